/* SPDX-License-Identifier: GPL-2.0 */
/*
 * mvgpu: what the rooms of the driver share
 *
 * main      module, parents, mdev probe and remove
 * function  the parents that are PCI functions
 * types     what can be created, and how much of it is left
 * vfio      the device as a VFIO user sees it: regions, ioctls, mmap
 * irq       INTx, MSI and the eventfds behind them
 * pci       configuration space
 * regs      BAR 0
 * fb        the framebuffer
 * engine    what the doorbell starts
 * group     start groups: links, owner, what is online
 * sysfs     the attributes of an mdev and of a parent
 * debug     faults to inject, and the log that proves the order of events
 */
#ifndef MVGPU_PRIV_H
#define MVGPU_PRIV_H

#include <linux/device.h>
#include <linux/list.h>
#include <linux/mdev.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/uuid.h>
#include <linux/vfio.h>
#include <linux/workqueue.h>

#include "mvgpu.h"

#define MVGPU_NAME	"mvgpu"

struct eventfd_ctx;
struct file;
struct kobject;
struct pid;
struct virqfd;

/* What a type promises. Constant. */
struct mvgpu_type_desc {
	const char *sysfs_name;
	const char *pretty_name;
	u32 id;			/* MVGPU_REG_TYPE, PCI subsystem id */
	u32 num_heads;
	u32 frl_config;		/* frames per second */
	u32 width, height;	/* maximum resolution, pixels */
	u64 framebuffer;	/* bytes */
	u32 max_instance;	/* of an otherwise empty parent */
};

/* A kind of parent device. Constant. */
struct mvgpu_personality {
	const char *name;
	u32 id;			/* MVGPU_PERSONALITY_* */
	u16 pci_device;
	bool homogeneous;	/* instances of one type at a time */
	u64 pool;		/* framebuffer memory to share, bytes */
	const struct mvgpu_type_desc *types;
	unsigned int nr_types;
};

extern const struct mvgpu_personality mvgpu_grid;
extern const struct mvgpu_personality mvgpu_igd;

struct mvgpu_type {
	struct mdev_type mtype;
	const struct mvgpu_type_desc *desc;
	struct mvgpu_parent *parent;
	struct kobject *attributes;
	unsigned int in_use;	/* instances; under the parent's lock */
};

struct mvgpu_parent {
	struct device *dev;	/* a PCI function, or of the class mvgpu */
	struct mdev_parent mdev_parent;
	const struct mvgpu_personality *personality;
	struct list_head node;	/* in the module's list, if of the class */

	struct mutex lock;	/* capacity */
	u64 pool_free;		/* bytes; under lock */
	const struct mvgpu_type *active;	/* homogeneous: the one in use */

	unsigned int links;		/* peer-to-peer links */
	unsigned int links_free;	/* under mvgpu_group_lock */

	struct mdev_type **mtypes;
	struct mvgpu_type types[];
};

/*
 * The mdevs of one parent that come online and go offline together. Every mdev
 * is in one; without a UUID it is alone in it. All under mvgpu_group_lock.
 */
struct mvgpu_group {
	struct list_head node;		/* in the list of all groups */
	guid_t uuid;			/* guid_null: none */
	struct mvgpu_parent *parent;
	struct list_head members;
	unsigned int nr_members;
	unsigned int nr_open;		/* members that are open */
	u32 slots;			/* taken ones, a bit each */
	bool starting;			/* a process is about to commit */
	bool online;
	unsigned int links;		/* committed */
	struct pid *owner;		/* thread group of the first opener */
	char *error;			/* why it did not start, or NULL */
};

/* What interrupts the user has asked for */
enum mvgpu_irq_mode {
	MVGPU_IRQ_MODE_NONE,
	MVGPU_IRQ_MODE_INTX,
	MVGPU_IRQ_MODE_MSI,
};

struct mvgpu_irq {
	struct mutex config_lock;	/* one VFIO_DEVICE_SET_IRQS at a time */
	struct virqfd *unmask;		/* eventfd that unmasks INTx */

	spinlock_t lock;		/* everything below */
	enum mvgpu_irq_mode mode;
	bool intx_masked;		/* by the user, or by delivery */
	bool intx_disabled;		/* PCI_COMMAND_INTX_DISABLE */
	u32 status, enable, count;	/* MVGPU_REG_IRQ_* */
	struct eventfd_ctx *trigger[VFIO_PCI_NUM_IRQS];
};

