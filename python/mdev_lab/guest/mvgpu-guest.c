// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * mvgpu-guest: uses mvgpu functions in a guest, at the word of the host
 *
 * A line server on the guest's console. It reads one command a line and answers
 * each with exactly one line, "@mvgpu " and a JSON object; whatever else stands
 * on the console is not its own. It says {"ok":true,"cmd":"ready",...} once
 * when it starts. README.rst beside this file describes the commands.
 *
 * The functions are reached through UIO (mvgpu-uio.ko). Nothing stays open
 * between two commands, so an unplug never waits for this program.
 */

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <linux/input.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "mvgpu.h"

#define PCI_DEVICES "/sys/bus/pci/devices"
#define DRIVER "/sys/bus/pci/drivers/mvgpu-uio"
#define PARAM_INTX "/sys/module/mvgpu_uio/parameters/intx"
#define MAX_FUNCTIONS 64
#define MAX_BUTTONS 8
#define UUID_LENGTH 36
/* A lost event costs no more than this. */
#define RESCAN_MS 1000

struct function {
    char bdf[32];
    char uuid[UUID_LENGTH + 1];
    unsigned type;
    uint64_t fb_bytes;
    char irq[8]; /* "msi", "intx", or "none" when no driver is bound */
};

/* A function in use. */
struct handle {
    int fd;
    volatile uint32_t *regs;
    volatile uint32_t *fb;
    size_t fb_mapped; /* bytes */
    unsigned irqs;    /* interrupts waited for */
};

static int uevents = -1;
static int buttons[MAX_BUTTONS];
static int nr_buttons;
static bool power_pressed;

static char error_text[256];
static uint32_t error_code; /* MVGPU_ERR_* of the command that failed, or 0 */

__attribute__((format(printf, 1, 2))) static int fail(const char *format, ...)
{
    va_list args;
    char *p;

    va_start(args, format);
    vsnprintf(error_text, sizeof(error_text), format, args);
    va_end(args);
    /* It goes between the quotes of a JSON string. */
    for (p = error_text; *p; p++) {
        if (*p == '"' || *p == '\\' || !isprint((unsigned char)*p)) {
            *p = '\'';
        }
    }
    return -1;
}

static double now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec + ts.tv_nsec / 1e9;
}

/*
 * Answers
 */

__attribute__((format(printf, 2, 3))) static void answer(const char *cmd, const char *format, ...)
{
    va_list args;

    printf("@mvgpu {\"ok\":true,\"cmd\":\"%s\"", cmd);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("}\n");
    fflush(stdout);
}

static void answer_error(const char *cmd)
{
    printf("@mvgpu {\"ok\":false,\"cmd\":\"%s\",\"error\":\"%s\"", cmd, error_text);
    if (error_code) {
        printf(",\"code\":%" PRIu32, error_code);
    }
    printf("}\n");
    fflush(stdout);
}

/*
 * sysfs
 */

static int read_text(const char *path, char *buf, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n;

    if (fd < 0) {
        return fail("%s: %s", path, strerror(errno));
    }
    n = read(fd, buf, size - 1);
    close(fd);
    if (n < 0) {
        return fail("%s: %s", path, strerror(errno));
    }
    while (n > 0 && isspace((unsigned char)buf[n - 1])) {
        n--;
    }
    buf[n] = '\0';
    return 0;
}

static int read_number(const char *path, uint64_t *number)
{
    char text[64];
    char *end;

    if (read_text(path, text, sizeof(text))) {
        return -1;
    }
    errno = 0;
    *number = strtoull(text, &end, 0);
    if (errno || end == text || *end) {
        return fail("%s: '%s' is not a number", path, text);
    }
    return 0;
}

static int write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    ssize_t n;

    if (fd < 0) {
        return fail("%s: %s", path, strerror(errno));
    }
    n = write(fd, text, strlen(text));
    if (n < 0) {
        fail("%s: write '%s': %s", path, text, strerror(errno));
    }
    close(fd);
    return n < 0 ? -1 : 0;
}

