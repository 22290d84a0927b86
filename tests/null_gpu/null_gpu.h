/* Shared declarations of the null GPU. README.md has its theory of operation. */
#ifndef NULL_GPU_H
#define NULL_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 16
#define MIB ((size_t)1 << 20)

/* cudaError_t and CUresult agree on all of these but the symbol that is missing. */
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    LAUNCH_FAILURE = 719,
    NOT_SUPPORTED = 801,
};

typedef struct {
    const char *name; /* as NVIDIA_GPU_DEVICE of the launcher calls it */
    const char *full_name;
    int major, minor, multiprocessors, clock_khz, memory_clock_khz, bus_bits;
    size_t memory, l2_bytes;
} Model;

/* What one process has done; in the state file, so that others can read it. */
typedef struct {
    uint64_t launches, allocations, host_waits, pageable_copies, collectives, collective_bytes;
    uint64_t copied_bytes, skipped_copies, pinned_bytes, pinned_peak;
} Counters;

typedef struct {
    int pid; /* 0: free */
    int unused;
    uint64_t used[MAX_DEVICES], peak[MAX_DEVICES];
    Counters counters;
} Process;

const Model *null_model(void);
int null_device_count(void);
int null_current_device(void);
Process *null_process(void); /* this process's entry in the state file */
Counters *null_counters(void);
long null_setting(const char *name, long otherwise); /* of this rank; see NULL_GPU_FAIL_RANK */
size_t null_copy_limit(void);
bool null_alive(int pid);
int null_error(void); /* the error of an earlier launch, which every later call returns */

/* memory.c */
int null_allocate(void **pointer, size_t bytes, int device);
int null_release(void *pointer);
int null_pin(void *pointer, size_t bytes, bool owned);
int null_unpin(void *pointer, bool owned);
bool null_is_pinned(const void *pointer);
int null_device_of(const void *pointer); /* -1: not device memory */
size_t null_free_bytes(int device);
void null_copy(void *to, const void *from, size_t bytes);

#endif
