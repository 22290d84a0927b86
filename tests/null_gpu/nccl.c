/* NCCL between processes of one machine.
 *
 * A communicator is a file in shared memory: a slot of memory for each rank, and a barrier. A
 * collective runs chunk by chunk: every rank writes its chunk to its slot, all wait, every rank
 * reads what it needs from the others' slots, all wait. Calls block until that is done. A message
 * (ncclSend) is a file of its own, so that sending never waits. Above NULL_GPU_COPY_MIB ranks only
 * meet, and no data is moved. A rank that waits checks that the others are alive, and returns
 * ncclRemoteError if one is not.
 */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLOT MIB
#define MAX_RANKS 1024
#define NAME 96

enum { NCCL_SUCCESS, NCCL_CUDA, NCCL_SYSTEM, NCCL_INTERNAL, NCCL_ARGUMENT, NCCL_USAGE, NCCL_REMOTE };
enum { SUM, PROD, MAX, MIN, AVG };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
static const size_t item_bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

typedef struct {
    char bytes[128];
} UniqueId;

typedef struct {
    int arrived, generation;
    int pids[MAX_RANKS];
} Meeting;

typedef struct {
    char name[NAME];
    int rank, ranks, splits, error;
    Meeting *meeting;
    char *slots;
    unsigned *sent, *received; /* messages to and from each rank */
} Communicator;

typedef struct {
    Communicator *communicator;
    char *buffer;
    size_t bytes;
    int peer;
    bool sends;
} Message;

int null_launch(void);
EXPORT void null_gpu_zero(void *start, size_t bytes);

/* ------------------------------------------------------------------ ranks meet */

static bool lost(Communicator *communicator)
{
    for (int rank = 0; rank < communicator->ranks; rank++) {
        int pid = __atomic_load_n(&communicator->meeting->pids[rank], __ATOMIC_ACQUIRE);
        if (pid && !null_alive(pid))
            return true;
    }
    return false;
}

/* Waits until all ranks have called it. Returns false if one of them has died. */
static bool meet(Communicator *communicator)
{
    Meeting *meeting = communicator->meeting;
    if (communicator->error)
        return false;
    int generation = __atomic_load_n(&meeting->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == communicator->ranks) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELEASE);
        __atomic_add_fetch(&meeting->generation, 1, __ATOMIC_ACQ_REL);
        syscall(SYS_futex, &meeting->generation, FUTEX_WAKE, MAX_RANKS, NULL, NULL, 0);
        return true;
    }
    while (__atomic_load_n(&meeting->generation, __ATOMIC_ACQUIRE) == generation) {
        struct timespec pause = {0, 200000000};
        long slept = syscall(SYS_futex, &meeting->generation, FUTEX_WAIT, generation, &pause, NULL, 0);
        if (slept && errno == ETIMEDOUT && lost(communicator)) {
            communicator->error = NCCL_REMOTE;
            return false;
        }
    }
    return true;
}

static char *slot(Communicator *communicator, int rank)
{
    return communicator->slots + (size_t)rank * SLOT;
}

static int join(Communicator **made, const char *name, int ranks, int rank)
{
    char path[NAME + 16];
    if (ranks > MAX_RANKS || rank < 0 || rank >= ranks)
        return NCCL_ARGUMENT;
    Communicator *communicator = calloc(1, sizeof *communicator);
    snprintf(communicator->name, sizeof communicator->name, "%s", name);
    communicator->rank = rank;
    communicator->ranks = ranks;
    communicator->sent = calloc((size_t)ranks, sizeof(unsigned));
    communicator->received = calloc((size_t)ranks, sizeof(unsigned));
    snprintf(path, sizeof path, "/dev/shm/%s", name);
    size_t head = (sizeof(Meeting) + 4095) / 4096 * 4096, bytes = head + (size_t)ranks * SLOT;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, (off_t)bytes))
        return NCCL_SYSTEM;
    communicator->meeting = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (communicator->meeting == MAP_FAILED)
        return NCCL_SYSTEM;
    communicator->slots = (char *)communicator->meeting + head;
    __atomic_store_n(&communicator->meeting->pids[rank], getpid(), __ATOMIC_RELEASE);
    if (!meet(communicator))
        return NCCL_REMOTE;
    unlink(path); /* all have it open */
    *made = communicator;
    return NCCL_SUCCESS;
}

