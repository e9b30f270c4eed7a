// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * vfio-user: opens an mdev as QEMU does and abuses it as QEMU would not
 *
 * usage: vfio-user UUID check       every bound, every refusal; TAP on stdout
 *        vfio-user UUID... hold     opens them in turn, says "open", until stdin ends
 *        vfio-user UUID fill BYTES  fills and checks, prints the CRC-32
 *
 * Runs on the machine that has mvgpu.ko loaded, as root.
 */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mvgpu.h"

#define REGS (VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_REGS)
#define FB (VFIO_PCI_BAR0_REGION_INDEX + MVGPU_BAR_FB)
#define CONFIG VFIO_PCI_CONFIG_REGION_INDEX

static int container = -1, group = -1, device = -1;
static struct vfio_region_info regions[VFIO_PCI_NUM_REGIONS];
static int tests, failures;
/* Volatile, so that no compiler warns of what is done on purpose. */
static void *volatile nowhere;

static void die(const char *what)
{
    fprintf(stderr, "vfio-user: %s: %s\n", what, strerror(errno));
    exit(2);
}

__attribute__((format(printf, 2, 3))) static void ok(bool good, const char *format, ...)
{
    va_list args;

    printf("%sok %d - ", good ? "" : "not ", ++tests);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    failures += !good;
}

/*
 * Opening
 */

static void open_mdev(const char *uuid)
{
    struct vfio_group_status status = {.argsz = sizeof(status)};
    char path[256], link[256];
    ssize_t n;
    uint32_t i;

    snprintf(path, sizeof(path), "/sys/bus/mdev/devices/%s/iommu_group", uuid);
    n = readlink(path, link, sizeof(link) - 1);
    if (n < 0) {
        die(path);
    }
    link[n] = '\0';
    snprintf(path, sizeof(path), "/dev/vfio/%s", strrchr(link, '/') + 1);

    container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
    if (container < 0) {
        die("/dev/vfio/vfio");
    }
    group = open(path, O_RDWR | O_CLOEXEC);
    if (group < 0) {
        die(path);
    }
    if (ioctl(group, VFIO_GROUP_GET_STATUS, &status) || !(status.flags & VFIO_GROUP_FLAGS_VIABLE)) {
        die("group is not viable");
    }
    if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container)) {
        die("VFIO_GROUP_SET_CONTAINER");
    }
    if (ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU)) {
        die("VFIO_SET_IOMMU");
    }
    device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, uuid);
    if (device < 0) {
        die("VFIO_GROUP_GET_DEVICE_FD");
    }
    for (i = 0; i < VFIO_PCI_NUM_REGIONS; i++) {
        regions[i].argsz = sizeof(regions[i]);
        regions[i].index = i;
        if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &regions[i])) {
            die("VFIO_DEVICE_GET_REGION_INFO");
        }
    }
}

/*
 * Access
 */

static ssize_t rd(int region, uint64_t at, void *buf, size_t n)
{
    return pread(device, buf, n, regions[region].offset + at);
}

static ssize_t wr(int region, uint64_t at, const void *buf, size_t n)
{
    return pwrite(device, buf, n, regions[region].offset + at);
}

static uint32_t rd32(int region, uint64_t at)
{
    uint32_t val = 0xdeadbeef;

    if (rd(region, at, &val, sizeof(val)) != sizeof(val)) {
        return 0xdeadbeef;
    }
    return val;
}

static void wr32(int region, uint64_t at, uint32_t val)
{
    if (wr(region, at, &val, sizeof(val)) != sizeof(val)) {
        die("write");
    }
}

static int set_irq(uint32_t flags, uint32_t index, uint32_t count, int fd)
{
    char buf[sizeof(struct vfio_irq_set) + sizeof(int)] = {0};
    struct vfio_irq_set *set = (struct vfio_irq_set *)buf;

    set->argsz = flags & VFIO_IRQ_SET_DATA_EVENTFD ? sizeof(buf) : sizeof(*set);
    set->flags = flags;
    set->index = index;
    set->count = count;
    memcpy(set->data, &fd, sizeof(fd));
    return ioctl(device, VFIO_DEVICE_SET_IRQS, set) ? -errno : 0;
}

