/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The least that reading the mdevs of a host takes: the files and links that scan() reads, by
 * open, read, readlink and getdents alone. Nothing is kept or checked.
 *
 * Prints how many values it has read, and in how many seconds.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PARENTS "/sys/class/mdev_bus"
#define DEVICES "/sys/bus/mdev/devices"

static char value[65536];
static unsigned int values;

static bool read_file(int dir, const char *name)
{
    int fd = openat(dir, name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0)
        return false;
    values += read(fd, value, sizeof(value)) >= 0;
    close(fd);
    return true;
}

static void read_link(int dir, const char *name)
{
    values += readlinkat(dir, name, value, sizeof(value)) >= 0;
}

static void walk(int dir, const char *name, void (*each)(int dir, const struct dirent *entry))
{
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = fd >= 0 ? fdopendir(fd) : NULL;
    const struct dirent *entry;

    if (!entries)
        return;
    while ((entry = readdir(entries)))
        if (entry->d_name[0] != '.')
            each(fd, entry);
    closedir(entries);
}

static void skip(int dir, const struct dirent *entry)
{
}

static void read_attribute(int dir, const struct dirent *entry)
{
    struct stat status;

    if (!fstatat(dir, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) && status.st_mode & 0444)
        read_file(dir, entry->d_name);
}

static void read_type_entry(int dir, const struct dirent *entry)
{
    if (entry->d_type != DT_DIR)
        read_attribute(dir, entry);
    else if (strcmp(entry->d_name, "devices"))
        walk(dir, entry->d_name, read_attribute);
}

static void read_type(int dir, const struct dirent *entry)
{
    walk(dir, entry->d_name, read_type_entry);
}

static void read_parent(int dir, const struct dirent *entry)
{
    int fd = openat(dir, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    read_link(dir, entry->d_name);
    walk(fd, "mdev_supported_types", read_type);
    read_file(fd, "p2p_links");
    read_file(fd, "p2p_links_free");
    walk(fd, ".", skip);
    close(fd);
}

/* What the first device lacks is not looked for in the others. */
static void read_device(int dir, const struct dirent *entry)
{
    static const char *optional[] = { "group_uuid", "online", "vgpu_params" };
    static const size_t n = sizeof(optional) / sizeof(*optional);
    static bool lacking[sizeof(optional) / sizeof(*optional)];
    int fd = openat(dir, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    size_t i;

    read_link(fd, "mdev_type");
    read_link(fd, "iommu_group");
    for (i = 0; i < n; i++)
        if (!lacking[i])
            lacking[i] = !read_file(fd, optional[i]);
    close(fd);
}

int main(void)
{
    struct timespec begun, ended;

    clock_gettime(CLOCK_MONOTONIC, &begun);
    walk(AT_FDCWD, PARENTS, read_parent);
    walk(AT_FDCWD, DEVICES, read_device);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%u %.6f\n", values,
           (double)(ended.tv_sec - begun.tv_sec) + (double)(ended.tv_nsec - begun.tv_nsec) / 1e9);
    return 0;
}
