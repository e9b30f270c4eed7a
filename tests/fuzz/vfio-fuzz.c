// SPDX-License-Identifier: GPL-2.0
/*
 * vfio-fuzz: calls of a VFIO device, and of its files in sysfs, as no program
 * makes them
 *
 * usage: vfio-fuzz SEED CALLS SECONDS THREADS TYPE...
 *
 * It makes mdevs of the given types (directories with a file "create"), and
 * until it has made CALLS calls, or SECONDS are over, opens, uses, abuses,
 * closes and removes them. What it does is a function of SEED; with one thread
 * the order is too. Otherwise the first thread creates and removes, the others
 * do all else, and one more process, a stranger to the groups of the first,
 * does the same. At the end nothing is left, and it prints how many calls of
 * which kind there were and how they ended. Exit status 0 if all were made, 3
 * if there was no time for them, 2 if it could not begin.
 *
 * A call counts when it has reached its object: not when that was closed.
 *
 * Where the kernel has fault injection, one call in eight is made with an
 * allocation or a copy from user space in it failing: the n-th, n random.
 */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "mvgpu.h"

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))
#define MIB		(1ULL << 20)

#define SLOTS		6	/* mdevs, there or not */
#define GROUPS		3	/* start groups, the first is none */
#define CONTAINERS	2
#define EVENTS		4	/* eventfds */
#define MAPS		4	/* of each thread */
#define MAX_THREADS	16
#define BUFFER		(64 * 1024)
#define ERRNOS		4096
#define GRACE		120	/* seconds after which it kills itself */

/*
 * Descriptors have fixed numbers, and a closed one refers to something that
 * answers all with EBADF: a thread can use what another one closes, and never
 * meets a file of another kind.
 */
#define FD_NOTHING	200
#define FD_CONTAINER(n)	(210 + (n))
#define FD_GROUP(n)	(220 + (n))
#define FD_DEVICE(n)	(230 + (n))
#define FD_EVENT(n)	(240 + (n))

#define REGION_SHIFT	40	/* of the number of a region in an offset */

enum kind {
	OPEN, CLOSE, READ, WRITE, JOB, MMAP, TOUCH, INFO, SET_IRQS, RESET,
	EVENT, IOCTL, CONTAINER, GROUP, ATTRIBUTE, CREATE, REMOVE, FAULT,
	KINDS
};

static const char *const kind_names[KINDS] = {
	"open", "close", "read", "write", "job", "mmap", "touch", "info",
	"set_irqs", "reset", "event", "ioctl", "container", "group",
	"attribute", "create", "remove", "fault",
};

/* What both processes count. */
static struct shared {
	atomic_ulong calls;
	atomic_ulong injected;		/* calls in which something failed */
	atomic_bool stop;
	atomic_ulong results[KINDS][ERRNOS];	/* 0: it succeeded */
} *shared;

struct thread {
	pthread_t id;
	unsigned int number;
	uint64_t random;
	int fail_nth;			/* descriptor, or -1 */
	uint8_t *buffer;		/* BUFFER bytes, then none */
	struct {
		uint8_t *at;
		size_t length;
	} maps[MAPS];
};

static unsigned long seed, wanted, seconds;
static unsigned int threads;
static char **types;
static unsigned int nr_types;
static char uuids[SLOTS][37];
static char groups[GROUPS][37];

static _Thread_local sigjmp_buf landing;
static _Thread_local volatile sig_atomic_t in_the_air;

static void die(const char *what)
{
	fprintf(stderr, "vfio-fuzz: %s: %s\n", what, strerror(errno));
	exit(2);
}

/*
 * Chance
 */

/* splitmix64 */
static uint64_t any(struct thread *t)
{
	uint64_t z = t->random += 0x9e3779b97f4a7c15ULL;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
	return z ^ z >> 31;
}

static uint64_t below(struct thread *t, uint64_t limit)
{
	return any(t) % limit;
}

static bool one_in(struct thread *t, uint64_t n)
{
	return !below(t, n);
}

