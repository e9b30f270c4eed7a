# SPDX-License-Identifier: GPL-2.0-or-later
"""Run functional tests, inside a lab: ``python tests/avocado/run.py RESULTS.xml [TEST…]``.

Prints a line for each test and a closing ``N passed, N failed``; the exit status is 0 only when
there were tests and all of them passed. TEST is a file (those of this directory if none is given),
FILE:CLASS.METHOD, or FILE:CLASS.METHOD;CELL for some cells of a table (see ``cells.py``): those
whose name begins so.

avocado starts a new Python for each test, which takes 10 to 25 s under emulation, most of it for
``pkg_resources`` to look at what is installed. So this process has everything imported, and tests
are forks of it. Tests run one after the other: the lab has one processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import multiprocessing
import operator
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEST_SECONDS = 1800
"""On a machine that is busy with other things a guest alone takes minutes to boot."""
KIND = "avocado-instrumented"
sys.path[:0] = [str(HERE), str(HERE.parent)]  # what the tests import
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


forks: list[Fork] = []


class Fork:
    """A test's process, and all that it starts, with what avocado asks of an ``asyncio`` one."""

    def __init__(self, task: Any) -> None:  # noqa: ANN401 - avocado has no types
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(task)
        self._pidfd = os.pidfd_open(self.pid)
        self.returncode: int | None = None
        forks.append(self)

    @staticmethod
    def _run(task: Any) -> None:  # noqa: ANN401
        from avocado.core.utils.messages import FinishedMessage

        status = 1
        try:
            os.setpgid(0, 0)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            task.identifier = str(task.identifier)  # as on the command line of avocado's own runner
            try:
                for _ in task.run():
                    pass  # it has told the job by its socket
                status = 0
            except BaseException as error:  # noqa: BLE001 - avocado waits for ever for a result
                why = f"the test did not run: {error!r}"
                result = FinishedMessage.get("error", fail_reason=why, fail_class="TestError")
                result |= {"id": task.identifier, "job_id": task.job_id}
                for service in task.status_services:
                    service.post(result)
        finally:
            os._exit(status)

    async def wait(self) -> int:
        """Wait until it has ended; its exit status."""
        loop = asyncio.get_running_loop()
        if self.returncode is None:
            ended = asyncio.Event()
            loop.add_reader(self._pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(self._pidfd)
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Make it end."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.killpg(self.pid, number)  # not reaped yet, so it is still this one


def listen(queue: SimpleQueue[Any]) -> Iterator[Any]:
    """What a test says, until it has finished.

    avocado's own asks a hundred times a second and tells the job each time that the test still
    runs: more than half of what the lab's processor can do.
    """
    while True:
        if not queue._reader.poll(1.0):  # type: ignore[attr-defined]
            if not multiprocessing.active_children() and queue.empty():
                raise RuntimeError("the test's process ended without a word")
            continue
        message = queue.get()
        if message.get("type") != "early_state":
            yield message
        if message.get("status") == "finished":
            return


def adapt_avocado() -> None:
    """Let avocado fork and listen as above. Its spawners can only be installed packages."""
    from avocado.core.nrunner import runnable
    from avocado.plugins.runners.avocado_instrumented import AvocadoInstrumentedTestRunner
    from avocado.plugins.spawners.process import ProcessSpawner, ProcessSpawnerHandle

    async def spawn_task(self: Any, runtime_task: Any) -> bool:  # noqa: ANN401
        self.create_task_output_dir(runtime_task)
        runtime_task.spawner_handle = ProcessSpawnerHandle(Fork(runtime_task.task))
        return True

    ProcessSpawner.spawn_task = spawn_task
    AvocadoInstrumentedTestRunner._monitor = staticmethod(listen)
    # it would start the runner only to ask what it can do
    runnable.RUNNERS_REGISTRY_STANDALONE_EXECUTABLE[KIND] = [f"avocado-runner-{KIND}"]


def preload() -> None:
    """Import what the tests do, once."""
    import guests

    from mdev_orchestrator.qemu import hotplug, monitor

    del guests, hotplug, monitor


def find_tests(references: list[str], config: dict[str, Any]) -> list[Any]:
    """The tests that are asked for, each cell of a table by itself.

    :param config: avocado's, of which a test takes along what it needs.
    """
    import cells
    from avocado.core.suite import TestSuite

    found = []
    for reference in references:
        place, _, cell = reference.partition(";")
        for runnable in TestSuite.from_config(config | {"resolver.references": [place]}).tests:
            tests = cells.expand(runnable, method(runnable.uri))
            found += [test for test in tests if cells.name(test).startswith(cell)]
    return found


def method(uri: str) -> Any:  # noqa: ANN401
    """The method that avocado names ``FILE:CLASS.METHOD``."""
    file, _, name = uri.partition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return operator.attrgetter(name)(module)


def run_job(xml: Path, references: list[str], directory: str) -> tuple[int, int]:
    """Run the tests; how many passed and how many did not."""
    from avocado.core.job import Job
    from avocado.core.suite import TestSuite

    config = {
        "run.results_dir": directory,
        "run.max_parallel_tasks": 1,
        "job.output.loglevel": "INFO",
        "task.timeout.running": TEST_SECONDS,
        "sysinfo.collect.enabled": False,
        "job.run.result.xunit.output": str(xml),
        "human_ui.omit.statuses": ["STARTED"],
    }
    tests = find_tests(references, config)
    with Job(config, [TestSuite("", config, tests)]) as job:
        status = job.run()
        result = job.result
        if result is None:
            return 0, 1
        failed = len(tests) - result.passed - result.cancelled
        for test in result.tests:
            if test["status"] == "CANCEL":
                say(f"not run: {test['name']}: {test.get('fail_reason')}")
            if test["status"] not in {"PASS", "CANCEL"}:
                say(f"\n{test['name']}: {test['status']}: {test.get('fail_reason')}")
                with contextlib.suppress(OSError):
                    say(Path(test["logfile"]).read_text(errors="replace"))
        if not failed and status:
            say(f"avocado ended with status {status}")
            failed = 1
        return result.passed, failed


async def clean_up(known: set[Any]) -> None:
    """End guests and remove mdevs that an interrupted test has left."""
    from lab.machine import machine
    from mdev_orchestrator.engine import guest_ops
    from mdev_orchestrator.engine.devices import remove_devices
    from mdev_orchestrator.errors import MdoError
    from mdev_orchestrator.host import sysfs
    from mdev_orchestrator.qemu import process

    for guest in process.list_guests(machine()):
        with contextlib.suppress(MdoError):
            await guest_ops.end(machine(), guest, deadline=0, force=True)
    for mdev in sysfs.read_host(machine()).mdevs:
        if mdev.uuid not in known:
            with contextlib.suppress(MdoError):
                await remove_devices(machine(), [mdev.uuid])


def say(text: str) -> None:
    """One line of what came of it."""
    sys.stdout.write(text + "\n")


def interrupt(number: int, _frame: object) -> None:
    """The first signal ends all; more of them change nothing.

    Not a KeyboardInterrupt: avocado handles that, and may wait for ever for a test to end.
    """
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    """Run all tests, or those that are named."""
    if "MDO_LAB" not in os.environ:
        sys.stderr.write("this is no lab; try: mdo lab run -- python tests/avocado/run.py FILE\n")
        return 2
    if len(sys.argv) < 2:
        sys.stderr.write("usage: run.py RESULTS.xml [TEST...]\n")
        return 2
    for number in SIGNALS:
        signal.signal(number, interrupt)
    xml = Path(sys.argv[1]).absolute()
    references = sys.argv[2:] or sorted(map(str, HERE.glob("test_*.py")))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mdo-") as directory:
        # guests of our own, so that the clean-up ends no others
        os.environ["MDO_STATE_DIR"] = tempfile.tempdir = directory
        from lab.machine import machine
        from mdev_orchestrator.host import sysfs

        known = {mdev.uuid for mdev in sysfs.read_host(machine()).mdevs}
        preload()
        adapt_avocado()
        try:
            passed, failed = run_job(xml, references, directory)
        finally:
            for fork in forks:
                with contextlib.suppress(ProcessLookupError):
                    fork.kill()
            asyncio.run(clean_up(known))
    say(f"{passed} passed, {failed} failed in {time.monotonic() - started:.0f} s")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as error:
        say("interrupted")
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, the exit status must tell
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    # avocado's own clean-up would only miss the directory that is gone
    os._exit(status)
