# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab: a nested machine with a real mdev core, a real QEMU and real guests.

The machine that the lab runs on is the *host*; **L1** is a stock Debian kernel under QEMU that sees
the host's files; **L2** are the guests that the orchestrator runs inside L1. Nothing is installed
on the host, no module is loaded there, and neither KVM nor mdev hardware is needed.

============== ==========================================================
debian.py      kernels and sources from the machine's own Debian mirror
initramfs.py   what a kernel finds first, for L1 and for L2
driver.py      kernel modules built for a kernel
wire.py        what client and agent say to each other
agent.py       runs inside L1 as its first process
client.py      runs a command inside L1 from the host
machine.py     L1: up, find, down
systemd.py     an L1 that boots systemd, and boots again
l2.py          the L2 guest: its files, and talking to it
story.py       the main job, told inside L1
demo.py        the same from the host's side: a lab, the story, a closing table
samples.py     the kernel's sample drivers, to test against what is not ours
qemubuild.py   QEMU with our patches
============== ==========================================================

virtme-ng does the L1 part too and was measured first: 22 s until a command runs, of which 15 s are
a udev coldplug that loads AHCI, I2C and watchdog drivers which no lab needs, against 6 to 10 s
here. It also runs QEMU below a shell below a Python process, which leaves nothing that can be found
again by process id, and a second command in a machine that is up goes over SSH, which needs a
network, keys and a server in it. docs/notes.md has more.
"""
