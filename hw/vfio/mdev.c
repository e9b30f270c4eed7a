/*
 * VFIO mediated devices: start before the first open, stop after the last
 * close
 *
 * mdev-lifecycle.c decides; this file lets it see sysfs, calls it when a
 * device is attached or detached and when QEMU ends, and says what it did
 * by Error, trace events, QMP and HMP.  It sits in the attach path that
 * vfio-pci, vfio-ap and vfio-ccw share.
 *
 * All of it runs under the BQL.  So does a slow driver: the guest stands
 * still while "online" is written, and a message says so after a while.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/sysmacros.h>

#include "mdev.h"
#include "mdev-lifecycle.h"
#include "pci.h"
#if __has_include("vfio-display.h")
#include "vfio-display.h"
#include "vfio-helpers.h"
#endif
#include "hw/qdev-core.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qapi/qapi-commands-vfio-mdev.h"
#include "qapi/qapi-events-vfio-mdev.h"
#include "qemu/error-report.h"
#include "qemu/thread.h"
#include "system/system.h"
#include "trace.h"

#define MDEV_DEVICES "/sys/bus/mdev/devices"
#define MDEV_CREATE \
    "/sys/class/mdev_bus/PARENT/mdev_supported_types/TYPE/create"

/* How long a write may take before QEMU says what it waits for. */
#define MDEV_PATIENCE_MS 5000

/* No attribute is longer than a page. */
#define MDEV_ATTR_MAX 4096

/*
 * What an mdev is called, for events and queries.  Kept here because a device has no
 * QOM path and no sysfsdev any more when it is finalized.
 */
typedef struct VFIOMdev {
    VFIODevice *vbasedev;
    char *id;
    char *qom_path;
    char *parent;
    char *type;
} VFIOMdev;

static MdevLifecycle *lifecycle;
static GHashTable *mdevs;       /* VFIODevice to VFIOMdev */

static void vfio_mdev_free(void *data)
{
    VFIOMdev *mdev = data;

    g_free(mdev->id);
    g_free(mdev->qom_path);
    g_free(mdev->parent);
    g_free(mdev->type);
    g_free(mdev);
}

/* mdev-lifecycle.h and QAPI list the same things in the same order. */
QEMU_BUILD_BUG_ON((int)MDEV_OFFLINE != (int)VFIO_MDEV_STATE_OFFLINE);
QEMU_BUILD_BUG_ON((int)MDEV_ONLINE != (int)VFIO_MDEV_STATE_ONLINE);
QEMU_BUILD_BUG_ON((int)MDEV_STATE_UNKNOWN != (int)VFIO_MDEV_STATE_UNKNOWN);
QEMU_BUILD_BUG_ON((int)MDEV_STARTER_NONE != (int)VFIO_MDEV_STARTER_NONE);
QEMU_BUILD_BUG_ON((int)MDEV_STARTER_QEMU != (int)VFIO_MDEV_STARTER_QEMU);
QEMU_BUILD_BUG_ON((int)MDEV_STARTER_DRIVER != (int)VFIO_MDEV_STARTER_DRIVER);
QEMU_BUILD_BUG_ON((int)MDEV_STARTER_OTHER != (int)VFIO_MDEV_STARTER_OTHER);

static int attr_read(void *opaque, const char *path, const char *attr,
                     char **text)
{
    g_autofree char *file = mdev_attribute(path, attr);
    g_autofree char *buffer = g_malloc0(MDEV_ATTR_MAX + 1);
    int fd = RETRY_ON_EINTR(open(file, O_RDONLY | O_CLOEXEC));
    ssize_t length;

    if (fd < 0) {
        return -errno;
    }
    length = RETRY_ON_EINTR(read(fd, buffer, MDEV_ATTR_MAX));
    if (length < 0) {
        int ret = -errno;

        close(fd);
        return ret;
    }
    close(fd);
    *text = g_steal_pointer(&buffer);
    return 0;
}

typedef struct VFIOMdevWrite {
    const char *file;
    const char *text;
    int ret;
    bool done;
    QemuMutex lock;
    QemuCond cond;
} VFIOMdevWrite;

