/* A stand-in for libcuda.so.1: the driver's checkpoint calls over the directory of simulated_nvml.c.
 *
 * The memory that a process has declared on a device (`memory/of_<pid>_<start>`) moves into files in the directory's
 * folder `host`, which NVML does not count, and back. simulated_gpu.py explains each file. Every call reads all files
 * anew, so a test can change them between two calls.
 *
 * As with the real library, the calling process must have called cuInit; a lock needs a running process, a
 * checkpoint a locked one, a restore a checkpointed one, and an unlock a locked one. A restore that finds too little
 * memory fails and leaves the process checkpointed.
 *
 * Build: gcc -O2 -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 simulated_cuda.c
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "simulated_process.h"

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    ILLEGAL_STATE = 401,
    NOT_READY = 600,
    NOT_SUPPORTED = 801
};

enum { RUNNING = 0, LOCKED = 1, CHECKPOINTED = 2, FAILED = 3 };

#define MAX_GPUS 8
/* How much is moved at a time. */
#define STEP_BYTES (64LL << 20)

static pid_t initialised_by;

/* ---- small files ------------------------------------------------------------------------------------------ */

static const char *root(void) {
    const char *folder = getenv("SIMULATED_GPU_DIR");
    return folder && *folder ? folder : 0;
}

__attribute__((format(printf, 2, 3))) static void path_to(char *to, const char *format, ...) {
    int used = snprintf(to, PATH_MAX, "%s/", root());
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(to + used, (size_t)(PATH_MAX - used), format, arguments);
    va_end(arguments);
}

static int read_text(const char *path, char *to, size_t size) {
    return read_path(path, to, size) > 0;
}

static long long read_number(const char *path) {
    char text[64];
    return read_text(path, text, sizeof text) ? strtoll(text, 0, 10) : 0;
}

/* Replace a file as a whole; no reader counts its temporary name. */
static void write_text(const char *path, const char *text) {
    char aside[PATH_MAX + 32];
    const char *name = strrchr(path, '/') + 1;
    snprintf(aside, sizeof aside, "%.*s.%s.%d", (int)(name - path), path, name, gettid());
    int fd = open(aside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ssize_t length = (ssize_t)strlen(text);
    if (fd < 0 || write(fd, text, (size_t)length) != length) perror("simulated_cuda: write");
    if (fd >= 0) close(fd);
    rename(aside, path);
}

static void write_number(const char *path, long long number) {
    char text[32];
    snprintf(text, sizeof text, "%lld", number);
    write_text(path, text);
}

/* Set the two numbers from the line '<call> <number> <number>' of the file `name`; return 0 if there is none. */
static int told(const char *name, const char *call, double *first, double *second) {
    char path[PATH_MAX], text[1024], key[32];
    path_to(path, "%s", name);
    if (!read_text(path, text, sizeof text)) return 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(0, "\n")) {
        *second = 0;
        if (sscanf(line, "%31s %lf %lf", key, first, second) >= 2 && !strcmp(key, call)) return 1;
    }
    return 0;
}

static void sleep_for(double seconds) {
    if (seconds <= 0) return;
    struct timespec left = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&left, &left)) continue;
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void log_call(const char *what, int pid) {
    char path[PATH_MAX], line[96];
    path_to(path, "calls");
    int fd = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0) return;
    int length = snprintf(line, sizeof line, "%d %s %d\n", getpid(), what, pid);
    if (write(fd, line, (size_t)length) != length) perror("simulated_cuda: log of calls");
    close(fd);
}

/* ---- processes -------------------------------------------------------------------------------------------- */

static void state_path(char *to, int pid) {
    path_to(to, "host/state_%d_%llu", pid, start_of(pid));
}

static int state_of(int pid) {
    char path[PATH_MAX];
    state_path(path, pid);
    return (int)read_number(path);
}

static void set_state(int pid, int state) {
    char path[PATH_MAX];
    state_path(path, pid);
    write_number(path, state);
}

/* ---- memory ----------------------------------------------------------------------------------------------- */

static void device_path(char *to, int gpu, int pid) {
    path_to(to, "gpu%d/memory/of_%d_%llu", gpu, pid, start_of(pid));
}

