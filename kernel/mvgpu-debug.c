// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: faults to inject, and the log that proves the order of events
 *
 * Both are in debugfs, and neither exists where that is not built in.
 */

#include <linux/debugfs.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/kstrtox.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "mvgpu-priv.h"

static struct dentry *mvgpu_debug_dir;

/*
 * Faults
 */

#define MVGPU_FAULT_LINE	256	/* bytes, written at once */
#define MVGPU_FAULT_DELAY_MAX	600000	/* milliseconds */

struct mvgpu_fault_spec {
	unsigned int error;		/* positive errno, or 0 */
	unsigned int delay;		/* milliseconds */
	int times;			/* left; -1: for ever, 0: not armed */
	guid_t uuid;			/* of an mdev or a group, or guid_null */
};

static struct mvgpu_fault {
	struct mvgpu_fault_spec spec;
	unsigned int hits;		/* since it was armed */
} mvgpu_faults[MVGPU_NR_FAULTS];

static DEFINE_MUTEX(mvgpu_fault_lock);

static const char * const mvgpu_fault_names[MVGPU_NR_FAULTS] = {
	[MVGPU_FAULT_CREATE] = "create",
	[MVGPU_FAULT_START] = "start",
	[MVGPU_FAULT_OPEN] = "open",
	[MVGPU_FAULT_REGION] = "region",
};

/*
 * What the hardware would do at this point: nothing, be slow, or fail. The
 * caller holds no lock of this driver. Only a signal that kills cuts a delay
 * short, so that nothing has to wait for a process that must die.
 */
int mvgpu_fault(enum mvgpu_fault_point point, const guid_t *uuid,
		const guid_t *group)
{
	struct mvgpu_fault *fault = &mvgpu_faults[point];
	struct mvgpu_fault_spec *spec = &fault->spec;
	unsigned int delay, error;

	/* Registers are read often, and faults are rare. */
	if (!READ_ONCE(spec->times))
		return 0;

	mutex_lock(&mvgpu_fault_lock);
	if (!spec->times ||
	    (!guid_is_null(&spec->uuid) && !guid_equal(&spec->uuid, uuid) &&
	     !guid_equal(&spec->uuid, group))) {
		mutex_unlock(&mvgpu_fault_lock);
		return 0;
	}
	if (spec->times > 0)
		WRITE_ONCE(spec->times, spec->times - 1);
	fault->hits++;
	delay = spec->delay;
	error = spec->error;
	mutex_unlock(&mvgpu_fault_lock);

	if (delay && schedule_timeout_killable(msecs_to_jiffies(delay)) &&
	    fatal_signal_pending(current))
		return -EINTR;
	return -(int)error;
}

static int mvgpu_fault_show(struct seq_file *m, void *unused)
{
	struct mvgpu_fault *fault = m->private;

	mutex_lock(&mvgpu_fault_lock);
	seq_printf(m, "errno=%u delay_ms=%u times=%d", fault->spec.error,
		   fault->spec.delay, fault->spec.times);
	if (!guid_is_null(&fault->spec.uuid))
		seq_printf(m, " uuid=%pUl", &fault->spec.uuid);
	seq_printf(m, " hits=%u\n", fault->hits);
	mutex_unlock(&mvgpu_fault_lock);
	return 0;
}

static int mvgpu_fault_word(struct mvgpu_fault_spec *spec, char *word)
{
	char *value = strchr(word, '=');
	int ret;

	if (!value)
		return -EINVAL;
	*value++ = '\0';

	if (!strcmp(word, "errno")) {
		ret = kstrtouint(value, 10, &spec->error);
		if (!ret && spec->error > MAX_ERRNO)
			ret = -EINVAL;
	} else if (!strcmp(word, "delay_ms")) {
		ret = kstrtouint(value, 10, &spec->delay);
		if (!ret && spec->delay > MVGPU_FAULT_DELAY_MAX)
			ret = -EINVAL;
	} else if (!strcmp(word, "times")) {
		ret = kstrtoint(value, 10, &spec->times);
		if (!ret && spec->times < -1)
			ret = -EINVAL;
	} else if (!strcmp(word, "uuid")) {
		ret = strlen(value) == UUID_STRING_LEN ?
		      guid_parse(value, &spec->uuid) : -EINVAL;
	} else {
		ret = -EINVAL;
	}
	return ret;
}

/* The whole fault in one line: no operation meets half of it. */
static ssize_t mvgpu_fault_write(struct file *file, const char __user *ubuf,
				 size_t count, loff_t *ppos)
{
	struct seq_file *m = file->private_data;
	struct mvgpu_fault *fault = m->private;
	struct mvgpu_fault_spec spec = { .times = 1 };
	char *line, *rest, *word;
	bool any = false;
	int ret = 0;

	if (count >= MVGPU_FAULT_LINE)
		return -EINVAL;
	line = memdup_user_nul(ubuf, count);
	if (IS_ERR(line))
		return PTR_ERR(line);

	rest = line;
	while (!ret && (word = strsep(&rest, " \t\n"))) {
		if (!*word)
			continue;
		ret = mvgpu_fault_word(&spec, word);
		any = true;
	}
	kfree(line);
	if (ret)
		return ret;

	/* An empty line disarms. */
	if (!any)
		spec.times = 0;

	mutex_lock(&mvgpu_fault_lock);
	fault->hits = 0;
	fault->spec = spec;
	mutex_unlock(&mvgpu_fault_lock);
	return count;
}

