/* A stand-in for the program nvidia-smi: its CSV queries and its list of GPUs, over simulated_nvml.c.
 *
 *   nvidia-smi --query-gpu=FIELDS|--query-compute-apps=FIELDS --format=csv[,noheader][,nounits] [-i INDEX|UUID]
 *   nvidia-smi -L
 *
 * Like the real one, it prints '[N/A]' and the like for a field without a value, and fails as a whole, with NVML's
 * error as exit status, if the driver does not answer or a device is lost. Slices are in the list, not in the CSV.
 * The file `smi_hang` in $SIMULATED_GPU_DIR holds the seconds that it hangs; with a file `inforom` it warns, like
 * the real one, of a corrupted infoROM on stdout, and exits with status 14 although it has answered.
 *
 * Build: gcc -O2 -o nvidia-smi simulated_nvidia_smi.c simulated_nvml.c
 */

#define _GNU_SOURCE
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MIB (1 << 20)
#define MAX_PROCESSES 1024
#define MAX_FIELDS 32
#define FIELD_SIZE 128

typedef uintptr_t Handle;

typedef struct {
    unsigned version;
    uint64_t total, reserved, free, used;
} MemoryV2;

typedef struct {
    unsigned pid;
    uint64_t used;
    unsigned gpu_instance, compute_instance;
} Process;

int nvmlInit_v2(void);
const char *nvmlErrorString(int);
int nvmlSystemGetDriverVersion(char *, unsigned);
int nvmlDeviceGetCount_v2(unsigned *);
int nvmlDeviceGetHandleByIndex_v2(unsigned, Handle *);
int nvmlDeviceGetName(Handle, char *, unsigned);
int nvmlDeviceGetUUID(Handle, char *, unsigned);
int nvmlDeviceGetMemoryInfo_v2(Handle, MemoryV2 *);
int nvmlDeviceGetComputeRunningProcesses_v3(Handle, unsigned *, Process *);
int nvmlDeviceGetMigMode(Handle, unsigned *, unsigned *);
int nvmlDeviceGetMigDeviceHandleByIndex(Handle, unsigned, Handle *);

static int with_header = 1, with_units = 1;
static const char *chosen;

/* ---- one value -------------------------------------------------------------------------------------------- */

static void give(char *to, int error, const char *text) {
    static const struct {
        int error;
        const char *text;
    } refusals[] = {{3, "[N/A]"}, {4, "[Insufficient Permissions]"}, {15, "[GPU is lost]"}, {16, "[GPU requires reset]"}};
    const char *shown = text;
    if (error) shown = "[Unknown Error]";
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++)
        if (error == refusals[i].error) shown = refusals[i].text;
    snprintf(to, FIELD_SIZE, "%s", shown);
}

static void give_mib(char *to, int error, uint64_t bytes) {
    char text[FIELD_SIZE];
    snprintf(text, sizeof text, "%llu%s", (unsigned long long)(bytes / MIB), with_units ? " MiB" : "");
    give(to, error, text);
}

static int is_one_of(const char *field, const char *name, const char *other) {
    return !strcmp(field, name) || !strcmp(field, other);
}

static int bus_id_field(const char *field) {
    return is_one_of(field, "pci.bus_id", "gpu_bus_id");
}

static void give_bus_id(char *to, unsigned number) {
    snprintf(to, FIELD_SIZE, "00000000:%02X:00.0", number + 1);
}

