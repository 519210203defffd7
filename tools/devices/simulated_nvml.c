/* A stand-in for libnvidia-ml.so.1: NVML's functions over a directory of small files, for machines without a GPU.
 *
 * It implements what nvidia-ml-py calls for memory, processes, names and MIG slices. $SIMULATED_GPU_DIR names the
 * directory; tools/devices/simulated_gpu.py writes it and explains each file. Every call reads memory anew; nvmlInit
 * reads the devices, their names and sizes.
 *
 * As with the real library, handles are valid until nvmlShutdown, and only in the process that called nvmlInit; and
 * a device once found lost stays lost until NVML is initialised again.
 *
 * Build: gcc -O2 -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 simulated_nvml.c
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "simulated_process.h"

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    RESET_REQUIRED = 16,
    UNKNOWN = 999
};

#define MAX_GPUS 8
#define MAX_SLICES 7
#define MAX_PROCESSES 1024
#define UNKNOWN_MEMORY UINT64_MAX

typedef uintptr_t Handle; /* generation << 8 | gpu << 4 | slice + 1, where slice -1 is the whole board */

typedef struct {
    uint64_t total, free, used;
} Memory;

typedef struct {
    unsigned version;
    uint64_t total, reserved, free, used;
} MemoryV2;

typedef struct {
    unsigned pid;
    uint64_t used;
    unsigned gpu_instance, compute_instance;
} Process;

typedef struct {
    char legacy_bus_id[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} PciInfo;

typedef struct {
    unsigned multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices;
    uint64_t memory_mb;
} Attributes;

/* A board or one of its slices. */
typedef struct {
    char folder[PATH_MAX];
    char uuid[96], name[96];
    uint64_t total, reserved;
    int64_t linger_ms;
    int mig; /* 1 on, 0 off, -1: this board has no MIG */
    unsigned number;
    int slices;
    int lost; /* found lost since nvmlInit */
} Unit;

typedef struct {
    uint64_t used; /* without the reserved bytes */
    unsigned count;
    Process processes[MAX_PROCESSES];
} Use;

static char root[PATH_MAX];
static Unit boards[MAX_GPUS];
static Unit slices[MAX_GPUS][MAX_SLICES];
static unsigned board_count, users, generation;
static pid_t owner; /* the process that called nvmlInit */

/* ---- small files ------------------------------------------------------------------------------------------ */

static int join(char *to, const char *folder, const char *name) {
    return snprintf(to, PATH_MAX, "%s/%s", folder, name) < PATH_MAX;
}

static ssize_t read_file(const char *folder, const char *name, char *to, size_t size) {
    char path[PATH_MAX];
    return join(path, folder, name) ? read_path(path, to, size) : -1;
}

/* Put the rest of the line of `text` that begins with `key` and a blank into `to`; return 0 if there is none. */
static int value_of(const char *text, const char *key, char *to, size_t size) {
    size_t length = strlen(key);
    for (const char *line = text; line && *line; line = strchr(line, '\n'), line = line ? line + 1 : 0) {
        if (strncmp(line, key, length) || line[length] != ' ') continue;
        size_t end = strcspn(line + length + 1, "\n");
        if (end >= size) end = size - 1;
        memcpy(to, line + length + 1, end);
        to[end] = 0;
        return 1;
    }
    return 0;
}

static int64_t number_of(const char *text, const char *key, int64_t otherwise) {
    char value[32];
    return value_of(text, key, value, sizeof value) ? strtoll(value, 0, 10) : otherwise;
}

static double seconds_in(const char *name) {
    char text[64];
    return read_file(root, name, text, sizeof text) > 0 ? strtod(text, 0) : 0.0;
}

static void sleep_for(double seconds) {
    if (seconds <= 0) return;
    struct timespec left = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&left, &left)) continue;
}

/* Add a line to the log of calls, if the file exists. */
static void log_call(const char *what, const char *about) {
    char path[PATH_MAX], line[160];
    if (!join(path, root, "calls")) return;
    int fd = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0) return;
    int length = snprintf(line, sizeof line, "%d %s %s\n", getpid(), what, about);
    if (write(fd, line, (size_t)length) != length) perror("simulated_nvml: log of calls");
    close(fd);
}