/* A number that is likely to stand at some limit. */
static uint32_t awkward(struct thread *t)
{
	static const uint32_t limits[] = {
		0, 1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 255, 256, 4095, 4096,
		0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff,
	};

	return one_in(t, 4) ? any(t) : limits[below(t, ARRAY_SIZE(limits))];
}

static void noise(struct thread *t, void *at, size_t length)
{
	uint8_t *p = at;
	size_t i;

	for (i = 0; i < length; i++)
		p[i] = any(t);
}

/* Mostly room for length bytes; else their end, or all, is not there. */
static void *pointer(struct thread *t, size_t length)
{
	switch (below(t, 32)) {
	case 0:
		return NULL;
	case 1:
		return (void *)0xffff888000000000ULL;
	case 2:
		return t->buffer + BUFFER - below(t, 64);
	default:
		return t->buffer + (length < BUFFER ? BUFFER - length : 0);
	}
}

/*
 * Calls
 */

static void count(enum kind kind, int error)
{
	if (error == EBADF)
		return;
	atomic_fetch_add(&shared->calls, 1);
	atomic_fetch_add(&shared->results[kind][error % ERRNOS], 1);
}

/* Lets the next call fail somewhere; true if it may. */
static bool arm(struct thread *t)
{
	char nth[8];
	int n;

	if (t->fail_nth < 0 || !one_in(t, 8))
		return false;
	n = snprintf(nth, sizeof(nth), "%d", (int)below(t, 24) + 1);
	return pwrite(t->fail_nth, nth, n, 0) == n;
}

static void disarm(struct thread *t)
{
	char left[8];

	if (pread(t->fail_nth, left, sizeof(left), 0) > 0 && left[0] == '0')
		atomic_fetch_add(&shared->injected, 1);
	/* What is left can befall this write; then nothing is left. */
	while (pwrite(t->fail_nth, "0", 1, 0) != 1)
		;
}

#define CALL(t, kind, call)					\
({								\
	bool armed_ = arm(t);					\
	long result_ = (long)(call);				\
	int error_ = result_ == -1 ? errno : 0;			\
								\
	if (armed_)						\
		disarm(t);					\
	count(kind, error_);					\
	errno = error_;						\
	result_;						\
})

static bool is_closed(int number)
{
	return fcntl(number, F_GETFL) & O_PATH;
}

/* Puts a descriptor at a fixed number, and closes what was there. */
static void place(struct thread *t, int fd, int number)
{
	if (is_closed(number))
		dup3(fd, number, O_CLOEXEC);
	else
		CALL(t, CLOSE, dup3(fd, number, O_CLOEXEC));
	if (fd != FD_NOTHING)
		close(fd);
}

static void leave(struct thread *t, int number)
{
	place(t, FD_NOTHING, number);
}

static unsigned int a_slot(struct thread *t)
{
	return below(t, SLOTS);
}

static int a_device(struct thread *t)
{
	return FD_DEVICE(a_slot(t));
}

/*
 * Opening and closing
 */

static void open_container(struct thread *t, unsigned int which)
{
	int fd = CALL(t, OPEN, open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC));

	if (fd >= 0)
		place(t, fd, FD_CONTAINER(which));
}

static void open_device(struct thread *t)
{
	unsigned int slot = a_slot(t);
	int container = FD_CONTAINER(slot % CONTAINERS);
	char path[128], link[128], *number;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/sys/bus/mdev/devices/%s/iommu_group",
		 uuids[slot]);
	n = readlink(path, link, sizeof(link) - 1);
	if (n < 0)
		return;
	link[n] = '\0';
	number = strrchr(link, '/');
	snprintf(path, sizeof(path), "/dev/vfio/%s", number ? number + 1 : "");

	if (is_closed(container))
		open_container(t, slot % CONTAINERS);
	fd = CALL(t, OPEN, open(path, O_RDWR | O_CLOEXEC));
	if (fd >= 0)
		place(t, fd, FD_GROUP(slot));
	if (!one_in(t, 16))
		CALL(t, GROUP, ioctl(FD_GROUP(slot), VFIO_GROUP_SET_CONTAINER,
				     &container));
	if (!one_in(t, 16))
		CALL(t, CONTAINER, ioctl(container, VFIO_SET_IOMMU,
					 one_in(t, 16) ? awkward(t) :
					 VFIO_TYPE1v2_IOMMU));
	fd = CALL(t, OPEN, ioctl(FD_GROUP(slot), VFIO_GROUP_GET_DEVICE_FD,
				 uuids[slot]));
	if (fd >= 0)
		place(t, fd, FD_DEVICE(slot));
}