static int mvgpu_fault_open(struct inode *inode, struct file *file)
{
	return single_open(file, mvgpu_fault_show, inode->i_private);
}

static const struct file_operations mvgpu_fault_fops = {
	.owner = THIS_MODULE,
	.open = mvgpu_fault_open,
	.read = seq_read,
	.write = mvgpu_fault_write,
	.llseek = seq_lseek,
	.release = single_release,
};

/*
 * The log
 */

#define MVGPU_LOG_SIZE	4096	/* entries; the oldest go first */

struct mvgpu_log_entry {
	u64 sequence;
	u64 ns;				/* CLOCK_MONOTONIC */
	guid_t uuid, group;
	enum mvgpu_event event;
	pid_t pid;			/* thread group, in the first namespace */
	int value;
};

static struct mvgpu_log_entry *mvgpu_log_ring;
static u64 mvgpu_log_next;		/* under mvgpu_log_lock, and the ring */
static DEFINE_MUTEX(mvgpu_log_lock);

static const char * const mvgpu_event_names[] = {
	[MVGPU_EVENT_CREATED] = "created",
	[MVGPU_EVENT_GROUPED] = "grouped",
	[MVGPU_EVENT_STARTED] = "started",
	[MVGPU_EVENT_REFUSED] = "refused",
	[MVGPU_EVENT_OPENED] = "opened",
	[MVGPU_EVENT_ACCESSED] = "accessed",
	[MVGPU_EVENT_CLOSED] = "closed",
	[MVGPU_EVENT_STOPPED] = "stopped",
	[MVGPU_EVENT_REMOVED] = "removed",
};

/* The sequence is the order: an entry stands before all that follows it. */
void mvgpu_log(struct mvgpu_dev *mv, enum mvgpu_event event,
	       const guid_t *group, int value)
{
	struct mvgpu_log_entry *entry;

	mutex_lock(&mvgpu_log_lock);
	entry = &mvgpu_log_ring[mvgpu_log_next % MVGPU_LOG_SIZE];
	entry->sequence = mvgpu_log_next++;
	entry->ns = ktime_get_ns();
	entry->uuid = mv->mdev->uuid;
	entry->group = group ? *group : guid_null;
	entry->event = event;
	entry->pid = task_tgid_nr(current);
	entry->value = value;
	mutex_unlock(&mvgpu_log_lock);
}

static void *mvgpu_log_at(loff_t *pos)
{
	u64 oldest = 0;

	lockdep_assert_held(&mvgpu_log_lock);

	if (mvgpu_log_next > MVGPU_LOG_SIZE)
		oldest = mvgpu_log_next - MVGPU_LOG_SIZE;
	if (*pos < oldest)
		*pos = oldest;
	if (*pos >= mvgpu_log_next)
		return NULL;
	return &mvgpu_log_ring[*pos % MVGPU_LOG_SIZE];
}

static void *mvgpu_log_start(struct seq_file *m, loff_t *pos)
{
	mutex_lock(&mvgpu_log_lock);
	return mvgpu_log_at(pos);
}

static void *mvgpu_log_following(struct seq_file *m, void *v, loff_t *pos)
{
	++*pos;
	return mvgpu_log_at(pos);
}

static void mvgpu_log_stop(struct seq_file *m, void *v)
{
	mutex_unlock(&mvgpu_log_lock);
}

static int mvgpu_log_show(struct seq_file *m, void *v)
{
	const struct mvgpu_log_entry *entry = v;

	seq_printf(m, "%llu %llu %s %pUl ", entry->sequence, entry->ns,
		   mvgpu_event_names[entry->event], &entry->uuid);
	if (guid_is_null(&entry->group))
		seq_puts(m, "-");
	else
		seq_printf(m, "%pUl", &entry->group);
	seq_printf(m, " %d %d\n", entry->pid, entry->value);
	return 0;
}

static const struct seq_operations mvgpu_log_sops = {
	.start = mvgpu_log_start,
	.next = mvgpu_log_following,
	.stop = mvgpu_log_stop,
	.show = mvgpu_log_show,
};
DEFINE_SEQ_ATTRIBUTE(mvgpu_log);

int mvgpu_debug_init(void)
{
	struct dentry *dir;
	unsigned int i;

	mvgpu_log_ring = kvcalloc(MVGPU_LOG_SIZE, sizeof(*mvgpu_log_ring),
				  GFP_KERNEL);
	if (!mvgpu_log_ring)
		return -ENOMEM;

	/* None of these needs to succeed. */
	mvgpu_debug_dir = debugfs_create_dir(MVGPU_NAME, NULL);
	debugfs_create_file("log", 0400, mvgpu_debug_dir, NULL,
			    &mvgpu_log_fops);
	dir = debugfs_create_dir("fault", mvgpu_debug_dir);
	for (i = 0; i < MVGPU_NR_FAULTS; i++)
		debugfs_create_file(mvgpu_fault_names[i], 0600, dir,
				    &mvgpu_faults[i], &mvgpu_fault_fops);
	return 0;
}

void mvgpu_debug_exit(void)
{
	debugfs_remove(mvgpu_debug_dir);
	kvfree(mvgpu_log_ring);
}