/*
 * Finding functions
 */

static uint64_t reg64(volatile uint32_t *regs, unsigned lo)
{
    return regs[lo / 4] | (uint64_t)regs[lo / 4 + 1] << 32;
}

static void format_uuid(volatile uint32_t *regs, unsigned reg, char *text)
{
    char *p = text;
    unsigned i;

    for (i = 0; i < 16; i++) {
        unsigned byte = regs[reg / 4 + i / 4] >> (8 * (i % 4)) & 0xff;

        if (i == 4 || i == 6 || i == 8 || i == 10) {
            *p++ = '-';
        }
        p += sprintf(p, "%02x", byte);
    }
}

static bool is_mvgpu(const char *bdf)
{
    char path[128];
    uint64_t vendor, device;

    snprintf(path, sizeof(path), PCI_DEVICES "/%.31s/vendor", bdf);
    if (read_number(path, &vendor) || vendor != MVGPU_PCI_VENDOR) {
        return false;
    }
    snprintf(path, sizeof(path), PCI_DEVICES "/%.31s/device", bdf);
    return !read_number(path, &device) &&
           (device == MVGPU_PCI_DEVICE_GRID || device == MVGPU_PCI_DEVICE_IGD);
}

/* What the function says it is; fails while it is not enabled. */
static int identify(struct function *f)
{
    volatile uint32_t *regs;
    char path[128];
    struct stat st;
    int fd;
    int ret = 0;

    snprintf(path, sizeof(path), PCI_DEVICES "/%s/uio", f->bdf);
    if (stat(path, &st)) {
        return fail("%s has no driver", f->bdf);
    }
    snprintf(path, sizeof(path), PCI_DEVICES "/%s/msi_irqs", f->bdf);
    strcpy(f->irq, stat(path, &st) ? "intx" : "msi");

    snprintf(path, sizeof(path), PCI_DEVICES "/%s/resource%d", f->bdf, MVGPU_BAR_REGS);
    fd = open(path, O_RDWR | O_SYNC | O_CLOEXEC);
    if (fd < 0) {
        return fail("%s: %s", path, strerror(errno));
    }
    regs = mmap(NULL, MVGPU_BAR_REGS_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (regs == MAP_FAILED) {
        return fail("%s: mmap: %s", path, strerror(errno));
    }
    if (regs[MVGPU_REG_MAGIC / 4] != MVGPU_MAGIC) {
        ret = fail("%s: the magic register reads %#" PRIx32, f->bdf, regs[MVGPU_REG_MAGIC / 4]);
    } else if (regs[MVGPU_REG_ABI / 4] != MVGPU_ABI_VERSION) {
        ret = fail("%s: unknown ABI version %" PRIu32, f->bdf, regs[MVGPU_REG_ABI / 4]);
    } else {
        format_uuid(regs, MVGPU_REG_UUID, f->uuid);
        f->type = regs[MVGPU_REG_TYPE / 4];
        f->fb_bytes = reg64(regs, MVGPU_REG_FB_SIZE_LO);
    }
    munmap((void *)regs, MVGPU_BAR_REGS_SIZE);
    return ret;
}

/* Every mvgpu function there is; those that do not answer have an empty uuid. */
static int scan(struct function *functions)
{
    DIR *dir = opendir(PCI_DEVICES);
    struct dirent *entry;
    int n = 0;

    if (!dir) {
        return 0;
    }
    while (n < MAX_FUNCTIONS && (entry = readdir(dir))) {
        struct function *f = &functions[n];

        if (entry->d_name[0] == '.' || !is_mvgpu(entry->d_name)) {
            continue;
        }
        memset(f, 0, sizeof(*f));
        strcpy(f->irq, "none");
        snprintf(f->bdf, sizeof(f->bdf), "%.31s", entry->d_name);
        if (identify(f)) {
            f->uuid[0] = '\0';
        }
        n++;
    }
    closedir(dir);
    return n;
}

static bool find(const char *uuid, struct function *found)
{
    static struct function functions[MAX_FUNCTIONS];
    int n = scan(functions);
    int i;

    for (i = 0; i < n; i++) {
        if (!strcasecmp(functions[i].uuid, uuid)) {
            *found = functions[i];
            return true;
        }
    }
    return false;
}

/*
 * Waiting: for kernel events, and for the power button at any time
 */

static void open_uevents(void)
{
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};

    uevents = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (uevents >= 0 && bind(uevents, (struct sockaddr *)&address, sizeof(address))) {
        close(uevents);
        uevents = -1;
    }
}

