/* Device memory: a sparse file in memory (memfd) for each device of a process, mapped whole.
 *
 * Pages exist once they are touched, so that 141 GiB fit any machine. Another process maps the same
 * file by /proc/PID/fd: CUDA IPC. How much of a device is in use is summed over all processes of the
 * state file, as on a real device, whose processes share its memory.
 */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ARENA_BYTES ((size_t)1 << 40)
#define PAGE ((size_t)4096)
#define GRANULARITY (2 * MIB) /* of the driver */
#define CONTEXT_BYTES (600 * MIB) /* about what a process takes on an H200 before its first tensor */

typedef struct Range {
    struct Range *next;
    size_t offset, bytes;
} Range;

typedef struct {
    int file;
    char *base;
    Range *used; /* in ascending order */
} Arena;

typedef struct Span {
    struct Span *next;
    char *start;
    size_t bytes;
    int device; /* -1: pinned host memory */
    bool owned;
} Span;

typedef struct {
    int device;
    size_t offset, bytes;
    int file; /* of another process; -1: the arena's */
} Handle;

typedef struct {
    uint32_t magic;
    int pid, file, device;
    uint64_t offset, bytes;
} Shared;

#define MAGIC 0x6e756c6c

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Arena arenas[MAX_DEVICES];
static Span *spans; /* pinned host memory, mapped segments and other processes' memory */

static size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

static bool open_arena(Arena *arena)
{
    if (arena->base)
        return true;
    arena->file = memfd_create("null-gpu", MFD_CLOEXEC);
    if (arena->file < 0 || ftruncate(arena->file, ARENA_BYTES)) {
        perror("null GPU: memfd");
        return false;
    }
    int flags = MAP_SHARED | MAP_NORESERVE;
    void *base = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, flags, arena->file, 0);
    if (base == MAP_FAILED) {
        perror("null GPU: no address space for a device (ulimit -v?)");
        return false;
    }
    madvise(base, ARENA_BYTES, MADV_DONTFORK); /* a child has no CUDA context either */
    arena->base = base;
    return true;
}

/* The first gap that is large enough. */
static Range *reserve(Arena *arena, size_t bytes)
{
    Range **at = &arena->used;
    size_t offset = 0;
    while (*at && (*at)->offset - offset < bytes) {
        offset = (*at)->offset + (*at)->bytes;
        at = &(*at)->next;
    }
    if (offset + bytes > ARENA_BYTES)
        return NULL;
    Range *range = malloc(sizeof *range);
    *range = (Range){*at, offset, bytes};
    return *at = range;
}

size_t null_free_bytes(int device)
{
    size_t used = 0;
    Process *own = null_process(), *first = own;
    extern Process *null_processes(int *count);
    int count;
    first = null_processes(&count);
    for (int i = 0; i < count; i++) {
        if (first[i].pid && first[i].used[device] && (first + i == own || null_alive(first[i].pid)))
            used += first[i].used[device] + CONTEXT_BYTES;
    }
    if (!own->used[device])
        used += CONTEXT_BYTES;
    size_t total = null_model()->memory;
    return used < total ? total - used : 0;
}

static long failing = -1; /* the first allocation that fails; 0: none, -1: not known yet */

/* For a test that knows the moment: memory is exhausted from now on. */
EXPORT void null_gpu_exhaust(void)
{
    failing = (long)null_counters()->allocations + 1;
}

static int take(size_t bytes, int device)
{
    Process *own = null_process();
    long number = (long)__atomic_add_fetch(&own->counters.allocations, 1, __ATOMIC_RELAXED);
    if (failing < 0)
        failing = null_setting("NULL_GPU_FAIL_ALLOCATION", 0);
    if ((failing && number >= failing) || bytes > null_free_bytes(device))
        return OUT_OF_MEMORY;
    uint64_t used = __atomic_add_fetch(&own->used[device], bytes, __ATOMIC_RELAXED);
    if (used > own->peak[device])
        own->peak[device] = used;
    return SUCCESS;
}

int null_allocate(void **pointer, size_t bytes, int device)
{
    bytes = rounded(bytes ? bytes : 1, PAGE);
    pthread_mutex_lock(&lock);
    int error = take(bytes, device);
    Range *range = !error && open_arena(&arenas[device]) ? reserve(&arenas[device], bytes) : NULL;
    pthread_mutex_unlock(&lock);
    if (error || !range)
        return OUT_OF_MEMORY;
    *pointer = arenas[device].base + range->offset;
    return SUCCESS;
}

static void give_back(int device, size_t offset)
{
    for (Range **at = &arenas[device].used; *at; at = &(*at)->next) {
        Range *range = *at;
        if (range->offset == offset) {
            *at = range->next;
            fallocate(arenas[device].file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      (off_t)range->offset, (off_t)range->bytes);
            __atomic_sub_fetch(&null_process()->used[device], range->bytes, __ATOMIC_RELAXED);
            free(range);
            return;
        }
    }
}