#define TRIGGER_FD (VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD)
#define TRIGGER_NONE (VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_NONE)
#define UNMASK_FD (VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_DATA_EVENTFD)
#define UNMASK_NONE (VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_DATA_NONE)
#define MASK_NONE (VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_DATA_NONE)

/* How often it was signalled since the last look, waiting a little for one. */
static uint64_t signals(int fd, int timeout_ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    uint64_t count = 0;

    if (poll(&p, 1, timeout_ms) == 1 && read(fd, &count, sizeof(count)) != sizeof(count)) {
        return 0;
    }
    return count;
}

static uint32_t run(uint32_t cmd, uint64_t src, uint64_t dst, uint64_t len, uint32_t seed)
{
    uint32_t status;

    wr32(REGS, MVGPU_REG_SRC_LO, (uint32_t)src);
    wr32(REGS, MVGPU_REG_SRC_HI, (uint32_t)(src >> 32));
    wr32(REGS, MVGPU_REG_DST_LO, (uint32_t)dst);
    wr32(REGS, MVGPU_REG_DST_HI, (uint32_t)(dst >> 32));
    wr32(REGS, MVGPU_REG_LEN_LO, (uint32_t)len);
    wr32(REGS, MVGPU_REG_LEN_HI, (uint32_t)(len >> 32));
    wr32(REGS, MVGPU_REG_SEED, seed);
    wr32(REGS, MVGPU_REG_COMMAND, cmd);
    while ((status = rd32(REGS, MVGPU_REG_STATUS)) & MVGPU_STATUS_BUSY) {
        usleep(1000);
    }
    return status;
}

static uint64_t fb_size(void)
{
    return rd32(REGS, MVGPU_REG_FB_SIZE_LO) | (uint64_t)rd32(REGS, MVGPU_REG_FB_SIZE_HI) << 32;
}

/* Bit by bit on purpose: it shares nothing with what it checks. */
static uint32_t crc32_of(const uint8_t *p, size_t n)
{
    uint32_t crc = ~0U;
    int bit;

    while (n--) {
        crc ^= *p++;
        for (bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
        }
    }
    return ~crc;
}

static uint32_t pattern_crc(uint32_t seed, uint64_t first, size_t bytes)
{
    uint32_t *words = malloc(bytes);
    uint32_t crc;
    size_t i;

    if (!words) {
        die("malloc");
    }
    for (i = 0; i < bytes / 4; i++) {
        words[i] = seed + (uint32_t)(first / 4 + i) * MVGPU_FILL_STEP;
    }
    crc = crc32_of((uint8_t *)words, bytes);
    free(words);
    return crc;
}

static int error_of(uint32_t status)
{
    return (status & MVGPU_STATUS_CODE_MASK) >> MVGPU_STATUS_CODE_SHIFT;
}

/*
 * Checks
 */

static void check_info(void)
{
    struct vfio_device_info info = {.argsz = sizeof(info)};
    struct vfio_region_info region = {.argsz = sizeof(region)};
    struct vfio_irq_info irq = {.argsz = sizeof(irq)};

    ok(!ioctl(device, VFIO_DEVICE_GET_INFO, &info) &&
           info.flags == (VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET) &&
           info.num_regions == VFIO_PCI_NUM_REGIONS && info.num_irqs == VFIO_PCI_NUM_IRQS,
       "device info");
    info.argsz = 4;
    ok(ioctl(device, VFIO_DEVICE_GET_INFO, &info) && errno == EINVAL, "device info, argsz 4");
    region.index = VFIO_PCI_NUM_REGIONS;
    ok(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region) && errno == EINVAL,
       "region info, index too large");
    region.index = UINT32_MAX;
    ok(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region) && errno == EINVAL,
       "region info, index of all ones");
    irq.index = VFIO_PCI_NUM_IRQS;
    ok(ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq) && errno == EINVAL,
       "irq info, index too large");
    irq.index = VFIO_PCI_MSI_IRQ_INDEX;
    ok(!ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq) && irq.count == 1, "irq info of MSI");
    irq.index = VFIO_PCI_MSIX_IRQ_INDEX;
    ok(!ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq) && irq.count == 0, "irq info of MSI-X");
    ok(ioctl(device, VFIO_DEVICE_GET_INFO, NULL) && errno == EFAULT, "device info, no buffer");
    ok(ioctl(device, _IO(VFIO_TYPE, VFIO_BASE + 90), NULL) && errno == ENOTTY, "unknown ioctl");
    ok(regions[REGS].size == MVGPU_BAR_REGS_SIZE && !(regions[REGS].flags & VFIO_REGION_INFO_FLAG_MMAP),
       "BAR 0 is trapped");
    ok(regions[FB].size && regions[FB].flags & VFIO_REGION_INFO_FLAG_MMAP, "BAR 2 is mappable");
    ok(!regions[VFIO_PCI_ROM_REGION_INDEX].size, "no ROM");
}

