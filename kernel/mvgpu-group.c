// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: start groups
 *
 * The mdevs of one parent that share a group_uuid come online together, all or
 * none, before any of them is touched. That costs a peer-to-peer link for every
 * pair. A group belongs to the process that opened its first member, until its
 * last member is closed, which the kernel sees to however the process ends.
 *
 * Locks: one mutex for the groups of all parents. A device's lock is taken
 * before it and never after it: registers ask for the state of the group. The
 * slow part of a start runs without it; group->starting keeps others out.
 */

#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kobject.h>
#include <linux/pid.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <linux/wait.h>

#include "mvgpu-compat.h"
#include "mvgpu-priv.h"

/* Groups, their members, and the links of parents. */
DEFINE_MUTEX(mvgpu_group_lock);

static LIST_HEAD(mvgpu_groups);		/* under mvgpu_group_lock */

/* Counts the starts that have ended, one way or the other. */
static unsigned int mvgpu_starts_ended;
static DECLARE_WAIT_QUEUE_HEAD(mvgpu_start_wait);

static unsigned int mvgpu_links_of(unsigned int members)
{
	return members * (members - 1) / 2;
}

static struct mvgpu_group *mvgpu_group_alloc(struct mvgpu_parent *parent,
					     const guid_t *uuid)
{
	struct mvgpu_group *group;

	group = kzalloc_obj(*group, GFP_KERNEL);
	if (!group)
		return NULL;

	group->parent = parent;
	guid_copy(&group->uuid, uuid);
	INIT_LIST_HEAD(&group->node);
	INIT_LIST_HEAD(&group->members);
	return group;
}

static struct mvgpu_group *mvgpu_group_find(const guid_t *uuid)
{
	struct mvgpu_group *group;

	lockdep_assert_held(&mvgpu_group_lock);

	list_for_each_entry(group, &mvgpu_groups, node)
		if (guid_equal(&group->uuid, uuid))
			return group;
	return NULL;
}

static void mvgpu_group_add(struct mvgpu_group *group, struct mvgpu_dev *mv)
{
	lockdep_assert_held(&mvgpu_group_lock);

	if (list_empty(&group->node))
		list_add(&group->node, &mvgpu_groups);

	mv->group = group;
	mv->slot = ffz(group->slots);
	group->slots |= BIT(mv->slot);
	group->nr_members++;
	list_add_tail(&mv->member, &group->members);
}

/* The last one to leave frees the group. */
static void mvgpu_group_del(struct mvgpu_dev *mv)
{
	struct mvgpu_group *group = mv->group;

	lockdep_assert_held(&mvgpu_group_lock);

	mv->group = NULL;
	list_del(&mv->member);
	group->slots &= ~BIT(mv->slot);
	if (--group->nr_members)
		return;

	WARN_ON(group->nr_open || group->links || group->owner);
	list_del(&group->node);
	kfree(group->error);
	kfree(group);
}

/* Tells user space, so that it need not poll. */
static void mvgpu_group_announce(struct mvgpu_dev *mv, bool online)
{
	struct device *dev = mdev_dev(mv->mdev);
	char state[] = "MVGPU_STATE=offline";
	char *envp[2] = { state };

	lockdep_assert_held(&mvgpu_group_lock);

	if (online)
		strscpy(state, "MVGPU_STATE=online", sizeof(state));
	mvgpu_log(mv, online ? MVGPU_EVENT_STARTED : MVGPU_EVENT_STOPPED,
		  &mv->group->uuid, mv->group->links);
	if (mvgpu_has_online)
		sysfs_notify(&dev->kobj, NULL, "online");
	kobject_uevent_env(&dev->kobj, KOBJ_CHANGE, envp);
}

static void mvgpu_group_failed(struct mvgpu_group *group, char *error)
{
	lockdep_assert_held(&mvgpu_group_lock);

	kfree(group->error);
	group->error = error;
}

/* The names of the members in the order of their slots, or NULL. */
static char *mvgpu_group_names(struct mvgpu_group *group)
{
	char *names = kzalloc(MVGPU_GROUP_SLOTS * (UUID_STRING_LEN + 1) + 1,
			      GFP_KERNEL);
	struct mvgpu_dev *mv;
	char *p = names;

	lockdep_assert_held(&mvgpu_group_lock);

	if (!names)
		return NULL;
	list_for_each_entry(mv, &group->members, member)
		p += sprintf(p, " %pUl", &mv->mdev->uuid);
	return names;
}