int null_release(void *pointer)
{
    int device = null_device_of(pointer);
    if (!pointer)
        return SUCCESS;
    if (device < 0)
        return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    give_back(device, (size_t)((char *)pointer - arenas[device].base));
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

static void add_span(void *start, size_t bytes, int device, bool owned)
{
    Span *span = malloc(sizeof *span);
    pthread_mutex_lock(&lock);
    *span = (Span){spans, start, bytes, device, owned};
    spans = span;
    pthread_mutex_unlock(&lock);
}

static const Span *span_with(const void *pointer)
{
    const char *at = pointer;
    pthread_mutex_lock(&lock);
    const Span *span = spans;
    while (span && (at < span->start || at >= span->start + span->bytes))
        span = span->next;
    pthread_mutex_unlock(&lock);
    return span;
}

static size_t remove_span(void *start)
{
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (Span **at = &spans; *at; at = &(*at)->next) {
        Span *span = *at;
        if (span->start == start) {
            *at = span->next;
            bytes = span->bytes;
            free(span);
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return bytes;
}

int null_device_of(const void *pointer)
{
    for (int device = 0; device < MAX_DEVICES; device++) {
        const char *base = arenas[device].base;
        if (base && (const char *)pointer >= base && (const char *)pointer < base + ARENA_BYTES)
            return device;
    }
    const Span *span = span_with(pointer);
    return span ? span->device : -1;
}

bool null_is_pinned(const void *pointer)
{
    const Span *span = span_with(pointer);
    return span && span->device < 0;
}

int null_pin(void *pointer, size_t bytes, bool owned)
{
    Counters *counters = null_counters();
    add_span(pointer, bytes, -1, owned);
    uint64_t pinned = __atomic_add_fetch(&counters->pinned_bytes, bytes, __ATOMIC_RELAXED);
    if (pinned > counters->pinned_peak)
        counters->pinned_peak = pinned;
    return SUCCESS;
}

int null_unpin(void *pointer, bool owned)
{
    size_t bytes = remove_span(pointer);
    if (!bytes)
        return INVALID_VALUE;
    __atomic_sub_fetch(&null_counters()->pinned_bytes, bytes, __ATOMIC_RELAXED);
    if (owned)
        munmap(pointer, bytes);
    return SUCCESS;
}

/* Zero device memory without touching it: whole pages are given back to the machine. */
EXPORT void null_gpu_zero(void *start, size_t bytes)
{
    char *first = (char *)rounded((size_t)start, PAGE), *end = (char *)start + bytes;
    char *last = (char *)((size_t)end / PAGE * PAGE);
    if (first >= last) {
        memset(start, 0, bytes);
        return;
    }
    memset(start, 0, (size_t)(first - (char *)start));
    memset(last, 0, (size_t)(end - last));
    if (madvise(first, (size_t)(last - first), MADV_REMOVE))
        memset(first, 0, (size_t)(last - first));
}

/* A copy above the limit is not made: device memory becomes zero, host memory stays as it is. */
void null_copy(void *to, const void *from, size_t bytes)
{
    Counters *counters = null_counters();
    if (to == from) /* a reduction in a group of one rank */
        return;
    if (bytes <= null_copy_limit()) {
        memmove(to, from, bytes);
        __atomic_add_fetch(&counters->copied_bytes, bytes, __ATOMIC_RELAXED);
        return;
    }
    __atomic_add_fetch(&counters->skipped_copies, 1, __ATOMIC_RELAXED);
    if (null_device_of(to) >= 0)
        null_gpu_zero(to, bytes);
}

/* ------------------------------------------------------------------ CUDA IPC */

static int map_shared(const Shared *shared, void *at, void **pointer)
{
    char path[64];
    if (shared->magic != MAGIC)
        return INVALID_HANDLE;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", shared->pid, shared->file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return INVALID_HANDLE; /* its process is gone */
    int flags = MAP_SHARED | MAP_NORESERVE | (at ? MAP_FIXED : 0);
    *pointer = mmap(at, shared->bytes, PROT_READ | PROT_WRITE, flags, file, (off_t)shared->offset);
    close(file);
    return *pointer == MAP_FAILED ? INVALID_HANDLE : SUCCESS;
}

typedef struct {
    char reserved[64];
} IpcHandle;

EXPORT int cudaIpcGetMemHandle(IpcHandle *handle, void *pointer)
{
    for (int device = 0; device < MAX_DEVICES; device++) {
        Arena *arena = &arenas[device];
        size_t offset = (size_t)((char *)pointer - arena->base);
        for (Range *range = arena->used; arena->base && range; range = range->next) {
            if (offset >= range->offset && offset < range->offset + range->bytes) {
                Shared shared = {MAGIC, getpid(), arena->file, device, range->offset, range->bytes};
                memset(handle, 0, sizeof *handle);
                memcpy(handle, &shared, sizeof shared);
                return SUCCESS;
            }
        }
    }
    return INVALID_VALUE;
}

EXPORT int cudaIpcOpenMemHandle(void **pointer, IpcHandle handle, unsigned flags)
{
    Shared shared;
    (void)flags;
    memcpy(&shared, &handle, sizeof shared);
    if (shared.pid == getpid())
        return INVALID_HANDLE; /* as in CUDA: only another process opens it */
    int error = map_shared(&shared, NULL, pointer);
    if (!error)
        add_span(*pointer, shared.bytes, null_current_device(), true);
    return error;
}

EXPORT int cudaIpcCloseMemHandle(void *pointer)
{
    size_t bytes = remove_span(pointer);
    return bytes ? munmap(pointer, bytes) : INVALID_VALUE;
}

/* ------------------------------------------------ virtual memory: expandable segments */

EXPORT int cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option)
{
    (void)properties, (void)option;
    *bytes = GRANULARITY;
    return SUCCESS;
}

EXPORT int cuMemAddressReserve(uint64_t *address, size_t bytes, size_t alignment, uint64_t wanted,
                               unsigned long long flags)
{
    (void)alignment, (void)wanted, (void)flags;
    int options = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *start = mmap(NULL, bytes + GRANULARITY, PROT_NONE, options, -1, 0);
    if (start == MAP_FAILED)
        return OUT_OF_MEMORY;
    *address = rounded((size_t)start, GRANULARITY);
    add_span((void *)*address, bytes, null_current_device(), false);
    return SUCCESS;
}

EXPORT int cuMemAddressFree(uint64_t address, size_t bytes)
{
    remove_span((void *)address);
    return munmap((void *)address, bytes);
}

/* CUmemAllocationProp: type, requested handle types, location {type, id}, ... */
EXPORT int cuMemCreate(Handle **handle, size_t bytes, const int *properties,
                       unsigned long long flags)
{
    void *pointer;
    int device = properties[3];
    (void)flags;
    int error = null_allocate(&pointer, bytes, device);
    if (error)
        return error;
    *handle = malloc(sizeof **handle);
    **handle = (Handle){device, (size_t)((char *)pointer - arenas[device].base), bytes, -1};
    return SUCCESS;
}

EXPORT int cuMemRelease(Handle *handle)
{
    if (handle->file < 0)
        null_release(arenas[handle->device].base + handle->offset);
    else
        close(handle->file);
    free(handle);
    return SUCCESS;
}

EXPORT int cuMemMap(uint64_t address, size_t bytes, size_t offset, Handle *handle,
                    unsigned long long flags)
{
    (void)flags;
    int file = handle->file < 0 ? arenas[handle->device].file : handle->file;
    void *at = mmap((void *)address, bytes, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file, (off_t)(handle->offset + offset));
    return at == MAP_FAILED ? INVALID_VALUE : SUCCESS;
}

EXPORT int cuMemUnmap(uint64_t address, size_t bytes)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap((void *)address, bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED ? INVALID_VALUE : 0;
}

EXPORT int cuMemSetAccess(uint64_t address, size_t bytes, const void *access, size_t count)
{
    (void)address, (void)bytes, (void)access, (void)count;
    return SUCCESS;
}

/* A file descriptor, which names the range of this process's device: see cuMemImport. */
EXPORT int cuMemExportToShareableHandle(int *file, Handle *handle, int type,
                                        unsigned long long flags)
{
    (void)type, (void)flags;
    Shared shared = {MAGIC, getpid(), arenas[handle->device].file, handle->device, handle->offset,
                     handle->bytes};
    *file = memfd_create("null-gpu-handle", MFD_CLOEXEC);
    return *file >= 0 && write(*file, &shared, sizeof shared) == sizeof shared ? 0 : INVALID_VALUE;
}

EXPORT int cuMemImportFromShareableHandle(Handle **handle, void *file, int type)
{
    Shared shared;
    char path[64];
    (void)type;
    if (pread((int)(intptr_t)file, &shared, sizeof shared, 0) != sizeof shared)
        return INVALID_HANDLE;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", shared.pid, shared.file);
    int arena = open(path, O_RDWR | O_CLOEXEC);
    if (arena < 0 || shared.magic != MAGIC)
        return INVALID_HANDLE;
    *handle = malloc(sizeof **handle);
    **handle = (Handle){shared.device, shared.offset, shared.bytes, arena};
    return SUCCESS;
}