/* ------------------------------------------------------------------ numbers */

static float from_bfloat16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return isnan(value) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define COMBINED(a, b) \
    (operation == PROD ? (a) * (b) : operation == MAX ? ((a) > (b) ? (a) : (b)) \
     : operation == MIN ? ((a) < (b) ? (a) : (b)) : (a) + (b))
#define COMBINE(ctype) \
    do { \
        const ctype *from = other; \
        ctype *to = total; \
        for (size_t i = 0; i < count; i++) \
            to[i] = (ctype)COMBINED(to[i], from[i]); \
    } while (0)
#define AVERAGE(ctype) \
    do { \
        for (size_t i = 0; i < count; i++) \
            ((ctype *)total)[i] /= (ctype)ranks; \
    } while (0)

/* Combines items in their own type; bf16 and fp16 are added in fp32 and rounded by each addition. */
static void combine(void *total, const void *other, size_t count, int type, int operation)
{
    switch (type) {
    case INT8: COMBINE(int8_t); break;
    case UINT8: COMBINE(uint8_t); break;
    case INT32: COMBINE(int32_t); break;
    case UINT32: COMBINE(uint32_t); break;
    case INT64: COMBINE(int64_t); break;
    case UINT64: COMBINE(uint64_t); break;
    case FLOAT16: COMBINE(_Float16); break;
    case FLOAT32: COMBINE(float); break;
    case FLOAT64: COMBINE(double); break;
    case BFLOAT16:
        for (size_t i = 0; i < count; i++) {
            float a = from_bfloat16(((uint16_t *)total)[i]);
            float b = from_bfloat16(((const uint16_t *)other)[i]);
            ((uint16_t *)total)[i] = to_bfloat16(COMBINED(a, b));
        }
    }
}

static void average(void *total, size_t count, int type, int ranks)
{
    switch (type) {
    case FLOAT16: AVERAGE(_Float16); break;
    case FLOAT32: AVERAGE(float); break;
    case FLOAT64: AVERAGE(double); break;
    case INT32: AVERAGE(int32_t); break;
    case INT64: AVERAGE(int64_t); break;
    case BFLOAT16:
        for (size_t i = 0; i < count; i++) {
            uint16_t *at = (uint16_t *)total + i;
            *at = to_bfloat16(from_bfloat16(*at) / (float)ranks);
        }
    }
}

/* ------------------------------------------------------------------ collectives */

typedef enum { ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL } Kind;

/* A collective of this rank. */
typedef struct {
    Kind kind;
    const char *send;
    char *receive;
    size_t count; /* of a part: what each rank sends, receives, or owns */
    int type, operation, root;
} Collective;

static void reduce_slots(Communicator *communicator, char *to, size_t at, size_t count,
                         const Collective *what)
{
    /* in the order of ranks, so that all have the same sum */
    size_t bytes = count * item_bytes[what->type];
    char *total = malloc(bytes);
    memcpy(total, slot(communicator, 0) + at, bytes);
    for (int rank = 1; rank < communicator->ranks; rank++)
        combine(total, slot(communicator, rank) + at, count, what->type, what->operation);
    if (what->operation == AVG)
        average(total, count, what->type, communicator->ranks);
    memcpy(to, total, bytes);
    free(total);
}

/* Runs a collective, at each step with as many items as fit into the slots. Returns false if a rank
 * has died. */