/* Write the value of a field of a GPU. Returns 0 for a field that does not exist. */
static int gpu_field(const char *field, unsigned number, unsigned count, Handle handle, char *to) {
    char text[FIELD_SIZE] = "";
    unsigned current, pending;
    if (!strcmp(field, "index"))
        snprintf(to, FIELD_SIZE, "%u", number);
    else if (!strcmp(field, "count"))
        snprintf(to, FIELD_SIZE, "%u", count);
    else if (is_one_of(field, "uuid", "gpu_uuid"))
        give(to, nvmlDeviceGetUUID(handle, text, sizeof text), text);
    else if (is_one_of(field, "name", "gpu_name"))
        give(to, nvmlDeviceGetName(handle, text, sizeof text), text);
    else if (!strcmp(field, "driver_version"))
        give(to, nvmlSystemGetDriverVersion(text, sizeof text), text);
    else if (bus_id_field(field))
        give_bus_id(to, number);
    else if (is_one_of(field, "mig.mode.current", "mig.mode.pending")) {
        int error = nvmlDeviceGetMigMode(handle, &current, &pending);
        give(to, error, !error && current ? "Enabled" : "Disabled");
    } else if (!strncmp(field, "memory.", 7)) {
        MemoryV2 memory = {0};
        int error = nvmlDeviceGetMemoryInfo_v2(handle, &memory);
        const char *what = field + 7;
        if (!strcmp(what, "total")) give_mib(to, error, memory.total);
        else if (!strcmp(what, "reserved")) give_mib(to, error, memory.reserved);
        else if (!strcmp(what, "used")) give_mib(to, error, memory.used);
        else if (!strcmp(what, "free")) give_mib(to, error, memory.free);
        else return 0;
    } else
        return 0;
    return 1;
}

static int app_field(const char *field, unsigned number, Handle handle, const Process *process, char *to) {
    char text[FIELD_SIZE] = "", path[64];
    if (!strcmp(field, "pid"))
        snprintf(to, FIELD_SIZE, "%u", process->pid);
    else if (is_one_of(field, "used_memory", "used_gpu_memory"))
        give_mib(to, process->used == UINT64_MAX ? 3 : 0, process->used);
    else if (is_one_of(field, "process_name", "name")) {
        snprintf(path, sizeof path, "/proc/%u/exe", process->pid);
        ssize_t length = readlink(path, text, sizeof text - 1);
        give(to, length < 0 ? 6 : 0, text);
    } else if (is_one_of(field, "gpu_uuid", "gpu_name") || bus_id_field(field))
        return gpu_field(field, number, 0, handle, to);
    else
        return 0;
    return 1;
}

/* ---- the table -------------------------------------------------------------------------------------------- */

typedef struct {
    int apps;
    int count;
    char *names[MAX_FIELDS];
} Query;

static int no_such_field(const char *field) {
    printf("Field \"%s\" is not a valid field to query.\n\n", field);
    return 2;
}

static void print_header(const Query *query) {
    for (int i = 0; i < query->count; i++) {
        const char *name = query->names[i];
        int in_mib = !strncmp(name, "memory.", 7) || !strncmp(name, "used_", 5);
        printf("%s%s%s", i ? ", " : "", name, in_mib ? " [MiB]" : "");
    }
    printf("\n");
}

static int print_line(const Query *query, unsigned number, unsigned count, Handle handle, const Process *process) {
    char values[MAX_FIELDS][FIELD_SIZE];
    for (int i = 0; i < query->count; i++) {
        int known = process ? app_field(query->names[i], number, handle, process, values[i])
                            : gpu_field(query->names[i], number, count, handle, values[i]);
        if (!known) return no_such_field(query->names[i]);
    }
    for (int i = 0; i < query->count; i++) printf("%s%s", i ? ", " : "", values[i]);
    printf("\n");
    return 0;
}

static int print_apps(const Query *query, unsigned number, Handle handle) {
    static Process processes[MAX_PROCESSES];
    unsigned count = MAX_PROCESSES;
    int error = nvmlDeviceGetComputeRunningProcesses_v3(handle, &count, processes);
    for (unsigned i = 0; !error && i < count; i++) {
        int status = print_line(query, number, 0, handle, &processes[i]);
        if (status) return status;
    }
    return 0;
}

static int is_chosen(unsigned number, Handle handle) {
    char uuid[FIELD_SIZE] = "", index[16];
    if (!chosen) return 1;
    snprintf(index, sizeof index, "%u", number);
    return !strcmp(chosen, index) || (!nvmlDeviceGetUUID(handle, uuid, sizeof uuid) && !strcmp(chosen, uuid));
}