/* Not enough links for what was asked: say all that is needed to act on it. */
static void mvgpu_group_short(struct mvgpu_group *group,
			      struct mvgpu_dev *joins, unsigned int asked)
{
	struct mvgpu_parent *parent = group->parent;
	char *names = mvgpu_group_names(group);
	char *what;

	lockdep_assert_held(&mvgpu_group_lock);

	if (joins)
		what = kasprintf(GFP_KERNEL, "%pUl joins",
				 &joins->mdev->uuid);
	else
		what = kasprintf(GFP_KERNEL, "%u members", group->nr_members);
	dev_err(parent->dev,
		"group %pUl does not start: %s, %u links asked, %u of %u left; members:%s\n",
		&group->uuid, what ?: "?", asked, parent->links_free,
		parent->links, names ?: " ?");
	mvgpu_group_failed(group,
			   kasprintf(GFP_KERNEL,
				     "%s, %u links asked, %u of %u left on %s",
				     what ?: "?", asked, parent->links_free,
				     parent->links, dev_name(parent->dev)));
	kfree(what);
	kfree(names);
}

static int mvgpu_group_commit(struct mvgpu_group *group)
{
	struct mvgpu_parent *parent = group->parent;
	unsigned int asked = mvgpu_links_of(group->nr_members);
	struct mvgpu_dev *mv;

	lockdep_assert_held(&mvgpu_group_lock);

	if (asked > parent->links_free) {
		mvgpu_group_short(group, NULL, asked);
		return -ENOSPC;
	}

	parent->links_free -= asked;
	group->links = asked;
	group->online = true;
	mvgpu_group_failed(group, NULL);
	list_for_each_entry(mv, &group->members, member)
		mvgpu_group_announce(mv, true);
	return 0;
}

static void mvgpu_group_stop(struct mvgpu_group *group)
{
	struct mvgpu_dev *mv;

	lockdep_assert_held(&mvgpu_group_lock);

	if (!group->online)
		return;

	WARN_ON(group->nr_open);
	group->online = false;
	list_for_each_entry(mv, &group->members, member)
		mvgpu_group_announce(mv, false);
	group->parent->links_free += group->links;
	group->links = 0;
}

/*
 * Waits until no process is about to start the group. It may be another group
 * afterwards: the lock was dropped.
 */
static int mvgpu_group_settle(struct mvgpu_dev *mv)
{
	unsigned int ended;
	int ret;

	lockdep_assert_held(&mvgpu_group_lock);

	while (mv->group->starting) {
		ended = mvgpu_starts_ended;
		mutex_unlock(&mvgpu_group_lock);
		ret = wait_event_killable(mvgpu_start_wait,
					  READ_ONCE(mvgpu_starts_ended) !=
					  ended);
		mutex_lock(&mvgpu_group_lock);
		if (ret)
			return -EINTR;
	}
	return 0;
}

/*
 * Starts the settled group of mv. The device cannot go meanwhile: the caller
 * is in its open or in one of its attributes, and both hold up a removal.
 */
static int mvgpu_group_start(struct mvgpu_dev *mv)
{
	struct mvgpu_group *group = mv->group;
	guid_t uuid = group->uuid;
	int ret;

	lockdep_assert_held(&mvgpu_group_lock);

	if (group->online)
		return 0;

	group->starting = true;
	mutex_unlock(&mvgpu_group_lock);
	ret = mvgpu_fault(MVGPU_FAULT_START, &mv->mdev->uuid, &uuid);
	mutex_lock(&mvgpu_group_lock);
	group->starting = false;

	if (ret) {
		dev_err(mdev_dev(mv->mdev), "group %pUl does not start: %pe\n",
			&group->uuid, ERR_PTR(ret));
		mvgpu_group_failed(group,
				   kasprintf(GFP_KERNEL, "the hardware said %pe",
					     ERR_PTR(ret)));
	} else {
		ret = mvgpu_group_commit(group);
	}
	if (ret)
		mvgpu_log(mv, MVGPU_EVENT_REFUSED, &group->uuid, ret);

	WRITE_ONCE(mvgpu_starts_ended, mvgpu_starts_ended + 1);
	wake_up_all(&mvgpu_start_wait);
	return ret;
}

