/* SPDX-License-Identifier: GPL-2.0 */
/*
 * mvgpu: what differs between the kernels that it builds on
 *
 * Kbuild compiles mvgpu-probe.c for each feature and defines MVGPU_HAVE_*.
 */
#ifndef MVGPU_COMPAT_H
#define MVGPU_COMPAT_H

#include <linux/eventfd.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vfio.h>

static inline void mvgpu_eventfd_signal(struct eventfd_ctx *ctx)
{
#ifdef MVGPU_HAVE_EVENTFD_SIGNAL_1
	eventfd_signal(ctx);
#else
	eventfd_signal(ctx, 1);
#endif
}

static inline void mvgpu_vm_flags_set(struct vm_area_struct *vma,
				      unsigned long flags)
{
#ifdef MVGPU_HAVE_VM_FLAGS_SET
	vm_flags_set(vma, flags);
#else
	vma->vm_flags |= flags;
#endif
}

static inline int mvgpu_vfs_mmap(struct file *file, struct vm_area_struct *vma)
{
#ifdef MVGPU_HAVE_VFS_MMAP
	return vfs_mmap(file, vma);
#else
	return call_mmap(file, vma);
#endif
}

#ifndef kzalloc_obj
#define kzalloc_obj(obj, gfp) kzalloc(sizeof(obj), gfp)
#endif

/* Without a reservation of memory. */
static inline struct file *mvgpu_shmem_file_setup(const char *name, loff_t size)
{
#ifdef MVGPU_HAVE_SHMEM_VMA_FLAGS
	return shmem_file_setup(name, size, mk_vma_flags(VMA_NORESERVE_BIT));
#else
	return shmem_file_setup(name, size, VM_NORESERVE);
#endif
}

/* Where the core does not do it, .release frees the device itself. */
static inline void mvgpu_vfio_free_device(struct vfio_device *vdev)
{
#ifdef MVGPU_HAVE_VFIO_FREE_DEVICE
	vfio_free_device(vdev);
#endif
}

/* Members of struct vfio_device_ops that came with iommufd. */
#ifdef MVGPU_HAVE_VFIO_IOMMUFD
#define MVGPU_VFIO_IOMMUFD_OPS						\
	.bind_iommufd = vfio_iommufd_emulated_bind,			\
	.unbind_iommufd = vfio_iommufd_emulated_unbind,			\
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,		\
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
#else
#define MVGPU_VFIO_IOMMUFD_OPS
#endif

typedef int mvgpu_region_info_fn(struct vfio_device *vdev,
				 struct vfio_region_info *info,
				 struct vfio_info_cap *caps);

/*
 * Newer cores answer VFIO_DEVICE_GET_REGION_INFO: they copy, check argsz, and
 * ask the driver for the region only. The ioctl does not reach the driver.
 */
#ifdef MVGPU_HAVE_REGION_INFO_CAPS
#define MVGPU_VFIO_REGION_OPS(fn) .get_region_info_caps = fn,

static inline long mvgpu_get_region_info(struct vfio_device *vdev,
					 void __user *arg,
					 mvgpu_region_info_fn *fn)
{
	return -ENOTTY;
}
#else
#define MVGPU_VFIO_REGION_OPS(fn)

static inline long mvgpu_get_region_info(struct vfio_device *vdev,
					 void __user *arg,
					 mvgpu_region_info_fn *fn)
{
	const size_t minsz = offsetofend(struct vfio_region_info, offset);
	struct vfio_region_info info = {};
	int ret;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;

	info.cap_offset = 0;
	ret = fn(vdev, &info, NULL);
	if (ret)
		return ret;

	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}
#endif

/* The older name of the same flag. */
#ifndef PCI_IRQ_INTX
#define PCI_IRQ_INTX PCI_IRQ_LEGACY
#endif

#endif /* MVGPU_COMPAT_H */
