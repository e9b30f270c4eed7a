// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: BAR 0, the registers
 */

#include <linux/kernel.h>
#include <linux/string.h>

#include "mvgpu-priv.h"

static u32 mvgpu_reg_read(struct mvgpu_dev *mv, u32 reg)
{
	const struct mvgpu_type_desc *desc = mv->type->desc;
	const struct mvgpu_engine *engine = &mv->engine;

	lockdep_assert_held(&mv->lock);

	if (reg >= MVGPU_REG_GROUP && reg < MVGPU_REG_GROUP +
	    MVGPU_GROUP_SLOTS * MVGPU_GROUP_STRIDE)
		return mvgpu_group_word(mv, (reg - MVGPU_REG_GROUP) / 4);

	switch (reg) {
	case MVGPU_REG_MAGIC:
		return MVGPU_MAGIC;
	case MVGPU_REG_ABI:
		return MVGPU_ABI_VERSION;
	case MVGPU_REG_FEATURES:
		return MVGPU_FEATURE_FILL | MVGPU_FEATURE_CHECKSUM |
		       MVGPU_FEATURE_COPY | MVGPU_FEATURE_PEER;
	case MVGPU_REG_PERSONALITY:
		return mv->type->parent->personality->id;
	case MVGPU_REG_UUID:
	case MVGPU_REG_UUID + 4:
	case MVGPU_REG_UUID + 8:
	case MVGPU_REG_UUID + 12:
		return mv->uuid[(reg - MVGPU_REG_UUID) / 4];
	case MVGPU_REG_TYPE:
		return desc->id;
	case MVGPU_REG_HEADS:
		return desc->num_heads;
	case MVGPU_REG_FRL:
		return mv->frl;
	case MVGPU_REG_MAX_RES:
		return desc->width << 16 | desc->height;
	case MVGPU_REG_FB_SIZE_LO:
		return lower_32_bits(desc->framebuffer);
	case MVGPU_REG_FB_SIZE_HI:
		return upper_32_bits(desc->framebuffer);
	case MVGPU_REG_APERTURE_LO:
		return lower_32_bits(mv->aperture);
	case MVGPU_REG_APERTURE_HI:
		return upper_32_bits(mv->aperture);
	case MVGPU_REG_STATE:
		return mvgpu_group_is_online(mv) ? MVGPU_STATE_ONLINE : 0;
	case MVGPU_REG_SCRATCH:
		return mv->scratch;
	case MVGPU_REG_SLOT:
		return mv->slot;	/* fixed while open */
	case MVGPU_REG_MEMBERS:
		return mvgpu_group_members(mv);
	case MVGPU_REG_SRC_LO:
		return lower_32_bits(engine->regs.src);
	case MVGPU_REG_SRC_HI:
		return upper_32_bits(engine->regs.src);
	case MVGPU_REG_DST_LO:
		return lower_32_bits(engine->regs.dst);
	case MVGPU_REG_DST_HI:
		return upper_32_bits(engine->regs.dst);
	case MVGPU_REG_LEN_LO:
		return lower_32_bits(engine->regs.len);
	case MVGPU_REG_LEN_HI:
		return upper_32_bits(engine->regs.len);
	case MVGPU_REG_SEED:
		return engine->regs.seed;
	case MVGPU_REG_PEER:
		return engine->regs.peer;
	case MVGPU_REG_STATUS:
		return engine->status;
	case MVGPU_REG_RESULT:
		return engine->result;
	case MVGPU_REG_SEQUENCE:
		return engine->sequence;
	case MVGPU_REG_IRQ_STATUS:
		return READ_ONCE(mv->irq.status);
	case MVGPU_REG_IRQ_ENABLE:
		return READ_ONCE(mv->irq.enable);
	case MVGPU_REG_IRQ_COUNT:
		return READ_ONCE(mv->irq.count);
	default:
		return 0;
	}
}

static u64 mvgpu_with_lo(u64 old, u32 lo)
{
	return (u64)upper_32_bits(old) << 32 | lo;
}

static u64 mvgpu_with_hi(u64 old, u32 hi)
{
	return (u64)hi << 32 | lower_32_bits(old);
}

static void mvgpu_reg_write(struct mvgpu_dev *mv, u32 reg, u32 val)
{
	struct mvgpu_job *regs = &mv->engine.regs;

	lockdep_assert_held(&mv->lock);

	switch (reg) {
	case MVGPU_REG_SCRATCH:
		mv->scratch = val;
		break;
	case MVGPU_REG_SRC_LO:
		regs->src = mvgpu_with_lo(regs->src, val);
		break;
	case MVGPU_REG_SRC_HI:
		regs->src = mvgpu_with_hi(regs->src, val);
		break;
	case MVGPU_REG_DST_LO:
		regs->dst = mvgpu_with_lo(regs->dst, val);
		break;
	case MVGPU_REG_DST_HI:
		regs->dst = mvgpu_with_hi(regs->dst, val);
		break;
	case MVGPU_REG_LEN_LO:
		regs->len = mvgpu_with_lo(regs->len, val);
		break;
	case MVGPU_REG_LEN_HI:
		regs->len = mvgpu_with_hi(regs->len, val);
		break;
	case MVGPU_REG_SEED:
		regs->seed = val;
		break;
	case MVGPU_REG_PEER:
		regs->peer = val;
		break;
	case MVGPU_REG_COMMAND:
		mvgpu_engine_doorbell(mv, val);
		break;
	case MVGPU_REG_IRQ_STATUS:
		mvgpu_irq_ack(mv, val);
		break;
	case MVGPU_REG_IRQ_ENABLE:
		mvgpu_irq_enable(mv, val);
		break;
	}
}

/* Any offset and size within BAR 0. */
void mvgpu_regs_read(struct mvgpu_dev *mv, u32 pos, u8 *buf, size_t count)
{
	mutex_lock(&mv->lock);
	while (count) {
		u32 skip = pos % 4;
		size_t n = min_t(size_t, count, 4 - skip);
		__le32 val = cpu_to_le32(mvgpu_reg_read(mv, pos - skip));

		memcpy(buf, (u8 *)&val + skip, n);
		pos += n;
		buf += n;
		count -= n;
	}
	mutex_unlock(&mv->lock);
}

/* Only whole registers; what is left and right of them has no effect. */
void mvgpu_regs_write(struct mvgpu_dev *mv, u32 pos, const u8 *buf,
		      size_t count)
{
	mutex_lock(&mv->lock);
	while (count) {
		u32 skip = pos % 4;
		size_t n = min_t(size_t, count, 4 - skip);
		__le32 val;

		if (n == 4) {
			memcpy(&val, buf, 4);
			mvgpu_reg_write(mv, pos, le32_to_cpu(val));
		}
		pos += n;
		buf += n;
		count -= n;
	}
	mutex_unlock(&mv->lock);
}