static void check_bounds(void)
{
    static const int some[] = {REGS, FB, CONFIG};
    uint8_t buf[64] = {0};
    unsigned i;

    for (i = 0; i < sizeof(some) / sizeof(some[0]); i++) {
        uint64_t size = regions[some[i]].size;

        ok(rd(some[i], size, buf, 4) < 0 && errno == EINVAL, "region %d: read at its end", some[i]);
        ok(wr(some[i], size, buf, 4) < 0 && errno == EINVAL, "region %d: write at its end", some[i]);
        ok(rd(some[i], size - 4, buf, 64) == 4, "region %d: read across its end is cut", some[i]);
        ok(rd(some[i], 1ULL << 39, buf, 1) < 0, "region %d: read far behind it", some[i]);
        ok(rd(some[i], 0, nowhere, 4) < 0 && errno == EFAULT, "region %d: read to nowhere", some[i]);
    }
    ok(pread(device, buf, 4, (off_t)1 << 40) < 0, "read of BAR 1, that is not there");
    ok(pread(device, buf, 4, (off_t)200 << 40) < 0, "read of region 200");
    ok(pwrite(device, buf, 4, (off_t)((1ULL << 63) - 8)) < 0, "write at the end of all offsets");
}

static void check_registers(void)
{
    uint8_t all[MVGPU_BAR_REGS_SIZE];
    uint64_t both = 0x1122334455667788;
    uint16_t half = 0xffff;

    ok(rd32(REGS, MVGPU_REG_MAGIC) == MVGPU_MAGIC, "magic");
    ok(rd32(REGS, MVGPU_REG_ABI) == MVGPU_ABI_VERSION, "ABI version");
    ok(rd(REGS, 0, all, sizeof(all)) == sizeof(all) && !memcmp(all, "mgpu", 4),
       "all registers in one read");
    ok(rd(REGS, MVGPU_REG_MAGIC + 1, all, 2) == 2 && !memcmp(all, "gp", 2), "two bytes, unaligned");
    wr32(REGS, MVGPU_REG_SCRATCH, 0x12345678);
    ok(rd32(REGS, MVGPU_REG_SCRATCH) == 0x12345678, "scratch keeps what is written");
    ok(wr(REGS, MVGPU_REG_SCRATCH, &half, 2) == 2 && rd32(REGS, MVGPU_REG_SCRATCH) == 0x12345678,
       "a narrow write does nothing");
    ok(wr(REGS, MVGPU_REG_SRC_LO, &both, 8) == 8 && rd32(REGS, MVGPU_REG_SRC_LO) == 0x55667788 &&
           rd32(REGS, MVGPU_REG_SRC_HI) == 0x11223344,
       "a 64 bit write is two registers");
    wr32(REGS, MVGPU_REG_MAGIC, 0);
    ok(rd32(REGS, MVGPU_REG_MAGIC) == MVGPU_MAGIC, "identity is read only");
    memset(all, 0xff, sizeof(all));
    ok(wr(REGS, 0, all, sizeof(all)) == sizeof(all), "all ones to all registers");
    while (rd32(REGS, MVGPU_REG_STATUS) & MVGPU_STATUS_BUSY) {
    }
    ok(error_of(rd32(REGS, MVGPU_REG_STATUS)) == MVGPU_ERR_COMMAND, "the unknown command is refused");
    ok(!ioctl(device, VFIO_DEVICE_RESET) && !rd32(REGS, MVGPU_REG_SCRATCH) &&
           !rd32(REGS, MVGPU_REG_STATUS) && !rd32(REGS, MVGPU_REG_IRQ_ENABLE),
       "reset clears the registers");
}