static bool exchange(Communicator *communicator, const Collective *what)
{
    int ranks = communicator->ranks, own = communicator->rank;
    size_t item = item_bytes[what->type];
    int parts = what->kind == REDUCE_SCATTER || what->kind == ALL_TO_ALL ? ranks : 1;
    size_t step = SLOT / item / (size_t)parts;
    for (size_t first = 0; first < what->count || first == 0; first += step) {
        size_t left = what->count - first, count = left < step ? left : step;
        size_t bytes = count * item;
        if (what->kind != BROADCAST || own == what->root)
            for (int part = 0; part < parts; part++)
                memcpy(slot(communicator, own) + (size_t)part * bytes,
                       what->send + ((size_t)part * what->count + first) * item, bytes);
        if (!meet(communicator))
            return false;
        char *to = what->receive + first * item;
        switch (what->kind) {
        case ALL_REDUCE: reduce_slots(communicator, to, 0, count, what); break;
        case REDUCE:
            if (own == what->root)
                reduce_slots(communicator, to, 0, count, what);
            break;
        case REDUCE_SCATTER:
            reduce_slots(communicator, to, (size_t)own * bytes, count, what);
            break;
        case BROADCAST: memcpy(to, slot(communicator, what->root), bytes); break;
        case ALL_GATHER:
            for (int rank = 0; rank < ranks; rank++)
                memcpy(to + (size_t)rank * what->count * item, slot(communicator, rank), bytes);
            break;
        case ALL_TO_ALL:
            for (int rank = 0; rank < ranks; rank++)
                memcpy(to + (size_t)rank * what->count * item,
                       slot(communicator, rank) + (size_t)own * bytes, bytes);
        }
        if (!meet(communicator))
            return false;
        if (!what->count)
            break;
    }
    return true;
}

static int run(Communicator *communicator, const Collective *what)
{
    static long failing = -1;
    Counters *counters = null_counters();
    size_t bytes = what->count * item_bytes[what->type];
    uint64_t number = __atomic_add_fetch(&counters->collectives, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&counters->collective_bytes, bytes, __ATOMIC_RELAXED);
    if (failing < 0)
        failing = null_setting("NULL_GPU_FAIL_COLLECTIVE", 0);
    if (failing && number >= (uint64_t)failing)
        raise(SIGKILL); /* this peer is gone */
    if (null_launch())
        return NCCL_CUDA;
    if (bytes > null_copy_limit())
        return meet(communicator) ? NCCL_SUCCESS : NCCL_REMOTE;
    return exchange(communicator, what) ? NCCL_SUCCESS : NCCL_REMOTE;
}

EXPORT int ncclAllReduce(const void *send, void *receive, size_t count, int type, int operation,
                         Communicator *communicator, void *stream)
{
    (void)stream;
    return run(communicator, &(Collective){ALL_REDUCE, send, receive, count, type, operation, 0});
}

EXPORT int ncclReduce(const void *send, void *receive, size_t count, int type, int operation,
                      int root, Communicator *communicator, void *stream)
{
    (void)stream;
    return run(communicator, &(Collective){REDUCE, send, receive, count, type, operation, root});
}

EXPORT int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root,
                         Communicator *communicator, void *stream)
{
    (void)stream;
    return run(communicator, &(Collective){BROADCAST, send, receive, count, type, SUM, root});
}

EXPORT int ncclBcast(void *buffer, size_t count, int type, int root, Communicator *communicator,
                     void *stream)
{
    return ncclBroadcast(buffer, buffer, count, type, root, communicator, stream);
}

EXPORT int ncclAllGather(const void *send, void *receive, size_t count, int type,
                         Communicator *communicator, void *stream)
{
    (void)stream;
    return run(communicator, &(Collective){ALL_GATHER, send, receive, count, type, SUM, 0});
}

EXPORT int ncclReduceScatter(const void *send, void *receive, size_t count, int type,
                             int operation, Communicator *communicator, void *stream)
{
    (void)stream;
    return run(communicator,
               &(Collective){REDUCE_SCATTER, send, receive, count, type, operation, 0});
}

