/*
 * Tests of hw/vfio/mdev-lifecycle.c
 *
 * A simulated driver stands in for sysfs, and every attach and detach runs
 * through the same sequence as in mdev.c.  The random test compares thousands
 * of steps with a reference model; g_test prints the seed, and --seed plays a
 * run again.
 *
 * Builds in the project (GLib only) and in QEMU's tests/unit.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#if __has_include("qemu/osdep.h")
#include "qemu/osdep.h"
#endif
#include <errno.h>
#include <string.h>

#include "hw/vfio/mdev-lifecycle.h"

#define DEVICES 8
#define PER_PARENT 4            /* the rest belongs to a second parent */
#define GROUPS 3                /* number 0 is no group */
#define LINKS 4                 /* of each parent */

typedef enum { NOTHING, US, DRIVER, OTHER } Starter;

typedef struct Device {
    char *path;
    char *uuid;
    int parent;
    int group;
    bool gone;
    bool online;
    Starter starter;                /* of its group, as the driver saw it */
    bool open;                  /* by us */
    bool held;                  /* by another process */
    MdevStart policy;
} Device;

/* How the driver behaves, and what the lifecycle has asked of it. */
typedef struct Driver {
    Device device[DEVICES];
    bool has_online;
    bool has_group;
    bool implicit;              /* starts in open, stops at the last close */
    bool hotplug;               /* lets members join an online group */
    int read_error;             /* of "online" */
    int start_error;            /* of writing 1 */
    int stop_error;             /* of writing 0 */
    int open_error;
    const char *error;          /* what "group_error" reads, or NULL */
    const char *owner;          /* what "group_owner" reads, or NULL */
    int starts, stops, busy_stops;
    int events;
    MdevState last_state;
    char *last_reason;
} Driver;

static const char *const group_names[GROUPS] = {
    "", "AAAAAAAA-0000-4000-8000-000000000001",
    "bbbbbbbb-0000-4000-8000-000000000002",
};

static Driver *driver_new(void)
{
    Driver *driver = g_new0(Driver, 1);
    int i;

    driver->has_online = true;
    driver->has_group = true;
    for (i = 0; i < DEVICES; i++) {
        Device *device = &driver->device[i];

        device->parent = i / PER_PARENT;
        device->uuid = g_strdup_printf("%08x-0000-4000-8000-00000000000%d",
                                       i, device->parent);
        device->path = g_strdup_printf("/sys/devices/parent%d/%s",
                                       device->parent, device->uuid);
    }
    return driver;
}

static void driver_free(Driver *driver)
{
    int i;

    for (i = 0; i < DEVICES; i++) {
        g_free(driver->device[i].uuid);
        g_free(driver->device[i].path);
    }
    g_free(driver->last_reason);
    g_free(driver);
}

static Device *by_path(Driver *driver, const char *path)
{
    int i;

    for (i = 0; i < DEVICES; i++) {
        if (!strcmp(driver->device[i].path, path)) {
            return &driver->device[i];
        }
    }
    g_assert_not_reached();
}

static bool together(Driver *driver, const Device *a, const Device *b)
{
    return a == b || (driver->has_group && a->group &&
                      a->parent == b->parent && a->group == b->group);
}

static int links_used(Driver *driver, int parent)
{
    int used = 0;
    int group, i;

    for (group = 1; group < GROUPS; group++) {
        int members = 0;

        for (i = 0; i < DEVICES; i++) {
            Device *device = &driver->device[i];

            members += device->parent == parent && device->online &&
                       device->group == group;
        }
        used += members * (members - 1) / 2;
    }
    return used;
}

static bool group_has(Driver *driver, const Device *of, bool open, bool held,
                      bool online)
{
    int i;

    for (i = 0; i < DEVICES; i++) {
        const Device *each = &driver->device[i];

        if (together(driver, of, each) && !each->gone &&
            ((open && each->open) || (held && each->held) ||
             (online && each->online))) {
            return true;
        }
    }
    return false;
}

