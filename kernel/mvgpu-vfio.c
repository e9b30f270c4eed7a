// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: the device as its VFIO user sees it
 *
 * Everything here comes from a process that is not trusted: every offset, size
 * and count is checked before it is used.
 */

#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "mvgpu-compat.h"
#include "mvgpu-priv.h"

/* A region's number stands in the upper bits of the file offset. */
#define MVGPU_OFFSET_SHIFT	40
#define MVGPU_OFFSET_MASK	((1ULL << MVGPU_OFFSET_SHIFT) - 1)

static const u8 mvgpu_guid_order[16] = {
	3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15
};

/* A guid_t is stored by halves of mixed order; its text is not. */
static void mvgpu_uuid_regs(struct mvgpu_dev *mv, const guid_t *guid)
{
	unsigned int i;

	memset(mv->uuid, 0, sizeof(mv->uuid));
	for (i = 0; i < sizeof(mvgpu_guid_order); i++)
		mv->uuid[i / 4] |= (u32)guid->b[mvgpu_guid_order[i]] <<
				   (8 * (i % 4));
}

static int mvgpu_vfio_init(struct vfio_device *vdev)
{
	struct mvgpu_dev *mv = mvgpu_from_vdev(vdev);
	struct mdev_device *mdev = to_mdev_device(vdev->dev);
	struct mvgpu_type *type = mvgpu_from_mtype(mdev->type);
	int ret;

	ret = mvgpu_fault(MVGPU_FAULT_CREATE, &mdev->uuid, &guid_null);
	if (ret)
		return ret;

	ret = mvgpu_type_take(type);
	if (ret)
		return ret;

	kobject_get(&type->mtype.kobj);
	mv->mdev = mdev;
	mv->type = type;
	mv->frl = type->desc->frl_config;
	mv->aperture = min_t(u64, type->desc->framebuffer,
			     (u64)mvgpu_aperture_mib * SZ_1M);
	mvgpu_uuid_regs(mv, &mdev->uuid);

	ret = mvgpu_pci_init(mv);
	if (ret)
		goto err_give;

	ret = mvgpu_group_init(mv);
	if (ret)
		goto err_pci;

	mutex_init(&mv->reset_lock);
	mutex_init(&mv->lock);
	mvgpu_irq_init(mv);
	mvgpu_engine_init(mv);
	return 0;

err_pci:
	mvgpu_pci_destroy(mv);
err_give:
	mvgpu_type_give(type);
	kobject_put(&type->mtype.kobj);
	return ret;
}

/* The last reference is gone, and only now is the capacity free again. */
static void mvgpu_vfio_release(struct vfio_device *vdev)
{
	struct mvgpu_dev *mv = mvgpu_from_vdev(vdev);
	struct mvgpu_type *type = mv->type;

	/* It has left already, unless the probe failed. */
	mvgpu_group_leave(mv);
	kfree(mv->params);
	mvgpu_irq_destroy(mv);
	mutex_destroy(&mv->lock);
	mutex_destroy(&mv->reset_lock);
	mvgpu_pci_destroy(mv);
	mvgpu_vfio_free_device(vdev);
	mvgpu_type_give(type);
	kobject_put(&type->mtype.kobj);
}

/* Ends the running job and puts registers and configuration space back. */
void mvgpu_reset(struct mvgpu_dev *mv)
{
	mutex_lock(&mv->reset_lock);
	mvgpu_engine_stop(mv);

	mutex_lock(&mv->lock);
	mv->scratch = 0;
	mvgpu_irq_reset(mv);
	mvgpu_pci_reset(mv);
	mvgpu_engine_open(mv);
	mutex_unlock(&mv->lock);
	mutex_unlock(&mv->reset_lock);
}

/* The first file descriptor. */
static int mvgpu_open_device(struct vfio_device *vdev)
{
	struct mvgpu_dev *mv = mvgpu_from_vdev(vdev);
	int ret;

	ret = mvgpu_fault(MVGPU_FAULT_OPEN, &mv->mdev->uuid, &guid_null);
	if (ret)
		return ret;

	ret = mvgpu_group_open(mv);
	if (ret)
		return ret;

	ret = mvgpu_fb_open(mv);
	if (ret) {
		mvgpu_group_close(mv);
		return ret;
	}

	mvgpu_reset(mv);
	atomic_set(&mv->accessed, 0);
	mvgpu_log(mv, MVGPU_EVENT_OPENED, NULL, 0);
	dev_info(mdev_dev(mv->mdev), "opened\n");
	return 0;
}

