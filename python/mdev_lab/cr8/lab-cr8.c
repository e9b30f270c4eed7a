// SPDX-License-Identifier: GPL-2.0
/*
 * lab-cr8: have KVM intercept every write of CR8
 *
 * A guest that boots by UEFI writes CR8 at the end of each interrupt. KVM for
 * AMD intercepts that at first, and stops to once no interrupt of the guest
 * depends on it. Then the processor is asked to do it, which in the lab is
 * one that QEMU's TCG emulates. Up to 11.1 that fails an assertion while a
 * virtual interrupt is pending: helper_write_crN() calls cpu_interrupt()
 * without the big lock. KVM has one pending whenever it waits for the guest
 * to take the next interrupt, and so the lab would end within a minute.
 *
 * With this module KVM keeps the intercept that it begins with.
 */

#include <linux/kprobes.h>
#include <linux/module.h>

static noinline notrace void lab_cr8_nothing(void)
{
	barrier();
}

/* Runs an empty function in the place of the probed one. */
static int lab_cr8_skip(struct kprobe *probe, struct pt_regs *regs)
{
	instruction_pointer_set(regs, (unsigned long)lab_cr8_nothing);
	return 1;
}
NOKPROBE_SYMBOL(lab_cr8_skip);

static struct kprobe lab_cr8_probe = {
	.symbol_name = "svm_update_cr8_intercept",
	.pre_handler = lab_cr8_skip,
};

static int __init lab_cr8_init(void)
{
	return register_kprobe(&lab_cr8_probe);
}

static void __exit lab_cr8_exit(void)
{
	unregister_kprobe(&lab_cr8_probe);
}

module_init(lab_cr8_init);
module_exit(lab_cr8_exit);
MODULE_DESCRIPTION("KVM intercepts every write of CR8");
MODULE_LICENSE("GPL");