static void set_online(Driver *driver, Device *of, bool online, Starter starter)
{
    int i;

    for (i = 0; i < DEVICES; i++) {
        Device *each = &driver->device[i];

        if (together(driver, of, each) && !each->gone) {
            each->online = online;
            each->starter = online ? starter : NOTHING;
        }
    }
}

/* Start the whole group, or join it if it is online; or return an errno. */
static int driver_start(Driver *driver, Device *device, Starter starter)
{
    int i;

    if (device->online) {
        return 0;
    }
    if (group_has(driver, device, false, true, false) && starter != OTHER) {
        return EBUSY;
    }
    if (!group_has(driver, device, false, false, true)) {
        set_online(driver, device, true, starter);
        if (links_used(driver, device->parent) > LINKS) {
            set_online(driver, device, false, NOTHING);
            return ENOSPC;
        }
        return 0;
    }
    if (!driver->hotplug) {
        return EBUSY;
    }
    for (i = 0; i < DEVICES; i++) {
        Device *each = &driver->device[i];

        if (together(driver, device, each) && each->online) {
            device->starter = each->starter;
        }
    }
    device->online = true;
    if (links_used(driver, device->parent) > LINKS) {
        device->online = false;
        device->starter = NOTHING;
        return ENOSPC;
    }
    return 0;
}

static int op_read(void *opaque, const char *path, const char *attr,
                   char **text)
{
    Driver *driver = opaque;
    Device *device = by_path(driver, path);

    if (device->gone) {
        return -ENOENT;
    }
    if (!strcmp(attr, MDEV_ATTR_GROUP)) {
        if (!driver->has_group) {
            return -ENOENT;
        }
        *text = g_strdup_printf("%s\n", group_names[device->group]);
        return 0;
    }
    if (strcmp(attr, MDEV_ATTR_ONLINE)) {
        const char *words = !strcmp(attr, MDEV_ATTR_ERROR) ? driver->error
                                                           : driver->owner;

        *text = g_strdup_printf("%s\n", words ?: "");
        return words ? 0 : -ENOENT;
    }
    if (!driver->has_online) {
        return -ENOENT;
    }
    if (driver->read_error) {
        return -driver->read_error;
    }
    *text = g_strdup(device->online ? "1\n" : "0\n");
    return 0;
}

static int op_write(void *opaque, const char *path, const char *attr,
                    const char *text)
{
    Driver *driver = opaque;
    Device *device = by_path(driver, path);

    g_assert_cmpstr(attr, ==, MDEV_ATTR_ONLINE);
    g_assert(driver->has_online && !device->gone);
    if (!strcmp(text, "1")) {
        driver->starts++;
        return driver->start_error ? -driver->start_error
                                   : -driver_start(driver, device, US);
    }
    g_assert_cmpstr(text, ==, "0");
    driver->stops++;
    if (driver->stop_error) {
        return -driver->stop_error;
    }
    if (group_has(driver, device, true, true, false)) {
        driver->busy_stops++;
        return -EBUSY;
    }
    set_online(driver, device, false, NOTHING);
    return 0;
}

static int op_siblings(void *opaque, const char *path, char ***paths)
{
    Driver *driver = opaque;
    Device *device = by_path(driver, path);
    GPtrArray *found = g_ptr_array_new();
    int i;

    for (i = DEVICES - 1; i >= 0; i--) {
        if (driver->device[i].parent == device->parent &&
            !driver->device[i].gone) {
            g_ptr_array_add(found, g_strdup(driver->device[i].path));
        }
    }
    g_ptr_array_add(found, NULL);
    *paths = (char **)g_ptr_array_free(found, FALSE);
    return 0;
}

static char *op_owner(void *opaque, const char *path, const char *attr)
{
    return g_strdup("owner 0:0, mode 0600");
}

static void op_changed(void *opaque, const MdevMember *member, MdevState old,
                       MdevState state, const MdevFailure *failure)
{
    Driver *driver = opaque;

    g_assert(failure || old != state);
    g_assert_cmpstr(member->uuid, ==, by_path(driver, member->path)->uuid);
    driver->events++;
    driver->last_state = state;
    g_free(driver->last_reason);
    driver->last_reason = failure ? g_strdup(failure->text) : NULL;
}

