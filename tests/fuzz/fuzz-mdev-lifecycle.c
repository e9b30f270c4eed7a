/*
 * Fuzzer of hw/vfio/mdev-lifecycle.c: a driver that answers anything, and a
 * QEMU that calls in any order
 *
 * The input is text.  Each line is taken by the next call that asks: a line that
 * the main loop takes is a call, one that is taken by an effect is the
 * kernel's answer.
 *
 *   oKP  open member K with policy P      dK  it was opened
 *   cK   close it                         eK  explain
 *   mK   what is missing                   k   is every group complete
 *
 *   -N   (of an effect) fails with errno N
 *
 * With clang and -fsanitize=fuzzer this is a fuzzer; with -DREPLAY it has a
 * main() that gives the files it is called with to the same function.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "hw/vfio/mdev-lifecycle.h"

#define MEMBERS 6

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const paths[MEMBERS] = {
    "/sys/devices/p0/00000000-0000-4000-8000-000000000000",
    "/sys/devices/p0/00000001-0000-4000-8000-000000000000",
    "/sys/devices/p0/00000002-0000-4000-8000-000000000000",
    "/sys/devices/p1/00000003-0000-4000-8000-000000000000",
    "/sys/devices/p1/00000004-0000-4000-8000-000000000000",
    "/",
};

typedef struct Input {
    char **lines;
    int next;
} Input;

/* The next line, or NULL at the end. */
static const char *take(Input *input)
{
    const char *line = input->lines[input->next];

    if (line) {
        input->next++;
    }
    return line;
}

/* The answer of an effect: 0 or -errno; *@line what it says. */
static int answer(Input *input, const char **line)
{
    int number;

    *line = take(input);
    if (!*line) {
        return -ENOENT;
    }
    if ((*line)[0] != '-') {
        return 0;
    }
    number = atoi(*line + 1);
    return number > 0 && number < 4096 ? -number : -EIO;
}

static int effect_read(void *opaque, const char *path, const char *attr,
                       char **text)
{
    const char *line;
    int ret = answer(opaque, &line);

    g_assert(path && attr && text);
    if (ret == 0) {
        *text = g_strdup(line);
        g_strdelimit(*text, "|", '\n');
    }
    return ret;
}

static int effect_write(void *opaque, const char *path, const char *attr,
                        const char *text)
{
    const char *line;

    g_assert(path && !strcmp(attr, MDEV_ATTR_ONLINE));
    g_assert(!strcmp(text, "0") || !strcmp(text, "1"));
    return answer(opaque, &line);
}

/* Members by their digits; with any other character, a path of its own. */
static int effect_siblings(void *opaque, const char *path, char ***found)
{
    const char *line;
    int ret = answer(opaque, &line);
    GPtrArray *list;

    g_assert(path);
    if (ret < 0) {
        return ret;
    }
    list = g_ptr_array_new();
    for (; *line; line++) {
        g_ptr_array_add(list, *line >= '0' && *line < '0' + MEMBERS
                              ? g_strdup(paths[*line - '0'])
                              : g_strdup_printf("/sys/devices/p0/%d", *line));
    }
    g_ptr_array_add(list, NULL);
    *found = (char **)g_ptr_array_free(list, FALSE);
    return 0;
}

static char *effect_owner(void *opaque, const char *path, const char *attr)
{
    const char *line;

    g_assert(path && attr);
    return answer(opaque, &line) == 0 ? g_strdup("of user 0") : NULL;
}

static void check(const MdevFailure *failure)
{
    g_assert(failure && failure->uuid && failure->text && failure->text[0]);
    g_assert(failure->err >= 0);
    g_assert(!strpbrk(failure->text, "\n\r\033"));
}

static void effect_changed(void *opaque, const MdevMember *member,
                           MdevState old, MdevState state,
                           const MdevFailure *failure)
{
    g_assert(opaque && member->path && member->uuid);
    g_assert(old <= MDEV_STATE_UNKNOWN && state <= MDEV_STATE_UNKNOWN);
    g_assert(state != old || failure);
    g_assert(state == member->state);
    if (failure) {
        check(failure);
    }
}

static const MdevLifecycleOps ops = {
    .read = effect_read,
    .write = effect_write,
    .siblings = effect_siblings,
    .owner = effect_owner,
    .changed = effect_changed,
};

/* A call that gives true or a failure. */
static void end(bool ok, MdevFailure *failure)
{
    g_assert(ok == !failure);
    if (failure) {
        check(failure);
        mdev_failure_free(failure);
    }
}

static void call(MdevLifecycle *lifecycle, const char *line)
{
    MdevFailure *failure = NULL;
    int number = line[0] && line[1] ? (uint8_t)line[1] % MEMBERS : 0;
    void *key = (void *)&paths[number];
    g_auto(GStrv) missing = NULL;
    bool ok;

    switch (line[0]) {
    case 'o':
        if (mdev_lifecycle_find(lifecycle, key)) {
            break;
        }
        ok = mdev_lifecycle_open(lifecycle, key, paths[number],
                                 line[1] ? (uint8_t)line[2] % 3 : 0, &failure);
        g_assert(ok == !!mdev_lifecycle_find(lifecycle, key));
        end(ok, failure);
        break;
    case 'd':
        mdev_lifecycle_opened(lifecycle, key);
        break;
    case 'e':
        failure = mdev_lifecycle_explain(lifecycle, key);
        if (failure) {
            check(failure);
            mdev_failure_free(failure);
        }
        break;
    case 'c':
        ok = mdev_lifecycle_close(lifecycle, key, &failure);
        g_assert(!mdev_lifecycle_find(lifecycle, key));
        end(ok, failure);
        break;
    case 'm':
        missing = mdev_lifecycle_missing(lifecycle, key);
        g_assert(missing);
        break;
    case 'k':
        ok = mdev_lifecycle_check_complete(lifecycle, &failure);
        end(ok, failure);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autofree char *text = g_strndup((const char *)data, size);
    g_auto(GStrv) lines = g_strsplit(text, "\n", 1000);
    Input input = { .lines = lines };
    MdevLifecycle *lifecycle = mdev_lifecycle_new(&ops, &input);
    GList *members;
    const char *line;

    while ((line = take(&input))) {
        call(lifecycle, line);
    }
    members = mdev_lifecycle_members(lifecycle);
    g_assert(g_list_length(members) <= MEMBERS);
    g_list_free(members);
    mdev_lifecycle_free(lifecycle);
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv)
{
    int i;

    g_print("1..%d\n", argc - 1);
    for (i = 1; i < argc; i++) {
        g_autofree char *data = NULL;
        gsize size;

        g_assert(g_file_get_contents(argv[i], &data, &size, NULL));
        LLVMFuzzerTestOneInput((const uint8_t *)data, size);
        g_print("ok %d %s\n", i, argv[i]);
    }
    return 0;
}
#endif
