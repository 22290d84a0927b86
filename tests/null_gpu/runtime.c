/* libcudart: the CUDA runtime. Every operation is finished when its call returns. */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAX_PROCESSES 256
#define COUNT(field) __atomic_add_fetch(&null_counters()->field, 1, __ATOMIC_RELAXED)
#define RETURNS_SUCCESS(name) EXPORT int name(void) { return null_error(); }
#define IS_UNSUPPORTED(name) EXPORT int name(void) { return remember(NOT_SUPPORTED); }

typedef struct {
    unsigned x, y, z;
} Dim3;
typedef struct {
    struct timespec recorded;
} Event;

/* Memory as nvidia-smi shows it; the clock is the boost clock. */
static const Model models[] = {
    {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 1980000, 2619000, 5120, 81559 * MIB, 50 * MIB},
    {"h200", "NVIDIA H200", 9, 0, 132, 1980000, 3201000, 6144, 143771 * MIB, 60 * MIB},
    {"b200", "NVIDIA B200", 10, 0, 148, 1965000, 3996000, 8192, 183359 * MIB, 126 * MIB},
};

static _Thread_local int device_of_thread;
static _Thread_local int last_error;
static int sticky_error;
static Process alone; /* if there is no state file */
static Process *processes = &alone;
static int process_count = 1;

/* ------------------------------------------------------------------ settings and state */

/* A setting that concerns one rank, if NULL_GPU_FAIL_RANK names one. */
long null_setting(const char *name, long otherwise)
{
    const char *value = getenv(name), *only = getenv("NULL_GPU_FAIL_RANK"), *rank = getenv("RANK");
    if (!value || (only && strcmp(only, rank ? rank : "0")))
        return otherwise;
    return strtol(value, NULL, 10);
}

static long mebibytes(const char *name, long otherwise)
{
    const char *value = getenv(name);
    return value ? strtol(value, NULL, 10) : otherwise;
}

size_t null_copy_limit(void)
{
    static size_t limit;
    if (!limit)
        limit = (size_t)mebibytes("NULL_GPU_COPY_MIB", 64) * MIB;
    return limit;
}

const Model *null_model(void)
{
    static Model model;
    if (!model.name) {
        const char *wanted = getenv("NULL_GPU_DEVICE");
        const Model *found = &models[1];
        for (size_t i = 0; i < sizeof models / sizeof *models; i++)
            if (wanted && !strcmp(models[i].name, wanted))
                found = &models[i];
        long memory = mebibytes("NULL_GPU_MEMORY_MIB", 0);
        Model chosen = *found;
        if (memory)
            chosen.memory = (size_t)memory * MIB;
        model = chosen;
    }
    return &model;
}

int null_device_count(void)
{
    long count = mebibytes("NULL_GPU_COUNT", 1);
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (visible) { /* a list of numbers; only their count matters */
        int listed = *visible != 0;
        for (; *visible; visible++)
            listed += *visible == ',';
        count = listed < count ? listed : count;
    }
    return count > MAX_DEVICES ? MAX_DEVICES : (int)count;
}

int null_current_device(void) { return device_of_thread; }