static const MdevLifecycleOps ops = {
    .read = op_read,
    .write = op_write,
    .siblings = op_siblings,
    .owner = op_owner,
    .changed = op_changed,
};

/* Open a device as VFIO does, or return an errno. */
static int driver_open(Driver *driver, Device *device)
{
    int ret;

    if (device->gone) {
        return ENODEV;
    }
    if (device->held || group_has(driver, device, false, true, false)) {
        return EBUSY;
    }
    if (driver->open_error) {
        return driver->open_error;
    }
    if (!device->online) {
        if (!driver->implicit) {
            return EIO;         /* touched before it was started */
        }
        ret = driver_start(driver, device, DRIVER);
        if (ret) {
            return ret;
        }
    }
    device->open = true;
    return 0;
}

static void driver_close(Driver *driver, Device *device)
{
    device->open = false;
    if (driver->implicit && device->starter == DRIVER &&
        !group_has(driver, device, true, true, false)) {
        set_online(driver, device, false, NOTHING);
    }
}

/* What mdev.c and QEMU's attach path do.  Returns an errno. */
static int attach(MdevLifecycle *lifecycle, Driver *driver, Device *device,
                  MdevStart policy, char **text)
{
    g_autoptr(MdevFailure) failure = NULL;
    int ret;

    if (!mdev_lifecycle_open(lifecycle, device, device->path, policy,
                             &failure)) {
        g_assert_nonnull(failure);
        g_assert_cmpstr(failure->uuid, ==, device->uuid);
        g_assert_null(strchr(failure->text, '\n'));
        if (text) {
            *text = g_strdup(failure->text);
        }
        return failure->err;
    }
    ret = driver_open(driver, device);
    if (ret) {
        failure = mdev_lifecycle_explain(lifecycle, device);
        if (text && failure) {
            *text = g_strdup(failure->text);
        }
        mdev_lifecycle_close(lifecycle, device, NULL);
        return ret;
    }
    device->policy = policy;
    mdev_lifecycle_opened(lifecycle, device);
    return 0;
}

static bool detach(MdevLifecycle *lifecycle, Driver *driver, Device *device)
{
    driver_close(driver, device);
    return mdev_lifecycle_close(lifecycle, device, NULL);
}

typedef struct Fixture {
    Driver *driver;
    MdevLifecycle *lifecycle;
    Device *d;
} Fixture;

static void setup(Fixture *f, const void *data)
{
    f->driver = driver_new();
    f->lifecycle = mdev_lifecycle_new(&ops, f->driver);
    f->d = f->driver->device;
}

static void teardown(Fixture *f, const void *data)
{
    mdev_lifecycle_free(f->lifecycle);
    driver_free(f->driver);
}

static void make_group(Fixture *f, int members)
{
    int i;

    for (i = 0; i < members; i++) {
        f->d[i].group = 1;
    }
}