static void close_device(struct thread *t)
{
	unsigned int slot = a_slot(t);

	if (!one_in(t, 8))
		leave(t, FD_DEVICE(slot));
	if (one_in(t, 2))
		leave(t, FD_GROUP(slot));
	if (one_in(t, 8))
		leave(t, FD_CONTAINER(slot % CONTAINERS));
}

static void close_all(struct thread *t)
{
	unsigned int i;

	for (i = 0; i < SLOTS; i++) {
		leave(t, FD_DEVICE(i));
		leave(t, FD_GROUP(i));
	}
	for (i = 0; i < CONTAINERS; i++)
		leave(t, FD_CONTAINER(i));
}

/*
 * Regions
 */

static uint64_t a_region(struct thread *t)
{
	static const uint8_t real[] = {
		VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_REGS,
		VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_FB,
		VFIO_PCI_CONFIG_REGION_INDEX,
	};

	if (one_in(t, 16))
		return below(t, 16);
	if (one_in(t, 64))
		return below(t, 1 << 24);
	return real[below(t, ARRAY_SIZE(real))];
}

static uint64_t a_place(struct thread *t)
{
	static const uint64_t ends[] = {
		64, 256, 4096, 2 * MIB, 128 * MIB, 256 * MIB, 512 * MIB,
		1ULL << REGION_SHIFT,
	};

	switch (below(t, 16)) {
	case 0:
		return ends[below(t, ARRAY_SIZE(ends))] - 8 + below(t, 16);
	case 1:
		return below(t, 2 * MIB);
	case 2:
		return below(t, 128 * MIB);
	case 3:
		return below(t, 1ULL << REGION_SHIFT);
	case 4:
	case 5:
		return below(t, 4096);
	default:
		return below(t, 1024) & ~3ULL;
	}
}

static off_t an_offset(struct thread *t)
{
	if (one_in(t, 64))
		return any(t);
	return a_region(t) << REGION_SHIFT | a_place(t);
}

static size_t a_length(struct thread *t)
{
	switch (below(t, 16)) {
	case 0:
		return below(t, 64);
	case 1:
		return below(t, 4097);
	case 2:
		return one_in(t, 4) ? below(t, BUFFER) : 0;
	case 3:
		return one_in(t, 4) ? any(t) : 3;
	default:
		return 1 << below(t, 4);
	}
}

static void read_region(struct thread *t)
{
	size_t length = a_length(t);
	void *to = pointer(t, length);

	CALL(t, READ, pread(a_device(t), to, length, an_offset(t)));
}

static void write_region(struct thread *t)
{
	size_t length = a_length(t);
	uint8_t *from = pointer(t, length);

	noise(t, t->buffer + BUFFER - 64, 64);
	CALL(t, WRITE, pwrite(a_device(t), from, length, an_offset(t)));
}

static void write_register(struct thread *t)
{
	uint32_t value = awkward(t);
	uint64_t at = below(t, 0x300) & ~3ULL;

	CALL(t, WRITE, pwrite(a_device(t), &value, sizeof(value), at));
}

static uint64_t an_address(struct thread *t)
{
	if (one_in(t, 8))
		return a_place(t);
	return below(t, 128 * MIB) & ~3ULL;
}