static void check_config(void)
{
    uint8_t all[4096], ones[4096];
    uint64_t aperture = regions[FB].size;
    uint8_t pos, previous = 0;
    unsigned found = 0;
    int hops;

    ok(rd(CONFIG, 0, all, sizeof(all)) == sizeof(all), "all of configuration space in one read");
    ok(rd32(CONFIG, 0) == (MVGPU_PCI_DEVICE_GRID << 16 | MVGPU_PCI_VENDOR) ||
           rd32(CONFIG, 0) == (MVGPU_PCI_DEVICE_IGD << 16 | MVGPU_PCI_VENDOR),
       "vendor and device");
    for (pos = all[PCI_CAPABILITY_LIST], hops = 0; pos && hops < 48; pos = all[pos + 1], hops++) {
        ok(pos > previous, "capability %#x at %#x", all[pos], pos);
        previous = pos;
        found |= 1U << all[pos];
    }
    ok(found == (1U << PCI_CAP_ID_PM | 1U << PCI_CAP_ID_MSI | 1U << PCI_CAP_ID_EXP),
       "power management, MSI and PCI Express");

    wr32(CONFIG, PCI_BASE_ADDRESS_0, ~0U);
    ok(rd32(CONFIG, PCI_BASE_ADDRESS_0) == (uint32_t)~(MVGPU_BAR_REGS_SIZE - 1), "size of BAR 0");
    wr32(CONFIG, PCI_BASE_ADDRESS_1, ~0U);
    ok(!rd32(CONFIG, PCI_BASE_ADDRESS_1), "no BAR 1");
    wr32(CONFIG, PCI_BASE_ADDRESS_2, ~0U);
    wr32(CONFIG, PCI_BASE_ADDRESS_3, ~0U);
    ok(((uint64_t)rd32(CONFIG, PCI_BASE_ADDRESS_3) << 32 | rd32(CONFIG, PCI_BASE_ADDRESS_2)) ==
           (~(aperture - 1) | 0xc),
       "size of BAR 2");

    /* All but the bit that resets, which would take everything back. */
    memset(ones, 0xff, sizeof(ones));
    ones[MVGPU_PCI_CAP_EXP + PCI_EXP_DEVCTL + 1] = 0x7f;
    ok(wr(CONFIG, 0, ones, sizeof(ones)) == sizeof(ones), "all ones to configuration space");
    ok(!memcmp(all, (uint8_t[]){MVGPU_PCI_VENDOR & 0xff, MVGPU_PCI_VENDOR >> 8}, 2) &&
           (rd32(CONFIG, 0) & 0xffff) == MVGPU_PCI_VENDOR,
       "identity is read only");
    wr32(REGS, MVGPU_REG_SCRATCH, 1);
    ones[0] = 0x80;
    ok(wr(CONFIG, MVGPU_PCI_CAP_EXP + PCI_EXP_DEVCTL + 1, ones, 1) == 1 &&
           !rd32(REGS, MVGPU_REG_SCRATCH) && !(rd32(CONFIG, PCI_COMMAND) & 0xffff),
       "a function level reset resets");
}