#define ATTACH(i, policy, text) \
    attach(f->lifecycle, f->driver, &f->d[i], MDEV_START_##policy, text)
#define DETACH(i) detach(f->lifecycle, f->driver, &f->d[i])

static MdevStarter starter(Fixture *f, int i)
{
    return mdev_lifecycle_find(f->lifecycle, &f->d[i])->starter;
}

static MdevState state(Fixture *f, int i)
{
    return mdev_lifecycle_find(f->lifecycle, &f->d[i])->state;
}

static void test_single(Fixture *f, const void *data)
{
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_true(f->d[0].online);
    g_assert_false(f->d[1].online);
    g_assert_cmpint(starter(f, 0), ==, MDEV_STARTER_QEMU);
    g_assert_cmpint(state(f, 0), ==, MDEV_ONLINE);
    g_assert_null(mdev_lifecycle_find(f->lifecycle, &f->d[0])->group);
    g_assert_true(DETACH(0));
    g_assert_false(f->d[0].online);
    g_assert_cmpint(f->driver->starts, ==, 1);
    g_assert_cmpint(f->driver->stops, ==, 1);
    g_assert_cmpint(f->driver->events, ==, 2);
    g_assert_cmpint(f->driver->last_state, ==, MDEV_OFFLINE);
    g_assert_null(f->driver->last_reason);
}

static void test_group_starts_once_and_stops_last(Fixture *f, const void *data)
{
    make_group(f, 3);
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_true(f->d[1].online && f->d[2].online);
    g_assert_cmpint(ATTACH(1, AUTO, NULL), ==, 0);
    g_assert_cmpint(ATTACH(2, ON, NULL), ==, 0);
    g_assert_cmpint(f->driver->starts, ==, 1);
    g_assert_cmpint(starter(f, 2), ==, MDEV_STARTER_QEMU);
    g_assert_cmpstr(mdev_lifecycle_find(f->lifecycle, &f->d[1])->group, ==,
                    "aaaaaaaa-0000-4000-8000-000000000001");
    g_assert_true(DETACH(0));
    g_assert_true(DETACH(2));
    g_assert_cmpint(f->driver->stops, ==, 0);
    g_assert_true(DETACH(1));
    g_assert_cmpint(f->driver->stops, ==, 1);
    g_assert_false(f->d[0].online);
}

static void test_same_group_of_two_parents(Fixture *f, const void *data)
{
    f->d[0].group = 1;
    f->d[PER_PARENT].group = 1;
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_false(f->d[PER_PARENT].online);
    g_assert_cmpint(ATTACH(PER_PARENT, AUTO, NULL), ==, 0);
    g_assert_cmpint(f->driver->starts, ==, 2);
    g_assert_true(DETACH(0));
    g_assert_true(f->d[PER_PARENT].online);
    g_assert_true(DETACH(PER_PARENT));
}

static void test_same_mdev_twice(Fixture *f, const void *data)
{
    int second;

    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    f->driver->owner = "4711";  /* that is us */
    g_assert_true(mdev_lifecycle_open(f->lifecycle, &second, f->d[0].path,
                                      MDEV_START_AUTO, NULL));
    g_assert_null(mdev_lifecycle_explain(f->lifecycle, &second));
    g_assert_true(mdev_lifecycle_close(f->lifecycle, &second, NULL));
    g_assert_true(f->d[0].online);
    g_assert_true(DETACH(0));
    g_assert_false(f->d[0].online);
}

static void test_refused_group(Fixture *f, const void *data)
{
    g_autofree char *text = NULL;

    make_group(f, 4);           /* six links */
    g_assert_cmpint(ATTACH(1, AUTO, &text), ==, ENOSPC);
    g_assert_nonnull(strstr(text, "cannot start group "
                                  "aaaaaaaa-0000-4000-8000-000000000001 ("));
    g_assert_nonnull(strstr(text, f->d[0].uuid));
    g_assert_nonnull(strstr(text, f->d[3].uuid));
    g_assert_nonnull(strstr(text, g_strerror(ENOSPC)));
    g_assert_cmpstr(f->driver->last_reason, ==, text);
    g_assert_false(f->d[1].online);
    g_assert_null(mdev_lifecycle_members(f->lifecycle));
    g_assert_cmpint(f->driver->stops, ==, 0);
    /* Nothing is remembered: a smaller group fits. */
    f->d[3].group = 0;
    g_assert_cmpint(ATTACH(1, AUTO, NULL), ==, 0);
    g_assert_true(DETACH(1));
}

static void test_driver_gives_reasons(Fixture *f, const void *data)
{
    g_autofree char *start = NULL;
    g_autofree char *open = NULL;

    f->driver->start_error = ENOSPC;
    f->driver->error = "3 links asked, 1 of 8 left";
    g_assert_cmpint(ATTACH(0, AUTO, &start), ==, ENOSPC);
    g_assert_nonnull(strstr(start, " (3 links asked, 1 of 8 left)"));

    f->d[0].online = true;
    f->d[0].held = true;
    f->driver->owner = "4711";
    g_assert_cmpint(ATTACH(0, AUTO, &open), ==, EBUSY);
    g_assert_cmpstr(open, ==, "its group belongs to process 4711");
}

static void test_reasons_are_one_line(Fixture *f, const void *data)
{
    g_autofree char *start = NULL;

    f->driver->start_error = ENOSPC;
    f->driver->error = "no links\n\033[2Jleft\n";
    g_assert_cmpint(ATTACH(0, AUTO, &start), ==, ENOSPC);
    g_assert_nonnull(strstr(start, " (no links  [2Jleft)"));
}

static void test_failed_open_stops(Fixture *f, const void *data)
{
    make_group(f, 2);
    f->driver->open_error = ENODEV;
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, ENODEV);
    g_assert_cmpint(f->driver->starts, ==, 1);
    g_assert_cmpint(f->driver->stops, ==, 1);
    g_assert_false(f->d[0].online);

    /* Not while another member is open. */
    f->driver->open_error = 0;
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    f->driver->open_error = ENODEV;
    g_assert_cmpint(ATTACH(1, AUTO, NULL), ==, ENODEV);
    g_assert_true(f->d[0].online);
    g_assert_true(DETACH(0));
    g_assert_false(f->d[0].online);
}