/* The registers that a user writes, and the job latched from them */
struct mvgpu_job {
	u32 command;
	u32 seed;
	u32 peer;
	u64 src, dst, len;
};

struct mvgpu_engine {
	struct work_struct work;
	bool abort;			/* asks the work to end early */
	bool closed;			/* the doorbell is dead; device lock */
	struct mvgpu_job regs;		/* as written; device lock */
	struct mvgpu_job job;		/* what the work runs */
	struct file *peer;		/* framebuffer to read; device lock */
	u32 status, result, sequence;	/* device lock */
};

struct mvgpu_dev {
	struct vfio_device vdev;
	struct mdev_device *mdev;
	struct mvgpu_type *type;
	u64 aperture;			/* bytes of the framebuffer in BAR 2 */
	u32 uuid[4];			/* MVGPU_REG_UUID */

	struct mutex reset_lock;	/* one reset at a time */
	struct mutex lock;		/* registers, configuration space */
	u8 *config;			/* configuration space as read */
	u8 *config_rw;			/* its writable bits */
	u32 scratch;
	struct mvgpu_engine engine;
	struct mvgpu_irq irq;

	/*
	 * From open_device to close_device. Changes under mvgpu_group_lock, as
	 * peers look at it; the device's own user needs no lock.
	 */
	struct file *fb;

	struct mvgpu_group *group;	/* under mvgpu_group_lock, and below */
	struct list_head member;	/* in group->members */
	unsigned int slot;		/* in the group */
	bool open;
	char *params;			/* vgpu_params, or NULL */
	u32 frl;			/* MVGPU_REG_FRL; fixed while open */

	atomic_t accessed;		/* since it was opened */
};

static inline struct mvgpu_dev *mvgpu_from_vdev(struct vfio_device *vdev)
{
	return container_of(vdev, struct mvgpu_dev, vdev);
}

static inline struct mvgpu_type *mvgpu_from_mtype(struct mdev_type *mtype)
{
	return container_of(mtype, struct mvgpu_type, mtype);
}

/* mvgpu-main.c */
extern struct workqueue_struct *mvgpu_wq;
extern unsigned int mvgpu_aperture_mib;
extern bool mvgpu_group_hotplug;
extern bool mvgpu_implicit_start;
extern bool mvgpu_has_online;
struct mvgpu_parent *
mvgpu_parent_alloc(const struct mvgpu_personality *personality);
void mvgpu_parent_free(struct mvgpu_parent *parent);
int mvgpu_parent_register(struct mvgpu_parent *parent, struct device *dev);
void mvgpu_parent_unregister(struct mvgpu_parent *parent);

/* mvgpu-function.c */
int mvgpu_function_init(void);
void mvgpu_function_exit(void);

/* mvgpu-types.c */
unsigned int mvgpu_type_available(struct mdev_type *mtype);
ssize_t mvgpu_type_description(struct mdev_type *mtype, char *buf);
int mvgpu_type_take(struct mvgpu_type *type);
void mvgpu_type_give(struct mvgpu_type *type);
void mvgpu_types_get(struct mvgpu_parent *parent);
void mvgpu_types_put(struct mvgpu_parent *parent);
int mvgpu_types_add_attributes(struct mvgpu_parent *parent);
void mvgpu_types_del_attributes(struct mvgpu_parent *parent);

/* mvgpu-vfio.c */
extern const struct vfio_device_ops mvgpu_vfio_ops;
void mvgpu_reset(struct mvgpu_dev *mv);

/* mvgpu-irq.c */
void mvgpu_irq_init(struct mvgpu_dev *mv);
void mvgpu_irq_destroy(struct mvgpu_dev *mv);
void mvgpu_irq_reset(struct mvgpu_dev *mv);
void mvgpu_irq_close(struct mvgpu_dev *mv);
void mvgpu_irq_raise(struct mvgpu_dev *mv, u32 bits);
void mvgpu_irq_ack(struct mvgpu_dev *mv, u32 bits);
void mvgpu_irq_enable(struct mvgpu_dev *mv, u32 bits);
void mvgpu_irq_intx_disable(struct mvgpu_dev *mv, bool disable);
bool mvgpu_irq_intx_pending(struct mvgpu_dev *mv);
void mvgpu_irq_request(struct mvgpu_dev *mv, unsigned int count);
int mvgpu_irq_info(u32 index, struct vfio_irq_info *info);
int mvgpu_irq_set(struct mvgpu_dev *mv, const struct vfio_irq_set *hdr,
		  const void *data);