static void check_engine(void)
{
    uint64_t size = fb_size();
    const uint64_t n = 256 << 10;
    uint32_t status;
    uint8_t *bytes;

    status = run(MVGPU_CMD_CHECKSUM, 0, 0, n, 0);
    bytes = calloc(1, n);
    ok(status == MVGPU_STATUS_DONE && rd32(REGS, MVGPU_REG_RESULT) == crc32_of(bytes, n),
       "an untouched framebuffer is zero");
    free(bytes);
    ok(run(MVGPU_CMD_FILL, 0, 0, n, 7) == MVGPU_STATUS_DONE, "fill");
    status = run(MVGPU_CMD_CHECKSUM, 0, 0, n, 0);
    ok(rd32(REGS, MVGPU_REG_RESULT) == pattern_crc(7, 0, n), "checksum of the pattern");
    ok(run(MVGPU_CMD_FILL, 0, size - 4096, 4096, 9) == MVGPU_STATUS_DONE, "fill at the very end");
    status = run(MVGPU_CMD_CHECKSUM, size - 4096, 0, 4096, 0);
    ok(rd32(REGS, MVGPU_REG_RESULT) == pattern_crc(9, size - 4096, 4096), "and its checksum");
    ok(run(MVGPU_CMD_COPY, 0, 4096, n - 4096, 0) == MVGPU_STATUS_DONE, "copy upwards, overlapping");
    status = run(MVGPU_CMD_CHECKSUM, 4096, 0, n - 4096, 0);
    ok(rd32(REGS, MVGPU_REG_RESULT) == pattern_crc(7, 0, n - 4096), "and its checksum");
    ok(run(MVGPU_CMD_COPY, 4096, 0, n - 4096, 0) == MVGPU_STATUS_DONE, "copy downwards, overlapping");
    status = run(MVGPU_CMD_CHECKSUM, 0, 0, n - 4096, 0);
    ok(rd32(REGS, MVGPU_REG_RESULT) == pattern_crc(7, 0, n - 4096), "and its checksum");
    ok(run(MVGPU_CMD_FILL, 0, 0, 0, 0) == MVGPU_STATUS_DONE, "fill of nothing");

    ok(error_of(run(MVGPU_CMD_FILL, 0, 0, size + 4, 0)) == MVGPU_ERR_RANGE, "fill, too long");
    ok(error_of(run(MVGPU_CMD_FILL, 0, size, 4, 0)) == MVGPU_ERR_RANGE, "fill at the end");
    ok(error_of(run(MVGPU_CMD_FILL, 0, -4ULL, 8, 0)) == MVGPU_ERR_RANGE, "fill, sum overflows");
    ok(error_of(run(MVGPU_CMD_FILL, 0, 4, -4ULL, 0)) == MVGPU_ERR_RANGE, "fill, length of all ones");
    ok(error_of(run(MVGPU_CMD_FILL, 0, 2, 4, 0)) == MVGPU_ERR_ALIGN, "fill, odd offset");
    ok(error_of(run(MVGPU_CMD_CHECKSUM, -1ULL, 0, 2, 0)) == MVGPU_ERR_RANGE,
       "checksum, sum overflows");
    ok(error_of(run(MVGPU_CMD_COPY, 0, size - 8, 16, 0)) == MVGPU_ERR_RANGE, "copy, target too far");
    wr32(REGS, MVGPU_REG_PEER, rd32(REGS, MVGPU_REG_SLOT));
    ok(error_of(run(MVGPU_CMD_PEER_COPY, 0, 0, 16, 0)) == MVGPU_ERR_PEER, "not a peer of itself");
    wr32(REGS, MVGPU_REG_PEER, MVGPU_GROUP_SLOTS - 1);
    ok(error_of(run(MVGPU_CMD_PEER_COPY, 0, 0, 16, 0)) == MVGPU_ERR_PEER, "a slot without a peer");
    wr32(REGS, MVGPU_REG_PEER, ~0U);
    ok(error_of(run(MVGPU_CMD_PEER_COPY, 0, 0, 0, 0)) == MVGPU_ERR_PEER, "a slot far beyond all");
    ok(error_of(run(0, 0, 0, 0, 0)) == MVGPU_ERR_COMMAND, "command 0");

    /* A long job, rung again meanwhile, and cut short. */
    wr32(REGS, MVGPU_REG_SRC_LO, 0);
    wr32(REGS, MVGPU_REG_SRC_HI, 0);
    wr32(REGS, MVGPU_REG_LEN_LO, (uint32_t)size);
    wr32(REGS, MVGPU_REG_LEN_HI, (uint32_t)(size >> 32));
    wr32(REGS, MVGPU_REG_COMMAND, MVGPU_CMD_CHECKSUM);
    wr32(REGS, MVGPU_REG_COMMAND, MVGPU_CMD_CHECKSUM);
    status = rd32(REGS, MVGPU_REG_STATUS);
    ok(status == (MVGPU_STATUS_BUSY | MVGPU_STATUS_DROPPED), "a doorbell while busy is dropped");
    ok(!ioctl(device, VFIO_DEVICE_RESET) && !rd32(REGS, MVGPU_REG_STATUS), "reset ends a job");
    ok(run(MVGPU_CMD_FILL, 0, 0, 64, 0) == MVGPU_STATUS_DONE, "and the next one runs");
}