EXPORT int ncclAlltoAll(const void *send, void *receive, size_t count, int type,
                        Communicator *communicator, void *stream)
{
    (void)stream;
    return run(communicator, &(Collective){ALL_TO_ALL, send, receive, count, type, SUM, 0});
}

/* ------------------------------------------------------------------ messages */

static _Thread_local int group_depth;
static _Thread_local Message pending[4096];
static _Thread_local int pending_count;

static void message_path(char *path, size_t room, const Communicator *communicator, int from,
                         int to, unsigned number)
{
    snprintf(path, room, "/dev/shm/%s-%d-%d-%u", communicator->name, from, to, number);
}

static int send_message(const Message *message)
{
    Communicator *communicator = message->communicator;
    char path[NAME + 64], draft[NAME + 72];
    unsigned number = communicator->sent[message->peer]++;
    message_path(path, sizeof path, communicator, communicator->rank, message->peer, number);
    snprintf(draft, sizeof draft, "%s.part", path);
    int file = open(draft, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0)
        return NCCL_SYSTEM;
    size_t bytes = message->bytes <= null_copy_limit() ? message->bytes : 0;
    bool written = write(file, message->buffer, bytes) == (ssize_t)bytes;
    close(file);
    return written && !rename(draft, path) ? NCCL_SUCCESS : NCCL_SYSTEM;
}

static int receive_message(const Message *message)
{
    Communicator *communicator = message->communicator;
    char path[NAME + 64];
    unsigned number = communicator->received[message->peer]++;
    message_path(path, sizeof path, communicator, message->peer, communicator->rank, number);
    int file;
    for (long tries = 0; (file = open(path, O_RDONLY | O_CLOEXEC)) < 0; tries++) {
        usleep(200);
        if (tries % 1000 == 999 && lost(communicator))
            return communicator->error = NCCL_REMOTE;
    }
    size_t bytes = message->bytes <= null_copy_limit() ? message->bytes : 0;
    bool complete = read(file, message->buffer, bytes) == (ssize_t)bytes;
    close(file);
    unlink(path);
    return complete ? NCCL_SUCCESS : NCCL_ARGUMENT;
}

EXPORT int ncclGroupStart(void) { return group_depth++, NCCL_SUCCESS; }

EXPORT int ncclGroupEnd(void)
{
    if (--group_depth)
        return NCCL_SUCCESS;
    int error = NCCL_SUCCESS;
    for (int sends = 1; sends >= 0; sends--)
        for (int i = 0; i < pending_count && !error; i++)
            if (pending[i].sends == (sends == 1))
                error = sends ? send_message(&pending[i]) : receive_message(&pending[i]);
    pending_count = 0;
    return error;
}

static int add_message(Message message)
{
    Counters *counters = null_counters();
    __atomic_add_fetch(&counters->collectives, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&counters->collective_bytes, message.bytes, __ATOMIC_RELAXED);
    if (pending_count == sizeof pending / sizeof *pending)
        return NCCL_INTERNAL;
    ncclGroupStart();
    pending[pending_count++] = message;
    return ncclGroupEnd();
}

EXPORT int ncclSend(const void *buffer, size_t count, int type, int peer,
                    Communicator *communicator, void *stream)
{
    (void)stream;
    return add_message(
        (Message){communicator, (char *)buffer, count * item_bytes[type], peer, true});
}

EXPORT int ncclRecv(void *buffer, size_t count, int type, int peer, Communicator *communicator,
                    void *stream)
{
    (void)stream;
    return add_message((Message){communicator, buffer, count * item_bytes[type], peer, false});
}

/* ------------------------------------------------------------------ communicators */

EXPORT int ncclGetVersion(int *version) { return *version = 22809, NCCL_SUCCESS; }

EXPORT int ncclGetUniqueId(UniqueId *id)
{
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        return NCCL_SYSTEM;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, NAME, "null-gpu-%016llx", (unsigned long long)number);
    return NCCL_SUCCESS;
}

EXPORT int ncclCommInitRank(Communicator **made, int ranks, UniqueId id, int rank)
{
    return join(made, id.bytes, ranks, rank);
}

