// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: the framebuffer
 *
 * An unlinked shmem file: its pages come when they are first written, can be
 * swapped, and start as zeroes. A file lives from the first open of the device
 * to its last close, so no user ever sees what another one left. A mapping
 * refers to the file and not to the device, and outlives the device safely.
 */

#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>

#include "mvgpu-compat.h"
#include "mvgpu-priv.h"

int mvgpu_fb_open(struct mvgpu_dev *mv)
{
	struct file *fb;

	/* No reservation: sixteen idle instances cost nothing. */
	fb = mvgpu_shmem_file_setup(MVGPU_NAME, mv->type->desc->framebuffer);
	if (IS_ERR(fb))
		return PTR_ERR(fb);

	/* Without it, writes stop at 2 GiB. */
	fb->f_flags |= O_LARGEFILE;

	mutex_lock(&mvgpu_group_lock);
	mv->fb = fb;
	mutex_unlock(&mvgpu_group_lock);
	return 0;
}

/* A peer in the middle of a copy keeps the file for one more piece. */
void mvgpu_fb_close(struct mvgpu_dev *mv)
{
	struct file *fb;

	mutex_lock(&mvgpu_group_lock);
	fb = mv->fb;
	mv->fb = NULL;
	mutex_unlock(&mvgpu_group_lock);

	fput(fb);
}

static bool mvgpu_fb_inside(struct mvgpu_dev *mv, u64 pos, size_t count)
{
	u64 size = mv->type->desc->framebuffer;

	return pos <= size && count <= size - pos;
}

/* Reading what was never written gives zeroes and takes no memory. */
int mvgpu_fb_read_file(struct file *fb, u64 pos, void *buf, size_t count)
{
	loff_t off = pos;
	ssize_t done;

	while (count) {
		done = kernel_read(fb, buf, count, &off);
		if (done < 0)
			return done;
		if (!done)
			return -EIO;
		buf += done;
		count -= done;
	}
	return 0;
}

int mvgpu_fb_read(struct mvgpu_dev *mv, u64 pos, void *buf, size_t count)
{
	if (WARN_ON_ONCE(!mvgpu_fb_inside(mv, pos, count)))
		return -EINVAL;

	return mvgpu_fb_read_file(mv->fb, pos, buf, count);
}

int mvgpu_fb_write(struct mvgpu_dev *mv, u64 pos, const void *buf,
		   size_t count)
{
	loff_t off = pos;
	ssize_t done;

	if (WARN_ON_ONCE(!mvgpu_fb_inside(mv, pos, count)))
		return -EINVAL;

	while (count) {
		done = kernel_write(mv->fb, buf, count, &off);
		if (done < 0)
			return done;
		if (!done)
			return -EIO;
		buf += done;
		count -= done;
	}
	return 0;
}

/* pgoff: first page of the mapping, counted from the start of BAR 2. */
int mvgpu_fb_mmap(struct mvgpu_dev *mv, struct vm_area_struct *vma,
		  unsigned long pgoff)
{
	unsigned long pages = mv->aperture >> PAGE_SHIFT;

	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	if (pgoff >= pages || vma_pages(vma) > pages - pgoff)
		return -EINVAL;

	vma->vm_pgoff = pgoff;
	mvgpu_vm_flags_set(vma, VM_DONTEXPAND | VM_DONTDUMP);
	vma_set_file(vma, mv->fb);
	return mvgpu_vfs_mmap(mv->fb, vma);
}