/* The last file descriptor, and with it every user of the registers. */
static void mvgpu_close_device(struct vfio_device *vdev)
{
	struct mvgpu_dev *mv = mvgpu_from_vdev(vdev);

	mvgpu_engine_stop(mv);
	mvgpu_irq_close(mv);
	mvgpu_fb_close(mv);
	mvgpu_log(mv, MVGPU_EVENT_CLOSED, NULL, 0);
	dev_info(mdev_dev(mv->mdev), "closed\n");
	mvgpu_group_close(mv);
}

static void mvgpu_request(struct vfio_device *vdev, unsigned int count)
{
	mvgpu_irq_request(mvgpu_from_vdev(vdev), count);
}

static u64 mvgpu_region_size(const struct mvgpu_dev *mv, u32 index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_REGS:
		return MVGPU_BAR_REGS_SIZE;
	case VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_FB:
		return mv->aperture;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return PCI_CFG_SPACE_EXP_SIZE;
	default:
		return 0;
	}
}

static int mvgpu_region_read(struct mvgpu_dev *mv, u32 index, u64 pos,
			     void *buf, size_t count)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_REGS:
		mvgpu_regs_read(mv, pos, buf, count);
		return 0;
	case VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_FB:
		return mvgpu_fb_read(mv, pos, buf, count);
	default:
		mvgpu_pci_read(mv, pos, buf, count);
		return 0;
	}
}

static int mvgpu_region_write(struct mvgpu_dev *mv, u32 index, u64 pos,
			      const void *buf, size_t count)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_REGS:
		mvgpu_regs_write(mv, pos, buf, count);
		return 0;
	case VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_FB:
		return mvgpu_fb_write(mv, pos, buf, count);
	default:
		if (mvgpu_pci_write(mv, pos, buf, count))
			mvgpu_reset(mv);
		return 0;
	}
}

/* Whatever touches the device. The first one is what a start must precede. */
static int mvgpu_touch(struct mvgpu_dev *mv)
{
	int ret;

	ret = mvgpu_fault(MVGPU_FAULT_REGION, &mv->mdev->uuid, &guid_null);
	if (ret)
		return ret;

	if (!atomic_read(&mv->accessed) && !atomic_xchg(&mv->accessed, 1))
		mvgpu_log(mv, MVGPU_EVENT_ACCESSED, NULL,
			  mvgpu_group_is_online(mv));
	return 0;
}

/*
 * One access in pieces, through a buffer on the stack or, for bulk, a page.
 * A piece ends at a multiple of its size, so that no register is split.
 */
static ssize_t mvgpu_access(struct mvgpu_dev *mv, char __user *rbuf,
			    const char __user *wbuf, size_t count,
			    loff_t *ppos)
{
	u64 pos = (u64)*ppos & MVGPU_OFFSET_MASK;
	u32 index = (u64)*ppos >> MVGPU_OFFSET_SHIFT;
	u64 size = mvgpu_region_size(mv, index);
	u8 small[64] __aligned(8);
	size_t piece = sizeof(small);
	void *page = NULL;
	void *buf = small;
	size_t done = 0;
	int ret = 0;

	if (!count)
		return 0;
	if (pos >= size)
		return -EINVAL;
	count = min_t(u64, count, size - pos);

	ret = mvgpu_touch(mv);
	if (ret)
		return ret;

	if (count > piece) {
		page = (void *)__get_free_page(GFP_KERNEL);
		if (!page)
			return -ENOMEM;
		buf = page;
		piece = PAGE_SIZE;
	}

	while (done < count) {
		size_t n = min_t(size_t, count - done, piece - pos % piece);

		if (rbuf) {
			ret = mvgpu_region_read(mv, index, pos, buf, n);
			if (!ret && copy_to_user(rbuf + done, buf, n))
				ret = -EFAULT;
		} else if (copy_from_user(buf, wbuf + done, n)) {
			ret = -EFAULT;
		} else {
			ret = mvgpu_region_write(mv, index, pos, buf, n);
		}
		if (ret)
			break;
		pos += n;
		done += n;
	}
	free_page((unsigned long)page);

	if (!done)
		return ret;
	*ppos += done;
	return done;
}