/* All registers of the engine in one write, the doorbell last. */
static void ring(struct thread *t)
{
	uint32_t regs[(MVGPU_REG_COMMAND - MVGPU_REG_SRC_LO) / 4 + 1];
	uint64_t src = an_address(t), dst = an_address(t);
	uint64_t length = below(t, 64 * 1024) & ~3ULL;

	if (one_in(t, 16))
		length = below(t, 4 * MIB);
	if (one_in(t, 64))
		length = a_place(t);
	regs[0] = src;
	regs[1] = src >> 32;
	regs[2] = dst;
	regs[3] = dst >> 32;
	regs[4] = length;
	regs[5] = length >> 32;
	regs[6] = any(t);
	regs[7] = one_in(t, 8) ? awkward(t) : below(t, SLOTS);
	regs[8] = one_in(t, 16) ? awkward(t) : 1 + below(t, 4);
	CALL(t, JOB, pwrite(a_device(t), regs, sizeof(regs),
			    MVGPU_REG_SRC_LO));
}

/*
 * Mappings, which stay for a while and outlive what they are of
 */

static void on_fault(int number)
{
	if (in_the_air)
		siglongjmp(landing, number);
	signal(number, SIG_DFL);
	raise(number);
}

static void touch(struct thread *t, uint8_t *map, size_t length)
{
	volatile uint8_t *at = map + below(t, length);
	bool store = one_in(t, 2);
	int number = sigsetjmp(landing, 1);

	if (!number) {
		in_the_air = 1;
		if (store)
			*at = 1;
		else
			(void)*at;
	}
	in_the_air = 0;
	count(TOUCH, number ? EFAULT : 0);
}

static void unmap(struct thread *t, unsigned int i)
{
	if (t->maps[i].at)
		munmap(t->maps[i].at, t->maps[i].length);
	t->maps[i].at = NULL;
}

static void map_region(struct thread *t)
{
	unsigned int i = below(t, MAPS), n = below(t, 4);
	size_t length = below(t, 2 * MIB) + 1;
	off_t offset = an_offset(t);
	int flags = one_in(t, 8) ? MAP_PRIVATE : MAP_SHARED;
	int prot = one_in(t, 8) ? below(t, 8) : PROT_READ | PROT_WRITE;
	long at;

	if (!one_in(t, 8))
		offset = (off_t)VFIO_PCI_BAR2_REGION_INDEX << REGION_SHIFT |
			 below(t, 3 * MIB);
	if (!one_in(t, 16))
		offset &= ~4095ULL;
	if (one_in(t, 32))
		length = any(t);
	unmap(t, i);
	at = CALL(t, MMAP, mmap(NULL, length, prot, flags, a_device(t),
				offset));
	if (at == -1)
		return;
	t->maps[i].at = (uint8_t *)at;
	t->maps[i].length = length;
	while (n--)
		touch(t, t->maps[i].at, length);
}

static void use_map(struct thread *t)
{
	unsigned int i = below(t, MAPS);
	uint8_t *at = t->maps[i].at;
	size_t length = t->maps[i].length;

	if (!at)
		return;
	switch (below(t, 8)) {
	case 0:
		CALL(t, MMAP, madvise(at, length, below(t, 24)));
		break;
	case 1:
		CALL(t, MMAP, mprotect(at, length, below(t, 8)));
		break;
	case 2:
		CALL(t, MMAP, msync(at, length, MS_SYNC));
		break;
	case 3:		/* There is no more than was given. */
		if (CALL(t, MMAP, (long)mremap(at, length, length + 4096,
					       0)) != -1)
			t->maps[i].length += 4096;
		break;
	default:
		touch(t, at, length);
	}
}

/*
 * Ioctls
 */

/* A structure that begins with its size, rightly or not. */
static void *an_argument(struct thread *t, size_t *size)
{
	uint32_t *words;
	unsigned int i;

	*size = 8 + below(t, 15) * 8;
	words = (uint32_t *)(t->buffer + BUFFER - *size);
	for (i = 0; i < *size / 4; i++)
		words[i] = awkward(t);
	words[0] = one_in(t, 4) ? awkward(t) : *size;
	if (one_in(t, 2))
		words[1] = 0;
	return one_in(t, 16) ? pointer(t, *size) : words;
}