static int print_list(unsigned number, Handle handle) {
    char uuid[FIELD_SIZE] = "", name[FIELD_SIZE] = "";
    Handle slice;
    nvmlDeviceGetUUID(handle, uuid, sizeof uuid);
    nvmlDeviceGetName(handle, name, sizeof name);
    printf("GPU %u: %s (UUID: %s)\n", number, name, uuid);
    for (unsigned i = 0; !nvmlDeviceGetMigDeviceHandleByIndex(handle, i, &slice); i++) {
        nvmlDeviceGetUUID(slice, uuid, sizeof uuid);
        nvmlDeviceGetName(slice, name, sizeof name);
        printf("  MIG %s Device %2u: (UUID: %s)\n", name, i, uuid);
    }
    return 0;
}

static int has_file(const char *name) {
    char path[PATH_MAX];
    const char *folder = getenv("SIMULATED_GPU_DIR");
    snprintf(path, sizeof path, "%s/%s", folder ? folder : "", name);
    return !access(path, F_OK);
}

static int for_each_gpu(const Query *query) {
    unsigned count = 0, shown = 0;
    Handle handles[64];
    nvmlDeviceGetCount_v2(&count);
    for (unsigned i = 0; i < count; i++) {
        int error = nvmlDeviceGetHandleByIndex_v2(i, &handles[i]);
        char text[16];
        snprintf(text, sizeof text, "%u", i);
        if (error && chosen && strcmp(chosen, text)) {
            handles[i] = 0;
        } else if (error) {
            printf("Unable to determine the device handle for GPU%u: %02X:00.0: %s\n", i, i + 1, nvmlErrorString(error));
            return error;
        }
    }
    for (unsigned i = 0; i < count; i++) {
        if (!handles[i] || !is_chosen(i, handles[i])) continue;
        shown++;
        int status = !query       ? print_list(i, handles[i])
                     : query->apps ? print_apps(query, i, handles[i])
                                   : print_line(query, i, count, handles[i], 0);
        if (status) return status;
    }
    if (!shown) printf("No devices were found\n");
    if (!shown) return 6;
    if (!has_file("inforom")) return 0;
    printf("WARNING: infoROM is corrupted at gpu 0000:01:00.0\n");
    return 14;
}

static void hang(void) {
    char path[PATH_MAX], text[32] = "";
    const char *folder = getenv("SIMULATED_GPU_DIR");
    snprintf(path, sizeof path, "%s/smi_hang", folder ? folder : "");
    FILE *file = fopen(path, "r");
    if (!file) return;
    double seconds = fgets(text, sizeof text, file) ? strtod(text, 0) : 0;
    fclose(file);
    struct timespec left = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&left, &left)) continue;
}

static void split(Query *query, char *fields) {
    for (char *name = strtok(fields, ", "); name && query->count < MAX_FIELDS; name = strtok(0, ", "))
        query->names[query->count++] = name;
}

int main(int argc, char **argv) {
    Query query = {0};
    int list = 0;
    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "--query-gpu=", 12))
            split(&query, argv[i] + 12);
        else if (!strncmp(argv[i], "--query-compute-apps=", 21)) {
            query.apps = 1;
            split(&query, argv[i] + 21);
        } else if (!strncmp(argv[i], "--format=", 9)) {
            with_header = !strstr(argv[i], "noheader");
            with_units = !strstr(argv[i], "nounits");
        } else if (!strncmp(argv[i], "--id=", 5))
            chosen = argv[i] + 5;
        else if (!strcmp(argv[i], "-i") && i + 1 < argc)
            chosen = argv[++i];
        else if (is_one_of(argv[i], "-L", "--list-gpus"))
            list = 1;
        else {
            printf("Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n");
            return 2;
        }
    }
    hang();
    int error = nvmlInit_v2();
    if (error) {
        printf("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver: %s.\n\n",
               nvmlErrorString(error));
        return error & 255;
    }
    if (list) return for_each_gpu(0);
    if (!query.count) return no_such_field("");
    if (with_header) print_header(&query);
    return for_each_gpu(&query);
}