bool null_alive(int pid)
{
    char path[32], line[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    ssize_t length = read(file, line, sizeof line - 1);
    close(file);
    line[length > 0 ? length : 0] = 0;
    const char *state = strrchr(line, ')');
    return state && state[1] && state[2] != 'Z' && state[2] != 'X';
}

static void open_state(void)
{
    const char *path = getenv("NULL_GPU_STATE");
    size_t bytes = MAX_PROCESSES * sizeof(Process);
    int file = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (file < 0)
        return;
    if (!ftruncate(file, (off_t)bytes)) {
        void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (at != MAP_FAILED) {
            processes = at;
            process_count = MAX_PROCESSES;
        }
    }
    close(file);
}

Process *null_processes(int *count)
{
    *count = process_count;
    return processes;
}

Process *null_process(void)
{
    static Process *own;
    static int owner;
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    int pid = getpid();
    if (own && owner == pid)
        return own;
    pthread_mutex_lock(&lock);
    if (!own)
        open_state();
    Process *found = &alone;
    for (int i = 0; i < process_count; i++) {
        int other = processes[i].pid;
        if ((!other || !null_alive(other)) &&
            __atomic_compare_exchange_n(&processes[i].pid, &other, pid, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
            found = &processes[i];
            break;
        }
    }
    memset(found, 0, sizeof *found);
    found->pid = pid;
    own = found;
    owner = pid;
    pthread_mutex_unlock(&lock);
    return own;
}

Counters *null_counters(void) { return &null_process()->counters; }
EXPORT const Counters *null_gpu_counters(void) { return null_counters(); }

int null_error(void) { return sticky_error; }

static int remember(int error)
{
    if (error)
        last_error = error;
    return error;
}

/* The n-th launch fails, and with it the context, as after a fault of a kernel. */
int null_launch(void)
{
    static long failing = -1;
    uint64_t number = COUNT(launches);
    if (failing < 0)
        failing = null_setting("NULL_GPU_FAIL_LAUNCH", 0);
    if (failing && number >= (uint64_t)failing)
        sticky_error = LAUNCH_FAILURE;
    return remember(sticky_error);
}

static int wait_for_device(void)
{
    COUNT(host_waits);
    return null_error();
}

/* For an operation that null_gpu_compute.py runs in place of a CUDA kernel that would wait. */
EXPORT void null_gpu_wait(void) { wait_for_device(); }

/* ------------------------------------------------------------------ devices */

EXPORT int cudaGetDeviceCount(int *count)
{
    *count = null_device_count();
    return *count ? SUCCESS : remember(100); /* cudaErrorNoDevice */
}

EXPORT int cudaGetDevice(int *device)
{
    *device = device_of_thread;
    return SUCCESS;
}

EXPORT int cudaSetDevice(int device)
{
    if (device < 0 || device >= null_device_count())
        return remember(INVALID_DEVICE);
    device_of_thread = device;
    return SUCCESS; /* also after a failed launch: nothing runs on the device */
}

EXPORT int cudaDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
EXPORT int cudaRuntimeGetVersion(int *version) { return *version = 13000, SUCCESS; }

/* cudaDeviceProp of CUDA 13, up to the last field that is read; 1,008 bytes in all. */
typedef struct {
    char name[256];
    unsigned char uuid[16];
    char luid[8];
    unsigned luid_mask;
    size_t memory, shared_per_block;
    int registers_per_block, warp;
    size_t pitch;
    int threads_per_block, block[3], grid[3];
    size_t constants;
    int major, minor;
    size_t texture_alignment, texture_pitch;
    int multiprocessors, integrated, maps_host_memory, textures[25], surfaces[14];
    size_t surface_alignment;
    int concurrent_kernels, ecc, bus, pci_device, domain, tcc, engines, unified_addressing;
    int bus_bits, l2_bytes, persisting_l2, threads_per_multiprocessor, priorities, l1[2];
    size_t shared_per_multiprocessor;
    int registers_per_multiprocessor, managed, board[2], atomics, pageable, managed_access;
    int preemption, host_pointer, cooperative;
    size_t shared_optin;
    int host_tables, direct_managed, blocks_per_multiprocessor, window;
    size_t shared_reserved;
    int rest[76];
} Properties;

EXPORT int cudaGetDeviceProperties(Properties *properties, int device)
{
    const Model *model = null_model();
    if (device < 0 || device >= null_device_count())
        return remember(INVALID_DEVICE);
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "%s", model->full_name);
    memcpy(properties->uuid, "null GPU", 8);
    properties->uuid[15] = (unsigned char)device;
    properties->memory = model->memory;
    properties->shared_per_block = 49152;
    properties->shared_optin = 232448;
    properties->shared_per_multiprocessor = 233472;
    properties->shared_reserved = 1024;
    properties->registers_per_block = properties->registers_per_multiprocessor = 65536;
    properties->warp = 32;
    properties->threads_per_block = properties->block[0] = properties->block[1] = 1024;
    properties->block[2] = 64;
    properties->grid[0] = 2147483647;
    properties->grid[1] = properties->grid[2] = 65535;
    properties->constants = 65536;
    properties->major = model->major;
    properties->minor = model->minor;
    properties->texture_alignment = 512;
    properties->multiprocessors = model->multiprocessors;
    properties->maps_host_memory = properties->unified_addressing = 1;
    properties->concurrent_kernels = properties->cooperative = 1;
    properties->bus = device + 1;
    properties->engines = 3;
    properties->bus_bits = model->bus_bits;
    properties->l2_bytes = (int)model->l2_bytes;
    properties->threads_per_multiprocessor = 2048;
    properties->blocks_per_multiprocessor = 32;
    return null_error();
}

int null_attribute(int *value, int attribute)
{
    const Model *model = null_model();
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break; /* threads of a block */
    case 4: *value = 64; break;
    case 5: *value = 2147483647; break; /* blocks of a grid */
    case 6: case 7: *value = 65535; break;
    case 8: *value = 49152; break; /* shared memory of a block */
    case 9: *value = 65536; break;
    case 10: *value = 32; break; /* threads of a warp */
    case 12: case 82: *value = 65536; break; /* registers */
    case 13: *value = model->clock_khz; break;
    case 16: *value = model->multiprocessors; break;
    case 36: *value = model->memory_clock_khz; break;
    case 37: *value = model->bus_bits; break;
    case 38: *value = (int)model->l2_bytes; break;
    case 39: *value = 2048; break; /* threads of a multiprocessor */
    case 40: *value = 3; break; /* copy engines */
    case 75: *value = model->major; break;
    case 76: *value = model->minor; break;
    case 81: *value = 233472; break; /* shared memory of a multiprocessor */
    case 97: *value = 232448; break; /* shared memory of a block that asks for it */
    case 106: *value = 32; break; /* blocks of a multiprocessor */
    case 19: case 31: case 41: case 78: case 79: case 80: case 90: case 95: case 99: case 102:
    case 103: case 120: *value = 1; break; /* virtual memory, unified addresses, clusters, ... */
    default: *value = 0;
    }
    return SUCCESS;
}

