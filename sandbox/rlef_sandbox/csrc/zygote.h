/* What the parts of the C library share; launch_plan.py mirrors `struct plan`. */
#ifndef RLEF_ZYGOTE_H
#define RLEF_ZYGOTE_H

#include <linux/filter.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#define MAX_FILES 8 /* protocol.MAX_DESCRIPTORS */
#define MAX_CHILDREN 64

enum phase { PHASE_SETUP, PHASE_COMPILING, PHASE_RUNNING };
enum step { STEP_NONE, STEP_PARENT, STEP_NAMESPACE, STEP_LIMITS, STEP_FILES, STEP_FILTER, STEP_EXEC };

/* A child's cell in memory that it shares with its zygote while it is trusted. */
struct progress {
    volatile uint8_t phase;
    volatile uint8_t step;  /* where it failed */
    volatile int32_t error; /* errno of that */
};

/* The files and limits of a child, and the program that it becomes. */
struct plan {
    uint64_t address_space_bytes;
    uint64_t cpu_s;
    uint64_t file_bytes;
    uint64_t open_files;
    uint64_t threads;         /* 0: not bounded */
    uint64_t stack_bytes;     /* 0: not changed */
    int32_t files[MAX_FILES]; /* become 0, 1, ... */
    int32_t file_count;
    int32_t executable; /* index in `files` of the program to execute, or -1: return in the child */
    int32_t namespaces; /* its own: CLONE_NEWUSER and perhaps CLONE_NEWPID, or 0 */
    int32_t own_pid_count;
    struct sock_fprog *filter; /* or NULL */
    uint32_t **own_pids;       /* constants of the filter that stand for the child's id */
    struct progress *progress;
};

/* A child that was started. */
struct started {
    pid_t pid;
    int pidfd;
    int by_init;    /* process 1 of its own namespaces is its parent */
    int awaited[2]; /* one is readable once the child can be reaped or its init has ended; unused: -1 */
};

/* How a child ended. */
struct ended {
    int wait_status;
    int lost_memory; /* forbidden to map more: it had too many page tables (page_tables.py) */
    struct rusage usage;
};

void rlef_own_children(int last_id_file);
int rlef_fork(const struct plan *plan);
int rlef_wait(void);
int rlef_spawn(const struct plan *plan, int cell, struct started *child);
void rlef_reap(int cell, const struct started *child, struct ended *ended);
int rlef_lost_memory(pid_t pid);

#endif
