/* A stand-in for libnvidia-ml.so.1, for the real pynvml to load: answers from the text file that
 * the environment variable NVML_STAND_IN names. Declared like nvml.h of CUDA 12.
 *
 *   init CODE                 nvmlInit fails with this code
 *   driver VERSION
 *   gpu UUID NAME...          a GPU; the lines below describe the latest gpu or slice
 *   slice UUID NAME...        a MIG slice of the latest gpu
 *   memory TOTAL RESERVED FREE       in bytes; used is what is left
 *   capability MAJOR MINOR | link MAXGEN MAXLANES GEN LANES | power MILLIWATTS | mig CURRENT
 *   cores COUNT | clocks SM MEMORY | bus BITS | sms COUNT
 *   process LIST PID BYTES    LIST is compute or graphics; PID self is the caller; BYTES may be -1
 *   fail QUESTION CODE        QUESTION answers CODE: handle, memory, memory_v2, processes, ...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_DEVICES = 16, MAX_PROCESSES = 8, MAX_FAILURES = 16, MAX_SLICES = 7 };

typedef unsigned long long bytes_t;
typedef struct { unsigned pid; bytes_t used; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { bytes_t total, free, used; } memory_t;
typedef struct { unsigned version; bytes_t total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned counts[8]; bytes_t memory_mb; } attributes_t;
typedef struct device {
    char uuid[96], name[96];
    bytes_t total, reserved, free;
    int major, minor;
    unsigned link[4], power, mig, cores, clocks[2], bus, sms;
    process_t processes[2][MAX_PROCESSES];
    unsigned num_processes[2];
    struct { char question[32]; int code; } failures[MAX_FAILURES];
    int num_failures;
    struct device *slices[MAX_SLICES];
    unsigned num_slices;
} device_t;

static device_t devices[MAX_DEVICES], *gpus[MAX_DEVICES], *latest;
static unsigned num_devices, num_gpus;
static char driver[80] = "550.54.14";

static void read_line(const char *line) {
    char list[16], pid[16], question[32], uuid[96], name[96];
    long long held;
    int code;
    if (sscanf(line, "driver %79s", driver) == 1) return;
    if (sscanf(line, "gpu %95s %95[^\n]", uuid, name) == 2) {
        latest = gpus[num_gpus++] = &devices[num_devices++];
    } else if (sscanf(line, "slice %95s %95[^\n]", uuid, name) == 2) {
        device_t *gpu = gpus[num_gpus - 1];
        latest = gpu->slices[gpu->num_slices++] = &devices[num_devices++];
    } else if (!latest) {
        return;
    } else if (sscanf(line, "process %15s %15s %lld", list, pid, &held) == 3) {
        int drawn = strcmp(list, "graphics") == 0;
        process_t *process = &latest->processes[drawn][latest->num_processes[drawn]++];
        process->pid = strcmp(pid, "self") ? (unsigned)atoi(pid) : (unsigned)getpid();
        process->used = (bytes_t)held;
        return;
    } else if (sscanf(line, "fail %31s %d", question, &code) == 2) {
        strcpy(latest->failures[latest->num_failures].question, question);
        latest->failures[latest->num_failures++].code = code;
        return;
    } else {
        sscanf(line, "memory %llu %llu %llu", &latest->total, &latest->reserved, &latest->free);
        sscanf(line, "capability %d %d", &latest->major, &latest->minor);
        sscanf(line, "link %u %u %u %u", &latest->link[0], &latest->link[1], &latest->link[2],
               &latest->link[3]);
        sscanf(line, "power %u", &latest->power);
        sscanf(line, "mig %u", &latest->mig);
        sscanf(line, "cores %u", &latest->cores);
        sscanf(line, "clocks %u %u", &latest->clocks[0], &latest->clocks[1]);
        sscanf(line, "bus %u", &latest->bus);
        sscanf(line, "sms %u", &latest->sms);
        return;
    }
    strcpy(latest->uuid, uuid);
    strcpy(latest->name, name);
}

static int failure(device_t *device, const char *question) {
    for (int i = 0; i < device->num_failures; i++)
        if (strcmp(device->failures[i].question, question) == 0) return device->failures[i].code;
    return SUCCESS;
}

/* A figure that the file leaves out is one that this GPU does not support. */
static int number(device_t *device, const char *question, unsigned figure, unsigned *answer) {
    int code = failure(device, question);
    *answer = figure;
    return code ? code : figure ? SUCCESS : NOT_SUPPORTED;
}

