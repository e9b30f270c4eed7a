// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: what the doorbell starts
 *
 * A write to MVGPU_REG_COMMAND checks and latches a job and returns; a work
 * item does it piece by piece and raises the interrupt. One job at a time.
 */

#include <linux/crc32.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "mvgpu-priv.h"

#define MVGPU_CHUNK	SZ_64K

static bool mvgpu_engine_aborted(struct mvgpu_dev *mv)
{
	cond_resched();
	return READ_ONCE(mv->engine.abort);
}

static u32 mvgpu_error(int err)
{
	switch (err) {
	case 0:
		return 0;
	case -ECANCELED:
		return MVGPU_ERR_ABORTED;
	case -EXDEV:
		return MVGPU_ERR_PEER;
	default:
		/* shmem: -ENOMEM, -ENOSPC, -EIO from swap */
		return MVGPU_ERR_MEMORY;
	}
}

static int mvgpu_fill(struct mvgpu_dev *mv, const struct mvgpu_job *job,
		      __le32 *buf)
{
	u64 end = job->dst + job->len;
	u64 pos = job->dst;
	int ret;

	while (pos < end) {
		size_t n = min_t(u64, end - pos, MVGPU_CHUNK);
		u32 word = job->seed + (u32)(pos / 4) * MVGPU_FILL_STEP;
		size_t i;

		if (mvgpu_engine_aborted(mv))
			return -ECANCELED;

		for (i = 0; i < n / 4; i++) {
			buf[i] = cpu_to_le32(word);
			word += MVGPU_FILL_STEP;
		}
		ret = mvgpu_fb_write(mv, pos, buf, n);
		if (ret)
			return ret;
		pos += n;
	}
	return 0;
}

static int mvgpu_checksum(struct mvgpu_dev *mv, const struct mvgpu_job *job,
			  void *buf, u32 *result)
{
	u64 end = job->src + job->len;
	u64 pos = job->src;
	u32 crc = ~0;
	int ret;

	while (pos < end) {
		size_t n = min_t(u64, end - pos, MVGPU_CHUNK);

		if (mvgpu_engine_aborted(mv))
			return -ECANCELED;

		ret = mvgpu_fb_read(mv, pos, buf, n);
		if (ret)
			return ret;
		crc = crc32_le(crc, buf, n);
		pos += n;
	}
	*result = ~crc;
	return 0;
}

/* From the end when the target lies behind the source, for overlap. */
static int mvgpu_copy(struct mvgpu_dev *mv, const struct mvgpu_job *job,
		      void *buf)
{
	u64 left = job->len;
	u64 done = 0;
	int ret;

	while (left) {
		size_t n = min_t(u64, left, MVGPU_CHUNK);
		u64 at = job->dst > job->src ? left - n : done;

		if (mvgpu_engine_aborted(mv))
			return -ECANCELED;

		ret = mvgpu_fb_read(mv, job->src + at, buf, n);
		if (ret)
			return ret;
		ret = mvgpu_fb_write(mv, job->dst + at, buf, n);
		if (ret)
			return ret;
		left -= n;
		done += n;
	}
	return 0;
}

/*
 * Between two devices: neither's lock is held. The peer's framebuffer is kept
 * by a reference, and asked for again before every piece, since the group can
 * stop and the peer can be closed or removed meanwhile.
 */
static int mvgpu_peer_copy(struct mvgpu_dev *mv, const struct mvgpu_job *job,
			   void *buf)
{
	struct file *peer = mv->engine.peer;
	u64 done = 0;
	int ret;

	while (done < job->len) {
		size_t n = min_t(u64, job->len - done, MVGPU_CHUNK);

		if (mvgpu_engine_aborted(mv))
			return -ECANCELED;
		if (!mvgpu_group_has_peer(mv, peer))
			return -EXDEV;

		ret = mvgpu_fb_read_file(peer, job->src + done, buf, n);
		if (ret)
			return ret;
		ret = mvgpu_fb_write(mv, job->dst + done, buf, n);
		if (ret)
			return ret;
		done += n;
	}
	return 0;
}

static void mvgpu_engine_end(struct mvgpu_dev *mv, u32 error)
{
	struct mvgpu_engine *engine = &mv->engine;

	lockdep_assert_held(&mv->lock);

	engine->status &= ~MVGPU_STATUS_BUSY;
	engine->status |= MVGPU_STATUS_DONE;
	if (error)
		engine->status |= MVGPU_STATUS_ERROR |
				  error << MVGPU_STATUS_CODE_SHIFT;
	engine->sequence++;
	mvgpu_irq_raise(mv, MVGPU_IRQ_ENGINE);
}