/* ---- devices ---------------------------------------------------------------------------------------------- */

static int read_unit(Unit *unit, const char *folder, unsigned number) {
    char about[1024], value[96];
    memset(unit, 0, sizeof *unit);
    if (read_file(folder, "about", about, sizeof about) < 0) return 0;
    snprintf(unit->folder, sizeof unit->folder, "%s", folder);
    unit->number = number;
    if (value_of(about, "uuid", value, sizeof value)) memcpy(unit->uuid, value, sizeof value);
    if (value_of(about, "name", value, sizeof value)) memcpy(unit->name, value, sizeof value);
    unit->total = (uint64_t)number_of(about, "total", 0);
    unit->reserved = (uint64_t)number_of(about, "reserved", 0);
    unit->linger_ms = number_of(about, "linger_ms", 0);
    unit->mig = (int)number_of(about, "mig", -1);
    return 1;
}

static void read_boards(void) {
    char folder[PATH_MAX], name[32];
    for (board_count = 0; board_count < MAX_GPUS; board_count++) {
        Unit *board = &boards[board_count];
        snprintf(name, sizeof name, "gpu%u", board_count);
        if (!join(folder, root, name) || !read_unit(board, folder, board_count)) break;
        for (board->slices = 0; board->slices < MAX_SLICES; board->slices++) {
            snprintf(name, sizeof name, "gpu%u/mig%d", board_count, board->slices);
            if (!join(folder, root, name)) break;
            if (!read_unit(&slices[board_count][board->slices], folder, (unsigned)board->slices)) break;
        }
    }
}

static Handle handle_of(unsigned board, int slice) {
    return (Handle)generation << 8 | board << 4 | (unsigned)(slice + 1);
}

static Unit *board_of(Handle handle) {
    return &boards[handle >> 4 & 15];
}

static int is_slice(Handle handle) {
    return (handle & 15) != 0;
}

/* Return the error that the board's file `refused` gives for a question; 0 for none. A line is '<what> <error>'. */
static int refusal(const Unit *unit, const char *what) {
    char text[512];
    return read_file(unit->folder, "refused", text, sizeof text) > 0 ? (int)number_of(text, what, 0) : 0;
}

static int is_lost(Unit *board) {
    char path[PATH_MAX];
    if (!board->lost && join(path, board->folder, "lost")) board->lost = !access(path, F_OK);
    return board->lost;
}

/* Set `unit` to the device of a handle. Returns NVML's error. */
static int open_handle(Handle handle, const char *what, Unit **unit) {
    if (!users || owner != getpid()) return UNINITIALIZED;
    unsigned board = handle >> 4 & 15;
    int slice = (int)(handle & 15) - 1;
    if (handle >> 8 != generation || board >= board_count || slice >= boards[board].slices) return INVALID_ARGUMENT;
    if (is_lost(&boards[board])) return GPU_IS_LOST;
    *unit = slice < 0 ? &boards[board] : &slices[board][slice];
    return refusal(*unit, what);
}

/* ---- memory ----------------------------------------------------------------------------------------------- */

/* Tell whether the process with this pid and start time lives; a zombie does not. */
static int lives(int pid, unsigned long long started) {
    return started && start_of(pid) == started;
}

static int64_t age_ms(const char *path) {
    struct stat status;
    struct timespec now;
    if (stat(path, &status)) return INT64_MAX;
    clock_gettime(CLOCK_REALTIME, &now);
    return (now.tv_sec - status.st_mtim.tv_sec) * 1000 + (now.tv_nsec - status.st_mtim.tv_nsec) / 1000000;
}

static void add_process(Use *use, unsigned pid, uint64_t bytes, unsigned slice) {
    if (use->count == MAX_PROCESSES) return;
    unsigned instance = slice ? slice : UINT_MAX;
    use->processes[use->count++] = (Process){pid, bytes, instance, slice ? 0 : UINT_MAX};
}