static void ask_info(struct thread *t)
{
	static const unsigned long asks[] = {
		VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_REGION_INFO,
		VFIO_DEVICE_GET_IRQ_INFO,
	};
	uint32_t *argument = (uint32_t *)t->buffer;

	argument[0] = one_in(t, 8) ? awkward(t) : 64;
	argument[1] = 0;
	argument[2] = one_in(t, 8) ? awkward(t) : below(t, 12);
	CALL(t, INFO, ioctl(a_device(t), asks[below(t, ARRAY_SIZE(asks))],
			    argument));
}

static void set_irqs(struct thread *t)
{
	struct vfio_irq_set set = {
		.argsz = sizeof(set) + sizeof(int32_t),
		.flags = 1 << below(t, 3) | 8 << below(t, 3),
		.index = below(t, VFIO_PCI_NUM_IRQS),
		.count = !one_in(t, 4),
	};
	int32_t data = FD_EVENT(below(t, EVENTS));
	uint8_t *argument = t->buffer + BUFFER - set.argsz;

	if (one_in(t, 4))
		data = one_in(t, 2) ? -1 : (int32_t)awkward(t);
	if (one_in(t, 16))
		data = a_device(t);
	if (one_in(t, 16))
		set.argsz = awkward(t);
	if (one_in(t, 16))
		set.flags = awkward(t);
	if (one_in(t, 16))
		set.index = awkward(t);
	if (one_in(t, 16))
		set.start = awkward(t);
	if (one_in(t, 16))
		set.count = awkward(t);
	memcpy(argument, &set, sizeof(set));
	memcpy(argument + sizeof(set), &data, sizeof(data));
	CALL(t, SET_IRQS, ioctl(a_device(t), VFIO_DEVICE_SET_IRQS, argument));
}

/* A guest's end of interrupt, or a user who looks whether there was one. */
static void signal_event(struct thread *t)
{
	uint64_t value = 1;
	int fd = FD_EVENT(below(t, EVENTS));

	if (one_in(t, 2))
		CALL(t, EVENT, write(fd, &value, sizeof(value)));
	else
		CALL(t, EVENT, read(fd, &value, sizeof(value)));
}

static void reset(struct thread *t)
{
	CALL(t, RESET, ioctl(a_device(t), VFIO_DEVICE_RESET));
}

static void any_ioctl(struct thread *t)
{
	unsigned long request = _IO(VFIO_TYPE, VFIO_BASE + below(t, 24));
	size_t size;
	void *argument = an_argument(t, &size);

	if (one_in(t, 8))
		request = any(t);
	CALL(t, IOCTL, ioctl(a_device(t), request, argument));
}

static void group_ioctl(struct thread *t)
{
	unsigned long request = _IO(VFIO_TYPE, VFIO_BASE + below(t, 8));
	int fd = FD_GROUP(a_slot(t));
	size_t size;
	void *argument = an_argument(t, &size);
	int got;

	if (one_in(t, 4))
		argument = strcpy((char *)t->buffer, uuids[a_slot(t)]);
	got = CALL(t, GROUP, ioctl(fd, request, argument));
	if (request == VFIO_GROUP_GET_DEVICE_FD && got >= 0)
		close(got);
}

/*
 * Only in a run of one thread: when the last group leaves a container, by a
 * close or by the removal of its device, Linux (6.12 at least) frees what such
 * an ioctl works on.
 */