static void drain(int fd)
{
    char buf[4096];

    while (fd >= 0 && (read(fd, buf, sizeof(buf)) > 0 || errno == ENOBUFS)) {
        errno = 0;
    }
}

/* The kernel's ACPI power button is an input device like any other. */
static void open_buttons(void)
{
    glob_t found;
    size_t i;

    if (glob("/dev/input/event*", 0, NULL, &found)) {
        return;
    }
    for (i = 0; i < found.gl_pathc && nr_buttons < MAX_BUTTONS; i++) {
        int fd = open(found.gl_pathv[i], O_RDONLY | O_CLOEXEC | O_NONBLOCK);

        if (fd >= 0) {
            buttons[nr_buttons++] = fd;
        }
    }
    globfree(&found);
}

static void read_button(int fd)
{
    struct input_event event;

    while (read(fd, &event, sizeof(event)) == sizeof(event)) {
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value) {
            power_pressed = true;
        }
    }
}

/* Waits for fd to be readable. 1: it is, 0: time is up, -1: power button. */
static int wait_readable(int fd, int timeout_ms)
{
    struct pollfd fds[1 + MAX_BUTTONS];
    double deadline = now() + timeout_ms / 1e3;
    int i;

    fds[0] = (struct pollfd){.fd = fd, .events = POLLIN};
    for (i = 0; i < nr_buttons; i++) {
        fds[1 + i] = (struct pollfd){.fd = buttons[i], .events = POLLIN};
    }
    while (!power_pressed) {
        int left = timeout_ms < 0 ? -1 : (int)((deadline - now()) * 1e3);

        if (timeout_ms >= 0 && left < 0) {
            left = 0;
        }
        if (poll(fds, 1 + nr_buttons, left) == 0) {
            return 0;
        }
        for (i = 0; i < nr_buttons; i++) {
            if (fds[1 + i].revents) {
                read_button(fds[1 + i].fd);
            }
        }
        if (fds[0].revents) {
            return 1;
        }
    }
    return -1;
}

/* Until the function with this UUID is there and usable, or is gone. */
static int wait_for(const char *uuid, bool there, double seconds, struct function *f)
{
    double deadline = now() + seconds;

    for (;;) {
        int left;

        drain(uevents);
        if (find(uuid, f) == there) {
            return 0;
        }
        left = (int)((deadline - now()) * 1e3);
        if (left <= 0) {
            return fail("%s is %s after %g s", uuid, there ? "not there" : "still there", seconds);
        }
        if (wait_readable(uevents, left < RESCAN_MS ? left : RESCAN_MS) < 0) {
            return fail("the power button was pressed");
        }
    }
}

/*
 * Using a function
 */

/* Binds the driver anew when the function does not have the wanted interrupt. */
static int choose_irq(struct function *f, const char *irq)
{
    char uuid[sizeof(f->uuid)];

    if (!strcmp(f->irq, irq)) {
        return 0;
    }
    strcpy(uuid, f->uuid);
    if (write_text(PARAM_INTX, strcmp(irq, "intx") ? "N" : "Y") ||
        write_text(DRIVER "/unbind", f->bdf) || write_text(DRIVER "/bind", f->bdf) ||
        write_text(PARAM_INTX, "N")) {
        return -1;
    }
    if (wait_for(uuid, true, 10, f)) {
        return -1;
    }
    if (strcmp(f->irq, irq)) {
        return fail("%s: asked for %s, got %s", f->bdf, irq, f->irq);
    }
    return 0;
}

