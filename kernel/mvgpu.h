/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * mvgpu: the programming interface of an mvgpu PCI function
 *
 * One header for the driver that emulates the function, for the program that
 * uses it in a guest, and for tests. Only object-like defines with a literal
 * value, one a line, so that a script can read it too. ABI.rst has the words.
 */
#ifndef MVGPU_H
#define MVGPU_H

/* PCI identity; no vendor has this id in the public list */
#define MVGPU_PCI_VENDOR		0xfff1
#define MVGPU_PCI_DEVICE_GRID		0x6d01
#define MVGPU_PCI_DEVICE_IGD		0x6d02
#define MVGPU_PCI_CLASS			0x038000	/* display, other */
#define MVGPU_PCI_REVISION		0x01

/* Base address registers */
#define MVGPU_BAR_REGS			0	/* 32 bit, trapped */
#define MVGPU_BAR_FB			2	/* 64 bit, prefetchable, mappable */
#define MVGPU_BAR_REGS_SIZE		0x1000
#define MVGPU_APERTURE_DEFAULT		0x200000	/* of BAR 2, bytes */
#define MVGPU_APERTURE_MAX		0x10000000

/* Capabilities in configuration space */
#define MVGPU_PCI_CAP_PM		0x40
#define MVGPU_PCI_CAP_MSI		0x50
#define MVGPU_PCI_CAP_EXP		0x70

/*
 * Registers, offsets in BAR 0. All are 32 bit, little endian. Reads may have
 * any size; a write that is not an aligned 32 bit write does nothing.
 */

/* Identity, read only */
#define MVGPU_REG_MAGIC			0x000
#define MVGPU_REG_ABI			0x004
#define MVGPU_REG_FEATURES		0x008	/* MVGPU_FEATURE_* */
#define MVGPU_REG_PERSONALITY		0x00c	/* MVGPU_PERSONALITY_* */
#define MVGPU_REG_UUID			0x010	/* 16 bytes, as in the text form */
#define MVGPU_REG_TYPE			0x020	/* 11 to 18, or MiB for igd */
#define MVGPU_REG_HEADS			0x024
#define MVGPU_REG_FRL			0x028	/* frame rate limit, frames/s */
#define MVGPU_REG_MAX_RES		0x02c	/* width << 16 | height */
#define MVGPU_REG_FB_SIZE_LO		0x030	/* framebuffer, bytes */
#define MVGPU_REG_FB_SIZE_HI		0x034
#define MVGPU_REG_APERTURE_LO		0x038	/* part that BAR 2 shows, bytes */
#define MVGPU_REG_APERTURE_HI		0x03c

/* State */
#define MVGPU_REG_STATE			0x040	/* MVGPU_STATE_*, read only */
#define MVGPU_REG_SCRATCH		0x044	/* read, write; no effect */
#define MVGPU_REG_SLOT			0x048	/* of itself in its start group */
#define MVGPU_REG_MEMBERS		0x04c	/* of its start group */

/* Engine; COMMAND is written last: it is the doorbell */
#define MVGPU_REG_SRC_LO		0x100	/* offset in the framebuffer */
#define MVGPU_REG_SRC_HI		0x104
#define MVGPU_REG_DST_LO		0x108	/* offset in the framebuffer */
#define MVGPU_REG_DST_HI		0x10c
#define MVGPU_REG_LEN_LO		0x110	/* bytes */
#define MVGPU_REG_LEN_HI		0x114
#define MVGPU_REG_SEED			0x118
#define MVGPU_REG_PEER			0x11c	/* slot of a group member */
#define MVGPU_REG_COMMAND		0x120	/* MVGPU_CMD_*, doorbell */
#define MVGPU_REG_STATUS		0x124	/* MVGPU_STATUS_*, read only */
#define MVGPU_REG_RESULT		0x128	/* of CHECKSUM, read only */
#define MVGPU_REG_SEQUENCE		0x12c	/* commands ended, read only */

/* Interrupts */
#define MVGPU_REG_IRQ_STATUS		0x180	/* MVGPU_IRQ_*, write 1 to clear */
#define MVGPU_REG_IRQ_ENABLE		0x184	/* MVGPU_IRQ_* */
#define MVGPU_REG_IRQ_COUNT		0x188	/* raised since reset, read only */

/*
 * The start group, read only: a UUID for every slot, as in the text form, or
 * zeroes. A member keeps its slot as long as it is a member.
 */
#define MVGPU_REG_GROUP			0x200
#define MVGPU_GROUP_SLOTS		16
#define MVGPU_GROUP_STRIDE		16	/* bytes */

#define MVGPU_MAGIC			0x7570676d	/* "mgpu" in memory */
#define MVGPU_ABI_VERSION		1

#define MVGPU_PERSONALITY_GRID		1
#define MVGPU_PERSONALITY_IGD		2

#define MVGPU_FEATURE_FILL		0x1
#define MVGPU_FEATURE_CHECKSUM		0x2
#define MVGPU_FEATURE_COPY		0x4
#define MVGPU_FEATURE_PEER		0x8

#define MVGPU_STATE_ONLINE		0x1	/* resources are committed */

/*
 * FILL: the little endian 32 bit word at framebuffer offset o, for every o in
 * [DST, DST + LEN), becomes SEED + o / 4 * MVGPU_FILL_STEP, modulo 2^32.
 * CHECKSUM: RESULT is the CRC-32 (that of zlib) of [SRC, SRC + LEN).
 * COPY: [SRC, SRC + LEN) to DST within the framebuffer; they may overlap.
 * PEER_COPY: [SRC, SRC + LEN) of the framebuffer of the member in slot PEER to
 * DST in the own one.
 */
#define MVGPU_CMD_FILL			1
#define MVGPU_CMD_CHECKSUM		2
#define MVGPU_CMD_COPY			3
#define MVGPU_CMD_PEER_COPY		4
#define MVGPU_FILL_STEP			0x9e3779b1

/* BUSY, or DONE with or without ERROR; 0 when nothing was ever asked */
#define MVGPU_STATUS_BUSY		0x1
#define MVGPU_STATUS_DONE		0x2
#define MVGPU_STATUS_ERROR		0x4
#define MVGPU_STATUS_DROPPED		0x8	/* a doorbell rang while BUSY */
#define MVGPU_STATUS_CODE_SHIFT		8
#define MVGPU_STATUS_CODE_MASK		0xff00

#define MVGPU_ERR_COMMAND		1	/* no such command */
#define MVGPU_ERR_RANGE			2	/* outside the framebuffer */
#define MVGPU_ERR_ALIGN			3	/* FILL: not a multiple of 4 */
#define MVGPU_ERR_ABORTED		4	/* reset or removed meanwhile */
#define MVGPU_ERR_MEMORY		5	/* the host has no memory left */
#define MVGPU_ERR_PEER			6	/* no such peer, or not any more */

#define MVGPU_IRQ_ENGINE		0x1	/* a command has ended */

#endif /* MVGPU_H */