/* Count one file of memory: 'of_<pid>_<start>', 'kept_<pid>' or 'late_…'. Files with other names are ignored. */
static void count_file(const Unit *unit, const char *folder, const char *name, unsigned slice, Use *use) {
    char path[PATH_MAX], late[PATH_MAX], text[32];
    unsigned long long started = 0;
    int pid = 0;
    if (!join(path, folder, name)) return;
    int owned = sscanf(name, "of_%d_%llu", &pid, &started) == 2;
    int kept = !owned && sscanf(name, "kept_%d", &pid) == 1;
    if (!owned && !kept && strncmp(name, "late_", 5)) return;
    if (read_path(path, text, sizeof text) <= 0) return;
    uint64_t bytes = strtoull(text, 0, 10);
    if (kept || (owned && lives(pid, started))) {
        use->used += bytes;
        add_process(use, (unsigned)pid, bytes, slice);
        return;
    }
    if (owned && unit->linger_ms > 0 && snprintf(late, sizeof late, "%s/late_%s", folder, name) < PATH_MAX) {
        /* A dead process's memory counts for linger_ms after this first look. Dated first: a reader that looks between
         * the two steps must not find an old file. */
        utimensat(AT_FDCWD, path, 0, 0);
        rename(path, late);
        use->used += bytes;
        return;
    }
    if (!owned && age_ms(path) < unit->linger_ms)
        use->used += bytes;
    else
        unlink(path);
}

static void count_folder(const Unit *unit, unsigned slice, Use *use) {
    char folder[PATH_MAX];
    if (!join(folder, unit->folder, "memory")) return;
    DIR *listing = opendir(folder);
    if (!listing) return;
    for (struct dirent *entry; (entry = readdir(listing));) count_file(unit, folder, entry->d_name, slice, use);
    closedir(listing);
}

/* Count the use of a board, including its slices, or of one slice. */
static void count_use(Handle handle, const Unit *unit, Use *use) {
    use->used = use->count = 0;
    count_folder(unit, is_slice(handle) ? unit->number + 1 : 0, use);
    for (int i = 0; !is_slice(handle) && i < unit->slices; i++)
        count_folder(&slices[unit->number][i], (unsigned)i + 1, use);
}

/* Replace the processes by the MPS daemon, which has the memory of all clients. */
static void show_daemon(Use *use, unsigned daemon) {
    if (use->count) use->processes[0] = (Process){daemon, use->used, UINT_MAX, UINT_MAX};
    use->count = use->count > 0;
}

static int list_processes(Handle handle, const char *what, unsigned *count, Process *to) {
    static __thread Use use;
    Unit *unit;
    char text[32];
    int computing = !strcmp(what, "processes"), sharing = !strcmp(what, "mps_processes");
    int error = open_handle(handle, what, &unit);
    if (error) return error;
    if (is_slice(handle) && !strcmp(what, "graphics")) return NOT_SUPPORTED;
    use.count = 0;
    unsigned daemon = read_file(root, "mps_daemon", text, sizeof text) > 0 ? (unsigned)atoi(text) : 0;
    if ((computing && !refusal(unit, "unlisted")) || (sharing && daemon)) count_use(handle, unit, &use);
    if (computing && daemon) show_daemon(&use, daemon);
    unsigned room = *count;
    *count = use.count;
    if (!use.count) return SUCCESS;
    if (!to || room < use.count) return INSUFFICIENT_SIZE;
    int shift = read_file(root, "pid_offset", text, sizeof text) > 0 ? atoi(text) : 0;
    int withheld = refusal(unit, "process_memory");
    for (unsigned i = 0; i < use.count; i++) {
        to[i] = use.processes[i];
        to[i].pid += (unsigned)shift;
        if (withheld) to[i].used = UNKNOWN_MEMORY;
    }
    return SUCCESS;
}

