// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: interrupts
 *
 * The device has one cause register and one line. As INTx the line is a level:
 * it is high while an enabled cause is pending; delivery masks it, and what
 * unmasks it (the guest's end of interrupt) delivers again if it is still high.
 * As MSI every raise is one message. Delivery is an eventfd of the user.
 */

#include <linux/device.h>
#include <linux/err.h>
#include <linux/eventfd.h>

#include "mvgpu-compat.h"
#include "mvgpu-priv.h"

static void mvgpu_irq_signal(struct mvgpu_irq *irq, u32 index)
{
	lockdep_assert_held(&irq->lock);

	if (irq->trigger[index])
		mvgpu_eventfd_signal(irq->trigger[index]);
}

static bool mvgpu_irq_level(const struct mvgpu_irq *irq)
{
	return irq->status & irq->enable;
}

static void mvgpu_intx_update(struct mvgpu_irq *irq)
{
	lockdep_assert_held(&irq->lock);

	if (irq->mode != MVGPU_IRQ_MODE_INTX || irq->intx_masked ||
	    irq->intx_disabled || !mvgpu_irq_level(irq) ||
	    !irq->trigger[VFIO_PCI_INTX_IRQ_INDEX])
		return;

	irq->intx_masked = true;
	mvgpu_irq_signal(irq, VFIO_PCI_INTX_IRQ_INDEX);
}

static void mvgpu_intx_mask(struct mvgpu_irq *irq, bool mask)
{
	unsigned long flags;

	spin_lock_irqsave(&irq->lock, flags);
	irq->intx_masked = mask;
	mvgpu_intx_update(irq);
	spin_unlock_irqrestore(&irq->lock, flags);
}

/*
 * The device's side
 */

void mvgpu_irq_raise(struct mvgpu_dev *mv, u32 bits)
{
	struct mvgpu_irq *irq = &mv->irq;
	unsigned long flags;

	spin_lock_irqsave(&irq->lock, flags);
	irq->status |= bits;
	irq->count++;
	if (irq->mode == MVGPU_IRQ_MODE_MSI) {
		if (mvgpu_irq_level(irq))
			mvgpu_irq_signal(irq, VFIO_PCI_MSI_IRQ_INDEX);
	} else {
		mvgpu_intx_update(irq);
	}
	spin_unlock_irqrestore(&irq->lock, flags);
}

void mvgpu_irq_ack(struct mvgpu_dev *mv, u32 bits)
{
	struct mvgpu_irq *irq = &mv->irq;
	unsigned long flags;

	spin_lock_irqsave(&irq->lock, flags);
	irq->status &= ~bits;
	spin_unlock_irqrestore(&irq->lock, flags);
}

/* Enabling a cause that is already pending raises the interrupt. */
void mvgpu_irq_enable(struct mvgpu_dev *mv, u32 bits)
{
	struct mvgpu_irq *irq = &mv->irq;
	unsigned long flags;
	bool before;

	spin_lock_irqsave(&irq->lock, flags);
	before = mvgpu_irq_level(irq);
	irq->enable = bits & MVGPU_IRQ_ENGINE;
	if (irq->mode == MVGPU_IRQ_MODE_MSI) {
		if (!before && mvgpu_irq_level(irq))
			mvgpu_irq_signal(irq, VFIO_PCI_MSI_IRQ_INDEX);
	} else {
		mvgpu_intx_update(irq);
	}
	spin_unlock_irqrestore(&irq->lock, flags);
}

void mvgpu_irq_intx_disable(struct mvgpu_dev *mv, bool disable)
{
	struct mvgpu_irq *irq = &mv->irq;
	unsigned long flags;

	spin_lock_irqsave(&irq->lock, flags);
	irq->intx_disabled = disable;
	mvgpu_intx_update(irq);
	spin_unlock_irqrestore(&irq->lock, flags);
}

bool mvgpu_irq_intx_pending(struct mvgpu_dev *mv)
{
	struct mvgpu_irq *irq = &mv->irq;
	unsigned long flags;
	bool pending;

	spin_lock_irqsave(&irq->lock, flags);
	pending = mvgpu_irq_level(irq);
	spin_unlock_irqrestore(&irq->lock, flags);

	return pending;
}

/* Asks the user to let go of the device, as vfio-pci does. */
void mvgpu_irq_request(struct mvgpu_dev *mv, unsigned int count)
{
	struct mvgpu_irq *irq = &mv->irq;
	unsigned long flags;
	bool heard;

	spin_lock_irqsave(&irq->lock, flags);
	heard = irq->trigger[VFIO_PCI_REQ_IRQ_INDEX];
	mvgpu_irq_signal(irq, VFIO_PCI_REQ_IRQ_INDEX);
	spin_unlock_irqrestore(&irq->lock, flags);

	if (!count)
		dev_info(mdev_dev(mv->mdev), "asked the user to let go%s\n",
			 heard ? "" : ", which does not listen");
}

/*
 * The VFIO user's side
 */

int mvgpu_irq_info(u32 index, struct vfio_irq_info *info)
{
	info->flags = 0;
	info->count = 0;

	switch (index) {
	case VFIO_PCI_INTX_IRQ_INDEX:
		info->flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE |
			      VFIO_IRQ_INFO_AUTOMASKED;
		info->count = 1;
		return 0;
	case VFIO_PCI_MSI_IRQ_INDEX:
	case VFIO_PCI_ERR_IRQ_INDEX:
	case VFIO_PCI_REQ_IRQ_INDEX:
		info->flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE;
		info->count = 1;
		return 0;
	case VFIO_PCI_MSIX_IRQ_INDEX:
		return 0;
	default:
		return -EINVAL;
	}
}

static void mvgpu_trigger_replace(struct mvgpu_irq *irq, u32 index,
				  struct eventfd_ctx *ctx,
				  enum mvgpu_irq_mode mode)
{
	struct eventfd_ctx *old;
	unsigned long flags;

	spin_lock_irqsave(&irq->lock, flags);
	old = irq->trigger[index];
	irq->trigger[index] = ctx;
	if (irq->mode != mode) {
		irq->mode = mode;
		irq->intx_masked = false;
	}
	mvgpu_intx_update(irq);
	spin_unlock_irqrestore(&irq->lock, flags);

	if (old)
		eventfd_ctx_put(old);
}

/* The mode that an index belongs to; ERR and REQ leave it alone. */
static enum mvgpu_irq_mode mvgpu_mode_of(const struct mvgpu_irq *irq,
					 u32 index)
{
	switch (index) {
	case VFIO_PCI_INTX_IRQ_INDEX:
		return MVGPU_IRQ_MODE_INTX;
	case VFIO_PCI_MSI_IRQ_INDEX:
		return MVGPU_IRQ_MODE_MSI;
	default:
		return irq->mode;
	}
}

static void mvgpu_trigger_disable(struct mvgpu_irq *irq, u32 index)
{
	enum mvgpu_irq_mode mode = mvgpu_mode_of(irq, index);

	lockdep_assert_held(&irq->config_lock);

	if (irq->mode != mode)
		return;
	if (index == VFIO_PCI_INTX_IRQ_INDEX)
		vfio_virqfd_disable(&irq->unmask);
	if (index == VFIO_PCI_INTX_IRQ_INDEX ||
	    index == VFIO_PCI_MSI_IRQ_INDEX)
		mode = MVGPU_IRQ_MODE_NONE;
	mvgpu_trigger_replace(irq, index, NULL, mode);
}

static int mvgpu_trigger_eventfd(struct mvgpu_irq *irq, u32 index, s32 fd)
{
	struct eventfd_ctx *ctx = NULL;

	if (fd >= 0) {
		ctx = eventfd_ctx_fdget(fd);
		if (IS_ERR(ctx))
			return PTR_ERR(ctx);
	} else if (fd != -1) {
		return -EINVAL;
	}
	mvgpu_trigger_replace(irq, index, ctx, mvgpu_mode_of(irq, index));
	return 0;
}

/* A user fires its own interrupt, to test the path. */
static void mvgpu_trigger_fire(struct mvgpu_irq *irq, u32 index)
{
	unsigned long flags;

	spin_lock_irqsave(&irq->lock, flags);
	if (index != VFIO_PCI_INTX_IRQ_INDEX) {
		mvgpu_irq_signal(irq, index);
	} else if (!irq->intx_masked && irq->trigger[index]) {
		irq->intx_masked = true;
		mvgpu_irq_signal(irq, index);
	}
	spin_unlock_irqrestore(&irq->lock, flags);
}

static int mvgpu_irq_set_trigger(struct mvgpu_irq *irq,
				 const struct vfio_irq_set *hdr,
				 const void *data)
{
	u32 type = hdr->flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
	enum mvgpu_irq_mode mode = mvgpu_mode_of(irq, hdr->index);

	lockdep_assert_held(&irq->config_lock);

	if (type == VFIO_IRQ_SET_DATA_NONE && !hdr->count) {
		mvgpu_trigger_disable(irq, hdr->index);
		return 0;
	}

	/* INTx and MSI exclude each other. */
	if (hdr->count != 1 ||
	    (irq->mode != mode && irq->mode != MVGPU_IRQ_MODE_NONE))
		return -EINVAL;

	if (type == VFIO_IRQ_SET_DATA_EVENTFD)
		return mvgpu_trigger_eventfd(irq, hdr->index,
					     *(const s32 *)data);

	if (irq->mode != mode)
		return -EINVAL;
	if (type == VFIO_IRQ_SET_DATA_NONE || *(const u8 *)data)
		mvgpu_trigger_fire(irq, hdr->index);
	return 0;
}

static void mvgpu_intx_unmask_thread(void *opaque, void *unused)
{
	struct mvgpu_dev *mv = opaque;

	mvgpu_intx_mask(&mv->irq, false);
}

/* Runs under the lock of the eventfd's wait queue: leave it to the thread. */
static int mvgpu_intx_unmask_handler(void *opaque, void *unused)
{
	return 1;
}

static int mvgpu_irq_set_mask(struct mvgpu_dev *mv,
			      const struct vfio_irq_set *hdr,
			      const void *data, bool mask)
{
	struct mvgpu_irq *irq = &mv->irq;
	u32 type = hdr->flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
	s32 fd;

	lockdep_assert_held(&irq->config_lock);

	if (hdr->index != VFIO_PCI_INTX_IRQ_INDEX)
		return -ENOTTY;
	if (hdr->count != 1 || irq->mode != MVGPU_IRQ_MODE_INTX)
		return -EINVAL;

	if (type == VFIO_IRQ_SET_DATA_EVENTFD) {
		if (mask)
			return -ENOTTY;
		fd = *(const s32 *)data;
		if (fd >= 0)
			return vfio_virqfd_enable(mv,
						  mvgpu_intx_unmask_handler,
						  mvgpu_intx_unmask_thread,
						  NULL, &irq->unmask, fd);
		vfio_virqfd_disable(&irq->unmask);
		return 0;
	}

	if (type == VFIO_IRQ_SET_DATA_NONE || *(const u8 *)data)
		mvgpu_intx_mask(irq, mask);
	return 0;
}

/* The header and the size of data have been checked. */
int mvgpu_irq_set(struct mvgpu_dev *mv, const struct vfio_irq_set *hdr,
		  const void *data)
{
	struct mvgpu_irq *irq = &mv->irq;
	int ret;

	mutex_lock(&irq->config_lock);
	switch (hdr->flags & VFIO_IRQ_SET_ACTION_TYPE_MASK) {
	case VFIO_IRQ_SET_ACTION_MASK:
		ret = mvgpu_irq_set_mask(mv, hdr, data, true);
		break;
	case VFIO_IRQ_SET_ACTION_UNMASK:
		ret = mvgpu_irq_set_mask(mv, hdr, data, false);
		break;
	case VFIO_IRQ_SET_ACTION_TRIGGER:
		ret = mvgpu_irq_set_trigger(irq, hdr, data);
		break;
	default:
		ret = -EINVAL;
	}
	mutex_unlock(&irq->config_lock);

	return ret;
}

void mvgpu_irq_init(struct mvgpu_dev *mv)
{
	mutex_init(&mv->irq.config_lock);
	spin_lock_init(&mv->irq.lock);
}

void mvgpu_irq_destroy(struct mvgpu_dev *mv)
{
	mutex_destroy(&mv->irq.config_lock);
}

/* The registers only: what the user has set up with VFIO stays. */
void mvgpu_irq_reset(struct mvgpu_dev *mv)
{
	struct mvgpu_irq *irq = &mv->irq;
	unsigned long flags;

	spin_lock_irqsave(&irq->lock, flags);
	irq->status = 0;
	irq->enable = 0;
	irq->count = 0;
	spin_unlock_irqrestore(&irq->lock, flags);
}

void mvgpu_irq_close(struct mvgpu_dev *mv)
{
	u32 index;

	mutex_lock(&mv->irq.config_lock);
	for (index = 0; index < VFIO_PCI_NUM_IRQS; index++)
		mvgpu_trigger_disable(&mv->irq, index);
	mutex_unlock(&mv->irq.config_lock);
}