static void mvgpu_engine_work(struct work_struct *work)
{
	struct mvgpu_dev *mv = container_of(work, struct mvgpu_dev,
					    engine.work);
	struct mvgpu_engine *engine = &mv->engine;
	const struct mvgpu_job *job = &engine->job;
	struct file *peer;
	u32 result = 0;
	void *buf;
	int ret;

	buf = kvmalloc(MVGPU_CHUNK, GFP_KERNEL);
	if (!buf) {
		ret = -ENOMEM;
		goto out;
	}

	switch (job->command) {
	case MVGPU_CMD_FILL:
		ret = mvgpu_fill(mv, job, buf);
		break;
	case MVGPU_CMD_CHECKSUM:
		ret = mvgpu_checksum(mv, job, buf, &result);
		break;
	case MVGPU_CMD_PEER_COPY:
		ret = mvgpu_peer_copy(mv, job, buf);
		break;
	default:
		ret = mvgpu_copy(mv, job, buf);
		break;
	}
	kvfree(buf);

out:
	mutex_lock(&mv->lock);
	peer = engine->peer;
	engine->peer = NULL;
	/* An abort is to bring silence: the registers are about to go. */
	if (!READ_ONCE(engine->abort)) {
		engine->result = result;
		mvgpu_engine_end(mv, mvgpu_error(ret));
	}
	mutex_unlock(&mv->lock);

	if (peer)
		fput(peer);
}

static bool mvgpu_engine_inside(u64 size, u64 pos, u64 len)
{
	return pos <= size && len <= size - pos;
}

/* A peer's framebuffer can have another size than the own one. */
static u32 mvgpu_engine_check_peer(struct mvgpu_dev *mv,
				   const struct mvgpu_job *job)
{
	struct file *peer = mvgpu_group_peer(mv, job->peer);

	lockdep_assert_held(&mv->lock);

	if (!peer)
		return MVGPU_ERR_PEER;

	if (!mvgpu_engine_inside(i_size_read(file_inode(peer)), job->src,
				 job->len) ||
	    !mvgpu_engine_inside(mv->type->desc->framebuffer, job->dst,
				 job->len)) {
		fput(peer);
		return MVGPU_ERR_RANGE;
	}
	mv->engine.peer = peer;
	return 0;
}

static u32 mvgpu_engine_check(struct mvgpu_dev *mv,
			      const struct mvgpu_job *job)
{
	u64 size = mv->type->desc->framebuffer;
	bool src = true, dst = true;

	switch (job->command) {
	case MVGPU_CMD_FILL:
		if ((job->dst | job->len) % 4)
			return MVGPU_ERR_ALIGN;
		src = false;
		break;
	case MVGPU_CMD_CHECKSUM:
		dst = false;
		break;
	case MVGPU_CMD_COPY:
		break;
	case MVGPU_CMD_PEER_COPY:
		return mvgpu_engine_check_peer(mv, job);
	default:
		return MVGPU_ERR_COMMAND;
	}

	if (src && !mvgpu_engine_inside(size, job->src, job->len))
		return MVGPU_ERR_RANGE;
	if (dst && !mvgpu_engine_inside(size, job->dst, job->len))
		return MVGPU_ERR_RANGE;
	return 0;
}

void mvgpu_engine_doorbell(struct mvgpu_dev *mv, u32 command)
{
	struct mvgpu_engine *engine = &mv->engine;
	u32 error;

	lockdep_assert_held(&mv->lock);

	if (engine->closed)
		return;
	if (engine->status & MVGPU_STATUS_BUSY) {
		engine->status |= MVGPU_STATUS_DROPPED;
		return;
	}

	engine->job = engine->regs;
	engine->job.command = command;
	engine->result = 0;
	engine->status = MVGPU_STATUS_BUSY;

	error = mvgpu_engine_check(mv, &engine->job);
	if (error)
		mvgpu_engine_end(mv, error);
	else
		queue_work(mvgpu_wq, &engine->work);
}

void mvgpu_engine_init(struct mvgpu_dev *mv)
{
	INIT_WORK(&mv->engine.work, mvgpu_engine_work);
	mv->engine.closed = true;
}

/* Clears the registers and lets the doorbell ring. */
void mvgpu_engine_open(struct mvgpu_dev *mv)
{
	struct mvgpu_engine *engine = &mv->engine;

	lockdep_assert_held(&mv->lock);

	memset(&engine->regs, 0, sizeof(engine->regs));
	engine->status = 0;
	engine->result = 0;
	engine->sequence = 0;
	engine->closed = false;
	WRITE_ONCE(engine->abort, false);
}

/* Returns when no job runs, and none can start before the next open. */
void mvgpu_engine_stop(struct mvgpu_dev *mv)
{
	struct file *peer;

	mutex_lock(&mv->lock);
	mv->engine.closed = true;
	WRITE_ONCE(mv->engine.abort, true);
	mutex_unlock(&mv->lock);

	cancel_work_sync(&mv->engine.work);

	/* Of a job that never ran. */
	mutex_lock(&mv->lock);
	peer = mv->engine.peer;
	mv->engine.peer = NULL;
	mutex_unlock(&mv->lock);
	if (peer)
		fput(peer);
}
