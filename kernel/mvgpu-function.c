// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: the parents that are PCI functions
 *
 * QEMU's two devices for tests stand for cards: a function that this driver
 * binds to is a parent, as with real hardware. It lends its place on the bus
 * and nothing else: neither its registers nor its memory are touched, so it is
 * not enabled either.
 */

#include <linux/module.h>
#include <linux/pci.h>

#include "mvgpu-priv.h"

/* Of the table's driver_data. A driver_override without an entry has 0. */
static const struct mvgpu_personality * const mvgpu_functions[] = {
	&mvgpu_grid,
	&mvgpu_igd,
};

static const struct pci_device_id mvgpu_function_ids[] = {
	{ PCI_DEVICE(0x1b36, 0x0005), .driver_data = 0 },	/* pci-testdev */
	{ PCI_DEVICE(0x1234, 0x11e8), .driver_data = 1 },	/* edu */
	{ }
};
MODULE_DEVICE_TABLE(pci, mvgpu_function_ids);

static int mvgpu_function_probe(struct pci_dev *pdev,
				const struct pci_device_id *id)
{
	struct mvgpu_parent *parent;
	int ret;

	parent = mvgpu_parent_alloc(mvgpu_functions[id->driver_data]);
	if (!parent)
		return -ENOMEM;

	pci_set_drvdata(pdev, parent);
	ret = mvgpu_parent_register(parent, &pdev->dev);
	if (ret)
		mvgpu_parent_free(parent);
	return ret;
}

/* Waits until no mdev of it is open, also when the function has been pulled. */
static void mvgpu_function_remove(struct pci_dev *pdev)
{
	struct mvgpu_parent *parent = pci_get_drvdata(pdev);

	mvgpu_parent_unregister(parent);
	mvgpu_parent_free(parent);
}

static struct pci_driver mvgpu_function_driver = {
	.name = MVGPU_NAME,
	.id_table = mvgpu_function_ids,
	.probe = mvgpu_function_probe,
	.remove = mvgpu_function_remove,
	.dev_groups = mvgpu_parent_groups,
};

int mvgpu_function_init(void)
{
	return pci_register_driver(&mvgpu_function_driver);
}

void mvgpu_function_exit(void)
{
	pci_unregister_driver(&mvgpu_function_driver);
}