static void container_ioctl(struct thread *t)
{
	int fd = FD_CONTAINER(below(t, CONTAINERS));
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map),
		.flags = below(t, 4),
		.vaddr = (uintptr_t)t->buffer,
		.iova = below(t, 64) * 4096,
		.size = (1 + below(t, 16)) * 4096,
	};
	struct vfio_iommu_type1_dma_unmap undo = {
		.argsz = sizeof(undo),
		.iova = map.iova,
		.size = map.size,
	};
	size_t size;
	void *argument;

	if (threads > 1)
		return;
	switch (below(t, 4)) {
	case 0:
		if (one_in(t, 4))
			map.iova = any(t);
		if (one_in(t, 4))
			map.size = any(t);
		CALL(t, CONTAINER, ioctl(fd, VFIO_IOMMU_MAP_DMA, &map));
		break;
	case 1:
		if (one_in(t, 4)) {
			undo.flags = VFIO_DMA_UNMAP_FLAG_ALL;
			undo.iova = undo.size = 0;
		}
		CALL(t, CONTAINER, ioctl(fd, VFIO_IOMMU_UNMAP_DMA, &undo));
		break;
	default:
		argument = an_argument(t, &size);
		CALL(t, CONTAINER, ioctl(fd, _IO(VFIO_TYPE,
						 VFIO_BASE + below(t, 24)),
					 argument));
	}
}

/*
 * sysfs and debugfs
 */

static long put(struct thread *t, enum kind kind, const char *path,
		const char *text, size_t length)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	long result;

	if (fd < 0)
		return -1;
	result = CALL(t, kind, write(fd, text, length));
	close(fd);
	return result;
}

static void read_file(struct thread *t, enum kind kind, const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	CALL(t, kind, pread(fd, t->buffer, 4096, 0));
	close(fd);
}

static void attribute(struct thread *t)
{
	static const char *const names[] = {
		"online", "group_uuid", "vgpu_params", "group_owner",
		"group_links", "group_error", "mdev_type/available_instances",
		"mdev_type/description", "uevent",
	};
	static const char *const texts[] = {
		"0", "1", "", "\n", "2", "frame_rate_limiter=0",
		"a=b,frame_rate_limiter=0,disable_vnc=1", "frame_rate_limiter",
	};
	const char *name = names[below(t, ARRAY_SIZE(names))];
	char path[192], text[600];
	size_t length;

	if (one_in(t, 2))
		name = names[below(t, 3)];
	snprintf(path, sizeof(path), "/sys/bus/mdev/devices/%s/%s",
		 uuids[a_slot(t)], name);
	if (one_in(t, 3)) {
		read_file(t, ATTRIBUTE, path);
		return;
	}
	switch (below(t, 8)) {
	case 0:
		length = below(t, sizeof(text));
		noise(t, text, length);
		break;
	case 1:
		length = below(t, sizeof(text));
		memset(text, ' ' + below(t, 95), length);
		break;
	case 2:
	case 3:
	case 4:
		strcpy(text, groups[below(t, GROUPS)]);
		length = strlen(text);
		if (one_in(t, 8) && length)
			text[below(t, length)] ^= 1 << below(t, 8);
		break;
	default:
		strcpy(text, texts[below(t, ARRAY_SIZE(texts))]);
		length = strlen(text);
	}
	put(t, ATTRIBUTE, path, text, length);
}

/* What the driver can be asked to do wrong, in small. */
static void inject(struct thread *t)
{
	static const char *const points[] = {
		"create", "start", "open", "region",
	};
	static const int errors[] = { 0, EIO, EREMOTEIO, ENOMEM, 4095 };
	char path[64], text[64];

	snprintf(path, sizeof(path), "/sys/kernel/debug/mvgpu/fault/%s",
		 points[below(t, ARRAY_SIZE(points))]);
	switch (below(t, 8)) {
	case 0:
		read_file(t, FAULT, path);
		return;
	case 1:
		read_file(t, FAULT, "/sys/kernel/debug/mvgpu/log");
		return;
	case 2:
		noise(t, text, sizeof(text));
		put(t, FAULT, path, text, sizeof(text));
		return;
	default:
		snprintf(text, sizeof(text), "errno=%d delay_ms=%d times=%d",
			 errors[below(t, ARRAY_SIZE(errors))],
			 one_in(t, 4) ? 2 : 0, (int)below(t, 4));
		put(t, FAULT, path, text, strlen(text));
	}
}

