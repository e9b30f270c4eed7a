// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: configuration space
 *
 * Two images of the same size: what a read returns, and which bits a write
 * changes. Sizing a BAR needs no more: its address bits below the size are not
 * writable. The few bits that do something are looked at after a write.
 */

#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "mvgpu-priv.h"

#define BAR_REGS	(PCI_BASE_ADDRESS_0 + 4 * MVGPU_BAR_REGS)
#define BAR_FB		(PCI_BASE_ADDRESS_0 + 4 * MVGPU_BAR_FB)
#define CAP_PM		MVGPU_PCI_CAP_PM
#define CAP_MSI		MVGPU_PCI_CAP_MSI
#define CAP_EXP		MVGPU_PCI_CAP_EXP

/* A link that trains at once: 2.5 GT/s, one lane */
#define LINK_SPEED	PCI_EXP_LNKCAP_SLS_2_5GB
#define LINK_WIDTH	0x0010

static void put8(u8 *image, u32 pos, u8 val)
{
	image[pos] = val;
}

static void put16(u8 *image, u32 pos, u16 val)
{
	__le16 le = cpu_to_le16(val);

	memcpy(image + pos, &le, sizeof(le));
}

static void put32(u8 *image, u32 pos, u32 val)
{
	__le32 le = cpu_to_le32(val);

	memcpy(image + pos, &le, sizeof(le));
}

static u16 get16(const u8 *image, u32 pos)
{
	__le16 le;

	memcpy(&le, image + pos, sizeof(le));
	return le16_to_cpu(le);
}

