// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: what can be created, and how much of it is left
 */

#include <linux/delay.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "mvgpu-priv.h"

#define GRID(_id, _name, _max, _heads, _frl, _mib, _w, _h)		\
	{								\
		.sysfs_name = #_id,					\
		.pretty_name = "GRID M60-" _name,			\
		.id = _id,						\
		.max_instance = _max,					\
		.num_heads = _heads,					\
		.frl_config = _frl,					\
		.framebuffer = (u64)(_mib) * SZ_1M,			\
		.width = _w,						\
		.height = _h,						\
	}

/* The table of the GRID M60 in the discussion that this driver follows. */
static const struct mvgpu_type_desc mvgpu_grid_types[] = {
	GRID(11, "0B", 16, 2, 45, 512, 2560, 1600),
	GRID(12, "0Q", 16, 2, 60, 512, 2560, 1600),
	GRID(13, "1B", 8, 2, 45, 1024, 2560, 1600),
	GRID(14, "1Q", 8, 2, 60, 1024, 2560, 1600),
	GRID(15, "2B", 4, 2, 45, 2048, 2560, 1600),
	GRID(16, "2Q", 4, 4, 60, 2048, 2560, 1600),
	GRID(17, "4Q", 2, 4, 60, 4096, 3840, 2160),
	GRID(18, "8Q", 1, 4, 60, 8192, 3840, 2160),
};

#define IGD(_mib, _max, _w, _h)						\
	{								\
		.sysfs_name = #_mib "M",				\
		.pretty_name = "IGD " #_mib "M",			\
		.id = _mib,						\
		.max_instance = _max,					\
		.num_heads = 1,						\
		.frl_config = 60,					\
		.framebuffer = (u64)(_mib) * SZ_1M,			\
		.width = _w,						\
		.height = _h,						\
	}

static const struct mvgpu_type_desc mvgpu_igd_types[] = {
	IGD(128, 8, 1024, 768),
	IGD(256, 4, 1920, 1200),
	IGD(512, 2, 1920, 1200),
};

const struct mvgpu_personality mvgpu_grid = {
	.name = "grid",
	.id = MVGPU_PERSONALITY_GRID,
	.pci_device = MVGPU_PCI_DEVICE_GRID,
	.homogeneous = true,
	.pool = 8ULL * SZ_1G,
	.types = mvgpu_grid_types,
	.nr_types = ARRAY_SIZE(mvgpu_grid_types),
};

const struct mvgpu_personality mvgpu_igd = {
	.name = "igd",
	.id = MVGPU_PERSONALITY_IGD,
	.pci_device = MVGPU_PCI_DEVICE_IGD,
	.pool = SZ_1G,
	.types = mvgpu_igd_types,
	.nr_types = ARRAY_SIZE(mvgpu_igd_types),
};

static unsigned int mvgpu_type_left(const struct mvgpu_type *type)
{
	const struct mvgpu_parent *parent = type->parent;

	lockdep_assert_held(&parent->lock);

	if (parent->personality->homogeneous &&
	    parent->active && parent->active != type)
		return 0;

	return min_t(u64, type->desc->max_instance - type->in_use,
		     div64_u64(parent->pool_free, type->desc->framebuffer));
}

/* The mdev core's available_instances. */
unsigned int mvgpu_type_available(struct mdev_type *mtype)
{
	struct mvgpu_type *type = mvgpu_from_mtype(mtype);
	unsigned int left;

	mutex_lock(&type->parent->lock);
	left = mvgpu_type_left(type);
	mutex_unlock(&type->parent->lock);

	return left;
}

/* Takes what one instance needs from its parent, or fails with -ENOSPC. */
int mvgpu_type_take(struct mvgpu_type *type)
{
	struct mvgpu_parent *parent = type->parent;
	int ret = -ENOSPC;

	mutex_lock(&parent->lock);
	if (mvgpu_type_left(type)) {
		parent->pool_free -= type->desc->framebuffer;
		parent->active = type;
		type->in_use++;
		ret = 0;
	}
	mutex_unlock(&parent->lock);

	return ret;
}

void mvgpu_type_give(struct mvgpu_type *type)
{
	struct mvgpu_parent *parent = type->parent;

	mutex_lock(&parent->lock);
	parent->pool_free += type->desc->framebuffer;
	type->in_use--;
	if (parent->pool_free == parent->personality->pool)
		parent->active = NULL;
	mutex_unlock(&parent->lock);
}