static void *attr_write_thread(void *data)
{
    VFIOMdevWrite *job = data;
    int ret = 0;
    int fd = RETRY_ON_EINTR(open(job->file, O_WRONLY | O_CLOEXEC));

    if (fd < 0) {
        ret = -errno;
    } else {
        /* Not again after EINTR: the driver may have begun */
        if (write(fd, job->text, strlen(job->text)) < 0) {
            ret = -errno;
        }
        close(fd);
    }

    qemu_mutex_lock(&job->lock);
    job->ret = ret;
    job->done = true;
    qemu_cond_signal(&job->cond);
    qemu_mutex_unlock(&job->lock);
    return NULL;
}

/* In a thread of its own, so that this one can say what it waits for. */
static int attr_write(void *opaque, const char *path, const char *attr,
                      const char *text)
{
    g_autofree char *file = mdev_attribute(path, attr);
    VFIOMdevWrite job = { .file = file, .text = text };
    int64_t since = g_get_monotonic_time();
    QemuThread thread;
    int seconds;

    qemu_mutex_init(&job.lock);
    qemu_cond_init(&job.cond);
    qemu_thread_create(&thread, "mdev-write", attr_write_thread, &job,
                       QEMU_THREAD_JOINABLE);
    qemu_mutex_lock(&job.lock);
    while (!job.done) {
        if (!qemu_cond_timedwait(&job.cond, &job.lock, MDEV_PATIENCE_MS) &&
            !job.done) {
            seconds = (g_get_monotonic_time() - since) / G_USEC_PER_SEC;
            warn_report("still waiting after %d s for the mdev driver to take "
                        "'%s' in %s", seconds, text, file);
        }
    }
    qemu_mutex_unlock(&job.lock);
    qemu_thread_join(&thread);
    qemu_cond_destroy(&job.cond);
    qemu_mutex_destroy(&job.lock);

    trace_vfio_mdev_write(file, text, job.ret,
                          g_get_monotonic_time() - since);
    return job.ret;
}

static int attr_siblings(void *opaque, const char *path, char ***paths)
{
    g_autofree char *parent = g_path_get_dirname(path);
    g_autoptr(GDir) dir = g_dir_open(parent, 0, NULL);
    GPtrArray *found;
    const char *name;

    if (!dir) {
        return -ENOENT;
    }
    found = g_ptr_array_new();
    while ((name = g_dir_read_name(dir))) {
        if (g_uuid_string_is_valid(name)) {
            g_ptr_array_add(found, g_build_filename(parent, name, NULL));
        }
    }
    g_ptr_array_add(found, NULL);
    *paths = (char **)g_ptr_array_free(found, FALSE);
    return 0;
}

static char *attr_owner(void *opaque, const char *path, const char *attr)
{
    g_autofree char *file = mdev_attribute(path, attr);
    struct stat st;

    if (stat(file, &st) < 0) {
        return NULL;
    }
    return g_strdup_printf("owner %u:%u, mode %04o; QEMU is %u:%u",
                           st.st_uid, st.st_gid, st.st_mode & 07777,
                           geteuid(), getegid());
}

static void vfio_mdev_event(const VFIOMdev *mdev, const MdevMember *member,
                            MdevState old, MdevState state, const char *reason)
{
    trace_vfio_mdev_state(member->uuid, member->group ?: "-",
                          VfioMdevState_str(old), VfioMdevState_str(state),
                          VfioMdevStarter_str(member->starter), reason ?: "-");
    qapi_event_send_vfio_mdev_state_changed(mdev->id, mdev->qom_path,
                                            member->uuid, mdev->parent,
                                            mdev->type, member->group,
                                            old, state, reason);
}

static void member_changed(void *opaque, const MdevMember *member,
                           MdevState old, MdevState state,
                           const MdevFailure *failure)
{
    vfio_mdev_event(g_hash_table_lookup(mdevs, member->key), member, old,
                    state, failure ? failure->text : NULL);
}