static void heal(struct thread *t)
{
	put(t, FAULT, "/sys/kernel/debug/mvgpu/fault/create", "\n", 1);
	put(t, FAULT, "/sys/kernel/debug/mvgpu/fault/start", "\n", 1);
	put(t, FAULT, "/sys/kernel/debug/mvgpu/fault/open", "\n", 1);
	put(t, FAULT, "/sys/kernel/debug/mvgpu/fault/region", "\n", 1);
}

static void create(struct thread *t)
{
	char path[256], text[64];
	size_t length = strlen(uuids[0]);

	snprintf(path, sizeof(path), "%s/create", types[below(t, nr_types)]);
	strcpy(text, uuids[a_slot(t)]);
	if (one_in(t, 16)) {
		length = below(t, sizeof(text));
		noise(t, text + 8, 20);
	}
	put(t, CREATE, path, text, length);
}

/* Blocks until it is not open: another thread must close it. */
static void remove_mdev(struct thread *t, unsigned int slot, const char *text)
{
	char path[128];

	if (threads == 1)
		leave(t, FD_DEVICE(slot));
	snprintf(path, sizeof(path), "/sys/bus/mdev/devices/%s/remove",
		 uuids[slot]);
	put(t, REMOVE, path, text, 1);
}

/*
 * Threads
 */

static void create_or_remove(struct thread *t)
{
	if (one_in(t, 4))
		remove_mdev(t, a_slot(t), one_in(t, 16) ? "0" : "1");
	else
		create(t);
}

/* Weights out of their sum. */
static const struct {
	void (*act)(struct thread *t);
	unsigned int weight;
} actions[] = {
	{ read_region, 220 }, { write_region, 200 }, { write_register, 100 },
	{ ring, 80 }, { map_region, 40 }, { use_map, 60 }, { ask_info, 60 },
	{ set_irqs, 120 }, { signal_event, 20 }, { reset, 20 },
	{ any_ioctl, 100 }, { group_ioctl, 10 }, { container_ioctl, 20 },
	{ attribute, 40 }, { inject, 2 }, { open_device, 20 },
	{ close_device, 6 },
};

static void act(struct thread *t)
{
	unsigned int total = 0, i;
	uint64_t chosen;

	for (i = 0; i < ARRAY_SIZE(actions); i++)
		total += actions[i].weight;
	chosen = below(t, total);
	for (i = 0; chosen >= actions[i].weight; i++)
		chosen -= actions[i].weight;
	actions[i].act(t);
}

static bool enough(void)
{
	return atomic_load(&shared->stop) ||
	       atomic_load(&shared->calls) >= wanted;
}

static void *work(void *argument)
{
	struct thread *t = argument;
	unsigned int i;

	t->fail_nth = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	for (i = 0; i < 2 * SLOTS && !t->number; i++)
		create(t);
	while (!enough()) {
		if (threads > 1 && !t->number) {
			create_or_remove(t);
			attribute(t);
			usleep(10000);
		} else if (threads == 1 && one_in(t, 256)) {
			create_or_remove(t);
		} else {
			act(t);
		}
	}
	for (i = 0; i < MAPS; i++)
		unmap(t, i);
	if (t->fail_nth >= 0)
		close(t->fail_nth);
	t->fail_nth = -1;
	return NULL;
}