static void host_path(char *to, int gpu, int pid) {
    path_to(to, "host/gpu%d_%d_%llu", gpu, pid, start_of(pid));
}

static void redo_path(char *to, int pid) {
    path_to(to, "host/redo_%d_%llu", pid, start_of(pid));
}

/* Take the directory's lock, as an allocation does; closing the descriptor releases it. */
static int hold(void) {
    char path[PATH_MAX];
    path_to(path, "lock");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) flock(fd, LOCK_EX);
    return fd;
}

static void set_bytes(const char *path, long long bytes) {
    if (bytes > 0)
        write_number(path, bytes);
    else
        unlink(path);
}

/* Apply a process's file `redo`, if there is one, to its two files. */
static void redo(int pid) {
    char path[PATH_MAX], text[128], of[PATH_MAX];
    int gpu;
    long long on_device, in_host;
    redo_path(path, pid);
    if (!read_text(path, text, sizeof text) || sscanf(text, "%d %lld %lld", &gpu, &on_device, &in_host) != 3) return;
    device_path(of, gpu, pid);
    set_bytes(of, on_device);
    host_path(of, gpu, pid);
    set_bytes(of, in_host);
    unlink(path);
}

/* Set both files through a `redo` file, so that a caller killed between them has moved all of the part, or nothing. */
static void set_both(int pid, int gpu, long long on_device, long long in_host) {
    char path[PATH_MAX], text[128];
    redo_path(path, pid);
    snprintf(text, sizeof text, "%d %lld %lld", gpu, on_device, in_host);
    write_text(path, text);
    redo(pid);
}

/* Do what every call begins with; return the error that the call must return. */
static int begin(const char *call, int pid) {
    double error, seconds;
    if (!root()) return NO_DEVICE;
    if (initialised_by != getpid()) return NOT_INITIALIZED;
    char folder[PATH_MAX];
    path_to(folder, "host");
    mkdir(folder, 0700);
    log_call(call, pid);
    if (told("cuda_hang", call, &seconds, &error)) sleep_for(seconds);
    if (!start_of(pid)) return INVALID_VALUE;
    int held = hold();
    redo(pid);
    if (held >= 0) close(held);
    return told("cuda_error", call, &error, &seconds) ? (int)error : SUCCESS;
}

/* ---- devices ---------------------------------------------------------------------------------------------- */

static int has_gpu(int gpu) {
    char path[PATH_MAX];
    path_to(path, "gpu%d/about", gpu);
    return !access(path, F_OK);
}

/* Tell whether the driver refuses checkpoints: under MPS, and for memory in a MIG slice. */
static int is_unsupported(int pid) {
    char path[PATH_MAX];
    path_to(path, "mps_daemon");
    if (read_number(path)) return 1;
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        for (int slice = 0; slice < 7; slice++) {
            path_to(path, "gpu%d/mig%d/memory/of_%d_%llu", gpu, slice, pid, start_of(pid));
            if (!access(path, F_OK)) return 1;
        }
    return 0;
}

static long long total_of(int gpu, const char *key) {
    char path[PATH_MAX], text[1024];
    path_to(path, "gpu%d/about", gpu);
    if (!read_text(path, text, sizeof text)) return 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(0, "\n"))
        if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ' ') return strtoll(line + strlen(key), 0, 10);
    return 0;
}

static long long used_of(int gpu) {
    char folder[PATH_MAX], path[PATH_MAX + 300];
    long long used = total_of(gpu, "reserved");
    path_to(folder, "gpu%d/memory", gpu);
    DIR *listing = opendir(folder);
    if (!listing) return used;
    for (struct dirent *entry; (entry = readdir(listing));) {
        int pid;
        unsigned long long started;
        if (entry->d_name[0] == '.') continue;
        if (sscanf(entry->d_name, "of_%d_%llu", &pid, &started) == 2 && start_of(pid) != started) continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        used += read_number(path);
    }
    closedir(listing);
    return used;
}

/* Move a process's memory, part by part, from the device to the host or back, at the rate in `cuda_rates`; 0 for at once.
 * Each part is due at its time since the beginning: on a busy host, late sleeps would otherwise lower the rate. */