static const MdevLifecycleOps vfio_mdev_ops = {
    .read = attr_read,
    .write = attr_write,
    .siblings = attr_siblings,
    .owner = attr_owner,
    .changed = member_changed,
};

static void report_failure(const MdevFailure *failure, bool fatal)
{
    (fatal ? error_report : warn_report)("vfio %s: %s", failure->uuid,
                                         failure->text);
    if (failure->hint) {
        error_printf("%s\n", failure->hint);
    }
}

static void vfio_mdev_machine_done(Notifier *notifier, void *data)
{
    g_autoptr(MdevFailure) failure = NULL;

    if (!mdev_lifecycle_check_complete(lifecycle, &failure)) {
        report_failure(failure, true);
        exit(EXIT_FAILURE);
    }
}

/*
 * There may be no hole where the device's memory was: whatever still runs
 * sees zeroes from here on.
 */
static void unmap_region(VFIORegion *region)
{
    int i;

    for (i = 0; region->mmaps && i < region->nr_mmaps; i++) {
        VFIOMmap *map = &region->mmaps[i];

        if (map->mmap &&
            mmap(map->mmap, map->size, PROT_READ | PROT_WRITE,
                 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0) == MAP_FAILED) {
            warn_report("vfio %s: cannot unmap region %d: %s",
                        region->vbasedev->name, region->nr, strerror(errno));
        }
    }
}

/*
 * Give up every reference to the open file without the device's teardown:
 * QEMU is ending and never finalizes devices then.
 */
static void release_at_exit(VFIODevice *vbasedev)
{
    int null;

    if (vbasedev->fd < 0) {
        return;
    }
    if (vbasedev->type == VFIO_DEVICE_TYPE_PCI) {
        VFIOPCIDevice *vdev = container_of(vbasedev, VFIOPCIDevice, vbasedev);
        int i;

        for (i = 0; i < PCI_ROM_SLOT; i++) {
            unmap_region(&vdev->bars[i].region);
        }
        if (vdev->dpy) {
            unmap_region(&vdev->dpy->region.buffer);
        }
    }
    if (vbasedev->iommufd) {
        vfio_kvm_device_del_fd(vbasedev->fd, NULL);
    }

    /* A user of the number must not meet another file. */
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, vbasedev->fd) < 0) {
        close(vbasedev->fd);
        vbasedev->fd = -1;
    }
    if (null >= 0) {
        close(null);
    }
}

static void vfio_mdev_exit(Notifier *notifier, void *data)
{
    g_autoptr(GList) members = mdev_lifecycle_members(lifecycle);
    GList *each;

    /* All first: a group cannot be stopped while a member is open. */
    for (each = members; each; each = each->next) {
        const MdevMember *member = each->data;

        if (member->starter == MDEV_STARTER_QEMU) {
            release_at_exit(member->key);
        }
    }
    for (each = members; each; each = each->next) {
        const MdevMember *member = each->data;
        g_autoptr(MdevFailure) failure = NULL;

        if (member->starter == MDEV_STARTER_QEMU &&
            !mdev_lifecycle_close(lifecycle, member->key, &failure)) {
            report_failure(failure, false);
        }
    }
}

static Notifier machine_done_notifier = { .notify = vfio_mdev_machine_done };
static Notifier exit_notifier = { .notify = vfio_mdev_exit };

static void vfio_mdev_init(void)
{
    if (lifecycle) {
        return;
    }
    lifecycle = mdev_lifecycle_new(&vfio_mdev_ops, NULL);
    mdevs = g_hash_table_new_full(NULL, NULL, NULL, vfio_mdev_free);
    qemu_add_exit_notifier(&exit_notifier);
    /* A group that is hot-plugged is complete some time later. */
    if (!phase_check(PHASE_MACHINE_READY)) {
        qemu_add_machine_init_done_notifier(&machine_done_notifier);
    }
}

