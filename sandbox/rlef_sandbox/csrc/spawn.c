/* Starts one confined child: everything between fork and the program, with system calls only.
 *
 * Theory of operation. The zygote, an interpreter with one thread, fills in a plan and calls
 * `rlef_spawn`. For a Python program this forks, and returns in the child with the run's files in
 * place, the limits set and the system call filter on. The same steps in Python would touch some
 * hundred more pages, each of which is copied, and take twice the time of the fork. For a compiled
 * program the interpreter is not copied at all: the child borrows its memory (CLONE_VM, the zygote
 * waits) and becomes the program. A step that fails is recorded in the child's progress cell, in
 * memory shared with the zygote, and ends the child: a fault of the sandbox, never a verdict.
 *
 * launch_plan.py mirrors `struct plan`; supervisor_python.py takes the same steps in Python. Each
 * layer is one function here, which returns 0, or -1 with errno set.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "zygote.h"

#define STREAMS 3
#define PENDING_SIGNALS 64 /* as in launch_plan.py */
#define BORROWED_STACK_BYTES (64 << 10) /* of a child that shares our memory until it execs */
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

static int die_with_parent(pid_t parent)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0)
        return -1;
    if (getppid() != parent) { /* it died before the call above */
        errno = ESRCH;
        return -1;
    }
    return 0;
}

/* Enters a new user namespace, in which RLIMIT_NPROC counts only this run's threads; entering it
 * gives capabilities over it, which are dropped at once. */
static int enter_user_namespace(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0, 0, 0}};
    if (unshare(CLONE_NEWUSER) != 0)
        return -1;
    return (int)syscall(SYS_capset, &header, none);
}

static int limit(int resource, uint64_t soft, uint64_t hard)
{
    struct rlimit bound = {soft, hard};
    return setrlimit((__rlimit_resource_t)resource, &bound);
}

static int set_limits(const struct plan *plan)
{
    if (limit(RLIMIT_AS, plan->address_space_bytes, plan->address_space_bytes) != 0 ||
        limit(RLIMIT_CPU, plan->cpu_s, plan->cpu_s + (plan->cpu_s < RLIM_INFINITY)) != 0 ||
        limit(RLIMIT_FSIZE, plan->file_bytes, plan->file_bytes) != 0 ||
        limit(RLIMIT_NOFILE, plan->open_files, plan->open_files) != 0 ||
        limit(RLIMIT_SIGPENDING, PENDING_SIGNALS, PENDING_SIGNALS) != 0)
        return -1;
    if (plan->stack_bytes && limit(RLIMIT_STACK, plan->stack_bytes, plan->stack_bytes) != 0)
        return -1;
    return plan->threads ? limit(RLIMIT_NPROC, plan->threads, plan->threads) : 0;
}

/* The zygote keeps the numbers below MAX_FILES occupied, so that no dup3 here replaces a file that
 * has yet to be placed. */
static int place_files(const struct plan *plan)
{
    for (int target = 0; target < plan->file_count; target++)
        if (dup3(plan->files[target], target, target == plan->executable ? O_CLOEXEC : 0) < 0)
            return -1;
    return (int)syscall(SYS_close_range, (unsigned)plan->file_count, ~0U, 0);
}

static int install_filter(const struct plan *plan)
{
    if (plan->filter == NULL)
        return 0;
    for (int index = 0; index < plan->own_pid_count; index++)
        *plan->own_pids[index] = (uint32_t)getpid();
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, plan->filter);
}

static int become_program(const struct plan *plan)
{
    /* a checker's input, output and answer; it opens them by cpp.CHECKER_FILES */
    static char *const paths[] = {"checker", "/dev/fd/0", "/dev/fd/3", "/dev/fd/4", NULL};
    static char *const no_paths[] = {"solution", NULL};
    char *const *arguments = plan->file_count > STREAMS + 1 ? paths : no_paths;
    /* a static program cannot load the files of another locale, so std::locale("") takes this one */
    static char *const environment[] = {"LANG=C", "PATH=/usr/bin:/bin", "ONLINE_JUDGE=true", NULL};
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigset_t none;
    sigemptyset(&none);
    /* The interpreter ignores these two; a program starts with the defaults. */
    if (sigaction(SIGPIPE, &standard, NULL) != 0 || sigaction(SIGXFSZ, &standard, NULL) != 0 ||
        sigprocmask(SIG_SETMASK, &none, NULL) != 0)
        return -1;
    return (int)syscall(SYS_execveat, plan->executable, "", arguments, environment, AT_EMPTY_PATH);
}

static void fail(const struct plan *plan, enum step step)
{
    plan->progress->error = errno;
    plan->progress->step = (uint8_t)step;
    _exit(1);
}

static void confine(const struct plan *plan, pid_t parent)
{
    if (plan->own_user_namespace && enter_user_namespace() != 0)
        fail(plan, STEP_NAMESPACE);
    if (die_with_parent(parent) != 0) /* after a change of credentials, which would undo it */
        fail(plan, STEP_PARENT);
    setsid(); /* one scheduling group (autogroup), however many threads */
    if (set_limits(plan) != 0)
        fail(plan, STEP_LIMITS);
    if (place_files(plan) != 0)
        fail(plan, STEP_FILES);
    if (install_filter(plan) != 0)
        fail(plan, STEP_FILTER);
}

struct borrower {
    const struct plan *plan;
    pid_t parent;
};

static int run_executable(void *argument)
{
    const struct borrower *borrower = argument;
    confine(borrower->plan, borrower->parent);
    borrower->plan->progress->phase = PHASE_RUNNING; /* a later failure is recorded in `step` */
    become_program(borrower->plan);
    fail(borrower->plan, STEP_EXEC);
    return 1;
}

/* Starts a child that shares this process's memory until it becomes the program. All signals are
 * blocked meanwhile, so that no handler runs in it. */
static pid_t spawn_executable(const struct plan *plan)
{
    char *stack = mmap(NULL, BORROWED_STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return -1;
    struct borrower borrower = {plan, getpid()};
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid_t pid = clone(run_executable, stack + BORROWED_STACK_BYTES,
                      CLONE_VM | CLONE_VFORK | SIGCHLD, &borrower);
    int number = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    munmap(stack, BORROWED_STACK_BYTES);
    errno = number;
    return pid;
}

/* Forks a child confined by `plan`, with its files in place. Returns its id, and 0 in the child. */
int rlef_fork(const struct plan *plan)
{
    pid_t parent = getpid(), pid = fork();
    if (pid == 0)
        confine(plan, parent);
    return pid;
}

/* Starts a child by `plan`. Returns its id, and in `pidfd` a descriptor of it; 0 in the child of a
 * plan without an executable; -1 with errno set if there is no child. */
int rlef_spawn(const struct plan *plan, int *pidfd)
{
    pid_t pid = plan->executable >= 0 ? spawn_executable(plan) : rlef_fork(plan);
    if (pid <= 0)
        return pid;
    *pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (*pidfd < 0) {
        int number = errno;
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        errno = number;
        return -1;
    }
    return pid;
}