static int move(const char *call, int pid, int restore) {
    double mb_s = 0, unused, die_after = -1, left_in = 0, began_s = now_s();
    char on_device[PATH_MAX], in_host[PATH_MAX];
    const char *source = restore ? in_host : on_device;
    long long moved = 0;
    told("cuda_rates", call, &mb_s, &unused);
    if (!told("cuda_die", call, &die_after, &left_in)) die_after = -1;
    for (int gpu = 0; gpu < MAX_GPUS && has_gpu(gpu); gpu++) {
        device_path(on_device, gpu, pid);
        host_path(in_host, gpu, pid);
        int held = restore ? hold() : -1;
        int fits = !restore || read_number(source) + used_of(gpu) <= total_of(gpu, "total");
        if (held >= 0) close(held);
        if (!fits) return OUT_OF_MEMORY;
        for (long long there; (there = read_number(source)) > 0;) {
            long long part = there < STEP_BYTES || mb_s <= 0 ? there : STEP_BYTES;
            if (die_after >= 0 && (double)(moved + part) >= die_after) {
                set_state(pid, (int)left_in);
                kill(getpid(), SIGKILL);
            }
            if (mb_s > 0) sleep_for(began_s + (double)(moved + part) / (mb_s * 1048576.0) - now_s());
            held = hold();
            long long change = restore ? part : -part;
            set_both(pid, gpu, read_number(on_device) + change, read_number(in_host) - change);
            if (held >= 0) close(held);
            moved += part;
            if (!start_of(pid)) return INVALID_VALUE;
        }
    }
    return SUCCESS;
}

/* ---- the driver's functions ------------------------------------------------------------------------------- */

int cuInit(unsigned flags) {
    double error, seconds;
    (void)flags;
    if (!root()) return NO_DEVICE;
    log_call("cuInit", 0);
    if (told("cuda_hang", "cuInit", &seconds, &error)) sleep_for(seconds);
    if (told("cuda_error", "cuInit", &error, &seconds)) return (int)error;
    initialised_by = getpid();
    return SUCCESS;
}

int cuDriverGetVersion(int *version) {
    *version = 12080;
    return SUCCESS;
}

int cuCheckpointProcessGetState(int pid, int *state) {
    int error = begin("state", pid);
    if (!error) *state = state_of(pid);
    return error;
}

int cuCheckpointProcessLock(int pid, unsigned *args) {
    double seconds, unused;
    int error = begin("lock", pid);
    if (error) return error;
    if (is_unsupported(pid)) return NOT_SUPPORTED;
    if (state_of(pid) != RUNNING) return ILLEGAL_STATE;
    /* A lock waits until submitted work ends. */
    if (told("cuda_busy", "lock", &seconds, &unused)) {
        double limit = args && args[0] ? args[0] / 1000.0 : seconds;
        sleep_for(seconds < limit ? seconds : limit);
        if (seconds > limit) return NOT_READY;
    }
    set_state(pid, LOCKED);
    return SUCCESS;
}

int cuCheckpointProcessCheckpoint(int pid, void *args) {
    (void)args;
    int error = begin("checkpoint", pid);
    if (error) return error;
    if (state_of(pid) != LOCKED) return ILLEGAL_STATE;
    error = move("checkpoint", pid, 0);
    if (!error) set_state(pid, CHECKPOINTED);
    return error;
}

int cuCheckpointProcessRestore(int pid, void *args) {
    (void)args;
    int error = begin("restore", pid);
    if (error) return error;
    if (state_of(pid) != CHECKPOINTED) return ILLEGAL_STATE;
    error = move("restore", pid, 1);
    if (!error) set_state(pid, LOCKED);
    return error;
}

int cuCheckpointProcessUnlock(int pid, void *args) {
    (void)args;
    int error = begin("unlock", pid);
    if (error) return error;
    if (state_of(pid) != LOCKED) return ILLEGAL_STATE;
    set_state(pid, RUNNING);
    return SUCCESS;
}

int cuGetErrorName(int error, const char **name) {
    switch (error) {
    case SUCCESS: *name = "CUDA_SUCCESS"; break;
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case ILLEGAL_STATE: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
    case NOT_READY: *name = "CUDA_ERROR_NOT_READY"; break;
    case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    default: *name = 0; return INVALID_VALUE;
    }
    return SUCCESS;
}
