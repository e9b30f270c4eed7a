// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: a vendor driver of mediated devices for machines without any
 *
 * It offers parents of two kinds: "grid", whose instances are all of one type
 * at a time, and "igd", whose instances share a pool of memory. Each instance
 * is a PCI function that a guest can use. ABI.rst describes all of it.
 */

#include <linux/log2.h>
#include <linux/module.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "mvgpu-priv.h"

#define MVGPU_MAX_PARENTS	64
#define MVGPU_MAX_LINKS		65535

static unsigned int grid_parents = 1;
module_param(grid_parents, uint, 0444);
MODULE_PARM_DESC(grid_parents,
		 "number of grid parents without a PCI function, 0 to 64 (default 1)");

static unsigned int igd_parents = 1;
module_param(igd_parents, uint, 0444);
MODULE_PARM_DESC(igd_parents,
		 "number of igd parents without a PCI function, 0 to 64 (default 1)");

/*
 * The default fits into the 2 MiB that firmware reserves behind an empty root
 * port: a hotplugged function must not need a larger window than there is.
 */
unsigned int mvgpu_aperture_mib = MVGPU_APERTURE_DEFAULT / SZ_1M;
module_param_named(aperture_mib, mvgpu_aperture_mib, uint, 0444);
MODULE_PARM_DESC(aperture_mib,
		 "MiB of framebuffer in BAR 2, a power of two up to 256 (default 2)");

/* Enough for a group of four, or for one of three and five of two. */
static unsigned int links = 8;
module_param(links, uint, 0444);
MODULE_PARM_DESC(links,
		 "peer-to-peer links of each parent, 0 to 65535 (default 8)");

bool mvgpu_group_hotplug;
module_param_named(group_hotplug, mvgpu_group_hotplug, bool, 0444);
MODULE_PARM_DESC(group_hotplug,
		 "an mdev can join a group that is online (default no)");

bool mvgpu_implicit_start = true;
module_param_named(implicit_start, mvgpu_implicit_start, bool, 0444);
MODULE_PARM_DESC(implicit_start,
		 "start at the first open, stop at the final release (default yes)");

bool mvgpu_has_online = true;
module_param_named(has_online, mvgpu_has_online, bool, 0444);
MODULE_PARM_DESC(has_online,
		 "mdevs have the attributes of start groups (default yes)");

struct workqueue_struct *mvgpu_wq;

/* Parents without a PCI function; only init and exit touch the list. */
static LIST_HEAD(mvgpu_parents);

/*
 * A parent of this class has no driver and no bus, so the mdev core takes the
 * name of the class as the prefix of the type directories. It is the driver's
 * name too, which is the prefix where the parent is a PCI function.
 */
static struct class mvgpu_class = {
	.name = MVGPU_NAME,
	.dev_groups = mvgpu_parent_groups,
};

static int mvgpu_probe(struct mdev_device *mdev)
{
	struct mvgpu_dev *mv;
	int ret;

	mv = vfio_alloc_device(mvgpu_dev, vdev, &mdev->dev, &mvgpu_vfio_ops);
	if (IS_ERR(mv))
		return PTR_ERR(mv);

	ret = vfio_register_emulated_iommu_dev(&mv->vdev);
	if (ret)
		goto err_put;

	dev_set_drvdata(&mdev->dev, mv);
	mvgpu_log(mv, MVGPU_EVENT_CREATED, NULL, mv->type->desc->id);
	return 0;

err_put:
	vfio_put_device(&mv->vdev);
	return ret;
}

/* Waits until the device is not open: see .request in mvgpu-vfio.c. */
static void mvgpu_remove(struct mdev_device *mdev)
{
	struct mvgpu_dev *mv = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&mv->vdev);
	mvgpu_group_leave(mv);
	mvgpu_log(mv, MVGPU_EVENT_REMOVED, NULL, 0);
	vfio_put_device(&mv->vdev);
}

static struct mdev_driver mvgpu_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.driver = {
		.name = MVGPU_NAME,
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
		.dev_groups = mvgpu_mdev_groups,
	},
	.probe = mvgpu_probe,
	.remove = mvgpu_remove,
	.get_available = mvgpu_type_available,
	.show_description = mvgpu_type_description,
};

struct mvgpu_parent *
mvgpu_parent_alloc(const struct mvgpu_personality *personality)
{
	struct mvgpu_parent *parent;
	unsigned int i;

	parent = kzalloc(struct_size(parent, types, personality->nr_types),
			 GFP_KERNEL);
	if (!parent)
		return NULL;

	parent->mtypes = kcalloc(personality->nr_types,
				 sizeof(*parent->mtypes), GFP_KERNEL);
	if (!parent->mtypes) {
		kfree(parent);
		return NULL;
	}

	parent->personality = personality;
	parent->pool_free = personality->pool;
	parent->links = links;
	parent->links_free = links;
	INIT_LIST_HEAD(&parent->node);
	mutex_init(&parent->lock);
	for (i = 0; i < personality->nr_types; i++) {
		struct mvgpu_type *type = &parent->types[i];

		type->parent = parent;
		type->desc = &personality->types[i];
		type->mtype.sysfs_name = type->desc->sysfs_name;
		type->mtype.pretty_name = type->desc->pretty_name;
		parent->mtypes[i] = &type->mtype;
	}
	return parent;
}