static void use_end(struct handle *h)
{
    if (h->regs) {
        h->regs[MVGPU_REG_IRQ_ENABLE / 4] = 0;
        munmap((void *)h->regs, MVGPU_BAR_REGS_SIZE);
    }
    if (h->fb) {
        munmap((void *)h->fb, h->fb_mapped);
    }
    if (h->fd >= 0) {
        close(h->fd);
    }
}

static void *map_bar(struct handle *h, int map, size_t size)
{
    void *bar = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, h->fd, map * getpagesize());

    if (bar == MAP_FAILED) {
        fail("mmap of map %d, %zu bytes: %s", map, size, strerror(errno));
        return NULL;
    }
    return bar;
}

static int use_begin(const struct function *f, struct handle *h)
{
    char pattern[128];
    char path[160];
    const char *node;
    uint64_t size;
    glob_t found;

    memset(h, 0, sizeof(*h));
    h->fd = -1;

    snprintf(pattern, sizeof(pattern), PCI_DEVICES "/%s/uio/uio*", f->bdf);
    if (glob(pattern, 0, NULL, &found)) {
        return fail("%s has no UIO device", f->bdf);
    }
    node = strrchr(found.gl_pathv[0], '/') + 1;
    snprintf(path, sizeof(path), "%s/maps/map1/size", found.gl_pathv[0]);
    if (read_number(path, &size)) {
        globfree(&found);
        return -1;
    }
    snprintf(path, sizeof(path), "/dev/%s", node);
    globfree(&found);

    h->fd = open(path, O_RDWR | O_CLOEXEC);
    if (h->fd < 0) {
        return fail("%s: %s", path, strerror(errno));
    }
    h->fb_mapped = size;
    h->regs = map_bar(h, 0, MVGPU_BAR_REGS_SIZE);
    h->fb = h->regs ? map_bar(h, 1, size) : NULL;
    if (!h->fb) {
        use_end(h);
        return -1;
    }
    h->regs[MVGPU_REG_IRQ_ENABLE / 4] = MVGPU_IRQ_ENGINE;
    return 0;
}

/* Rings the doorbell, sleeps until the interrupt, looks at the outcome. */
static int command(struct handle *h, uint32_t cmd, uint64_t length)
{
    uint32_t sequence = h->regs[MVGPU_REG_SEQUENCE / 4];
    int timeout_ms = 30000 + (int)(length >> 20) * 200;
    uint32_t count, status;
    int ret;

    h->regs[MVGPU_REG_LEN_LO / 4] = (uint32_t)length;
    h->regs[MVGPU_REG_LEN_HI / 4] = (uint32_t)(length >> 32);
    h->regs[MVGPU_REG_COMMAND / 4] = cmd;

    ret = wait_readable(h->fd, timeout_ms);
    if (ret < 0) {
        return fail("the power button was pressed");
    }
    status = h->regs[MVGPU_REG_STATUS / 4];
    if (!ret) {
        return fail("command %" PRIu32 ": no interrupt within %d ms, status %#" PRIx32, cmd,
                    timeout_ms, status);
    }
    if (read(h->fd, &count, sizeof(count)) != sizeof(count)) {
        return fail("command %" PRIu32 ": waiting for the interrupt: %s", cmd, strerror(errno));
    }
    h->irqs++;
    if (status != MVGPU_STATUS_DONE) {
        error_code = (status & MVGPU_STATUS_CODE_MASK) >> MVGPU_STATUS_CODE_SHIFT;
        return fail("command %" PRIu32 ": status %#" PRIx32 ", error %" PRIu32, cmd, status,
                    error_code);
    }
    if (h->regs[MVGPU_REG_SEQUENCE / 4] != sequence + 1) {
        return fail("command %" PRIu32 ": the sequence register did not advance by one", cmd);
    }
    return 0;
}