static void test_no_online_file(Fixture *f, const void *data)
{
    g_autofree char *text = NULL;

    f->driver->has_online = false;
    f->driver->implicit = true;
    g_assert_cmpint(ATTACH(0, ON, &text), ==, ENOENT);
    g_assert_nonnull(strstr(text, f->d[0].path));
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_cmpint(starter(f, 0), ==, MDEV_STARTER_DRIVER);
    g_assert_cmpint(state(f, 0), ==, MDEV_STATE_UNKNOWN);
    g_assert_true(DETACH(0));
    g_assert_cmpint(f->driver->starts + f->driver->stops, ==, 0);
}

static void test_not_writable(Fixture *f, const void *data)
{
    g_autofree char *text = NULL;
    g_autofree char *text_on = NULL;

    f->driver->start_error = EACCES;
    f->driver->implicit = true;
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_cmpint(starter(f, 0), ==, MDEV_STARTER_DRIVER);
    g_assert_cmpint(state(f, 0), ==, MDEV_ONLINE);
    g_assert_true(DETACH(0));
    g_assert_cmpint(f->driver->stops, ==, 0);
    g_assert_false(f->d[0].online);

    f->driver->implicit = false;
    g_assert_cmpint(ATTACH(0, AUTO, &text), ==, EIO);
    g_assert_nonnull(strstr(text, "/online (owner 0:0, mode 0600): "));
    g_assert_cmpint(ATTACH(0, ON, &text_on), ==, EACCES);
    g_assert_cmpstr(text, ==, text_on);
}

static void test_not_readable(Fixture *f, const void *data)
{
    f->driver->read_error = EACCES;
    f->driver->implicit = true;
    g_assert_cmpint(ATTACH(0, ON, NULL), ==, EACCES);
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_cmpint(state(f, 0), ==, MDEV_STATE_UNKNOWN);
    g_assert_cmpint(starter(f, 0), ==, MDEV_STARTER_DRIVER);
    g_assert_true(DETACH(0));
    g_assert_cmpint(f->driver->starts + f->driver->stops, ==, 0);
}

static void test_started_by_another(Fixture *f, const void *data)
{
    make_group(f, 2);
    g_assert_cmpint(driver_start(f->driver, &f->d[0], OTHER), ==, 0);
    g_assert_cmpint(ATTACH(0, ON, NULL), ==, 0);
    g_assert_cmpint(ATTACH(1, AUTO, NULL), ==, 0);
    g_assert_cmpint(starter(f, 1), ==, MDEV_STARTER_OTHER);
    g_assert_true(DETACH(0));
    g_assert_true(DETACH(1));
    g_assert_true(f->d[0].online);
    g_assert_cmpint(f->driver->starts + f->driver->stops, ==, 0);
}

