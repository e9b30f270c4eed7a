/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What reads and writes of a device take in a guest, one with an mvgpu and an mtty.
 *
 * Each way has its turn in random order, as many rounds as "rounds" in the environment (from
 * the kernel's command line) says, after one that warms up. In the end every turn is a line on the
 * console:
 *
 *     @bench WORK;WAY;SECONDS
 *
 * of one access, the mean of many, or of one MiB in words of 32 bits. Then the guest ends.
 *
 * mvgpu's registers are memory and mtty's are ports: each access of either ends in QEMU, which asks
 * the driver, but on the way there the hypervisor must decode an access to memory. Ports are read by
 * the kernel, since TCG's SVM has none for a program in a guest; that is a system call more, so
 * mvgpu's are read with one, too. Configuration is read in the same way from both.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "mvgpu.h"

#define DEVICES "/sys/bus/pci/devices"
#define MTTY_VENDOR 0x4348
#define LCR 3 /* of a 16550: what was written is read */
#define READS 1000
#define MIB (1u << 20)

static const uint8_t written = 0x1b;
static volatile uint32_t *registers, *framebuffer, *ram;
static int mvgpu_config, mtty_config, mtty_ports;

/* The guest has nothing else to do: what it says last is why it ended. */
static void end(const char *what)
{
    if (what) {
        printf("@failed %s: %s\n", what, strerror(errno));
    }
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    reboot(RB_POWER_OFF);
}

static int open_file(const char *bdf, const char *name, int flags)
{
    char path[300];
    int fd;

    snprintf(path, sizeof(path), DEVICES "/%s/%s", bdf, name);
    fd = open(path, flags);
    if (fd < 0) {
        end(path);
    }
    return fd;
}

static volatile uint32_t *map(const char *bdf, const char *bar, size_t size)
{
    int fd = bdf ? open_file(bdf, bar, O_RDWR) : -1;
    int flags = bdf ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

    if (memory == MAP_FAILED) {
        end(bar);
    }
    return memory;
}

/* Finds both functions, and has them decode what they are asked. */
static void prepare(void)
{
    DIR *dir = opendir(DEVICES);
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        const char *bdf = entry->d_name;
        uint16_t vendor;
        int config;

        if (bdf[0] == '.') {
            continue;
        }
        config = open_file(bdf, "config", O_RDONLY);
        if (pread(config, &vendor, sizeof(vendor), 0) != sizeof(vendor)) {
            end("config");
        }
        if (vendor == MVGPU_PCI_VENDOR || vendor == MTTY_VENDOR) {
            /* A driver that has it has enabled it. */
            if (write(open_file(bdf, "enable", O_WRONLY), "1", 1) != 1 && errno != EBUSY) {
                end("enable");
            }
        }
        if (vendor == MVGPU_PCI_VENDOR) {
            mvgpu_config = config;
            registers = map(bdf, "resource0", MVGPU_BAR_REGS_SIZE);
            framebuffer = map(bdf, "resource2_wc", MIB);
        } else if (vendor == MTTY_VENDOR) {
            mtty_config = config;
            mtty_ports = open_file(bdf, "resource0", O_RDWR);
        }
    }
    ram = map(NULL, "memory", MIB);
    if (!registers || !mtty_ports || pwrite(mtty_ports, &written, 1, LCR) != 1) {
        end("mvgpu and mtty");
    }
}

static void read_mvgpu(void)
{
    for (int i = 0; i < READS; i++) {
        syscall(SYS_getppid); /* mtty's cost one */
        if (registers[MVGPU_REG_MAGIC / 4] != MVGPU_MAGIC) {
            end("mvgpu's register");
        }
    }
}

static void read_mtty(void)
{
    uint8_t found;

    for (int i = 0; i < READS; i++) {
        if (pread(mtty_ports, &found, 1, LCR) != 1 || found != written) {
            end("mtty's register");
        }
    }
}

static void read_config(int config, uint16_t want)
{
    uint16_t vendor;

    for (int i = 0; i < READS; i++) {
        if (pread(config, &vendor, sizeof(vendor), 0) != sizeof(vendor) || vendor != want) {
            end("configuration");
        }
    }
}

static void read_mvgpu_config(void)
{
    read_config(mvgpu_config, MVGPU_PCI_VENDOR);
}

static void read_mtty_config(void)
{
    read_config(mtty_config, MTTY_VENDOR);
}

static void fill(volatile uint32_t *words)
{
    for (uint32_t i = 0; i < MIB / 4; i++) {
        words[i] = i;
    }
}

static void write_framebuffer(void)
{
    fill(framebuffer);
}

static void write_ram(void)
{
    fill(ram);
}

static const struct way {
    const char *work, *name;
    void (*run)(void);
    unsigned times;
} ways[] = {
    {"register read", "mtty", read_mtty, READS},
    {"register read", "mvgpu", read_mvgpu, READS},
    {"configuration read", "mtty", read_mtty_config, READS},
    {"configuration read", "mvgpu", read_mvgpu_config, READS},
    {"1 MiB written", "guest RAM", write_ram, 1},
    {"1 MiB written", "mvgpu", write_framebuffer, 1},
};
#define WAYS (sizeof(ways) / sizeof(ways[0]))

static double now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec + ts.tv_nsec / 1e9;
}

int main(void)
{
    const char *text = getenv("rounds");
    int rounds = text ? atoi(text) : 1;
    unsigned order[WAYS];
    static char said[1 << 17];

    /* Held back until the end: a line on its way out would take time from the next turn. */
    setvbuf(stdout, said, _IOFBF, sizeof(said));
    prepare();
    srand((unsigned)(now() * 1e9));
    for (unsigned i = 0; i < WAYS; i++) {
        order[i] = i;
    }
    for (int round = 0; round <= rounds; round++) {
        for (unsigned i = WAYS - 1; i > 0; i--) { /* Fisher and Yates */
            unsigned j = (unsigned)rand() % (i + 1), kept = order[i];

            order[i] = order[j];
            order[j] = kept;
        }
        for (unsigned i = 0; i < WAYS; i++) {
            const struct way *way = &ways[order[i]];
            double begun = now(), taken;

            way->run();
            taken = (now() - begun) / way->times;
            if (round) {
                printf("@bench %s;%s;%.9f\n", way->work, way->name, taken);
            }
        }
    }
    end(NULL);
}