EXPORT int cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    return null_attribute(value, attribute);
}

EXPORT int cudaDeviceGetPCIBusId(char *text, int length, int device)
{
    snprintf(text, (size_t)length, "0000:%02x:00.0", device + 1);
    return null_error();
}

EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return null_error();
}

EXPORT int cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    (void)device, (void)peer;
    return *can = 1, null_error();
}

RETURNS_SUCCESS(cudaDeviceEnablePeerAccess)
EXPORT int cudaDeviceSynchronize(void) { return wait_for_device(); }

EXPORT int cudaGetLastError(void)
{
    int error = last_error;
    last_error = sticky_error;
    return error;
}

EXPORT int cudaPeekAtLastError(void) { return last_error; }

static const char *const *words_of(int error)
{
    static const struct {
        int code;
        const char *words[2];
    } known[] = {
        {SUCCESS, {"cudaSuccess", "no error"}},
        {INVALID_VALUE, {"cudaErrorInvalidValue", "invalid argument"}},
        {OUT_OF_MEMORY, {"cudaErrorMemoryAllocation", "out of memory"}},
        {100, {"cudaErrorNoDevice", "no CUDA-capable device is detected"}},
        {INVALID_DEVICE, {"cudaErrorInvalidDevice", "invalid device ordinal"}},
        {INVALID_HANDLE, {"cudaErrorInvalidResourceHandle", "invalid resource handle"}},
        {LAUNCH_FAILURE, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
        {NOT_SUPPORTED, {"cudaErrorNotSupported", "operation not supported"}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].code == error)
            return known[i].words;
    static const char *const unknown[] = {"cudaErrorUnknown", "unknown error"};
    return unknown;
}

EXPORT const char *cudaGetErrorName(int error) { return words_of(error)[0]; }
EXPORT const char *cudaGetErrorString(int error) { return words_of(error)[1]; }
const char *null_words(int error) { return words_of(error)[1]; }

/* ------------------------------------------------------------------ streams and events */

EXPORT int cudaStreamCreate(void **stream) { return *stream = malloc(16), null_error(); }

EXPORT int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority)
{
    (void)flags, (void)priority;
    return cudaStreamCreate(stream);
}

EXPORT int cudaStreamGetPriority(void *stream, int *priority)
{
    (void)stream;
    return *priority = 0, null_error();
}

RETURNS_SUCCESS(cudaStreamDestroy)
RETURNS_SUCCESS(cudaStreamQuery)
RETURNS_SUCCESS(cudaStreamWaitEvent)
EXPORT int cudaStreamSynchronize(void *stream) { return (void)stream, wait_for_device(); }

EXPORT int cudaStreamIsCapturing(void *stream, int *status)
{
    (void)stream;
    return *status = 0, null_error();
}

EXPORT int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void *graph,
                                    void *nodes, void *edges, size_t *count)
{
    (void)stream, (void)graph, (void)nodes, (void)edges;
    if (id)
        *id = 0;
    if (count)
        *count = 0;
    return *status = 0, null_error();
}