void mvgpu_parent_free(struct mvgpu_parent *parent)
{
	mutex_destroy(&parent->lock);
	kfree(parent->mtypes);
	kfree(parent);
}

/* From now on mdevs can be created on @dev, of which @parent is the drvdata. */
int mvgpu_parent_register(struct mvgpu_parent *parent, struct device *dev)
{
	int ret;

	parent->dev = dev;
	ret = mdev_register_parent(&parent->mdev_parent, dev, &mvgpu_driver,
				   parent->mtypes,
				   parent->personality->nr_types);
	if (ret)
		return ret;

	mvgpu_types_get(parent);
	ret = mvgpu_types_add_attributes(parent);
	if (ret) {
		mdev_unregister_parent(&parent->mdev_parent);
		mvgpu_types_put(parent);
	}
	return ret;
}

/* Removes the mdevs, and waits for each until its user has closed it. */
void mvgpu_parent_unregister(struct mvgpu_parent *parent)
{
	mvgpu_types_del_attributes(parent);
	mdev_unregister_parent(&parent->mdev_parent);
	mvgpu_types_put(parent);
}

static int mvgpu_parent_add(const struct mvgpu_personality *personality,
			    unsigned int number)
{
	struct mvgpu_parent *parent;
	struct device *dev;
	int ret;

	parent = mvgpu_parent_alloc(personality);
	if (!parent)
		return -ENOMEM;

	dev = device_create(&mvgpu_class, NULL, MKDEV(0, 0), parent, "%s%u",
			    personality->name, number);
	if (IS_ERR(dev)) {
		ret = PTR_ERR(dev);
		goto err_free;
	}

	ret = mvgpu_parent_register(parent, dev);
	if (ret)
		goto err_device;

	list_add(&parent->node, &mvgpu_parents);
	return 0;

err_device:
	device_unregister(dev);
err_free:
	mvgpu_parent_free(parent);
	return ret;
}

static void mvgpu_parents_del(void)
{
	struct mvgpu_parent *parent, *next;

	list_for_each_entry_safe(parent, next, &mvgpu_parents, node) {
		list_del(&parent->node);
		mvgpu_parent_unregister(parent);
		device_unregister(parent->dev);
		mvgpu_parent_free(parent);
	}
}

static int mvgpu_parents_add(const struct mvgpu_personality *personality,
			     unsigned int count)
{
	unsigned int i;
	int ret;

	for (i = 0; i < count; i++) {
		ret = mvgpu_parent_add(personality, i);
		if (ret)
			return ret;
	}
	return 0;
}

static int __init mvgpu_init(void)
{
	int ret;

	if (grid_parents > MVGPU_MAX_PARENTS ||
	    igd_parents > MVGPU_MAX_PARENTS) {
		pr_err(MVGPU_NAME ": at most %d parents of a kind\n",
		       MVGPU_MAX_PARENTS);
		return -EINVAL;
	}

	if (!is_power_of_2(mvgpu_aperture_mib) ||
	    mvgpu_aperture_mib > MVGPU_APERTURE_MAX / SZ_1M) {
		pr_err(MVGPU_NAME ": aperture_mib is a power of two up to %d\n",
		       MVGPU_APERTURE_MAX / SZ_1M);
		return -EINVAL;
	}

	if (links > MVGPU_MAX_LINKS) {
		pr_err(MVGPU_NAME ": at most %d links\n", MVGPU_MAX_LINKS);
		return -EINVAL;
	}

	if (!mvgpu_has_online && !mvgpu_implicit_start) {
		pr_err(MVGPU_NAME ": without has_online only implicit_start can start a group\n");
		return -EINVAL;
	}

	mvgpu_wq = alloc_workqueue(MVGPU_NAME, WQ_UNBOUND, 0);
	if (!mvgpu_wq)
		return -ENOMEM;

	ret = mvgpu_debug_init();
	if (ret)
		goto err_wq;

	ret = class_register(&mvgpu_class);
	if (ret)
		goto err_debug;

	ret = mdev_register_driver(&mvgpu_driver);
	if (ret)
		goto err_class;

	ret = mvgpu_parents_add(&mvgpu_grid, grid_parents);
	if (ret)
		goto err_parents;

	ret = mvgpu_parents_add(&mvgpu_igd, igd_parents);
	if (ret)
		goto err_parents;

	ret = mvgpu_function_init();
	if (ret)
		goto err_parents;

	return 0;

err_parents:
	mvgpu_parents_del();
	mdev_unregister_driver(&mvgpu_driver);
err_class:
	class_unregister(&mvgpu_class);
err_debug:
	mvgpu_debug_exit();
err_wq:
	destroy_workqueue(mvgpu_wq);
	return ret;
}

static void __exit mvgpu_exit(void)
{
	mvgpu_function_exit();
	mvgpu_parents_del();
	mdev_unregister_driver(&mvgpu_driver);
	class_unregister(&mvgpu_class);
	mvgpu_debug_exit();
	destroy_workqueue(mvgpu_wq);
}

module_init(mvgpu_init);
module_exit(mvgpu_exit);

MODULE_DESCRIPTION("Mediated virtual GPUs without a GPU");
MODULE_AUTHOR("The mdev orchestrator project");
MODULE_LICENSE("GPL");
