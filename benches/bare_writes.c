/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The least that making and removing mdevs takes: one open and one write each.
 *
 * Standard input has a line for each: the file and the text to write into it.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(void)
{
    char file[4096], text[64];

    while (scanf("%4095s %63s", file, text) == 2) {
        int fd = open(file, O_WRONLY | O_CLOEXEC);

        if (fd < 0 || write(fd, text, strlen(text)) < 0) {
            perror(file);
            return 1;
        }
        close(fd);
    }
    return 0;
}