/* ---- NVML's functions ------------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags) {
    const char *folder = getenv("SIMULATED_GPU_DIR");
    char text[32];
    (void)flags;
    if (!folder || !*folder) return DRIVER_NOT_LOADED;
    if (users && owner == getpid()) {
        users++;
        return SUCCESS;
    }
    snprintf(root, sizeof root, "%s", folder);
    log_call("init", "-");
    if (read_file(root, "init", text, sizeof text) > 0 && atoi(text)) return atoi(text);
    read_boards();
    generation++;
    owner = getpid();
    users = 1;
    return SUCCESS;
}

int nvmlInit_v2(void) {
    return nvmlInitWithFlags(0);
}

int nvmlInit(void) {
    return nvmlInitWithFlags(0);
}

int nvmlShutdown(void) {
    if (!users || owner != getpid()) return UNINITIALIZED;
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int error) {
    switch (error) {
    case SUCCESS: return "The operation was successful";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case RESET_REQUIRED: return "GPU requires reset";
    default: return "Unknown Error";
    }
}

static int give_text(const char *text, char *to, unsigned size) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *to, unsigned size) {
    return users ? give_text("550.54.14", to, size) : UNINITIALIZED;
}

int nvmlSystemGetNVMLVersion(char *to, unsigned size) {
    return users ? give_text("12.550.54.14", to, size) : UNINITIALIZED;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 12040;
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!users || owner != getpid()) return UNINITIALIZED;
    *count = board_count;
    return SUCCESS;
}

int nvmlDeviceGetCount(unsigned *count) {
    return nvmlDeviceGetCount_v2(count);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *handle) {
    if (!users || owner != getpid()) return UNINITIALIZED;
    if (index >= board_count) return INVALID_ARGUMENT;
    if (is_lost(&boards[index])) return GPU_IS_LOST;
    *handle = handle_of(index, -1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex(unsigned index, Handle *handle) {
    return nvmlDeviceGetHandleByIndex_v2(index, handle);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Handle *handle) {
    if (!users || owner != getpid()) return UNINITIALIZED;
    for (unsigned board = 0; board < board_count; board++) {
        for (int slice = -1; slice < boards[board].slices; slice++) {
            Unit *unit = slice < 0 ? &boards[board] : &slices[board][slice];
            if (strcmp(unit->uuid, uuid)) continue;
            if (is_lost(&boards[board])) return GPU_IS_LOST;
            *handle = handle_of(board, slice);
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

static void bus_id_of(unsigned board, char *to, size_t size) {
    snprintf(to, size, "00000000:%02X:00.0", board + 1);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Handle *handle) {
    char ours[32];
    if (!users || owner != getpid()) return UNINITIALIZED;
    for (unsigned board = 0; board < board_count; board++) {
        bus_id_of(board, ours, sizeof ours);
        if (!strcasecmp(ours, bus_id)) return nvmlDeviceGetHandleByIndex_v2(board, handle);
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId(const char *bus_id, Handle *handle) {
    return nvmlDeviceGetHandleByPciBusId_v2(bus_id, handle);
}

int nvmlDeviceGetName(Handle handle, char *to, unsigned size) {
    Unit *unit;
    int error = open_handle(handle, "name", &unit);
    return error ? error : give_text(unit->name, to, size);
}

int nvmlDeviceGetUUID(Handle handle, char *to, unsigned size) {
    Unit *unit;
    int error = open_handle(handle, "uuid", &unit);
    return error ? error : give_text(unit->uuid, to, size);
}

int nvmlDeviceGetIndex(Handle handle, unsigned *index) {
    Unit *unit;
    int error = open_handle(handle, "index", &unit);
    if (!error) *index = unit->number;
    return error;
}

int nvmlDeviceGetMinorNumber(Handle handle, unsigned *number) {
    return is_slice(handle) ? NOT_SUPPORTED : nvmlDeviceGetIndex(handle, number);
}

int nvmlDeviceGetPciInfo_v3(Handle handle, PciInfo *info) {
    Unit *unit;
    int error = open_handle(handle, "pci", &unit);
    if (error) return error;
    unsigned board = (unsigned)(board_of(handle) - boards);
    memset(info, 0, sizeof *info);
    bus_id_of(board, info->bus_id, sizeof info->bus_id);
    snprintf(info->legacy_bus_id, sizeof info->legacy_bus_id, "0000:%02X:00.0", (board + 1) & 0xFF);
    info->bus = board + 1;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Handle handle, MemoryV2 *memory) {
    static __thread Use use;
    Unit *unit;
    int error = open_handle(handle, "memory", &unit);
    log_call("memory", error ? "-" : unit->uuid);
    sleep_for(seconds_in("nvml_hang"));
    if (error) return error;
    count_use(handle, unit, &use);
    memory->total = unit->total;
    memory->reserved = unit->reserved;
    memory->used = use.used;
    memory->free = use.used + unit->reserved < unit->total ? unit->total - unit->reserved - use.used : 0;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Handle handle, Memory *memory) {
    MemoryV2 found;
    int error = nvmlDeviceGetMemoryInfo_v2(handle, &found);
    /* The older form counts what the driver keeps for itself as used. */
    if (!error) *memory = (Memory){found.total, found.free, found.total - found.free};
    return error;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Handle handle, unsigned *count, Process *processes) {
    return list_processes(handle, "processes", count, processes);
}