int nvmlInitWithFlags(unsigned flags) {
    char line[256];
    int code = SUCCESS;
    FILE *file = fopen(getenv("NVML_STAND_IN"), "r");
    (void)flags;
    memset(devices, 0, sizeof devices);
    num_devices = num_gpus = 0;
    latest = NULL;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "init %d", &code) != 1) read_line(line);
    fclose(file);
    return code;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { (void)code; return "error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "%s", driver);
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) { *count = num_gpus; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **device) {
    if (index >= num_gpus) return INVALID;
    *device = gpus[index];
    return failure(*device, "handle");
}

int nvmlDeviceGetName(device_t *device, char *name, unsigned length) {
    snprintf(name, length, "%s", device->name);
    return failure(device, "name");
}

int nvmlDeviceGetUUID(device_t *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "%s", device->uuid);
    return failure(device, "uuid");
}

int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *memory) {
    memory->total = device->total;
    memory->free = device->free;
    memory->used = device->total - device->free;
    return failure(device, "memory");
}

int nvmlDeviceGetMemoryInfo_v2(device_t *device, memory_v2_t *memory) {
    if (memory->version != 0x02000028) return INVALID;
    memory->total = device->total;
    memory->reserved = device->reserved;
    memory->free = device->free;
    memory->used = device->total - device->reserved - device->free;
    return failure(device, "memory") ? failure(device, "memory") : failure(device, "memory_v2");
}

static int processes(device_t *device, int drawn, unsigned *count, process_t *found) {
    unsigned room = *count;
    int code = failure(device, "processes");
    if (code) return code;
    *count = device->num_processes[drawn];
    if (room < *count) return INSUFFICIENT_SIZE;
    memcpy(found, device->processes[drawn], *count * sizeof *found);
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t *device, unsigned *count, process_t *found) {
    return processes(device, 0, count, found);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t *device, unsigned *count, process_t *found) {
    return processes(device, 1, count, found);
}

int nvmlDeviceGetCudaComputeCapability(device_t *device, int *major, int *minor) {
    *major = device->major;
    *minor = device->minor;
    return failure(device, "capability");
}

int nvmlDeviceGetMaxPcieLinkGeneration(device_t *device, unsigned *answer) {
    return number(device, "link", device->link[0], answer);
}

int nvmlDeviceGetMaxPcieLinkWidth(device_t *device, unsigned *answer) {
    return number(device, "link", device->link[1], answer);
}

int nvmlDeviceGetCurrPcieLinkGeneration(device_t *device, unsigned *answer) {
    return number(device, "link", device->link[2], answer);
}

int nvmlDeviceGetCurrPcieLinkWidth(device_t *device, unsigned *answer) {
    return number(device, "link", device->link[3], answer);
}

int nvmlDeviceGetEnforcedPowerLimit(device_t *device, unsigned *answer) {
    return number(device, "power", device->power, answer);
}

int nvmlDeviceGetNumGpuCores(device_t *device, unsigned *answer) {
    return number(device, "cores", device->cores, answer);
}

int nvmlDeviceGetMaxClockInfo(device_t *device, unsigned kind, unsigned *answer) {
    return number(device, "clocks", device->clocks[kind == 2], answer);
}

int nvmlDeviceGetMemoryBusWidth(device_t *device, unsigned *answer) {
    return number(device, "bus", device->bus, answer);
}

int nvmlDeviceGetMigMode(device_t *device, unsigned *current, unsigned *pending) {
    *current = *pending = device->mig;
    return failure(device, "mig");
}

int nvmlDeviceGetMaxMigDeviceCount(device_t *device, unsigned *count) {
    *count = MAX_SLICES;
    return failure(device, "mig");
}

/* The first place is left empty, as it is when an earlier slice was destroyed. */
int nvmlDeviceGetMigDeviceHandleByIndex(device_t *device, unsigned index, device_t **slice) {
    if (index == 0 || index > device->num_slices) return NOT_FOUND;
    *slice = device->slices[index - 1];
    return SUCCESS;
}

int nvmlDeviceGetAttributes_v2(device_t *device, attributes_t *attributes) {
    memset(attributes, 0, sizeof *attributes);
    attributes->counts[0] = device->sms;
    attributes->memory_mb = device->total >> 20;
    return device->sms ? SUCCESS : NOT_SUPPORTED;
}