static int checksum(struct handle *h, uint64_t length, uint32_t *crc)
{
    h->regs[MVGPU_REG_SRC_LO / 4] = 0;
    h->regs[MVGPU_REG_SRC_HI / 4] = 0;
    if (command(h, MVGPU_CMD_CHECKSUM, length)) {
        return -1;
    }
    *crc = h->regs[MVGPU_REG_RESULT / 4];
    return 0;
}

static int fill(struct handle *h, uint32_t seed, uint64_t length)
{
    h->regs[MVGPU_REG_DST_LO / 4] = 0;
    h->regs[MVGPU_REG_DST_HI / 4] = 0;
    h->regs[MVGPU_REG_SEED / 4] = seed;
    return command(h, MVGPU_CMD_FILL, length);
}

/* Some words all over what the aperture shows, the first and last included. */
static int check_words(struct handle *h, uint32_t seed, uint64_t length)
{
    uint64_t shown = length < h->fb_mapped ? length : h->fb_mapped;
    uint64_t words = shown / 4;
    unsigned i;

    for (i = 0; i < 64 && words; i++) {
        uint64_t at = (words - 1) * i / 63;
        uint32_t want = seed + (uint32_t)at * MVGPU_FILL_STEP;
        uint32_t got = h->fb[at];

        if (got != want) {
            return fail("framebuffer word %" PRIu64 " is %#" PRIx32 ", not %#" PRIx32, at, got,
                        want);
        }
    }
    return 0;
}

/* What is written through the mapping is what the engine sees, and back. */
static int check_mapping(struct handle *h, uint64_t length, uint32_t crc)
{
    uint64_t shown = length < h->fb_mapped ? length : h->fb_mapped;
    uint64_t last = shown / 4 - 1;
    uint32_t first_word = h->fb[0];
    uint32_t last_word = h->fb[last];
    uint32_t changed, restored;

    h->fb[0] = ~first_word;
    h->fb[last] = last_word ^ 0x1;
    if (checksum(h, length, &changed)) {
        return -1;
    }
    if (changed == crc) {
        return fail("the engine does not see what was written through the mapping");
    }
    h->fb[0] = first_word;
    h->fb[last] = last_word;
    if (checksum(h, length, &restored)) {
        return -1;
    }
    if (restored != crc) {
        return fail("checksum %#" PRIx32 " and not %#" PRIx32 " after the words were put back",
                    restored, crc);
    }
    return 0;
}

static int use(struct function *f, uint32_t seed, uint64_t length, const char *irq,
               struct handle *h, uint32_t *crc)
{
    uint32_t irqs_before, irqs;
    char uuid[UUID_LENGTH + 1];
    int ret = -1;

    if (choose_irq(f, irq) || use_begin(f, h)) {
        return -1;
    }
    irqs_before = h->regs[MVGPU_REG_IRQ_COUNT / 4];
    format_uuid(h->regs, MVGPU_REG_UUID, uuid);
    if (h->regs[MVGPU_REG_MAGIC / 4] != MVGPU_MAGIC || strcmp(uuid, f->uuid)) {
        fail("%s says it is %s", f->bdf, uuid);
        goto out;
    }
    if (fill(h, seed, length) || checksum(h, length, crc) || check_words(h, seed, length) ||
        check_mapping(h, length, *crc)) {
        goto out;
    }
    irqs = h->regs[MVGPU_REG_IRQ_COUNT / 4] - irqs_before;
    if (irqs != h->irqs) {
        fail("the function raised %" PRIu32 " interrupts, %u arrived", irqs, h->irqs);
        goto out;
    }
    ret = 0;
out:
    use_end(h);
    return ret;
}

/*
 * Commands
 */

static bool is_uuid(const char *text)
{
    int i;

    for (i = 0; i < UUID_LENGTH; i++) {
        bool dash = i == 8 || i == 13 || i == 18 || i == 23;

        if (dash ? text[i] != '-' : !isxdigit((unsigned char)text[i])) {
            return false;
        }
    }
    return text[i] == '\0';
}

static int parse_number(const char *text, uint64_t max, uint64_t *number)
{
    char *end;

    errno = 0;
    *number = strtoull(text ? text : "", &end, 0);
    if (!text || errno || end == text || *end || *text == '-' || *number > max) {
        return fail("'%s' is not a number up to %" PRIu64, text ? text : "", max);
    }
    return 0;
}

