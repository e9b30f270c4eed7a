/*
 * Start groups of mediated devices: when to start and stop them
 *
 * See mdev-lifecycle.h for the rules.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#if __has_include("qemu/osdep.h")
#include "qemu/osdep.h"         /* QEMU wants it first in every file */
#endif
#include <errno.h>
#include <string.h>

#include "mdev-lifecycle.h"

/* Members of one group that are open here; gone when there are none. */
typedef struct MdevGroup {
    char *place;                /* its parent, or the mdev that has no uuid */
    char *uuid;                 /* NULL: the group of one mdev */
    unsigned int open;
    MdevStarter starter;
} MdevGroup;

typedef struct Member {
    MdevMember public;
    char *path;
    char *uuid;
    MdevGroup *group;
    /* Why an explicit start was not possible, although there is a file. */
    MdevFailure *unusable;
} Member;

struct MdevLifecycle {
    const MdevLifecycleOps *ops;
    void *opaque;
    GList *members;             /* Member, in the order of opening */
    GList *groups;              /* MdevGroup */
};

void mdev_failure_free(MdevFailure *failure)
{
    if (failure) {
        g_free(failure->uuid);
        g_free(failure->text);
        g_free(failure->hint);
        g_free(failure);
    }
}

char *mdev_attribute(const char *path, const char *attr)
{
    return g_build_filename(path, attr, NULL);
}

/* Takes @text. */
static MdevFailure *failure_new(const char *uuid, int err, char *text,
                                const char *hint)
{
    MdevFailure *failure = g_new0(MdevFailure, 1);

    failure->err = err;
    failure->uuid = g_strdup(uuid);
    failure->text = text;
    failure->hint = g_strdup(hint);
    return failure;
}

/* Pass @failure to a caller that may not want it. */
static void failure_give(MdevFailure **out, MdevFailure *failure)
{
    if (out) {
        *out = failure;
    } else {
        mdev_failure_free(failure);
    }
}

static MdevFailure *failure_copy(const MdevFailure *failure)
{
    return failure_new(failure->uuid, failure->err, g_strdup(failure->text),
                       failure->hint);
}

MdevLifecycle *mdev_lifecycle_new(const MdevLifecycleOps *ops, void *opaque)
{
    MdevLifecycle *lifecycle = g_new0(MdevLifecycle, 1);

    lifecycle->ops = ops;
    lifecycle->opaque = opaque;
    return lifecycle;
}

static void group_free(void *data)
{
    MdevGroup *group = data;

    g_free(group->place);
    g_free(group->uuid);
    g_free(group);
}

static void member_free(void *data)
{
    Member *member = data;

    mdev_failure_free(member->unusable);
    g_free(member->path);
    g_free(member->uuid);
    g_free(member);
}

void mdev_lifecycle_free(MdevLifecycle *lifecycle)
{
    if (lifecycle) {
        g_list_free_full(lifecycle->members, member_free);
        g_list_free_full(lifecycle->groups, group_free);
        g_free(lifecycle);
    }
}

static Member *find(MdevLifecycle *lifecycle, void *key)
{
    GList *each;

    for (each = lifecycle->members; each; each = each->next) {
        Member *member = each->data;

        if (member->public.key == key) {
            return member;
        }
    }
    return NULL;
}

/*
 * Return 0 and the text of an attribute as one line, to be freed; or -errno.
 * It is a driver's and gets into messages: control characters become spaces.
 */
static int read_line(MdevLifecycle *lifecycle, const char *path,
                     const char *attr, char **text)
{
    int ret = lifecycle->ops->read(lifecycle->opaque, path, attr, text);
    char *each;

    if (ret < 0) {
        return ret;
    }
    for (each = *text; *each; each++) {
        if (g_ascii_iscntrl(*each)) {
            *each = ' ';
        }
    }
    g_strstrip(*text);
    return 0;
}

/* Return 0 or -errno, and *@value 0 or 1. */
static int read_online(MdevLifecycle *lifecycle, const char *path, int *value)
{
    g_autofree char *text = NULL;
    int ret = read_line(lifecycle, path, MDEV_ATTR_ONLINE, &text);

    if (ret < 0) {
        return ret;
    }
    if (strcmp(text, "0") && strcmp(text, "1")) {
        return -EPROTO;
    }
    *value = text[0] - '0';
    return 0;
}