static ssize_t mvgpu_read(struct vfio_device *vdev, char __user *buf,
			  size_t count, loff_t *ppos)
{
	return mvgpu_access(mvgpu_from_vdev(vdev), buf, NULL, count, ppos);
}

static ssize_t mvgpu_write(struct vfio_device *vdev, const char __user *buf,
			   size_t count, loff_t *ppos)
{
	return mvgpu_access(mvgpu_from_vdev(vdev), NULL, buf, count, ppos);
}

static int mvgpu_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	const unsigned int shift = MVGPU_OFFSET_SHIFT - PAGE_SHIFT;
	unsigned long pgoff = vma->vm_pgoff & ((1UL << shift) - 1);
	int ret;

	if (vma->vm_pgoff >> shift != VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_FB)
		return -EINVAL;

	ret = mvgpu_touch(mvgpu_from_vdev(vdev));
	if (ret)
		return ret;

	return mvgpu_fb_mmap(mvgpu_from_vdev(vdev), vma, pgoff);
}

static long mvgpu_get_info(void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info = {};

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;

	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;

	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static int mvgpu_region_info_caps(struct vfio_device *vdev,
				  struct vfio_region_info *info,
				  struct vfio_info_cap *caps)
{
	struct mvgpu_dev *mv = container_of(vdev, struct mvgpu_dev, vdev);

	if (info->index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;

	info->flags = 0;
	info->size = mvgpu_region_size(mv, info->index);
	info->offset = (u64)info->index << MVGPU_OFFSET_SHIFT;
	if (info->size)
		info->flags = VFIO_REGION_INFO_FLAG_READ |
			      VFIO_REGION_INFO_FLAG_WRITE;
	if (info->index == VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_FB)
		info->flags |= VFIO_REGION_INFO_FLAG_MMAP;

	return 0;
}

static long mvgpu_get_irq_info(void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info = {};
	int ret;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;

	ret = mvgpu_irq_info(info.index, &info);
	if (ret)
		return ret;

	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long mvgpu_set_irqs(struct mvgpu_dev *mv, u8 __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_irq_set, count);
	struct vfio_irq_info info;
	struct vfio_irq_set hdr;
	size_t size = 0;
	void *data = NULL;
	int ret;

	if (copy_from_user(&hdr, arg, minsz))
		return -EFAULT;

	ret = mvgpu_irq_info(hdr.index, &info);
	if (ret)
		return ret;

	ret = vfio_set_irqs_validate_and_prepare(&hdr, info.count,
						 VFIO_PCI_NUM_IRQS, &size);
	if (ret)
		return ret;

	if (size) {
		data = memdup_user(arg + minsz, size);
		if (IS_ERR(data))
			return PTR_ERR(data);
	}
	ret = mvgpu_irq_set(mv, &hdr, data);
	kfree(data);
	return ret;
}

static long mvgpu_ioctl(struct vfio_device *vdev, unsigned int cmd,
			unsigned long arg)
{
	struct mvgpu_dev *mv = mvgpu_from_vdev(vdev);
	void __user *uarg = (void __user *)arg;

	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return mvgpu_get_info(uarg);
	case VFIO_DEVICE_GET_REGION_INFO:
		return mvgpu_get_region_info(vdev, uarg,
					     mvgpu_region_info_caps);
	case VFIO_DEVICE_GET_IRQ_INFO:
		return mvgpu_get_irq_info(uarg);
	case VFIO_DEVICE_SET_IRQS:
		return mvgpu_set_irqs(mv, uarg);
	case VFIO_DEVICE_RESET:
		mvgpu_reset(mv);
		return 0;
	default:
		return -ENOTTY;
	}
}

const struct vfio_device_ops mvgpu_vfio_ops = {
	.name = MVGPU_NAME,
	.init = mvgpu_vfio_init,
	.release = mvgpu_vfio_release,
	.open_device = mvgpu_open_device,
	.close_device = mvgpu_close_device,
	.read = mvgpu_read,
	.write = mvgpu_write,
	.mmap = mvgpu_mmap,
	.ioctl = mvgpu_ioctl,
	.request = mvgpu_request,
	MVGPU_VFIO_IOMMUFD_OPS
	MVGPU_VFIO_REGION_OPS(mvgpu_region_info_caps)
};