EXPORT int ncclCommInitRankConfig(Communicator **made, int ranks, UniqueId id, int rank,
                                  void *config)
{
    return (void)config, join(made, id.bytes, ranks, rank);
}

EXPORT int ncclCommInitRankScalable(Communicator **made, int ranks, int rank, int ids,
                                    UniqueId *id, void *config)
{
    (void)ids, (void)config;
    return join(made, id->bytes, ranks, rank);
}

EXPORT int ncclCommSplit(Communicator *parent, int color, int key, Communicator **made,
                         void *config)
{
    (void)config;
    int mine[2] = {color, key}, (*all)[2] = malloc((size_t)parent->ranks * sizeof mine);
    Collective gather = {ALL_GATHER, (char *)mine, (char *)all, 2, INT32, SUM, 0};
    bool met = exchange(parent, &gather);
    int ranks = 0, rank = 0, number = parent->splits++;
    for (int other = 0; met && other < parent->ranks; other++) {
        if (all[other][0] != color)
            continue;
        ranks++;
        rank += all[other][1] < key || (all[other][1] == key && other < parent->rank);
    }
    free(all);
    *made = NULL;
    if (!met)
        return NCCL_REMOTE;
    if (color == -1)
        return NCCL_SUCCESS;
    char name[NAME];
    snprintf(name, sizeof name, "%.60s-%d-%d", parent->name, number, color);
    return join(made, name, ranks, rank);
}

EXPORT int ncclCommDestroy(Communicator *communicator)
{
    munmap(communicator->meeting,
           (sizeof(Meeting) + 4095) / 4096 * 4096 + (size_t)communicator->ranks * SLOT);
    free(communicator->sent);
    free(communicator->received);
    free(communicator);
    return NCCL_SUCCESS;
}

EXPORT int ncclCommAbort(Communicator *communicator)
{
    communicator->error = NCCL_REMOTE; /* a thread may still wait in it, so its memory stays */
    return NCCL_SUCCESS;
}

EXPORT int ncclCommFinalize(Communicator *communicator)
{
    return (void)communicator, NCCL_SUCCESS;
}

EXPORT int ncclCommGetAsyncError(Communicator *communicator, int *error)
{
    return *error = communicator->error, NCCL_SUCCESS;
}

EXPORT int ncclCommCount(const Communicator *communicator, int *count)
{
    return *count = communicator->ranks, NCCL_SUCCESS;
}

EXPORT int ncclCommUserRank(const Communicator *communicator, int *rank)
{
    return *rank = communicator->rank, NCCL_SUCCESS;
}

EXPORT const char *ncclGetErrorString(int error)
{
    static const char *const words[] = {
        "no error", "unhandled cuda error", "unhandled system error", "internal error",
        "invalid argument", "invalid usage", "remote process exited or there was a network error",
    };
    return error >= 0 && error <= NCCL_REMOTE ? words[error] : "unknown error";
}

EXPORT const char *ncclGetLastError(Communicator *communicator)
{
    return (void)communicator, "";
}

int cudaMalloc(void **pointer, size_t bytes);
int cudaFree(void *pointer);
EXPORT int ncclMemAlloc(void **pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
EXPORT int ncclMemFree(void *pointer) { return cudaFree(pointer); }

#define IS_UNUSED(name) EXPORT int name(void) { return NCCL_USAGE; }
IS_UNUSED(ncclCommInitAll)
IS_UNUSED(ncclCommShrink)
IS_UNUSED(ncclCommRegister)
IS_UNUSED(ncclCommDeregister)
IS_UNUSED(ncclCommWindowRegister)
IS_UNUSED(ncclCommWindowDeregister)
IS_UNUSED(ncclDevCommCreate)
IS_UNUSED(ncclDevCommDestroy)
IS_UNUSED(ncclGroupSimulateEnd)
IS_UNUSED(ncclRedOpCreatePreMulSum)
IS_UNUSED(ncclRedOpDestroy)