static void test_off(Fixture *f, const void *data)
{
    f->driver->implicit = true;
    g_assert_cmpint(ATTACH(0, OFF, NULL), ==, 0);
    g_assert_cmpint(starter(f, 0), ==, MDEV_STARTER_DRIVER);
    g_assert_true(DETACH(0));
    f->driver->implicit = false;
    g_assert_cmpint(ATTACH(0, OFF, NULL), ==, EIO);
    g_assert_cmpint(f->driver->starts + f->driver->stops, ==, 0);
}

static void test_join(Fixture *f, const void *data)
{
    g_autofree char *text = NULL;

    make_group(f, 2);
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_cmpint(ATTACH(1, AUTO, NULL), ==, 0);
    f->d[2].group = 1;
    g_assert_cmpint(ATTACH(2, AUTO, &text), ==, EBUSY);
    g_assert_nonnull(strstr(text, "cannot join the online group "));
    g_assert_false(f->d[2].online);
    f->driver->hotplug = true;
    g_assert_cmpint(ATTACH(2, AUTO, NULL), ==, 0);
    g_assert_cmpint(starter(f, 2), ==, MDEV_STARTER_QEMU);
    g_assert_true(DETACH(0));
    g_assert_true(DETACH(1));
    g_assert_true(f->d[2].online);
    g_assert_true(DETACH(2));
    g_assert_false(f->d[2].online);
}

static void test_failed_stop_is_told(Fixture *f, const void *data)
{
    g_autoptr(MdevFailure) failure = NULL;

    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    f->driver->stop_error = EIO;
    driver_close(f->driver, &f->d[0]);
    g_assert_false(mdev_lifecycle_close(f->lifecycle, &f->d[0], &failure));
    g_assert_cmpint(failure->err, ==, EIO);
    g_assert_nonnull(strstr(failure->text, "cannot stop it"));
    g_assert_null(mdev_lifecycle_find(f->lifecycle, &f->d[0]));
    g_assert_cmpint(f->driver->last_state, ==, MDEV_ONLINE);
}

static void test_removed_while_open(Fixture *f, const void *data)
{
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    f->d[0].gone = true;
    g_assert_true(DETACH(0));
    g_assert_cmpint(f->driver->stops, ==, 0);
}

static void test_driver_stopped_it_already(Fixture *f, const void *data)
{
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    driver_close(f->driver, &f->d[0]);
    f->d[0].online = false;
    g_assert_true(mdev_lifecycle_close(f->lifecycle, &f->d[0], NULL));
    g_assert_cmpint(f->driver->stops, ==, 0);
}

static void test_missing_members(Fixture *f, const void *data)
{
    g_autoptr(MdevFailure) failure = NULL;
    g_auto(GStrv) missing = NULL;

    make_group(f, 3);
    g_assert_true(mdev_lifecycle_check_complete(f->lifecycle, NULL));
    g_assert_cmpint(ATTACH(1, AUTO, NULL), ==, 0);
    missing = mdev_lifecycle_missing(f->lifecycle, &f->d[1]);
    g_assert_cmpint(g_strv_length(missing), ==, 2);
    g_assert_cmpstr(missing[0], ==, f->d[0].uuid);
    g_assert_cmpstr(missing[1], ==, f->d[2].uuid);
    g_assert_false(mdev_lifecycle_check_complete(f->lifecycle, &failure));
    g_assert_nonnull(strstr(failure->text, f->d[0].uuid));
    g_assert_nonnull(strstr(failure->text, f->d[2].uuid));
    g_assert_null(strstr(failure->text, f->d[1].uuid));
    g_assert_cmpint(ATTACH(0, AUTO, NULL), ==, 0);
    g_assert_cmpint(ATTACH(2, AUTO, NULL), ==, 0);
    g_assert_true(mdev_lifecycle_check_complete(f->lifecycle, NULL));
}

static void test_incomplete_but_off(Fixture *f, const void *data)
{
    f->driver->implicit = true;
    make_group(f, 2);
    g_assert_cmpint(ATTACH(0, OFF, NULL), ==, 0);
    g_assert_true(mdev_lifecycle_check_complete(f->lifecycle, NULL));
}