RETURNS_SUCCESS(cudaThreadExchangeStreamCaptureMode)
IS_UNSUPPORTED(cudaStreamBeginCapture)
IS_UNSUPPORTED(cudaStreamEndCapture)
IS_UNSUPPORTED(cudaGraphInstantiateWithFlags)
IS_UNSUPPORTED(cudaGraphLaunch)
IS_UNSUPPORTED(cudaGraphDestroy)
IS_UNSUPPORTED(cudaGraphExecDestroy)
IS_UNSUPPORTED(cudaGraphGetNodes)
IS_UNSUPPORTED(cudaGraphNodeGetDependencies)
IS_UNSUPPORTED(cudaGraphDebugDotPrint)

EXPORT int cudaEventCreate(Event **event) { return *event = calloc(1, sizeof **event), null_error(); }

EXPORT int cudaEventCreateWithFlags(Event **event, unsigned flags)
{
    (void)flags;
    return cudaEventCreate(event);
}

EXPORT int cudaEventDestroy(Event *event) { return free(event), SUCCESS; }

EXPORT int cudaEventRecord(Event *event, void *stream)
{
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, &event->recorded);
    return null_error();
}

EXPORT int cudaEventRecordWithFlags(Event *event, void *stream, unsigned flags)
{
    (void)flags;
    return cudaEventRecord(event, stream);
}

RETURNS_SUCCESS(cudaEventQuery)
EXPORT int cudaEventSynchronize(Event *event) { return (void)event, wait_for_device(); }

/* The host's time between the two calls: a GPU's is not known. */
EXPORT int cudaEventElapsedTime(float *milliseconds, Event *start, Event *end)
{
    double seconds = (double)(end->recorded.tv_sec - start->recorded.tv_sec);
    double nanoseconds = (double)(end->recorded.tv_nsec - start->recorded.tv_nsec);
    *milliseconds = (float)(1e3 * seconds + 1e-6 * nanoseconds) + 1e-6f;
    return null_error();
}

typedef struct {
    char reserved[64];
} EventHandle;

EXPORT int cudaIpcGetEventHandle(EventHandle *handle, Event *event)
{
    (void)event;
    memset(handle, 0, sizeof *handle);
    return null_error();
}

EXPORT int cudaIpcOpenEventHandle(Event **event, EventHandle handle)
{
    (void)handle;
    return cudaEventCreate(event);
}

EXPORT int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data)
{
    (void)stream;
    return function(data), null_error();
}

EXPORT int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data,
                                 unsigned flags)
{
    (void)flags;
    return function(stream, 0, data), null_error();
}

/* ------------------------------------------------------------------ memory */

EXPORT int cudaMalloc(void **pointer, size_t bytes)
{
    if (null_error())
        return null_error();
    return remember(null_allocate(pointer, bytes, device_of_thread));
}

EXPORT int cudaFree(void *pointer) { return null_release(pointer); }

EXPORT int cudaMallocAsync(void **pointer, size_t bytes, void *stream)
{
    return (void)stream, cudaMalloc(pointer, bytes);
}

EXPORT int cudaFreeAsync(void *pointer, void *stream) { return (void)stream, cudaFree(pointer); }

EXPORT int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags)
{
    (void)flags;
    bytes = (bytes + 4095) / 4096 * 4096;
    int options = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *pointer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, options, -1, 0);
    return *pointer == MAP_FAILED ? remember(OUT_OF_MEMORY) : null_pin(*pointer, bytes, true);
}

EXPORT int cudaFreeHost(void *pointer) { return remember(null_unpin(pointer, true)); }

EXPORT int cudaHostRegister(void *pointer, size_t bytes, unsigned flags)
{
    (void)flags;
    return null_is_pinned(pointer) ? remember(712) : null_pin(pointer, bytes, false);
}

EXPORT int cudaHostUnregister(void *pointer) { return remember(null_unpin(pointer, false)); }

EXPORT int cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *free_bytes = null_free_bytes(device_of_thread);
    *total = null_model()->memory;
    return null_error();
}

EXPORT int cudaMemcpy(void *to, const void *from, size_t bytes, int kind)
{
    (void)kind;
    null_copy(to, from, bytes);
    return wait_for_device();
}

EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream)
{
    (void)kind, (void)stream;
    null_copy(to, from, bytes);
    bool to_device = null_device_of(to) >= 0, from_device = null_device_of(from) >= 0;
    if ((to_device && !from_device && !null_is_pinned(from)) ||
        (from_device && !to_device && !null_is_pinned(to))) {
        COUNT(pageable_copies); /* through a staging buffer; back to the host it also waits */
        if (!to_device)
            COUNT(host_waits);
    }
    return null_error();
}