static int parse_uuid(const char *text)
{
    return text && is_uuid(text) ? 0 : fail("'%s' is no UUID", text ? text : "");
}

static int do_ping(const char *cmd)
{
    struct utsname uts;

    uname(&uts);
    answer(cmd, ",\"kernel\":\"%s\",\"uptime\":%.3f", uts.release, now());
    return 0;
}

static int do_list(const char *cmd)
{
    static struct function functions[MAX_FUNCTIONS];
    int n = scan(functions);
    int i;

    printf("@mvgpu {\"ok\":true,\"cmd\":\"%s\",\"functions\":[", cmd);
    for (i = 0; i < n; i++) {
        const struct function *f = &functions[i];

        printf("%s{\"bdf\":\"%s\",\"uuid\":\"%s\",\"type\":%u,\"bytes\":%" PRIu64 ",\"irq\":\"%s\"}",
               i ? "," : "", f->bdf, f->uuid, f->type, f->fb_bytes, f->irq);
    }
    printf("]}\n");
    fflush(stdout);
    return 0;
}

static int do_wait(const char *cmd, char **args)
{
    bool there = !strcmp(cmd, "wait");
    double start = now();
    struct function f;
    uint64_t seconds;

    if (parse_uuid(args[0]) || parse_number(args[1], 3600, &seconds) ||
        wait_for(args[0], there, seconds, &f)) {
        return -1;
    }
    if (there) {
        answer(cmd, ",\"uuid\":\"%s\",\"bdf\":\"%s\",\"type\":%u,\"bytes\":%" PRIu64
               ",\"seconds\":%.3f", f.uuid, f.bdf, f.type, f.fb_bytes, now() - start);
    } else {
        answer(cmd, ",\"uuid\":\"%s\",\"seconds\":%.3f", args[0], now() - start);
    }
    return 0;
}

static int do_use(const char *cmd, char **args)
{
    const char *irq = args[3];
    double start = now();
    uint64_t seed, length;
    struct function f;
    struct handle h;
    uint32_t crc;

    if (parse_uuid(args[0]) || parse_number(args[1], UINT32_MAX, &seed) ||
        parse_number(args[2], UINT64_MAX, &length)) {
        return -1;
    }
    if (length < 8 || length % 4) {
        return fail("a length is a multiple of 4 and at least 8");
    }
    if (!irq || (strcmp(irq, "msi") && strcmp(irq, "intx"))) {
        return fail("the interrupt is msi or intx");
    }
    if (!find(args[0], &f)) {
        return fail("there is no usable function with UUID %s", args[0]);
    }
    if (use(&f, (uint32_t)seed, length, irq, &h, &crc)) {
        return -1;
    }
    answer(cmd, ",\"uuid\":\"%s\",\"bdf\":\"%s\",\"type\":%u,\"crc32\":%" PRIu32
           ",\"irqs\":%u,\"irq\":\"%s\",\"bytes\":%" PRIu64 ",\"seconds\":%.3f", f.uuid, f.bdf,
           f.type, crc, h.irqs, f.irq, length, now() - start);
    return 0;
}

/* The slot of a UUID in the function's start group; one that is none if it is not there. */
static uint32_t slot_of(struct handle *h, const char *uuid)
{
    char text[UUID_LENGTH + 1];
    uint32_t slot;

    for (slot = 0; slot < MVGPU_GROUP_SLOTS; slot++) {
        format_uuid(h->regs, MVGPU_REG_GROUP + slot * MVGPU_GROUP_STRIDE, text);
        if (!strcasecmp(text, uuid)) {
            break;
        }
    }
    return slot;
}