/*
 * What the attributes do
 */

/* Starts the group now. It has no owner before it is opened. */
int mvgpu_group_online(struct mvgpu_dev *mv)
{
	int ret;

	mutex_lock(&mvgpu_group_lock);
	ret = mvgpu_group_settle(mv);
	if (!ret)
		ret = mvgpu_group_start(mv);
	mutex_unlock(&mvgpu_group_lock);

	return ret;
}

int mvgpu_group_offline(struct mvgpu_dev *mv)
{
	int ret = 0;

	mutex_lock(&mvgpu_group_lock);
	if (mv->group->nr_open || mv->group->starting)
		ret = -EBUSY;
	else
		mvgpu_group_stop(mv->group);
	mutex_unlock(&mvgpu_group_lock);

	return ret;
}

/* An online group has room for one more by policy, and by its links. */
static int mvgpu_group_admit(struct mvgpu_group *group, struct mvgpu_dev *mv)
{
	lockdep_assert_held(&mvgpu_group_lock);

	if (group->parent != mv->type->parent)
		return -EINVAL;
	if (group->nr_members >= MVGPU_GROUP_SLOTS)
		return -ENOSPC;
	if (!group->online)
		return group->starting ? -EBUSY : 0;
	if (!mvgpu_group_hotplug)
		return -EBUSY;
	if (group->nr_members > group->parent->links_free) {
		mvgpu_group_short(group, mv, group->nr_members);
		mvgpu_log(mv, MVGPU_EVENT_REFUSED, &group->uuid, -ENOSPC);
		return -ENOSPC;
	}
	return 0;
}

/* Into the group of that UUID; guid_null: into one of its own. */
int mvgpu_group_join(struct mvgpu_dev *mv, const guid_t *uuid)
{
	struct mvgpu_group *fresh, *group = NULL;
	int ret = 0;

	fresh = mvgpu_group_alloc(mv->type->parent, uuid);
	if (!fresh)
		return -ENOMEM;

	mutex_lock(&mvgpu_group_lock);
	if (mv->open || mv->group->online || mv->group->starting) {
		ret = -EBUSY;
		goto out;
	}
	if (guid_equal(&mv->group->uuid, uuid))
		goto out;

	if (!guid_is_null(uuid))
		group = mvgpu_group_find(uuid);
	if (group) {
		ret = mvgpu_group_admit(group, mv);
		if (ret)
			goto out;
	} else {
		group = fresh;
		fresh = NULL;
	}

	mvgpu_group_del(mv);
	mvgpu_group_add(group, mv);
	mvgpu_log(mv, MVGPU_EVENT_GROUPED, uuid, group->nr_members);
	if (group->online) {
		/* One link to each of the others. */
		group->parent->links_free -= group->nr_members - 1;
		group->links += group->nr_members - 1;
		mvgpu_group_announce(mv, true);
	}
out:
	mutex_unlock(&mvgpu_group_lock);
	kfree(fresh);
	return ret;
}

/*
 * The life of a device
 */

int mvgpu_group_init(struct mvgpu_dev *mv)
{
	struct mvgpu_group *group;

	group = mvgpu_group_alloc(mv->type->parent, &guid_null);
	if (!group)
		return -ENOMEM;

	mutex_lock(&mvgpu_group_lock);
	mvgpu_group_add(group, mv);
	mutex_unlock(&mvgpu_group_lock);
	return 0;
}

/*
 * The device goes. It is not open, but the others of its group can be, and
 * stay online: only the links to this one come back.
 */
void mvgpu_group_leave(struct mvgpu_dev *mv)
{
	struct mvgpu_group *group;

	mutex_lock(&mvgpu_group_lock);
	group = mv->group;
	if (group) {
		WARN_ON(mv->open);
		if (group->online) {
			mvgpu_group_announce(mv, false);
			group->links -= group->nr_members - 1;
			group->parent->links_free += group->nr_members - 1;
		}
		mvgpu_group_del(mv);
	}
	mutex_unlock(&mvgpu_group_lock);
}