static void mvgpu_pci_header(struct mvgpu_dev *mv, u8 *cfg, u8 *rw)
{
	u64 fb_mask = ~(mv->aperture - 1);

	put16(cfg, PCI_VENDOR_ID, MVGPU_PCI_VENDOR);
	put16(cfg, PCI_DEVICE_ID, mv->type->parent->personality->pci_device);
	put16(cfg, PCI_SUBSYSTEM_VENDOR_ID, MVGPU_PCI_VENDOR);
	put16(cfg, PCI_SUBSYSTEM_ID, mv->type->desc->id);
	put32(cfg, PCI_CLASS_REVISION,
	      MVGPU_PCI_CLASS << 8 | MVGPU_PCI_REVISION);

	/* No PCI_COMMAND_IO: there is no I/O BAR. */
	put16(rw, PCI_COMMAND,
	      PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY |
	      PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
	put16(cfg, PCI_STATUS, PCI_STATUS_CAP_LIST);
	put8(rw, PCI_CACHE_LINE_SIZE, 0xff);

	put32(cfg, BAR_REGS, PCI_BASE_ADDRESS_MEM_TYPE_32);
	put32(rw, BAR_REGS, ~(u32)(MVGPU_BAR_REGS_SIZE - 1));
	put32(cfg, BAR_FB,
	      PCI_BASE_ADDRESS_MEM_TYPE_64 | PCI_BASE_ADDRESS_MEM_PREFETCH);
	put32(rw, BAR_FB, lower_32_bits(fb_mask));
	put32(rw, BAR_FB + 4, upper_32_bits(fb_mask));

	put8(cfg, PCI_CAPABILITY_LIST, CAP_PM);
	put8(rw, PCI_INTERRUPT_LINE, 0xff);
	put8(cfg, PCI_INTERRUPT_PIN, 1);	/* INTA */
}

static void mvgpu_pci_capabilities(u8 *cfg, u8 *rw)
{
	put8(cfg, CAP_PM, PCI_CAP_ID_PM);
	put8(cfg, CAP_PM + PCI_CAP_LIST_NEXT, CAP_MSI);
	put16(cfg, CAP_PM + PCI_PM_PMC, 3);	/* version; D0 and D3 */
	put16(cfg, CAP_PM + PCI_PM_CTRL, PCI_PM_CTRL_NO_SOFT_RESET);
	put16(rw, CAP_PM + PCI_PM_CTRL, PCI_PM_CTRL_STATE_MASK);

	put8(cfg, CAP_MSI, PCI_CAP_ID_MSI);
	put8(cfg, CAP_MSI + PCI_CAP_LIST_NEXT, CAP_EXP);
	put16(cfg, CAP_MSI + PCI_MSI_FLAGS, PCI_MSI_FLAGS_64BIT);
	put16(rw, CAP_MSI + PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE);
	put32(rw, CAP_MSI + PCI_MSI_ADDRESS_LO, ~3U);
	put32(rw, CAP_MSI + PCI_MSI_ADDRESS_HI, ~0U);
	put16(rw, CAP_MSI + PCI_MSI_DATA_64, 0xffff);

	put8(cfg, CAP_EXP, PCI_CAP_ID_EXP);
	put16(cfg, CAP_EXP + PCI_EXP_FLAGS, 2 | PCI_EXP_TYPE_ENDPOINT << 4);
	put32(cfg, CAP_EXP + PCI_EXP_DEVCAP,
	      PCI_EXP_DEVCAP_RBER | PCI_EXP_DEVCAP_FLR);
	put16(rw, CAP_EXP + PCI_EXP_DEVCTL,
	      PCI_EXP_DEVCTL_CERE | PCI_EXP_DEVCTL_NFERE |
	      PCI_EXP_DEVCTL_FERE | PCI_EXP_DEVCTL_URRE |
	      PCI_EXP_DEVCTL_RELAX_EN | PCI_EXP_DEVCTL_PAYLOAD |
	      PCI_EXP_DEVCTL_NOSNOOP_EN | PCI_EXP_DEVCTL_READRQ);
	put32(cfg, CAP_EXP + PCI_EXP_LNKCAP, LINK_SPEED | LINK_WIDTH);
	put16(rw, CAP_EXP + PCI_EXP_LNKCTL,
	      PCI_EXP_LNKCTL_RCB | PCI_EXP_LNKCTL_CCC);
	put16(cfg, CAP_EXP + PCI_EXP_LNKSTA, LINK_SPEED | LINK_WIDTH);
	put32(cfg, CAP_EXP + PCI_EXP_LNKCAP2, PCI_EXP_LNKCAP2_SLS_2_5GB);
	put16(cfg, CAP_EXP + PCI_EXP_LNKCTL2, LINK_SPEED);
}

/* As after power on. */
void mvgpu_pci_reset(struct mvgpu_dev *mv)
{
	lockdep_assert_held(&mv->lock);

	memset(mv->config, 0, PCI_CFG_SPACE_EXP_SIZE);
	memset(mv->config_rw, 0, PCI_CFG_SPACE_EXP_SIZE);
	mvgpu_pci_header(mv, mv->config, mv->config_rw);
	mvgpu_pci_capabilities(mv->config, mv->config_rw);
	mvgpu_irq_intx_disable(mv, false);
}

int mvgpu_pci_init(struct mvgpu_dev *mv)
{
	mv->config = kzalloc(2 * PCI_CFG_SPACE_EXP_SIZE, GFP_KERNEL);
	if (!mv->config)
		return -ENOMEM;
	mv->config_rw = mv->config + PCI_CFG_SPACE_EXP_SIZE;
	return 0;
}

void mvgpu_pci_destroy(struct mvgpu_dev *mv)
{
	kfree(mv->config);
}

/* The caller has checked that it stays within the space. */
void mvgpu_pci_read(struct mvgpu_dev *mv, u32 pos, u8 *buf, size_t count)
{
	u16 status;

	mutex_lock(&mv->lock);
	status = get16(mv->config, PCI_STATUS) & ~PCI_STATUS_INTERRUPT;
	if (mvgpu_irq_intx_pending(mv))
		status |= PCI_STATUS_INTERRUPT;
	put16(mv->config, PCI_STATUS, status);
	memcpy(buf, mv->config + pos, count);
	mutex_unlock(&mv->lock);
}

/*
 * The caller has checked that it stays within the space. Returns true when the
 * write asked for a function level reset, which the caller owes then.
 */
bool mvgpu_pci_write(struct mvgpu_dev *mv, u32 pos, const u8 *buf,
		     size_t count)
{
	const u32 flr_pos = CAP_EXP + PCI_EXP_DEVCTL + 1;
	const u8 flr_bit = PCI_EXP_DEVCTL_BCR_FLR >> 8;
	bool flr = false;
	size_t i;

	mutex_lock(&mv->lock);
	for (i = 0; i < count; i++) {
		u8 rw = mv->config_rw[pos + i];
		u8 *byte = &mv->config[pos + i];

		*byte = (*byte & ~rw) | (buf[i] & rw);
		if (pos + i == flr_pos && buf[i] & flr_bit)
			flr = true;
	}
	mvgpu_irq_intx_disable(mv, get16(mv->config, PCI_COMMAND) &
				   PCI_COMMAND_INTX_DISABLE);
	mutex_unlock(&mv->lock);

	return flr;
}