static void check_mmap(void)
{
    const int rw = PROT_READ | PROT_WRITE;
    uint64_t size = regions[FB].size;
    off_t fb = regions[FB].offset;
    long page = sysconf(_SC_PAGESIZE);
    uint32_t word = 0xcafe;
    volatile uint32_t *map;

    ok(mmap(NULL, page, rw, MAP_SHARED, device, regions[REGS].offset) == MAP_FAILED,
       "mmap of BAR 0 is refused");
    ok(mmap(NULL, page, rw, MAP_PRIVATE, device, fb) == MAP_FAILED, "private mmap is refused");
    ok(mmap(NULL, size + page, rw, MAP_SHARED, device, fb) == MAP_FAILED, "mmap, too long");
    ok(mmap(NULL, page, rw, MAP_SHARED, device, fb + size) == MAP_FAILED, "mmap behind the end");
    ok(mmap(NULL, 2 * page, rw, MAP_SHARED, device, fb + size - page) == MAP_FAILED,
       "mmap across the end");
    ok(mmap(NULL, page, rw, MAP_SHARED, device, fb + (1LL << 39)) == MAP_FAILED,
       "mmap far behind the end");
    ok(mmap(NULL, page, rw, MAP_SHARED, device, 200LL << 40) == MAP_FAILED, "mmap of region 200");

    map = mmap(NULL, size, rw, MAP_SHARED, device, fb);
    ok(map != MAP_FAILED, "mmap of all of BAR 2");
    if (map == MAP_FAILED) {
        return;
    }
    map[0] = 0x12345678;
    map[size / 4 - 1] = 0x9abcdef0;
    ok(rd32(FB, 0) == 0x12345678 && rd32(FB, size - 4) == 0x9abcdef0, "pread sees what was mapped");
    ok(wr(FB, 4096, &word, 4) == 4 && map[1024] == 0xcafe, "and the mapping what was written");
    ok(mremap((void *)map, size, size + page, MREMAP_MAYMOVE) == MAP_FAILED,
       "the mapping cannot grow");
    munmap((void *)map, size);
}

static void check_msi(int fd)
{
    ok(!set_irq(TRIGGER_FD, VFIO_PCI_MSI_IRQ_INDEX, 1, fd), "MSI eventfd");
    ok(set_irq(TRIGGER_FD, VFIO_PCI_INTX_IRQ_INDEX, 1, fd) == -EINVAL, "no INTx beside it");
    run(MVGPU_CMD_FILL, 0, 0, 64, 0);
    ok(!signals(fd, 50), "silent while not enabled");
    wr32(REGS, MVGPU_REG_IRQ_ENABLE, MVGPU_IRQ_ENGINE);
    ok(signals(fd, 1000) == 1, "enabling a pending cause signals");
    run(MVGPU_CMD_FILL, 0, 0, 64, 0);
    ok(signals(fd, 1000) == 1, "MSI signals every command");
    ok(!set_irq(TRIGGER_NONE, VFIO_PCI_MSI_IRQ_INDEX, 1, 0) && signals(fd, 1000) == 1,
       "the user fires it");
    ok(set_irq(MASK_NONE, VFIO_PCI_MSI_IRQ_INDEX, 1, 0) == -ENOTTY, "MSI is not maskable");
    ok(!set_irq(TRIGGER_NONE, VFIO_PCI_MSI_IRQ_INDEX, 0, 0), "MSI off");
    run(MVGPU_CMD_FILL, 0, 0, 64, 0);
    ok(!signals(fd, 50), "silent when off");
    wr32(REGS, MVGPU_REG_IRQ_STATUS, ~0U);
}