/* The target holds something else first, so that what is found there was copied. */
static int peer_copy(struct handle *dst, struct handle *src, const char *src_uuid, uint32_t seed,
                     uint64_t length, uint32_t *crc, uint32_t *slot)
{
    uint32_t before, after;

    if (fill(src, seed, length) || checksum(src, length, crc) || fill(dst, ~seed, length) ||
        checksum(dst, length, &before)) {
        return -1;
    }
    if (before == *crc) {
        return fail("both patterns have the checksum %#" PRIx32, before);
    }
    *slot = slot_of(dst, src_uuid);
    dst->regs[MVGPU_REG_PEER / 4] = *slot;
    dst->regs[MVGPU_REG_SRC_LO / 4] = 0;
    dst->regs[MVGPU_REG_SRC_HI / 4] = 0;
    dst->regs[MVGPU_REG_DST_LO / 4] = 0;
    dst->regs[MVGPU_REG_DST_HI / 4] = 0;
    if (command(dst, MVGPU_CMD_PEER_COPY, length) || checksum(dst, length, &after)) {
        return -1;
    }
    if (after != *crc) {
        return fail("checksum %#" PRIx32 " after the copy, and not %#" PRIx32, after, *crc);
    }
    return check_words(dst, seed, length);
}

static int do_peer(const char *cmd, char **args)
{
    double start = now();
    struct function fd, fs;
    struct handle dst, src;
    uint64_t seed, length;
    uint32_t crc = 0, slot = 0;
    int ret;

    if (parse_uuid(args[0]) || parse_uuid(args[1]) || parse_number(args[2], UINT32_MAX, &seed) ||
        parse_number(args[3], UINT64_MAX, &length)) {
        return -1;
    }
    if (length < 8 || length % 4) {
        return fail("a length is a multiple of 4 and at least 8");
    }
    if (!strcasecmp(args[0], args[1])) {
        return fail("a peer is another function");
    }
    if (!find(args[0], &fd)) {
        return fail("there is no usable function with UUID %s", args[0]);
    }
    if (!find(args[1], &fs)) {
        return fail("there is no usable function with UUID %s", args[1]);
    }
    if (use_begin(&fd, &dst)) {
        return -1;
    }
    if (use_begin(&fs, &src)) {
        use_end(&dst);
        return -1;
    }
    ret = peer_copy(&dst, &src, fs.uuid, (uint32_t)seed, length, &crc, &slot);
    use_end(&src);
    use_end(&dst);
    if (!ret) {
        answer(cmd, ",\"uuid\":\"%s\",\"peer\":\"%s\",\"slot\":%" PRIu32 ",\"crc32\":%" PRIu32
               ",\"irqs\":%u,\"bytes\":%" PRIu64 ",\"seconds\":%.3f", fd.uuid, fs.uuid, slot, crc,
               dst.irqs + src.irqs, length, now() - start);
    }
    return ret;
}

/* As zlib computes it: the host knows what it wrote. */
static uint32_t crc32_of(const unsigned char *data, size_t length)
{
    uint32_t crc = ~0u;
    size_t i;
    int bit;

    for (i = 0; i < length; i++) {
        crc ^= data[i];
        for (bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
        }
    }
    return ~crc;
}

static int do_disk(const char *cmd, char **args)
{
    unsigned char data[4096];
    char path[64];
    off_t bytes;
    int fd;

    if (!args[0] || strchr(args[0], '/')) {
        return fail("name a disk below /dev");
    }
    snprintf(path, sizeof(path), "/dev/%s", args[0]);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return fail("cannot open %s: %s", path, strerror(errno));
    }
    bytes = lseek(fd, 0, SEEK_END);
    if (bytes < 0 || pread(fd, data, sizeof(data), 0) != sizeof(data)) {
        close(fd);
        return fail("cannot read %zu bytes of %s", sizeof(data), path);
    }
    close(fd);
    answer(cmd, ",\"bytes\":%jd,\"crc32\":%" PRIu32, (intmax_t)bytes,
           crc32_of(data, sizeof(data)));
    return 0;
}

static double write_speed(volatile uint32_t *words, size_t bytes)
{
    double start = now();
    size_t i;

    for (i = 0; i < bytes / 4; i++) {
        words[i] = (uint32_t)i;
    }
    return bytes / (now() - start) / 1e6;
}