int nvmlDeviceGetComputeRunningProcesses_v2(Handle handle, unsigned *count, Process *processes) {
    return list_processes(handle, "processes", count, processes);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Handle handle, unsigned *count, Process *processes) {
    return list_processes(handle, "graphics", count, processes);
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(Handle handle, unsigned *count, Process *processes) {
    return list_processes(handle, "graphics", count, processes);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(Handle handle, unsigned *count, Process *processes) {
    return list_processes(handle, "mps_processes", count, processes);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v2(Handle handle, unsigned *count, Process *processes) {
    return list_processes(handle, "mps_processes", count, processes);
}

int nvmlDeviceGetMigMode(Handle handle, unsigned *current, unsigned *pending) {
    Unit *unit;
    int error = open_handle(handle, "mig", &unit);
    if (error) return error;
    if (is_slice(handle) || unit->mig < 0) return NOT_SUPPORTED;
    *current = *pending = (unsigned)unit->mig;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Handle handle, unsigned *count) {
    Unit *unit;
    int error = open_handle(handle, "mig", &unit);
    if (!error) *count = unit->mig < 0 ? 0 : MAX_SLICES;
    return error;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Handle handle, unsigned index, Handle *slice) {
    Unit *unit;
    int error = open_handle(handle, "mig", &unit);
    if (error) return error;
    if (is_slice(handle) || unit->mig != 1) return INVALID_ARGUMENT;
    if ((int)index >= unit->slices) return NOT_FOUND;
    *slice = handle_of(unit->number, (int)index);
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Handle slice, Handle *handle) {
    Unit *unit;
    int error = open_handle(slice, "mig", &unit);
    if (error) return error;
    if (!is_slice(slice)) return INVALID_ARGUMENT;
    *handle = slice & ~(Handle)15;
    return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(Handle handle, unsigned *answer) {
    Unit *unit;
    int error = open_handle(handle, "mig", &unit);
    if (!error) *answer = (unsigned)is_slice(handle);
    return error;
}

int nvmlDeviceGetGpuInstanceId(Handle handle, unsigned *number) {
    Unit *unit;
    int error = open_handle(handle, "mig", &unit);
    if (error) return error;
    if (!is_slice(handle)) return NOT_SUPPORTED;
    *number = unit->number + 1;
    return SUCCESS;
}

int nvmlDeviceGetComputeInstanceId(Handle handle, unsigned *number) {
    int error = nvmlDeviceGetGpuInstanceId(handle, number);
    if (!error) *number = 0;
    return error;
}

int nvmlDeviceGetAttributes_v2(Handle handle, Attributes *attributes) {
    Unit *unit;
    int error = open_handle(handle, "attributes", &unit);
    if (error) return error;
    memset(attributes, 0, sizeof *attributes);
    attributes->gpu_slices = attributes->compute_slices = 1;
    attributes->memory_mb = unit->total >> 20;
    return SUCCESS;
}
