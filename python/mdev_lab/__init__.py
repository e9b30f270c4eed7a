# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab: a nested machine with a real mdev core, a real QEMU and real guests.

The machine that the lab runs on is the *host*; **L1** is a stock Debian kernel under QEMU that sees
the host's files; **L2** are the guests that the orchestrator runs in L1. Nothing is installed on
the host, no module is loaded there, and neither KVM nor mdev hardware is needed.

================== ==============================================================
cli.py             the command ``mdo lab``
labs.py            which labs there are: their records and directories
l1.py              L1: booted, and commands run in it
systemd.py         an L1 that boots systemd, and boots again
client.py          runs a command in L1 from the host
agent.py           the first process of L1, which runs the commands
wire.py            the protocol between the two
l2.py              the L2 guest: its files, and a client of the program in it
initramfs.py       the initramfs of L1 and of L2
kernels.py         kernels from the machine's own Debian mirror
debug_kernel.py    a kernel with checkers, built from Debian's source
iommufd_kernel.py  Debian's kernel with VFIO built for iommufd
kernel_modules.py  modules built for a kernel
sample_drivers.py  the kernel's sample drivers, for tests with drivers not ours
qemus.py           QEMU with and without our patches, for comparisons
mvgpu.py           types of mvgpu, and counts of their instances
demo.py            ``make demo`` on the host
demo_acts.py       the acts of the demo, in L1
checkout.py        where the source tree is
================== ==============================================================

The product, ``mdev_orchestrator``, does not import the lab, and its wheel does not contain it.

virtme-ng boots an L1, too, and was measured first: 22 s until a command runs, against 6 to 10 s
here. A udev coldplug that loads AHCI, I2C and watchdog drivers is 15 s of those. virtme-ng also
runs QEMU below a shell below a Python process, so that no process id identifies the machine;
and a second command in a machine that is up needs SSH, hence a network, keys and a server in it.
docs/notes.md has more.
"""