static void test_unknown_key(Fixture *f, const void *data)
{
    g_auto(GStrv) missing = mdev_lifecycle_missing(f->lifecycle, f);

    g_assert_true(mdev_lifecycle_close(f->lifecycle, f, NULL));
    g_assert_null(mdev_lifecycle_find(f->lifecycle, f));
    g_assert_null(mdev_lifecycle_explain(f->lifecycle, f));
    g_assert_null(missing[0]);
    mdev_lifecycle_opened(f->lifecycle, f);
}

/*
 * What the rules say about an attach, from the driver's state before it: the
 * errno, and how often 1 is written.  The driver's own answers come from a
 * copy of it.
 */
static int expected(const Driver *driver, const Device *device,
                    MdevStart policy, int *starts)
{
    Driver copy = *driver;
    Device *its = &copy.device[device - driver->device];
    int err;

    *starts = 0;
    if (!copy.has_online || copy.read_error) {
        if (policy == MDEV_START_ON) {
            return copy.has_online ? copy.read_error : ENOENT;
        }
    } else if (!its->online && policy != MDEV_START_OFF) {
        *starts = 1;
        err = copy.start_error ?: driver_start(&copy, its, US);
        if (err && (err != EACCES || policy == MDEV_START_ON)) {
            return err;
        }
    }
    return driver_open(&copy, its);
}

/* What must hold after every step. */
static void check(MdevLifecycle *lifecycle, Driver *driver, GList *order)
{
    g_autoptr(GList) members = mdev_lifecycle_members(lifecycle);
    GList *each, *theirs;
    int i, j;

    g_assert_cmpint(g_list_length(members), ==, g_list_length(order));
    for (each = members, theirs = order; each;
         each = each->next, theirs = theirs->next) {
        const MdevMember *member = each->data;
        Device *device = theirs->data;
        g_auto(GStrv) missing = mdev_lifecycle_missing(lifecycle, device);
        int count = 0;

        g_assert(member->key == device);
        g_assert(device->open);
        for (j = 0; j < DEVICES; j++) {
            Device *other = &driver->device[j];

            count += other != device && !other->open && !other->gone &&
                     together(driver, device, other);
        }
        g_assert_cmpint(g_strv_length(missing), ==, count);
        if (driver->has_online && !driver->read_error &&
            member->state != MDEV_STATE_UNKNOWN) {
            g_assert_cmpint(member->state == MDEV_ONLINE, ==, device->online);
        }
    }
    for (i = 0; i < DEVICES; i++) {
        Device *device = &driver->device[i];

        g_assert_cmpint(device->open, ==,
                        g_list_find(order, device) != NULL);
        /* What we started is online exactly as long as we use it. */
        if (device->online && device->starter == US) {
            g_assert_true(group_has(driver, device, true, false, false));
        }
        if (device->open && !driver->implicit) {
            g_assert_true(device->online);
        }
    }
    for (i = 0; i < 2; i++) {
        g_assert_cmpint(links_used(driver, i), <=, LINKS);
    }
    /* 0 is written after the last close, never before. */
    g_assert_cmpint(driver->busy_stops, ==, 0);
}

static int maybe(int err)
{
    return g_test_rand_int_range(0, 8) ? 0 : err;
}