static void check_intx(int fd, int unmask)
{
    uint64_t one = 1;

    ok(set_irq(UNMASK_NONE, VFIO_PCI_INTX_IRQ_INDEX, 1, 0) == -EINVAL, "unmask without INTx");
    ok(!set_irq(TRIGGER_FD, VFIO_PCI_INTX_IRQ_INDEX, 1, fd), "INTx eventfd");
    run(MVGPU_CMD_FILL, 0, 0, 64, 0);
    ok(signals(fd, 1000) == 1, "INTx signals");
    ok(rd32(CONFIG, PCI_COMMAND) >> 16 & PCI_STATUS_INTERRUPT, "the status bit is set");
    run(MVGPU_CMD_FILL, 0, 0, 64, 0);
    ok(!signals(fd, 50), "masked by delivery");
    ok(!set_irq(UNMASK_NONE, VFIO_PCI_INTX_IRQ_INDEX, 1, 0) && signals(fd, 1000) == 1,
       "unmasked while the level is high: again");
    wr32(REGS, MVGPU_REG_IRQ_STATUS, ~0U);
    ok(!set_irq(UNMASK_NONE, VFIO_PCI_INTX_IRQ_INDEX, 1, 0) && !signals(fd, 50),
       "unmasked while it is low: silent");
    ok(!(rd32(CONFIG, PCI_COMMAND) >> 16 & PCI_STATUS_INTERRUPT), "the status bit is clear");

    wr32(CONFIG, PCI_COMMAND, PCI_COMMAND_INTX_DISABLE);
    run(MVGPU_CMD_FILL, 0, 0, 64, 0);
    ok(!signals(fd, 50), "silent by the command register");
    wr32(CONFIG, PCI_COMMAND, 0);
    ok(signals(fd, 1000) == 1, "and delivered when that ends");

    ok(!set_irq(UNMASK_FD, VFIO_PCI_INTX_IRQ_INDEX, 1, unmask), "an eventfd that unmasks");
    ok(write(unmask, &one, sizeof(one)) == sizeof(one) && signals(fd, 1000) == 1, "it unmasks");
    ok(set_irq(VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_INTX_IRQ_INDEX, 1,
               fd) == -ENOTTY,
       "no eventfd that masks");
    ok(!set_irq(UNMASK_FD, VFIO_PCI_INTX_IRQ_INDEX, 1, -1), "which can be taken away");
    ok(!set_irq(TRIGGER_NONE, VFIO_PCI_INTX_IRQ_INDEX, 0, 0), "INTx off");
    wr32(REGS, MVGPU_REG_IRQ_ENABLE, 0);
}