static void mvgpu_group_release(struct mvgpu_dev *mv)
{
	struct mvgpu_group *group = mv->group;

	lockdep_assert_held(&mvgpu_group_lock);

	mv->open = false;
	if (--group->nr_open)
		return;

	put_pid(group->owner);
	group->owner = NULL;
	if (mvgpu_implicit_start)
		mvgpu_group_stop(group);
}

/*
 * The first open of a device. It is the group's first, and then takes it, or
 * it comes from the process that has it. What counts is the process that
 * opens, not the one that uses: descriptors can be passed on.
 */
int mvgpu_group_open(struct mvgpu_dev *mv)
{
	struct mvgpu_group *group;
	int ret;

	mutex_lock(&mvgpu_group_lock);
	group = mv->group;
	if (group->owner && group->owner != task_tgid(current)) {
		dev_err(mdev_dev(mv->mdev),
			"group %pUl belongs to process %d: refused to process %d\n",
			&group->uuid, pid_nr(group->owner),
			task_tgid_nr(current));
		ret = -EBUSY;
		goto out;
	}

	/* From here on the group of this device cannot change. */
	if (!group->owner)
		group->owner = get_pid(task_tgid(current));
	group->nr_open++;
	mv->open = true;

	ret = mvgpu_group_settle(mv);
	if (!ret && !group->online && !mvgpu_implicit_start) {
		dev_err(mdev_dev(mv->mdev),
			"offline: write 1 to its 'online' before it is opened\n");
		ret = -ENXIO;
	}
	if (!ret)
		ret = mvgpu_group_start(mv);
	if (ret)
		mvgpu_group_release(mv);
out:
	mutex_unlock(&mvgpu_group_lock);
	return ret;
}

void mvgpu_group_close(struct mvgpu_dev *mv)
{
	mutex_lock(&mvgpu_group_lock);
	mvgpu_group_release(mv);
	mutex_unlock(&mvgpu_group_lock);
}

/*
 * What the registers show
 */

bool mvgpu_group_is_online(struct mvgpu_dev *mv)
{
	bool online;

	mutex_lock(&mvgpu_group_lock);
	online = mv->group->online;
	mutex_unlock(&mvgpu_group_lock);

	return online;
}

u32 mvgpu_group_members(struct mvgpu_dev *mv)
{
	u32 members;

	mutex_lock(&mvgpu_group_lock);
	members = mv->group->nr_members;
	mutex_unlock(&mvgpu_group_lock);

	return members;
}

static struct mvgpu_dev *mvgpu_group_at(struct mvgpu_group *group, u32 slot)
{
	struct mvgpu_dev *mv;

	lockdep_assert_held(&mvgpu_group_lock);

	list_for_each_entry(mv, &group->members, member)
		if (mv->slot == slot)
			return mv;
	return NULL;
}

/* Word number index of the window that holds the members' UUIDs. */
u32 mvgpu_group_word(struct mvgpu_dev *mv, u32 index)
{
	const u32 words = MVGPU_GROUP_STRIDE / 4;
	struct mvgpu_dev *member;
	u32 word = 0;

	mutex_lock(&mvgpu_group_lock);
	member = mvgpu_group_at(mv->group, index / words);
	if (member)
		word = member->uuid[index % words];
	mutex_unlock(&mvgpu_group_lock);

	return word;
}

/*
 * Peers
 */

/* A reference to the framebuffer of an online, open peer, or NULL. */
struct file *mvgpu_group_peer(struct mvgpu_dev *mv, u32 slot)
{
	struct mvgpu_dev *peer;
	struct file *fb = NULL;

	mutex_lock(&mvgpu_group_lock);
	peer = mvgpu_group_at(mv->group, slot);
	if (peer && peer != mv && mv->group->online && peer->fb) {
		get_file(peer->fb);
		fb = peer->fb;
	}
	mutex_unlock(&mvgpu_group_lock);

	return fb;
}

/* Whether that still is the framebuffer of a peer. */
bool mvgpu_group_has_peer(struct mvgpu_dev *mv, const struct file *fb)
{
	struct mvgpu_dev *peer;
	bool has = false;

	mutex_lock(&mvgpu_group_lock);
	if (mv->group->online)
		list_for_each_entry(peer, &mv->group->members, member)
			has |= peer->fb == fb;
	mutex_unlock(&mvgpu_group_lock);

	return has;
}