static void random_schedule(int steps)
{
    static const int start_errors[] = { EACCES, EIO, ENOSPC, ETIMEDOUT };
    Driver *driver = driver_new();
    MdevLifecycle *lifecycle = mdev_lifecycle_new(&ops, driver);
    GList *order = NULL;
    int i, step;

    driver->implicit = g_test_rand_int_range(0, 2);
    driver->has_online = !driver->implicit || g_test_rand_int_range(0, 4);
    driver->has_group = g_test_rand_int_range(0, 8);
    driver->read_error = driver->implicit ? maybe(EACCES) : 0;

    for (step = 0; step < steps; step++) {
        Device *device = &driver->device[g_test_rand_int_range(0, DEVICES)];
        int stops = driver->stops;
        int starts = driver->starts;
        int wanted_starts;
        MdevStart policy;

        switch (g_test_rand_int_range(0, 12)) {
        case 0:
            driver->hotplug = !driver->hotplug;
            break;
        case 1:
            /* The driver does not let the group of what is in use change. */
            if (!device->online && !device->open && !device->held) {
                device->group = g_test_rand_int_range(0, GROUPS);
            }
            break;
        case 2:
            /* Another process starts a group, or gives back what it had. */
            if (device->starter == OTHER &&
                !group_has(driver, device, true, true, false)) {
                set_online(driver, device, false, NOTHING);
            } else if (driver->has_online &&
                       !group_has(driver, device, true, true, true)) {
                driver_start(driver, device, OTHER);
            }
            break;
        case 3:
            /* Another process opens or closes what no other has. */
            if (device->held) {
                device->held = false;
            } else if (!group_has(driver, device, true, false, false) &&
                       device->starter != US) {
                device->held = true;
            }
            break;
        case 4:
            if (!device->open && !device->online && !device->held) {
                device->gone = !device->gone;
            }
            break;
        case 5:
        case 6:
        case 7:
            if (device->open) {
                Starter starter = device->starter;
                bool last;

                driver_close(driver, device);
                last = !group_has(driver, device, true, false, false);
                g_assert_true(mdev_lifecycle_close(lifecycle, device, NULL));
                order = g_list_remove(order, device);
                g_assert_cmpint(driver->stops - stops, ==,
                                last && starter == US &&
                                !driver->read_error);
            }
            break;
        default:
            if (device->open || device->gone) {
                break;
            }
            policy = g_test_rand_int_range(0, 3);
            driver->start_error = maybe(start_errors[step % 4]);
            driver->open_error = maybe(ENODEV);
            i = expected(driver, device, policy, &wanted_starts);
            g_assert_cmpint(attach(lifecycle, driver, device, policy, NULL),
                            ==, i);
            g_assert_cmpint(driver->starts - starts, ==, wanted_starts);
            if (i == 0) {
                order = g_list_append(order, device);
            }
        }
        check(lifecycle, driver, order);
    }

    while (order) {
        Device *device = order->data;

        order = g_list_delete_link(order, order);
        g_assert_true(detach(lifecycle, driver, device));
        check(lifecycle, driver, order);
    }
    mdev_lifecycle_free(lifecycle);
    driver_free(driver);
}

static void test_random(void)
{
    int schedules = g_test_slow() ? 2000 : 100;
    int i;

    for (i = 0; i < schedules; i++) {
        random_schedule(400);
    }
    g_test_message("%d steps", schedules * 400);
}

#define ADD(name, function) \
    g_test_add("/mdev-lifecycle/" name, Fixture, NULL, setup, function, \
               teardown)

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    ADD("single", test_single);
    ADD("group-starts-once-and-stops-last",
        test_group_starts_once_and_stops_last);
    ADD("same-group-of-two-parents", test_same_group_of_two_parents);
    ADD("same-mdev-twice", test_same_mdev_twice);
    ADD("refused-group", test_refused_group);
    ADD("driver-gives-reasons", test_driver_gives_reasons);
    ADD("reasons-are-one-line", test_reasons_are_one_line);
    ADD("failed-open-stops", test_failed_open_stops);
    ADD("no-online-file", test_no_online_file);
    ADD("not-writable", test_not_writable);
    ADD("not-readable", test_not_readable);
    ADD("started-by-another", test_started_by_another);
    ADD("off", test_off);
    ADD("join", test_join);
    ADD("failed-stop-is-told", test_failed_stop_is_told);
    ADD("removed-while-open", test_removed_while_open);
    ADD("driver-stopped-it-already", test_driver_stopped_it_already);
    ADD("missing-members", test_missing_members);
    ADD("incomplete-but-off", test_incomplete_but_off);
    ADD("unknown-key", test_unknown_key);
    g_test_add_func("/mdev-lifecycle/random", test_random);
    return g_test_run();
}