static VFIOMdev *vfio_mdev_new(VFIODevice *vbasedev, const char *path)
{
    g_autofree char *link = g_build_filename(path, "mdev_type", NULL);
    g_autofree char *type = g_file_read_link(link, NULL);
    g_autofree char *parent = g_path_get_dirname(path);
    VFIOMdev *mdev = g_new0(VFIOMdev, 1);

    mdev->vbasedev = vbasedev;
    mdev->id = g_strdup(vbasedev->dev->id);
    mdev->qom_path = object_get_canonical_path(OBJECT(vbasedev->dev));
    mdev->parent = g_path_get_basename(parent);
    mdev->type = type ? g_path_get_basename(type) : NULL;
    return mdev;
}

/*
 * Turn down what could not be opened anyhow, in words.  A device that VFIO
 * can open has an IOMMU group or a character device of its own.
 */
static bool check_other_device(VFIODevice *vbasedev, Error **errp)
{
    ERRP_GUARD();
    g_autofree char *subsystem = NULL;
    g_autofree char *link = NULL;
    g_autofree char *group = NULL;
    g_autofree char *cdev = NULL;

    group = g_build_filename(vbasedev->sysfsdev, "iommu_group", NULL);
    cdev = g_build_filename(vbasedev->sysfsdev, "vfio-dev", NULL);
    if (!access(group, F_OK) || !access(cdev, F_OK)) {
        return true;
    }
    link = g_build_filename(vbasedev->sysfsdev, "subsystem", NULL);
    subsystem = g_file_read_link(link, NULL);
    if (!subsystem) {
        error_setg(errp, "%s is no device: it has no 'subsystem'",
                   vbasedev->sysfsdev);
        error_append_hint(errp, "Mediated devices are found in "
                          MDEV_DEVICES ".\n");
        return false;
    }
    if (!g_str_has_suffix(subsystem, "/pci") &&
        vbasedev->type == VFIO_DEVICE_TYPE_PCI) {
        error_setg(errp, "%s is a device of '%s', neither a mediated nor a "
                   "PCI device", vbasedev->sysfsdev,
                   strrchr(subsystem, '/') ? strrchr(subsystem, '/') + 1
                                           : subsystem);
        return false;
    }
    return true;
}

static bool check_api(VFIODevice *vbasedev, const char *path, Error **errp)
{
    g_autofree char *api = NULL;
    const char *ours;

    switch (vbasedev->type) {
    case VFIO_DEVICE_TYPE_PCI:
        ours = "vfio-pci";
        break;
    case VFIO_DEVICE_TYPE_CCW:
        ours = "vfio-ccw";
        break;
    case VFIO_DEVICE_TYPE_AP:
        ours = "vfio-ap";
        break;
    default:
        return true;
    }
    if (attr_read(NULL, path, "mdev_type/device_api", &api) < 0) {
        return true;
    }
    g_strstrip(api);
    if (strcmp(api, ours)) {
        error_setg(errp, "its device API is '%s', not '%s': %s%s", api, ours,
                   object_class_by_name(api) ? "use -device "
                                             : "this QEMU has no ", api);
        return false;
    }
    return true;
}

static MdevStart start_policy(const VFIODevice *vbasedev)
{
    switch (vbasedev->mdev_start) {
    case ON_OFF_AUTO_ON:
        return MDEV_START_ON;
    case ON_OFF_AUTO_OFF:
        return MDEV_START_OFF;
    default:
        return MDEV_START_AUTO;
    }
}

static void set_error(Error **errp, const MdevFailure *failure)
{
    ERRP_GUARD();

    error_setg(errp, "%s", failure->text);
    if (failure->hint) {
        error_append_hint(errp, "%s\n", failure->hint);
    }
}

/* What vfio-pci and vfio-ap do with every error, and vfio-ccw with none. */
static void prepend_name(Error **errp, const VFIODevice *vbasedev)
{
    ERRP_GUARD();

    if (vbasedev->type == VFIO_DEVICE_TYPE_CCW) {
        error_prepend(errp, VFIO_MSG_PREFIX, vbasedev->name);
    }
}

