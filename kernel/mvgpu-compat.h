/* SPDX-License-Identifier: GPL-2.0 */
/*
 * mvgpu: what differs between the kernels that it builds on
 *
 * Kbuild looks the features up in the headers and defines MVGPU_HAVE_*.
 */
#ifndef MVGPU_COMPAT_H
#define MVGPU_COMPAT_H

#include <linux/eventfd.h>
#include <linux/mm.h>
#include <linux/pci.h>
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

/* The older name of the same flag. */
#ifndef PCI_IRQ_INTX
#define PCI_IRQ_INTX PCI_IRQ_LEGACY
#endif

#endif /* MVGPU_COMPAT_H */
