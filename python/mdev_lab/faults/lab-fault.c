// SPDX-License-Identifier: GPL-2.0
/*
 * lab-fault: one fault for each checker of a debug kernel
 *
 * A kernel that reports nothing may have nothing to report, or a checker that
 * sleeps. insmod lab-fault.ko what=NAME makes the fault of that name and then
 * fails with EAGAIN, so that there is nothing to unload.
 */

#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>

static char *what = "";
module_param(what, charp, 0444);
MODULE_PARM_DESC(what, "kasan, ubsan, kmemleak, lockdep or atomic");

static DEFINE_MUTEX(lab_first);
static DEFINE_MUTEX(lab_second);
static DEFINE_SPINLOCK(lab_spin);

/* What the compiler must not see through. */
static volatile unsigned int lab_size = 32;
static void *volatile lab_pointer;

/* Reads what was freed. */
static void lab_kasan(void)
{
	char *p = kzalloc(lab_size, GFP_KERNEL);

	lab_pointer = p;
	kfree(p);
	p = lab_pointer;
	if (p)
		pr_info("lab-fault: %d\n", READ_ONCE(p[0]));
	lab_pointer = NULL;
}

/* Shifts by as many bits as there are. */
static void lab_ubsan(void)
{
	pr_info("lab-fault: %d\n", 1 << lab_size);
}

/* Forgets what it allocated. */
static void lab_kmemleak(void)
{
	unsigned int i;

	for (i = 0; i < 16; i++)
		lab_pointer = kzalloc(lab_size, GFP_KERNEL);
	lab_pointer = NULL;
}

/* Takes two locks in both orders, which no other task has to be there for. */
static void lab_lockdep(void)
{
	mutex_lock(&lab_first);
	mutex_lock(&lab_second);
	mutex_unlock(&lab_second);
	mutex_unlock(&lab_first);

	mutex_lock(&lab_second);
	mutex_lock(&lab_first);
	mutex_unlock(&lab_first);
	mutex_unlock(&lab_second);
}

/* May sleep where it must not. */
static void lab_atomic(void)
{
	spin_lock(&lab_spin);
	might_sleep();
	spin_unlock(&lab_spin);
}

static int __init lab_init(void)
{
	if (!strcmp(what, "kasan"))
		lab_kasan();
	else if (!strcmp(what, "ubsan"))
		lab_ubsan();
	else if (!strcmp(what, "kmemleak"))
		lab_kmemleak();
	else if (!strcmp(what, "lockdep"))
		lab_lockdep();
	else if (!strcmp(what, "atomic"))
		lab_atomic();
	else
		return -EINVAL;
	return -EAGAIN;
}
module_init(lab_init);

MODULE_DESCRIPTION("Faults on purpose, one for each checker of the kernel");
MODULE_AUTHOR("The mdev orchestrator project");
MODULE_LICENSE("GPL");