static bool attach_begin(VFIODevice *vbasedev, Error **errp)
{
    g_autoptr(MdevFailure) failure = NULL;
    g_autofree char *path = NULL;

    if (!vbasedev->sysfsdev) {
        return true;            /* passed and no mdev, or vfio-user */
    }
    if (!vfio_device_is_mdev(vbasedev)) {
        if (vbasedev->mdev_start == ON_OFF_AUTO_ON) {
            error_setg(errp, "mdev-start=on, but %s is no mediated device",
                       vbasedev->sysfsdev);
            return false;
        }
        return check_other_device(vbasedev, errp);
    }

    path = realpath(vbasedev->sysfsdev, NULL);
    if (!path) {
        error_setg_errno(errp, errno, "cannot resolve %s", vbasedev->sysfsdev);
        return false;
    }
    if (!check_api(vbasedev, path, errp)) {
        return false;
    }

    vfio_mdev_init();
    g_hash_table_insert(mdevs, vbasedev, vfio_mdev_new(vbasedev, path));
    trace_vfio_mdev_open(path, OnOffAuto_str(vbasedev->mdev_start));
    if (!mdev_lifecycle_open(lifecycle, vbasedev, path,
                             start_policy(vbasedev), &failure)) {
        g_hash_table_remove(mdevs, vbasedev);
        set_error(errp, failure);
        return false;
    }
    return true;
}

void vfio_mdev_find_by_fd(VFIODevice *vbasedev)
{
    g_autofree char *link = NULL;
    g_autofree char *path = NULL;
    struct stat st;

    if (vbasedev->sysfsdev || fstat(vbasedev->fd, &st) < 0 ||
        !S_ISCHR(st.st_mode)) {
        return;
    }

    /* Its node in /dev/vfio/devices is of a child of the device. */
    link = g_strdup_printf("/sys/dev/char/%u:%u/device", major(st.st_rdev),
                           minor(st.st_rdev));
    path = realpath(link, NULL);
    if (!path) {
        return;
    }
    vbasedev->sysfsdev = g_strdup(path);
    if (!vfio_device_is_mdev(vbasedev)) {
        g_clear_pointer(&vbasedev->sysfsdev, g_free);
        return;
    }
    trace_vfio_mdev_fd(vbasedev->fd, path);
}

bool vfio_mdev_attach_begin(VFIODevice *vbasedev, Error **errp)
{
    ERRP_GUARD();

    if (!attach_begin(vbasedev, errp)) {
        prepend_name(errp, vbasedev);
        return false;
    }
    return true;
}

/* NULL for what is no mdev, or is not open. */
static const MdevMember *find_member(VFIODevice *vbasedev)
{
    return lifecycle ? mdev_lifecycle_find(lifecycle, vbasedev) : NULL;
}

void vfio_mdev_detach(VFIODevice *vbasedev)
{
    g_autoptr(MdevFailure) failure = NULL;
    const MdevMember *member = find_member(vbasedev);

    if (!member) {
        return;
    }
    trace_vfio_mdev_close(member->path);
    if (!mdev_lifecycle_close(lifecycle, vbasedev, &failure)) {
        report_failure(failure, false);
    }
    g_hash_table_remove(mdevs, vbasedev);
}

void vfio_mdev_attach_end(VFIODevice *vbasedev, bool opened, Error **errp)
{
    ERRP_GUARD();
    g_autoptr(MdevFailure) failure = NULL;
    const MdevMember *member = find_member(vbasedev);

    if (!member) {
        return;
    }
    if (opened) {
        mdev_lifecycle_opened(lifecycle, vbasedev);
        return;
    }
    failure = mdev_lifecycle_explain(lifecycle, vbasedev);
    if (failure) {
        error_prepend(errp, "%s; opening it failed: ", failure->text);
        prepend_name(errp, vbasedev);
        if (failure->hint) {
            error_append_hint(errp, "%s\n", failure->hint);
        }
    }
    /* Other drivers' words stay as they were without this. */
    if (failure || member->state != MDEV_STATE_UNKNOWN) {
        error_append_hint(errp, "If its driver turned the open down, "
                          "the kernel log may say why.\n");
    }
    vfio_mdev_detach(vbasedev);
}

