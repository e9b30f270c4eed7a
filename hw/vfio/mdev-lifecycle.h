/*
 * Start groups of mediated devices: when to start and stop them
 *
 * This is the part of mdev.c that decides.  It needs GLib only and reaches
 * the kernel through a table of functions, so that it is tested without QEMU
 * and without a kernel.
 *
 * A start group is the set of mdevs of one parent with the same group_uuid;
 * an mdev without one is a group of its own.  A group is started (1 is
 * written to "online" of the member that is opened first) before the first
 * open of any of its members, and stopped (0 is written) after the last
 * close.  The user that started a group stops it:
 *
 *   started by   when                                         stopped by
 *   ----------   ------------------------------------------   ------------
 *   qemu         "online" read 0 and 1 could be written       this code
 *   driver       no "online", or it cannot be used: the       the driver
 *                driver starts in its open callback
 *   other        "online" read 1 before the first open        that other
 *
 * Not thread safe: callers hold one lock around all calls (QEMU: the BQL).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_VFIO_MDEV_LIFECYCLE_H
#define HW_VFIO_MDEV_LIFECYCLE_H

#include <glib.h>
#include <stdbool.h>

#define MDEV_ATTR_GROUP "group_uuid"
#define MDEV_ATTR_ONLINE "online"

/* Drivers may have these too; they only make messages better. */
#define MDEV_ATTR_ERROR "group_error"   /* why the last start was refused */
#define MDEV_ATTR_OWNER "group_owner"   /* process that has the group, or 0 */

typedef struct MdevLifecycle MdevLifecycle;

typedef enum {
    MDEV_START_AUTO,            /* use "online" where it exists */
    MDEV_START_ON,              /* an error without it */
    MDEV_START_OFF,             /* never write it */
} MdevStart;

typedef enum {
    MDEV_OFFLINE,
    MDEV_ONLINE,
    MDEV_STATE_UNKNOWN,         /* there is no "online" that could be read */
} MdevState;

typedef enum {
    MDEV_STARTER_NONE,
    MDEV_STARTER_QEMU,
    MDEV_STARTER_DRIVER,
    MDEV_STARTER_OTHER,
} MdevStarter;

/*
 * What went wrong with the mdev @uuid.  @text is one line without a full stop
 * that names the group or the file and what the kernel said; @hint says what
 * to do about it and may be NULL.  @err is an errno value, or 0.
 */
typedef struct MdevFailure {
    int err;
    char *uuid;
    char *text;
    char *hint;
} MdevFailure;

void mdev_failure_free(MdevFailure *failure);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(MdevFailure, mdev_failure_free)

/*
 * One open or opening mdev, as callers see it.  The strings belong to the
 * lifecycle and live until the member is closed.
 */
typedef struct MdevMember {
    void *key;
    const char *path;           /* canonical directory of the mdev */
    const char *uuid;           /* its last component */
    const char *group;          /* group_uuid in lower case, NULL for none */
    MdevStart policy;
    MdevState state;
    MdevStarter starter;
} MdevMember;

/*
 * The effects.  All functions but @owner are required.  Paths are those that
 * were given to mdev_lifecycle_open(), or came from @siblings.
 */
typedef struct MdevLifecycleOps {
    /* Return 0 and the text of an attribute, to be freed; or -errno. */
    int (*read)(void *opaque, const char *path, const char *attr, char **text);

    /* Return 0 or -errno.  May take as long as the driver takes. */
    int (*write)(void *opaque, const char *path, const char *attr,
                 const char *text);

    /*
     * Return 0 and the canonical directories of all mdevs of the parent of
     * @path, its own included or not, as a vector to be freed; or -errno.
     */
    int (*siblings)(void *opaque, const char *path, char ***paths);

    /* Return which user may use the file, in words and to be freed; or NULL. */
    char *(*owner)(void *opaque, const char *path, const char *attr);

    /*
     * A member's state is about to be @state, or could not become so, for
     * the reason @failure.
     */
    void (*changed)(void *opaque, const MdevMember *member, MdevState old,
                    MdevState state, const MdevFailure *failure);
} MdevLifecycleOps;

MdevLifecycle *mdev_lifecycle_new(const MdevLifecycleOps *ops, void *opaque);

/* Forget everything; closes nothing. */
void mdev_lifecycle_free(MdevLifecycle *lifecycle);

/*
 * Call before the mdev is opened: join its start group, and start that when
 * it is this process's part to do so.  Returns false with *@failure set, and
 * then nothing has changed.
 *
 * @key:  identifies the member in later calls; must not be open already
 * @path: canonical directory of the mdev; copied
 */
bool mdev_lifecycle_open(MdevLifecycle *lifecycle, void *key, const char *path,
                         MdevStart policy, MdevFailure **failure);

/*
 * Call after the open: it has worked.  Reads back what state a start by the
 * driver has left.
 */
void mdev_lifecycle_opened(MdevLifecycle *lifecycle, void *key);

/*
 * Call when the open has failed, before mdev_lifecycle_close(): what is known
 * here about why, for instance that "online" could not be written.  NULL when
 * nothing is.
 */
MdevFailure *mdev_lifecycle_explain(MdevLifecycle *lifecycle, void *key);

/*
 * Call after the mdev was closed, or when its open failed: leave the group,
 * and stop it when that was the last member and we had started it.  The
 * member is gone afterwards in any case; false means that the stop failed.
 * A @key that is not open is none of ours and does nothing.
 */
bool mdev_lifecycle_close(MdevLifecycle *lifecycle, void *key,
                          MdevFailure **failure);

/* NULL if @key is not open. */
const MdevMember *mdev_lifecycle_find(MdevLifecycle *lifecycle, void *key);

/* All members in the order of their opening: MdevMember, free the list only. */
GList *mdev_lifecycle_members(MdevLifecycle *lifecycle);

/*
 * UUIDs of the members of @key's group that are not open here, sorted, to be
 * freed; empty for a group of one.
 */
char **mdev_lifecycle_missing(MdevLifecycle *lifecycle, void *key);

/*
 * Check that all members of every group are open here.  Groups that only have
 * members with MDEV_START_OFF are left alone.
 */
bool mdev_lifecycle_check_complete(MdevLifecycle *lifecycle,
                                   MdevFailure **failure);

/* The mdev's directory and the file in it, for messages. */
char *mdev_attribute(const char *path, const char *attr);

#endif /* HW_VFIO_MDEV_LIFECYCLE_H */