static int do_bench(const char *cmd, char **args)
{
    double start, reads, fb_speed, ram_speed;
    uint64_t n, i;
    struct function f;
    struct handle h;
    size_t bytes;
    uint32_t *ram;

    if (parse_uuid(args[0]) || parse_number(args[1], 10000000, &n)) {
        return -1;
    }
    if (!find(args[0], &f)) {
        return fail("there is no usable function with UUID %s", args[0]);
    }
    if (use_begin(&f, &h)) {
        return -1;
    }
    start = now();
    for (i = 0; i < n; i++) {
        (void)h.regs[MVGPU_REG_MAGIC / 4];
    }
    reads = n / (now() - start);

    bytes = h.fb_mapped < 4 << 20 ? h.fb_mapped : 4 << 20;
    ram = malloc(bytes);
    if (!ram) {
        use_end(&h);
        return fail("no memory for %zu bytes", bytes);
    }
    /* The first pass makes the pages come, the second is what we measure. */
    write_speed(h.fb, bytes);
    fb_speed = write_speed(h.fb, bytes);
    write_speed(ram, bytes);
    ram_speed = write_speed(ram, bytes);
    free(ram);
    use_end(&h);

    answer(cmd, ",\"uuid\":\"%s\",\"register_reads_per_second\":%.0f,"
           "\"framebuffer_megabytes_per_second\":%.1f,\"ram_megabytes_per_second\":%.1f",
           f.uuid, reads, fb_speed, ram_speed);
    return 0;
}

/* False when the guest is to end. */
static bool serve(char *line)
{
    char *args[5] = {NULL};
    char *cmd, *save;
    int n = 0;
    int ret;

    cmd = strtok_r(line, " \t\r\n", &save);
    if (!cmd) {
        return true;
    }
    while (n < 4 && (args[n] = strtok_r(NULL, " \t\r\n", &save))) {
        n++;
    }
    error_code = 0;

    if (!strcmp(cmd, "ping")) {
        ret = do_ping(cmd);
    } else if (!strcmp(cmd, "list")) {
        ret = do_list(cmd);
    } else if (!strcmp(cmd, "wait") || !strcmp(cmd, "gone")) {
        ret = do_wait(cmd, args);
    } else if (!strcmp(cmd, "use")) {
        ret = do_use(cmd, args);
    } else if (!strcmp(cmd, "peer")) {
        ret = do_peer(cmd, args);
    } else if (!strcmp(cmd, "bench")) {
        ret = do_bench(cmd, args);
    } else if (!strcmp(cmd, "disk")) {
        ret = do_disk(cmd, args);
    } else if (!strcmp(cmd, "poweroff")) {
        answer(cmd, "%s", "");
        return false;
    } else {
        cmd = "unknown";
        ret = fail("the commands are ping, list, wait, gone, use, peer, bench, disk and poweroff");
    }
    if (ret) {
        answer_error(cmd);
    }
    return true;
}

/* What the host reads is what we write, and nothing is echoed. */
static void set_terminal(void)
{
    struct termios tio;

    if (tcgetattr(STDIN_FILENO, &tio)) {
        return;
    }
    tio.c_lflag &= ~(ECHO | ECHONL | ISIG);
    tio.c_lflag |= ICANON;
    tio.c_oflag &= ~OPOST;
    tcsetattr(STDIN_FILENO, TCSANOW, &tio);
}

int main(void)
{
    char line[1024];

    set_terminal();
    open_uevents();
    open_buttons();
    do_ping("ready");

    for (;;) {
        ssize_t n;

        if (wait_readable(STDIN_FILENO, -1) < 0) {
            printf("mvgpu-guest: power button\n");
            break;
        }
        /* A terminal gives one line a read. */
        n = read(STDIN_FILENO, line, sizeof(line) - 1);
        if (n <= 0) {
            break;
        }
        line[n] = '\0';
        if (!serve(line)) {
            break;
        }
    }
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    return 0;
}