void vfio_mdev_release_requested(VFIODevice *vbasedev)
{
    const MdevMember *member = find_member(vbasedev);

    if (member) {
        vfio_mdev_event(g_hash_table_lookup(mdevs, vbasedev), member,
                        member->state, member->state,
                        "the driver asks for the device back");
    }
}

void vfio_mdev_explain_missing(const char *sysfsdev, Error **errp)
{
    g_autofree char *uuid = g_path_get_basename(sysfsdev);
    g_autofree char *message = NULL;

    if (!errp || !*errp || !access(sysfsdev, F_OK) ||
        !g_uuid_string_is_valid(uuid)) {
        return;
    }
    message = g_strdup(error_get_pretty(*errp));
    error_free(*errp);
    *errp = NULL;
    if (access(MDEV_DEVICES, F_OK)) {
        error_setg(errp, "%s; the kernel's module mdev is not loaded",
                   message);
    } else {
        error_setg(errp, "%s; to create it, write the UUID to " MDEV_CREATE,
                   message);
    }
}

void vfio_mdev_class_init(ObjectClass *klass)
{
    object_class_property_set_description(klass,
                                          "mdev-start",
                                          "Start a mediated device and its "
                                          "group by their file 'online': "
                                          "auto (where there is one), on "
                                          "(fail without), off");
}

VfioMdevInfoList *qmp_query_vfio_mdevs(Error **errp)
{
    VfioMdevInfoList *list = NULL, **tail = &list;
    g_autoptr(GList) members = NULL;
    GList *each;

    if (!lifecycle) {
        return NULL;
    }
    members = mdev_lifecycle_members(lifecycle);
    for (each = members; each; each = each->next) {
        const MdevMember *member = each->data;
        const VFIOMdev *mdev = g_hash_table_lookup(mdevs, member->key);
        VfioMdevInfo *info = g_new0(VfioMdevInfo, 1);
        g_auto(GStrv) missing = mdev_lifecycle_missing(lifecycle, member->key);
        strList **missing_tail = &info->missing;
        int i;

        info->id = g_strdup(mdev->id);
        info->qom_path = g_strdup(mdev->qom_path);
        info->uuid = g_strdup(member->uuid);
        info->parent = g_strdup(mdev->parent);
        info->type = g_strdup(mdev->type);
        info->group = g_strdup(member->group);
        info->start = mdev->vbasedev->mdev_start;
        info->state = (VfioMdevState)member->state;
        info->started_by = (VfioMdevStarter)member->starter;
        for (i = 0; missing[i]; i++) {
            QAPI_LIST_APPEND(missing_tail, g_strdup(missing[i]));
        }
        QAPI_LIST_APPEND(tail, info);
    }
    return list;
}

static void hmp_info_vfio_mdevs(Monitor *mon, const QDict *qdict)
{
    g_autoptr(VfioMdevInfoList) list = qmp_query_vfio_mdevs(NULL);
    VfioMdevInfoList *each;
    strList *name;

    if (!list) {
        monitor_printf(mon, "No mediated device is open\n");
    }
    for (each = list; each; each = each->next) {
        VfioMdevInfo *info = each->value;

        monitor_printf(mon, "%s: mdev %s, type %s, parent %s\n",
                       info->id ?: info->qom_path, info->uuid,
                       info->type ?: "unknown", info->parent);
        monitor_printf(mon, "    %s, started by %s\n",
                       VfioMdevState_str(info->state),
                       VfioMdevStarter_str(info->started_by));
        if (info->group) {
            monitor_printf(mon, "    group %s\n", info->group);
        }
        for (name = info->missing; name; name = name->next) {
            monitor_printf(mon, "    not in this machine: %s\n", name->value);
        }
    }
}

static void vfio_mdev_register(void)
{
    monitor_register_hmp("vfio-mdevs", true, hmp_info_vfio_mdevs);
}

type_init(vfio_mdev_register);