EXPORT int cudaMemcpyPeerAsync(void *to, int device, const void *from, int peer, size_t bytes,
                               void *stream)
{
    (void)device, (void)peer, (void)stream;
    null_copy(to, from, bytes);
    return null_error();
}

EXPORT void null_gpu_zero(void *start, size_t bytes);

EXPORT int cudaMemset(void *to, int value, size_t bytes)
{
    if (value == 0 && bytes > MIB)
        null_gpu_zero(to, bytes);
    else if (bytes <= null_copy_limit())
        memset(to, value, bytes);
    return null_error();
}

EXPORT int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream)
{
    return (void)stream, cudaMemset(to, value, bytes);
}

typedef struct {
    int type, device;
    void *device_pointer, *host_pointer;
    long reserved[8];
} PointerAttributes;

EXPORT int cudaPointerGetAttributes(PointerAttributes *attributes, const void *pointer)
{
    int device = null_device_of(pointer);
    bool pinned = null_is_pinned(pointer);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = device >= 0 ? 2 : pinned ? 1 : 0;
    attributes->device = device >= 0 ? device : pinned ? device_of_thread : -2;
    attributes->device_pointer = device >= 0 || pinned ? (void *)pointer : NULL;
    attributes->host_pointer = device < 0 ? (void *)pointer : NULL;
    return null_error();
}

IS_UNSUPPORTED(cudaDeviceGetDefaultMemPool)
IS_UNSUPPORTED(cudaMemPoolGetAttribute)
IS_UNSUPPORTED(cudaMemPoolSetAttribute)
IS_UNSUPPORTED(cudaMemPoolSetAccess)
IS_UNSUPPORTED(cudaMemPoolTrimTo)

/* ------------------------------------------------------------------ kernels */

typedef struct {
    size_t shared, constants, local;
    int threads, registers, ptx, binary, rest[26];
} FunctionAttributes;

EXPORT int cudaFuncGetAttributes(FunctionAttributes *attributes, const void *function)
{
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->threads = 1024;
    attributes->registers = 32;
    attributes->ptx = attributes->binary = 10 * null_model()->major + null_model()->minor;
    return null_error();
}

RETURNS_SUCCESS(cudaFuncSetAttribute)
RETURNS_SUCCESS(cudaProfilerStart)
RETURNS_SUCCESS(cudaProfilerStop)

EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks)
{
    return *blocks = 2, null_error();
}

EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks)
{
    return *blocks = 2, null_error();
}

EXPORT int cudaLaunchKernel(void) { return null_launch(); }
EXPORT int cudaLaunchKernelExC(void) { return null_launch(); }
EXPORT int cudaLaunchCooperativeKernel(void) { return null_launch(); }
EXPORT int __cudaLaunchKernel(void) { return null_launch(); }

EXPORT int cudaGetSymbolAddress(void **pointer) { return *pointer = NULL, null_error(); }
RETURNS_SUCCESS(cudaMemcpyToSymbol)

/* The calls that nvcc generates around kernels: nothing is registered, a launch needs no function. */
EXPORT void **__cudaRegisterFatBinary(void *binary)
{
    (void)binary;
    static void *handle;
    return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
EXPORT void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
EXPORT void __cudaRegisterFunction(void) {}
EXPORT void __cudaRegisterVar(void) {}
EXPORT char __cudaInitModule(void **handle) { return (void)handle, 1; }
EXPORT int __cudaGetKernel(void **kernel, const void *function)
{
    return *kernel = (void *)function, SUCCESS;
}

static _Thread_local struct {
    Dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;

EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void *stream)
{
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}

EXPORT int __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void **stream)
{
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *stream = configuration.stream;
    return SUCCESS;
}

static int unsupported(void) { return NOT_SUPPORTED; }

/* A function of the driver by its name. */
EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                            unsigned long long flags, int *found)
{
    (void)version, (void)flags;
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function)
        *function = (void *)unsupported;
    if (found)
        *found = 0;
    return SUCCESS;
}

_Static_assert(sizeof(Properties) == 1008, "cudaDeviceProp of CUDA 13");
_Static_assert(sizeof(FunctionAttributes) == 144, "cudaFuncAttributes of CUDA 13");