/*
 * The types live in the parent's memory, and an mdev refers to its type as
 * long as anything refers to the mdev, which may be longer than the mdev core
 * waits. One reference of the parent's own tells when it is the last.
 */
void mvgpu_types_get(struct mvgpu_parent *parent)
{
	unsigned int i;

	for (i = 0; i < parent->personality->nr_types; i++)
		kobject_get(&parent->types[i].mtype.kobj);
}

/* After mdev_unregister_parent(): waits until the memory can be freed. */
void mvgpu_types_put(struct mvgpu_parent *parent)
{
	unsigned int i;

	for (i = 0; i < parent->personality->nr_types; i++) {
		struct kobject *kobj = &parent->types[i].mtype.kobj;

		while (kref_read(&kobj->kref) > 1)
			msleep(20);
		kobject_put(kobj);
	}
}

/* One line, as NVIDIA's driver prints it. */
ssize_t mvgpu_type_description(struct mdev_type *mtype, char *buf)
{
	const struct mvgpu_type_desc *desc = mvgpu_from_mtype(mtype)->desc;

	return sysfs_emit(buf,
			  "num_heads=%u, frl_config=%u, framebuffer=%lluM, max_resolution=%ux%u, max_instance=%u\n",
			  desc->num_heads, desc->frl_config,
			  desc->framebuffer / SZ_1M, desc->width, desc->height,
			  desc->max_instance);
}

/*
 * The same values one a file, in attributes/ of the type. The mdev core keeps
 * its attribute type to itself, hence a kobject of our own below the type's.
 */

static const struct mvgpu_type_desc *mvgpu_desc_of(struct kobject *kobj)
{
	struct mdev_type *mtype = container_of(kobj->parent, struct mdev_type,
					       kobj);

	return mvgpu_from_mtype(mtype)->desc;
}

static ssize_t num_heads_show(struct kobject *kobj,
			      struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", mvgpu_desc_of(kobj)->num_heads);
}

static ssize_t frl_config_show(struct kobject *kobj,
			       struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", mvgpu_desc_of(kobj)->frl_config);
}

static ssize_t framebuffer_show(struct kobject *kobj,
				struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", mvgpu_desc_of(kobj)->framebuffer);
}

static ssize_t max_resolution_show(struct kobject *kobj,
				   struct kobj_attribute *attr, char *buf)
{
	const struct mvgpu_type_desc *desc = mvgpu_desc_of(kobj);

	return sysfs_emit(buf, "%ux%u\n", desc->width, desc->height);
}

static ssize_t max_instance_show(struct kobject *kobj,
				 struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", mvgpu_desc_of(kobj)->max_instance);
}

static struct kobj_attribute num_heads_attr = __ATTR_RO(num_heads);
static struct kobj_attribute frl_config_attr = __ATTR_RO(frl_config);
static struct kobj_attribute framebuffer_attr = __ATTR_RO(framebuffer);
static struct kobj_attribute max_resolution_attr = __ATTR_RO(max_resolution);
static struct kobj_attribute max_instance_attr = __ATTR_RO(max_instance);

static struct attribute *mvgpu_type_attrs[] = {
	&num_heads_attr.attr,
	&frl_config_attr.attr,
	&framebuffer_attr.attr,
	&max_resolution_attr.attr,
	&max_instance_attr.attr,
	NULL,
};

static const struct attribute_group mvgpu_type_group = {
	.attrs = mvgpu_type_attrs,
};

static int mvgpu_type_add_attributes(struct mvgpu_type *type)
{
	int ret;

	type->attributes = kobject_create_and_add("attributes",
						  &type->mtype.kobj);
	if (!type->attributes)
		return -ENOMEM;

	ret = sysfs_create_group(type->attributes, &mvgpu_type_group);
	if (ret) {
		kobject_put(type->attributes);
		type->attributes = NULL;
	}
	return ret;
}

void mvgpu_types_del_attributes(struct mvgpu_parent *parent)
{
	unsigned int i;

	for (i = 0; i < parent->personality->nr_types; i++) {
		kobject_put(parent->types[i].attributes);
		parent->types[i].attributes = NULL;
	}
}

int mvgpu_types_add_attributes(struct mvgpu_parent *parent)
{
	unsigned int i;
	int ret;

	for (i = 0; i < parent->personality->nr_types; i++) {
		ret = mvgpu_type_add_attributes(&parent->types[i]);
		if (ret) {
			mvgpu_types_del_attributes(parent);
			return ret;
		}
	}
	return 0;
}