static void check_irqs(void)
{
    struct vfio_irq_set tiny = {.argsz = 8, .flags = TRIGGER_NONE, .count = 1};
    int fd = eventfd(0, EFD_CLOEXEC);
    int unmask = eventfd(0, EFD_CLOEXEC);

    ok(set_irq(TRIGGER_FD, 99, 1, fd) == -EINVAL, "no such index");
    ok(set_irq(TRIGGER_FD, VFIO_PCI_MSI_IRQ_INDEX, 2, fd) == -EINVAL, "two vectors of one");
    ok(set_irq(TRIGGER_FD, VFIO_PCI_MSI_IRQ_INDEX, UINT32_MAX, fd) == -EINVAL, "all ones vectors");
    ok(set_irq(TRIGGER_FD, VFIO_PCI_MSIX_IRQ_INDEX, 1, fd) == -EINVAL, "no MSI-X");
    ok(set_irq(TRIGGER_FD, VFIO_PCI_MSI_IRQ_INDEX, 1, 9999) == -EBADF, "no such descriptor");
    ok(set_irq(TRIGGER_FD, VFIO_PCI_MSI_IRQ_INDEX, 1, device) == -EINVAL, "not an eventfd");
    ok(set_irq(0xffffffff, VFIO_PCI_MSI_IRQ_INDEX, 1, fd) == -EINVAL, "all flags");
    ok(set_irq(VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_MSI_IRQ_INDEX, 1, fd) == -EINVAL, "no data");
    ok(ioctl(device, VFIO_DEVICE_SET_IRQS, &tiny) && errno == EINVAL, "argsz 8");
    check_msi(fd);
    check_intx(fd, unmask);

    ok(!set_irq(TRIGGER_FD, VFIO_PCI_REQ_IRQ_INDEX, 1, fd) &&
           !set_irq(TRIGGER_NONE, VFIO_PCI_REQ_IRQ_INDEX, 1, 0) && signals(fd, 1000) == 1,
       "the request index signals");
    /* Left armed on purpose, with both descriptors gone: closing must cope. */
    set_irq(TRIGGER_FD, VFIO_PCI_INTX_IRQ_INDEX, 1, fd);
    set_irq(UNMASK_FD, VFIO_PCI_INTX_IRQ_INDEX, 1, unmask);
    close(unmask);
    close(fd);
}

/* A second open sees nothing of the first, and an old mapping stays harmless. */
static void check_reopen(const char *uuid)
{
    volatile uint32_t *map;

    map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, device, regions[FB].offset);
    map[0] = 0xfeedface;
    close(device);
    close(group);
    close(container);
    open_mdev(uuid);
    ok(rd32(FB, 0) == 0 && rd32(REGS, MVGPU_REG_SEQUENCE) == 0, "a new user finds a clean device");
    map[1] = 0xfeedface;
    ok(rd32(FB, 4) == 0 && map[0] == 0xfeedface, "an old mapping is not of this device");
    munmap((void *)map, 4096);

    /* Closed in the middle of a job. */
    wr32(REGS, MVGPU_REG_LEN_LO, 64 << 20);
    wr32(REGS, MVGPU_REG_COMMAND, MVGPU_CMD_FILL);
    close(device);
    close(group);
    close(container);
    open_mdev(uuid);
    ok(rd32(REGS, MVGPU_REG_STATUS) == 0 && rd32(FB, 0) == 0, "closing ends the job");
}

static int check(const char *uuid)
{
    check_info();
    check_bounds();
    check_registers();
    check_config();
    check_engine();
    check_mmap();
    check_irqs();
    check_reopen(uuid);
    printf("1..%d\n", tests);
    return failures ? 1 : 0;
}

static int fill(const char *text)
{
    uint64_t bytes = strtoull(text, NULL, 0);

    if (run(MVGPU_CMD_FILL, 0, 0, bytes, 1) != MVGPU_STATUS_DONE ||
        run(MVGPU_CMD_CHECKSUM, 0, 0, bytes, 0) != MVGPU_STATUS_DONE) {
        fprintf(stderr, "vfio-user: status %#" PRIx32 "\n", rd32(REGS, MVGPU_REG_STATUS));
        return 1;
    }
    printf("%" PRIu32 "\n", rd32(REGS, MVGPU_REG_RESULT));
    return 0;
}

static int hold(void)
{
    char byte;

    printf("open\n");
    fflush(stdout);
    while (read(STDIN_FILENO, &byte, 1) > 0) {
    }
    return 0;
}

int main(int argc, char **argv)
{
    int i;

    if (argc == 3 && !strcmp(argv[2], "check")) {
        open_mdev(argv[1]);
        return check(argv[1]);
    }
    if (argc >= 3 && !strcmp(argv[argc - 1], "hold")) {
        for (i = 1; i < argc - 1; i++) {
            open_mdev(argv[i]);
        }
        return hold();
    }
    if (argc == 4 && !strcmp(argv[2], "fill")) {
        open_mdev(argv[1]);
        return fill(argv[3]);
    }
    fprintf(stderr, "usage: vfio-user UUID check | UUID... hold | UUID fill BYTES\n");
    return 2;
}
