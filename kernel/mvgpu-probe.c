// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: uses of what only some kernels have
 *
 * Kbuild compiles this with one PROBE_* at a time; it is no part of the module.
 */
#include <linux/eventfd.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/shmem_fs.h>
#include <linux/vfio.h>

#if defined(PROBE_EVENTFD_SIGNAL_1)

static inline void mvgpu_probe(struct eventfd_ctx *ctx)
{
	eventfd_signal(ctx);
}

#elif defined(PROBE_VM_FLAGS_SET)

static inline void mvgpu_probe(struct vm_area_struct *vma)
{
	vm_flags_set(vma, VM_DONTEXPAND);
}

#elif defined(PROBE_VFS_MMAP)

static inline int mvgpu_probe(struct file *file, struct vm_area_struct *vma)
{
	return vfs_mmap(file, vma);
}

#elif defined(PROBE_SHMEM_VMA_FLAGS)

static inline struct file *mvgpu_probe(vma_flags_t flags)
{
	return shmem_file_setup("", 0, flags);
}

#elif defined(PROBE_VFIO_FREE_DEVICE)

static inline void mvgpu_probe(struct vfio_device *vdev)
{
	vfio_free_device(vdev);
}

#elif defined(PROBE_VFIO_IOMMUFD)

extern const struct vfio_device_ops mvgpu_probe;
const struct vfio_device_ops mvgpu_probe = {
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

#elif defined(PROBE_REGION_INFO_CAPS)

static int mvgpu_probe_caps(struct vfio_device *vdev,
			    struct vfio_region_info *info,
			    struct vfio_info_cap *caps)
{
	return 0;
}

extern const struct vfio_device_ops mvgpu_probe;
const struct vfio_device_ops mvgpu_probe = {
	.get_region_info_caps = mvgpu_probe_caps,
};

#else
#error "nothing to probe"
#endif