static void prepare(struct thread *t, unsigned int number)
{
	memset(t, 0, sizeof(*t));
	t->number = number;
	t->random = seed * 1000003 + number;
	t->fail_nth = -1;
	t->buffer = mmap(NULL, BUFFER + 4096, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (t->buffer == MAP_FAILED ||
	    mprotect(t->buffer + BUFFER, 4096, PROT_NONE))
		die("mmap");
}

/* One process: its own descriptors, its threads, and their end. */
static void run(unsigned int first, unsigned int last)
{
	static struct thread all[MAX_THREADS + 1];
	unsigned int i;
	int fd;

	fd = open("/", O_PATH | O_CLOEXEC);
	if (fd < 0 || dup3(fd, FD_NOTHING, O_CLOEXEC) < 0)
		die("/");
	close(fd);
	for (i = first; i <= last; i++)
		prepare(&all[i], i);
	close_all(&all[first]);
	for (i = 0; i < EVENTS; i++) {
		fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		if (fd < 0 || dup3(fd, FD_EVENT(i), O_CLOEXEC) < 0)
			die("eventfd");
		close(fd);
	}
	for (i = first; i <= last; i++)
		if (pthread_create(&all[i].id, NULL, work, &all[i]))
			die("pthread_create");
	/* The first may wait for a removal, and that for us. */
	for (i = last; i > first; i--)
		pthread_join(all[i].id, NULL);
	if (last > first)
		close_all(&all[last]);
	pthread_join(all[first].id, NULL);
	close_all(&all[first]);
}

static void print_results(double took)
{
	unsigned int i, error;

	for (i = 0; i < KINDS; i++) {
		printf("%s:", kind_names[i]);
		for (error = 0; error < ERRNOS; error++) {
			unsigned long n = shared->results[i][error];
			const char *name = strerrorname_np(error);

			if (n && name)
				printf(" %s=%lu", error ? name : "ok", n);
			else if (n)
				printf(" %u=%lu", error, n);
		}
		printf("\n");
	}
	printf("seed %lu: %lu calls of %lu in %.0f s, %lu of them with a failure inside, %u threads\n",
	       seed, atomic_load(&shared->calls), wanted, took,
	       atomic_load(&shared->injected), threads);
}

static void on_alarm(int number)
{
	/* Twice: nothing ended it, not even the end of time. */
	if (atomic_exchange(&shared->stop, true))
		kill(0, SIGKILL);
	alarm(GRACE);
	(void)number;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	struct sigaction fault = {
		.sa_handler = on_fault,
		.sa_flags = SA_NODEFER,
	};
	struct thread last;
	double began = now();
	pid_t stranger = 0;
	unsigned int i;

	if (argc < 6) {
		fprintf(stderr, "usage: vfio-fuzz SEED CALLS SECONDS THREADS TYPE...\n");
		return 2;
	}
	seed = strtoul(argv[1], NULL, 0);
	wanted = strtoul(argv[2], NULL, 0);
	seconds = strtoul(argv[3], NULL, 0);
	threads = strtoul(argv[4], NULL, 0);
	types = argv + 5;
	nr_types = argc - 5;
	if (!threads || threads > MAX_THREADS || !seconds) {
		fprintf(stderr, "vfio-fuzz: 1 to %d threads, and some time\n",
			MAX_THREADS);
		return 2;
	}
	for (i = 0; i < SLOTS; i++)
		snprintf(uuids[i], sizeof(uuids[i]),
			 "%08x-0000-4000-8000-%012x", (unsigned int)seed, i);
	for (i = 1; i < GROUPS; i++)
		snprintf(groups[i], sizeof(groups[i]),
			 "%08x-1111-4000-8000-%012x", (unsigned int)seed, i);

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		die("mmap");
	setpgid(0, 0);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGSEGV, &fault, NULL);
	sigaction(SIGBUS, &fault, NULL);
	signal(SIGALRM, on_alarm);
	alarm(seconds);

	if (threads > 1) {
		stranger = fork();
		if (stranger < 0)
			die("fork");
		if (!stranger) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			run(threads, threads);
			_exit(0);
		}
		run(0, threads - 1);
		waitpid(stranger, NULL, 0);
	} else {
		run(0, 0);
	}

	prepare(&last, MAX_THREADS + 1);
	heal(&last);
	for (i = 0; i < SLOTS; i++)
		remove_mdev(&last, i, "1");
	print_results(now() - began);
	return atomic_load(&shared->calls) >= wanted ? 0 : 3;
}