/* mvgpu-pci.c */
int mvgpu_pci_init(struct mvgpu_dev *mv);
void mvgpu_pci_destroy(struct mvgpu_dev *mv);
void mvgpu_pci_reset(struct mvgpu_dev *mv);
void mvgpu_pci_read(struct mvgpu_dev *mv, u32 pos, u8 *buf, size_t count);
bool mvgpu_pci_write(struct mvgpu_dev *mv, u32 pos, const u8 *buf,
		     size_t count);

/* mvgpu-regs.c */
void mvgpu_regs_read(struct mvgpu_dev *mv, u32 pos, u8 *buf, size_t count);
void mvgpu_regs_write(struct mvgpu_dev *mv, u32 pos, const u8 *buf,
		      size_t count);

/* mvgpu-fb.c */
int mvgpu_fb_open(struct mvgpu_dev *mv);
void mvgpu_fb_close(struct mvgpu_dev *mv);
int mvgpu_fb_read_file(struct file *fb, u64 pos, void *buf, size_t count);
int mvgpu_fb_read(struct mvgpu_dev *mv, u64 pos, void *buf, size_t count);
int mvgpu_fb_write(struct mvgpu_dev *mv, u64 pos, const void *buf,
		   size_t count);
int mvgpu_fb_mmap(struct mvgpu_dev *mv, struct vm_area_struct *vma,
		  unsigned long pgoff);

/* mvgpu-engine.c */
void mvgpu_engine_init(struct mvgpu_dev *mv);
void mvgpu_engine_open(struct mvgpu_dev *mv);
void mvgpu_engine_stop(struct mvgpu_dev *mv);
void mvgpu_engine_doorbell(struct mvgpu_dev *mv, u32 command);

/* mvgpu-group.c */
extern struct mutex mvgpu_group_lock;
int mvgpu_group_init(struct mvgpu_dev *mv);
void mvgpu_group_leave(struct mvgpu_dev *mv);
int mvgpu_group_join(struct mvgpu_dev *mv, const guid_t *uuid);
int mvgpu_group_online(struct mvgpu_dev *mv);
int mvgpu_group_offline(struct mvgpu_dev *mv);
int mvgpu_group_open(struct mvgpu_dev *mv);
void mvgpu_group_close(struct mvgpu_dev *mv);
bool mvgpu_group_is_online(struct mvgpu_dev *mv);
u32 mvgpu_group_members(struct mvgpu_dev *mv);
u32 mvgpu_group_word(struct mvgpu_dev *mv, u32 index);
struct file *mvgpu_group_peer(struct mvgpu_dev *mv, u32 slot);
bool mvgpu_group_has_peer(struct mvgpu_dev *mv, const struct file *fb);

/* mvgpu-sysfs.c */
extern const struct attribute_group *mvgpu_mdev_groups[];
extern const struct attribute_group *mvgpu_parent_groups[];

/* mvgpu-debug.c */
enum mvgpu_fault_point {
	MVGPU_FAULT_CREATE,
	MVGPU_FAULT_START,
	MVGPU_FAULT_OPEN,
	MVGPU_FAULT_REGION,
	MVGPU_NR_FAULTS,
};

enum mvgpu_event {
	MVGPU_EVENT_CREATED,
	MVGPU_EVENT_GROUPED,
	MVGPU_EVENT_STARTED,
	MVGPU_EVENT_REFUSED,
	MVGPU_EVENT_OPENED,
	MVGPU_EVENT_ACCESSED,
	MVGPU_EVENT_CLOSED,
	MVGPU_EVENT_STOPPED,
	MVGPU_EVENT_REMOVED,
};

int mvgpu_debug_init(void);
void mvgpu_debug_exit(void);
int mvgpu_fault(enum mvgpu_fault_point point, const guid_t *uuid,
		const guid_t *group);
void mvgpu_log(struct mvgpu_dev *mv, enum mvgpu_event event,
	       const guid_t *group, int value);

#endif /* MVGPU_PRIV_H */
