/* How the simulated drivers read files, and processes' start times. */

#ifndef SIMULATED_PROCESS_H
#define SIMULATED_PROCESS_H

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* Read a small file as text; return its length, or -1 if it cannot be read. */
static ssize_t read_path(const char *path, char *to, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t got = read(fd, to, size - 1);
    close(fd);
    if (got >= 0) to[got] = 0;
    return got;
}

/* Return a process's start time in the kernel's clock ticks (field 22 of its stat file); 0 if it has ended or is a
 * zombie. */
static unsigned long long start_of(int pid) {
    char path[64], text[1024], state;
    unsigned long long found;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    if (pid <= 0 || read_path(path, text, sizeof text) <= 0) return 0;
    char *rest = strrchr(text, ')');
    if (!rest || sscanf(rest + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
                        &state, &found) != 2)
        return 0;
    return state == 'Z' || state == 'X' ? 0 : found;
}

#endif