/*
 * Return 0 or -errno, and *@uuid in lower case, or NULL for none.  A driver
 * without the attribute has no groups.
 */
static int read_group(MdevLifecycle *lifecycle, const char *path, char **uuid)
{
    g_autofree char *text = NULL;
    int ret = read_line(lifecycle, path, MDEV_ATTR_GROUP, &text);

    *uuid = NULL;
    if (ret == -ENOENT) {
        return 0;
    }
    if (ret < 0) {
        return ret;
    }
    if (text[0]) {
        *uuid = g_ascii_strdown(text, -1);
    }
    return 0;
}

static MdevGroup *find_group(MdevLifecycle *lifecycle, const char *place,
                             const char *uuid)
{
    GList *each;

    for (each = lifecycle->groups; each; each = each->next) {
        MdevGroup *group = each->data;

        if (!g_strcmp0(group->uuid, uuid) && !strcmp(group->place, place)) {
            return group;
        }
    }
    return NULL;
}

static bool is_open(MdevLifecycle *lifecycle, const char *path)
{
    GList *each;

    for (each = lifecycle->members; each; each = each->next) {
        Member *member = each->data;

        if (!strcmp(member->path, path)) {
            return true;
        }
    }
    return false;
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Sorted UUIDs of the mdevs of @path's parent that have @group. */
static char **group_uuids(MdevLifecycle *lifecycle, const char *path,
                          const char *group, bool with_open)
{
    GPtrArray *uuids = g_ptr_array_new();
    g_auto(GStrv) paths = NULL;
    int i;

    if (group &&
        lifecycle->ops->siblings(lifecycle->opaque, path, &paths) == 0) {
        for (i = 0; paths[i]; i++) {
            g_autofree char *theirs = NULL;

            if ((with_open || !is_open(lifecycle, paths[i])) &&
                read_group(lifecycle, paths[i], &theirs) == 0 &&
                !g_strcmp0(theirs, group)) {
                g_ptr_array_add(uuids, g_path_get_basename(paths[i]));
            }
        }
    }
    g_ptr_array_sort(uuids, compare_strings);
    g_ptr_array_add(uuids, NULL);
    return (char **)g_ptr_array_free(uuids, FALSE);
}

/* "group G (A, B)", or "it" for an mdev without a group. */
static char *describe_group(MdevLifecycle *lifecycle, Member *member)
{
    g_auto(GStrv) uuids = NULL;
    g_autofree char *joined = NULL;

    if (!member->group->uuid) {
        return g_strdup("it");
    }
    uuids = group_uuids(lifecycle, member->path, member->group->uuid, true);
    joined = g_strjoinv(", ", uuids);
    return g_strdup_printf("group %s (%s)", member->group->uuid, joined);
}

/* "FILE (OWNER)" */
static char *describe_file(MdevLifecycle *lifecycle, const char *path,
                           const char *attr)
{
    g_autofree char *file = mdev_attribute(path, attr);
    g_autofree char *owner = NULL;

    if (lifecycle->ops->owner) {
        owner = lifecycle->ops->owner(lifecycle->opaque, path, attr);
    }
    return owner ? g_strdup_printf("%s (%s)", file, owner)
                 : g_steal_pointer(&file);
}

static MdevFailure *file_failure(MdevLifecycle *lifecycle, Member *member,
                                 const char *verb, const char *attr, int err)
{
    g_autofree char *file = describe_file(lifecycle, member->path, attr);
    const char *hint = NULL;

    if (err == EACCES || err == EPERM) {
        hint = "Let QEMU's user write the file, or start the group before "
               "QEMU does.";
    }
    return failure_new(member->uuid, err,
                       g_strdup_printf("cannot %s %s: %s", verb, file,
                                       g_strerror(err)),
                       hint);
}

/* Whether a member other than the one at @path is online, whatever uses it. */
static bool group_is_online(MdevLifecycle *lifecycle, const char *path,
                            const char *group)
{
    g_auto(GStrv) paths = NULL;
    int i;

    if (!group ||
        lifecycle->ops->siblings(lifecycle->opaque, path, &paths) < 0) {
        return false;
    }
    for (i = 0; paths[i]; i++) {
        g_autofree char *theirs = NULL;
        int online;

        if (strcmp(paths[i], path) &&
            read_group(lifecycle, paths[i], &theirs) == 0 &&
            !g_strcmp0(theirs, group) &&
            read_online(lifecycle, paths[i], &online) == 0 && online) {
            return true;
        }
    }
    return false;
}

/* A line of an attribute that need not exist; NULL if it is empty. */
static char *read_word(MdevLifecycle *lifecycle, const char *path,
                       const char *attr)
{
    g_autofree char *text = NULL;

    if (read_line(lifecycle, path, attr, &text) < 0) {
        return NULL;
    }
    return text[0] ? g_steal_pointer(&text) : NULL;
}

/* "Device or resource busy (what the driver knows about it)" */
static char *describe_error(MdevLifecycle *lifecycle, Member *member, int err)
{
    g_autofree char *words = read_word(lifecycle, member->path,
                                       MDEV_ATTR_ERROR);

    return words ? g_strdup_printf("%s (%s)", g_strerror(err), words)
                 : g_strdup(g_strerror(err));
}

/* What else has the group, in words; NULL if that is not known. */
static char *describe_owner(MdevLifecycle *lifecycle, Member *member)
{
    g_autofree char *owner = read_word(lifecycle, member->path,
                                       MDEV_ATTR_OWNER);

    return owner && strcmp(owner, "0")
           ? g_strdup_printf("its group belongs to process %s", owner)
           : NULL;
}

/* @joins: some of the group were online before. */
static MdevFailure *start_failure(MdevLifecycle *lifecycle, Member *member,
                                  bool joins, int err)
{
    g_autofree char *group = describe_group(lifecycle, member);
    g_autofree char *error = describe_error(lifecycle, member, err);
    const char *hint = "The kernel log may say more.";

    if (joins && err == EBUSY) {
        hint = member->group->open
               ? "Its driver lets no member join a group that is online: "
                 "attach all members before the guest starts."
               : "Another process uses the group.";
    } else if (joins) {
        hint = "The group stays online without it; the kernel log may say "
               "more.";
    } else if (err == EBUSY) {
        hint = "Another process has a member of the group open.";
    } else if (err == ENOSPC) {
        hint = "The parent has too few resources left for the whole group: "
               "stop another group or take a smaller one.";
    }
    return failure_new(member->uuid, err,
                       g_strdup_printf("cannot %s %s: %s",
                                       joins ? "join the online" : "start",
                                       group, error),
                       hint);
}

static void set_starter(MdevLifecycle *lifecycle, MdevGroup *group,
                        MdevStarter starter)
{
    GList *each;

    group->starter = starter;
    for (each = lifecycle->members; each; each = each->next) {
        Member *member = each->data;

        if (member->group == group) {
            member->public.starter = starter;
        }
    }
}

static void set_state(MdevLifecycle *lifecycle, Member *member,
                      MdevState state, const MdevFailure *failure)
{
    MdevState old = member->public.state;

    member->public.state = state;
    if (lifecycle->ops->changed && (state != old || failure)) {
        lifecycle->ops->changed(lifecycle->opaque, &member->public, old, state,
                                failure);
    }
}

/*
 * Start the group of a member that is not in the list yet.  Returns NULL when
 * the mdev may be opened, which includes that the driver has to start it.
 */
static MdevFailure *start(MdevLifecycle *lifecycle, Member *member)
{
    MdevGroup *group = member->group;
    bool must = member->public.policy == MDEV_START_ON;
    MdevFailure *failure;
    int online, ret;
    bool joins;

    ret = read_online(lifecycle, member->path, &online);
    if (ret == -ENOENT && must) {
        g_autofree char *file = mdev_attribute(member->path, MDEV_ATTR_ONLINE);

        return failure_new(member->uuid, ENOENT,
                           g_strdup_printf("there is no %s, which "
                                           "mdev-start=on needs", file),
                           "Its driver starts it when it is opened: use "
                           "mdev-start=auto.");
    }
    if (ret < 0) {
        member->public.state = MDEV_STATE_UNKNOWN;
        if (ret == -ENOENT || member->public.policy == MDEV_START_OFF) {
            return NULL;
        }
        failure = file_failure(lifecycle, member, "read", MDEV_ATTR_ONLINE,
                               -ret);
        goto unusable;
    }

    if (online) {
        if (group->starter == MDEV_STARTER_NONE) {
            /* Not ours, so its state does not change by our open. */
            member->public.state = MDEV_ONLINE;
            set_starter(lifecycle, group, MDEV_STARTER_OTHER);
        } else {
            set_state(lifecycle, member, MDEV_ONLINE, NULL);
        }
        return NULL;
    }
    if (member->public.policy == MDEV_START_OFF) {
        return NULL;
    }

    joins = group_is_online(lifecycle, member->path, group->uuid);
    ret = lifecycle->ops->write(lifecycle->opaque, member->path,
                                MDEV_ATTR_ONLINE, "1");
    switch (-ret) {
    case 0:
        if (group->starter == MDEV_STARTER_NONE) {
            set_starter(lifecycle, group, joins ? MDEV_STARTER_OTHER
                                                : MDEV_STARTER_QEMU);
        }
        member->public.starter = group->starter;
        set_state(lifecycle, member, MDEV_ONLINE, NULL);
        return NULL;
    case EACCES:
    case EPERM:
    case EROFS:
        failure = file_failure(lifecycle, member, "write", MDEV_ATTR_ONLINE,
                               -ret);
        goto unusable;
    default:
        return start_failure(lifecycle, member, joins, -ret);
    }

unusable:
    if (must) {
        return failure;
    }
    member->unusable = failure;
    return NULL;
}

bool mdev_lifecycle_open(MdevLifecycle *lifecycle, void *key, const char *path,
                         MdevStart policy, MdevFailure **failure)
{
    g_autofree char *place = NULL;
    g_autofree char *group_uuid = NULL;
    Member *member = g_new0(Member, 1);
    MdevFailure *failed = NULL;
    int ret;

    g_assert(!find(lifecycle, key));

    member->path = g_strdup(path);
    member->uuid = g_path_get_basename(path);
    ret = read_group(lifecycle, path, &group_uuid);
    place = group_uuid ? g_path_get_dirname(path) : g_strdup(path);
    member->group = find_group(lifecycle, place, group_uuid);
    if (!member->group) {
        member->group = g_new0(MdevGroup, 1);
        member->group->place = g_steal_pointer(&place);
        member->group->uuid = g_steal_pointer(&group_uuid);
        lifecycle->groups = g_list_append(lifecycle->groups, member->group);
    }
    member->public = (MdevMember) {
        .key = key,
        .path = member->path,
        .uuid = member->uuid,
        .group = member->group->uuid,
        .policy = policy,
        .state = MDEV_OFFLINE,
        .starter = member->group->starter,
    };

    if (ret < 0 && policy == MDEV_START_ON) {
        failed = file_failure(lifecycle, member, "read", MDEV_ATTR_GROUP, -ret);
    } else {
        failed = start(lifecycle, member);
    }
    if (failed) {
        set_state(lifecycle, member, member->public.state, failed);
        if (!member->group->open) {
            lifecycle->groups = g_list_remove(lifecycle->groups,
                                              member->group);
            group_free(member->group);
        }
        member_free(member);
        failure_give(failure, failed);
        return false;
    }

    member->public.starter = member->group->starter;
    member->group->open++;
    lifecycle->members = g_list_append(lifecycle->members, member);
    return true;
}

void mdev_lifecycle_opened(MdevLifecycle *lifecycle, void *key)
{
    Member *member = find(lifecycle, key);
    int online, ret;

    if (!member || member->public.state == MDEV_ONLINE) {
        return;
    }
    ret = read_online(lifecycle, member->path, &online);
    if (ret == 0 && !online) {
        set_state(lifecycle, member, MDEV_OFFLINE, NULL);
        return;
    }
    if (member->group->starter == MDEV_STARTER_NONE) {
        set_starter(lifecycle, member->group, MDEV_STARTER_DRIVER);
    }
    set_state(lifecycle, member, ret < 0 ? MDEV_STATE_UNKNOWN : MDEV_ONLINE,
              NULL);
}

MdevFailure *mdev_lifecycle_explain(MdevLifecycle *lifecycle, void *key)
{
    Member *member = find(lifecycle, key);
    char *text = NULL;

    if (!member) {
        return NULL;
    }
    if (member->unusable) {
        return failure_copy(member->unusable);
    }
    if (member->group->open == 1) {
        text = describe_owner(lifecycle, member);
    }
    if (!text) {
        text = read_word(lifecycle, member->path, MDEV_ATTR_ERROR);
    }
    return text ? failure_new(member->uuid, 0, text, NULL) : NULL;
}

/* The mdev went away, and its resources with it. */
static bool is_gone(int ret)
{
    return ret == -ENOENT || ret == -ENODEV;
}

/* Stop the group of a member that has left it as the last one. */
static MdevFailure *stop(MdevLifecycle *lifecycle, Member *member)
{
    g_autofree char *group = NULL;
    int online = 0;
    int ret;

    ret = read_online(lifecycle, member->path, &online);
    if (is_gone(ret) || (ret == 0 && !online)) {
        return NULL;
    }
    if (ret == 0) {
        ret = lifecycle->ops->write(lifecycle->opaque, member->path,
                                    MDEV_ATTR_ONLINE, "0");
        if (ret == 0 || is_gone(ret)) {
            return NULL;
        }
    }
    group = describe_group(lifecycle, member);
    return failure_new(member->uuid, -ret,
                       g_strdup_printf("cannot stop %s: %s", group,
                                       g_strerror(-ret)),
                       ret == -EBUSY
                       ? "A member is still open; write 0 to its 'online' "
                         "when it no longer is."
                       : "Write 0 to its 'online' to try again.");
}

bool mdev_lifecycle_close(MdevLifecycle *lifecycle, void *key,
                          MdevFailure **failure)
{
    Member *member = find(lifecycle, key);
    MdevFailure *failed = NULL;
    MdevGroup *group;
    int online;

    if (!member) {
        return true;
    }
    group = member->group;
    lifecycle->members = g_list_remove(lifecycle->members, member);
    if (--group->open == 0) {
        if (group->starter == MDEV_STARTER_QEMU) {
            failed = stop(lifecycle, member);
            set_state(lifecycle, member,
                      failed ? member->public.state : MDEV_OFFLINE, failed);
        } else if (member->public.state == MDEV_ONLINE &&
                   read_online(lifecycle, member->path, &online) == 0 &&
                   !online) {
            set_state(lifecycle, member, MDEV_OFFLINE, NULL);
        }
        lifecycle->groups = g_list_remove(lifecycle->groups, group);
        group_free(group);
    }
    member_free(member);
    if (failed) {
        failure_give(failure, failed);
        return false;
    }
    return true;
}

const MdevMember *mdev_lifecycle_find(MdevLifecycle *lifecycle, void *key)
{
    Member *member = find(lifecycle, key);

    return member ? &member->public : NULL;
}

GList *mdev_lifecycle_members(MdevLifecycle *lifecycle)
{
    GList *list = NULL;
    GList *each;

    for (each = lifecycle->members; each; each = each->next) {
        Member *member = each->data;

        list = g_list_prepend(list, &member->public);
    }
    return g_list_reverse(list);
}

char **mdev_lifecycle_missing(MdevLifecycle *lifecycle, void *key)
{
    Member *member = find(lifecycle, key);

    return member ? group_uuids(lifecycle, member->path, member->group->uuid,
                                false)
                  : g_new0(char *, 1);
}

bool mdev_lifecycle_check_complete(MdevLifecycle *lifecycle,
                                   MdevFailure **failure)
{
    GList *each;

    for (each = lifecycle->members; each; each = each->next) {
        Member *member = each->data;
        g_auto(GStrv) missing = NULL;
        g_autofree char *list = NULL;

        if (member->public.policy == MDEV_START_OFF) {
            continue;
        }
        missing = mdev_lifecycle_missing(lifecycle, member->public.key);
        if (!missing[0]) {
            continue;
        }
        list = g_strjoinv(", ", missing);
        failure_give(failure, failure_new(member->uuid, 0,
            g_strdup_printf("its start group %s is not complete: this machine "
                            "has no device for %s", member->group->uuid, list),
            "Add a device for each, take them out of the group (file "
            "'" MDEV_ATTR_GROUP "'), or use mdev-start=off."));
        return false;
    }
    return true;
}
