# SPDX-License-Identifier: GPL-2.0-or-later
"""From plain values, as TOML and JSON have them, to structures.

The structures say what they take in their annotations (:func:`msgspec.inspect.type_info`); what
does not fit is said in words of this module.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from msgspec import Struct
from msgspec.inspect import (
    BoolType,
    CustomType,
    DictType,
    Field,
    IntType,
    LiteralType,
    Metadata,
    NoneType,
    StrType,
    StructType,
    TupleType,
    Type,
    UnionType,
    UUIDType,
    VarTupleType,
    type_info,
)

from mdev_orchestrator.errors import RequestError
from mdev_orchestrator.model import as_uuid
from mdev_orchestrator.spec.conditions import Condition
from mdev_orchestrator.spec.messages import Place
from mdev_orchestrator.spec.sizes import Size

S = TypeVar("S", bound=Struct)

_NAME_SHOWN = 40  # characters of a key in a message


class DecodingError(Exception):
    """A value is not what a structure takes.

    :ivar place: Its key.
    :ivar message: A sentence without its subject.
    """

    def __init__(self, place: Place, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.place = place
        self.message = message
        self.hint = hint


def decode(raw: object, type_: type[S], base: Path | None = None) -> S:
    """Make a structure of plain values.

    :param base: Directory that relative paths are relative to; without it they stay as they are.
    :raise DecodingError: It cannot be made; says what is wrong with the first faulty key.
    """
    made: S = _Decoder(base).value(_info(type_), raw, ())
    return made


@cache
def _info(type_: type[Struct]) -> Type:
    return type_info(type_)


@cache
def _fields(type_: type[Struct]) -> dict[str, Field]:
    """The fields of a structure by their names in a file."""
    info = _info(type_)
    if not isinstance(info, StructType):
        raise TypeError(type_)
    return {field.encode_name: field for field in info.fields}


class _Decoder:
    def __init__(self, base: Path | None) -> None:
        self.base = base

    def value(self, info: Type, raw: object, place: Place, fault: str = "") -> Any:  # noqa: ANN401, PLR0911 - of that type
        """Make one value of the type that ``info`` describes.

        :param fault: What is to be said of a text that does not match its pattern.
        """
        match info:
            case Metadata():
                fault = (info.extra or {}).get("fault", fault)
                return self.value(info.type, raw, place, fault)
            case UnionType():  # a type and nothing; no structure has another one
                if raw is None:
                    return None
                (only,) = (one for one in info.types if not isinstance(one, NoneType))
                return self.value(only, raw, place, fault)
            case StructType():
                return self._table(info, raw, place)
            case VarTupleType():
                items = _list(raw, place)
                return self._values([info.item_type] * len(items), items, place, fault)
            case TupleType():
                items, types = _list(raw, place), info.item_types
                if len(items) != len(types):
                    message = f"must be a list of {len(types)}, not of {len(items)}"
                    raise DecodingError(place, message)
                return self._values(types, items, place, fault)
            case DictType():
                return {
                    name: self.value(info.value_type, item, (*place, name), fault)
                    for name, item in _dict(raw, place).items()
                }
            case CustomType():
                return self._own(info.cls, raw, place)
        return _scalar(info, raw, place, fault)

    def _values(
        self, types: Sequence[Type], items: Sequence[object], place: Place, fault: str
    ) -> tuple[Any, ...]:
        return tuple(
            self.value(info, item, (*place, index), fault)
            for index, (info, item) in enumerate(zip(types, items, strict=True))
        )

    def _table(self, info: StructType, raw: object, place: Place) -> Struct:
        fields = _fields(info.cls)
        values: dict[str, Any] = {}
        for name, item in _dict(raw, place).items():
            field = fields.get(name)
            if field is not None:
                values[field.name] = self.value(field.type, item, (*place, name))
            elif info.forbid_unknown_fields:
                close = get_close_matches(name, fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(fields)}"
                where = (*place, name[:_NAME_SHOWN])
                raise DecodingError(where, "there is no such key", hint)
        for name, field in fields.items():
            if field.required and field.name not in values:
                raise DecodingError(place, f"the key {name} is missing")
        made: Struct = info.cls(**values)
        return made

    def _own(self, type_: type, raw: object, place: Place) -> object:
        """Make a value of one of the spec's own types, or a path."""
        if issubclass(type_, (Size, Condition)):
            try:
                return type_.read(raw)
            except RequestError as error:
                raise DecodingError(place, error.message, error.hint) from None
        if type_ is not Path:
            raise NotImplementedError(type_)
        if not isinstance(raw, str) or not raw or "\0" in raw:
            raise DecodingError(place, "must be the name of a file")
        return self.base / raw if self.base is not None else Path(raw)


def _dict(raw: object, place: Place) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise _wrong("a table", raw, place)
    return raw


def _list(raw: object, place: Place) -> Sequence[object]:
    if not isinstance(raw, list | tuple):
        raise _wrong("a list", raw, place)
    return raw


def _scalar(info: Type, raw: object, place: Place, fault: str) -> object:
    match info:
        case StrType():
            return _text(info, raw, place, fault)
        case IntType():
            return _number(info, raw, place)
        case BoolType():
            return _truth(raw, place)
        case UUIDType():
            return _uuid(raw, place)
        case LiteralType():
            return _choice(info, raw, place)
    raise NotImplementedError(info)


def _choice(info: LiteralType, raw: object, place: Place) -> object:
    if not isinstance(raw, str):
        raise _wrong("text", raw, place)
    if raw not in info.values:
        raise DecodingError(place, f"is none of {', '.join(map(str, info.values))}")
    return raw


def _text(info: StrType, raw: object, place: Place, fault: str) -> str:
    if not isinstance(raw, str):
        raise _wrong("text", raw, place)
    if info.pattern is not None and re.search(info.pattern, raw) is None:
        raise DecodingError(place, fault or "has characters that it may not have")
    return raw


def _number(info: IntType, raw: object, place: Place) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool):
        raise _wrong("a whole number", raw, place)
    if info.ge is not None and raw < info.ge:
        raise DecodingError(place, f"must be at least {info.ge}")
    if info.le is not None and raw > info.le:
        raise DecodingError(place, f"must be at most {info.le}")
    return raw


def _truth(raw: object, place: Place) -> bool:
    if not isinstance(raw, bool):
        raise _wrong("true or false", raw, place)
    return raw


def _uuid(raw: object, place: Place) -> UUID:
    if isinstance(raw, UUID):
        return raw
    if not isinstance(raw, str):
        raise _wrong("text", raw, place)
    uuid = as_uuid(raw)
    if uuid is None:
        message = "is not a UUID; write it as 8-4-4-4-12 hexadecimal digits"
        raise DecodingError(place, message)
    return uuid


def _wrong(wanted: str, raw: object, place: Place) -> DecodingError:
    return DecodingError(place, f"must be {wanted}, not {_named(raw)}")


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (str, "text"),
    (int, "a whole number"),
    (dict, "a table"),
    ((list, tuple), "a list"),
    (dt.time, "a time"),
    (dt.date, "a date"),
)


def _named(raw: object) -> str:
    """What a value is, for messages; numbers with a fraction and truths as they are written."""
    if raw is None:
        return "nothing"
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, float):
        return str(raw)
    return next((words for kind, words in _KINDS if isinstance(raw, kind)), "something else")
