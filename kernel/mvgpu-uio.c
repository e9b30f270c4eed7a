// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu-uio: the driver of an mvgpu function in the guest
 *
 * It gives user space the two BARs and the interrupt as a UIO device: map 0 is
 * BAR 0, map 1 is BAR 2, a read of the device waits for the interrupt. Debian's
 * kernels leave a guest no other way to a message interrupt from user space:
 * vfio-pci needs an IOMMU there and uio_pci_generic knows INTx only.
 */

#include <linux/io.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/uio_driver.h>

#include "mvgpu-compat.h"
#include "mvgpu.h"

static bool intx;
module_param(intx, bool, 0644);
MODULE_PARM_DESC(intx, "use INTx and not MSI for functions bound from now on");

struct mvgpu_uio {
	struct uio_info info;
	void __iomem *regs;
};

static irqreturn_t mvgpu_uio_handler(int irq, struct uio_info *info)
{
	struct mvgpu_uio *mu = container_of(info, struct mvgpu_uio, info);
	u32 status = ioread32(mu->regs + MVGPU_REG_IRQ_STATUS);

	/* All ones: the function has been unplugged. */
	if (!status || status == ~0U)
		return IRQ_NONE;

	iowrite32(status, mu->regs + MVGPU_REG_IRQ_STATUS);
	return IRQ_HANDLED;
}

static void mvgpu_uio_map(struct uio_info *info, unsigned int map,
			  struct pci_dev *pdev, int bar, const char *name)
{
	info->mem[map].name = name;
	info->mem[map].addr = pci_resource_start(pdev, bar);
	info->mem[map].size = pci_resource_len(pdev, bar);
	info->mem[map].memtype = UIO_MEM_PHYS;
}

static int mvgpu_uio_probe(struct pci_dev *pdev,
			   const struct pci_device_id *id)
{
	struct mvgpu_uio *mu;
	int ret;

	mu = devm_kzalloc(&pdev->dev, sizeof(*mu), GFP_KERNEL);
	if (!mu)
		return -ENOMEM;

	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;

	mu->regs = pcim_iomap(pdev, MVGPU_BAR_REGS, MVGPU_BAR_REGS_SIZE);
	if (!mu->regs)
		return -ENODEV;
	if (ioread32(mu->regs + MVGPU_REG_MAGIC) != MVGPU_MAGIC ||
	    ioread32(mu->regs + MVGPU_REG_ABI) != MVGPU_ABI_VERSION) {
		pci_err(pdev, "not a function that this driver knows\n");
		return -ENODEV;
	}

	/* The bridge above a hotplugged function can be too small for it. */
	if (!pci_resource_len(pdev, MVGPU_BAR_FB) ||
	    pci_resource_flags(pdev, MVGPU_BAR_FB) & IORESOURCE_UNSET) {
		pci_err(pdev, "the framebuffer BAR has no address\n");
		return -ENOSPC;
	}

	pci_set_master(pdev);
	iowrite32(0, mu->regs + MVGPU_REG_IRQ_ENABLE);
	ret = pci_alloc_irq_vectors(pdev, 1, 1,
				    intx ? PCI_IRQ_INTX : PCI_IRQ_MSI);
	if (ret < 0)
		return ret;

	mu->info.name = "mvgpu";
	mu->info.version = "1";
	mu->info.irq = pci_irq_vector(pdev, 0);
	mu->info.irq_flags = intx ? IRQF_SHARED : 0;
	mu->info.handler = mvgpu_uio_handler;
	mvgpu_uio_map(&mu->info, 0, pdev, MVGPU_BAR_REGS, "registers");
	mvgpu_uio_map(&mu->info, 1, pdev, MVGPU_BAR_FB, "framebuffer");

	ret = uio_register_device(&pdev->dev, &mu->info);
	if (ret)
		goto err_vectors;

	pci_set_drvdata(pdev, mu);
	return 0;

err_vectors:
	pci_free_irq_vectors(pdev);
	return ret;
}

static void mvgpu_uio_remove(struct pci_dev *pdev)
{
	struct mvgpu_uio *mu = pci_get_drvdata(pdev);

	iowrite32(0, mu->regs + MVGPU_REG_IRQ_ENABLE);
	uio_unregister_device(&mu->info);
	pci_free_irq_vectors(pdev);
}

static const struct pci_device_id mvgpu_uio_ids[] = {
	{ PCI_DEVICE(MVGPU_PCI_VENDOR, MVGPU_PCI_DEVICE_GRID) },
	{ PCI_DEVICE(MVGPU_PCI_VENDOR, MVGPU_PCI_DEVICE_IGD) },
	{ }
};
MODULE_DEVICE_TABLE(pci, mvgpu_uio_ids);

static struct pci_driver mvgpu_uio_driver = {
	.name = "mvgpu-uio",
	.id_table = mvgpu_uio_ids,
	.probe = mvgpu_uio_probe,
	.remove = mvgpu_uio_remove,
};
module_pci_driver(mvgpu_uio_driver);

MODULE_DESCRIPTION("mvgpu functions for user space, in a guest");
MODULE_AUTHOR("The mdev orchestrator project");
MODULE_LICENSE("GPL");
