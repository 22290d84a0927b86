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
 * Where the machine allows, a child runs in a user namespace, in which its threads are counted, and
 * in a pid namespace, in which its ids begin with 2. A plain fork leaves a child in the zygote's own
 * namespaces, and process 1 of a pid namespace ignores signals without a handler. So each cell, the
 * place of one child at a time, has an `init`, made once, which shares the zygote's memory and
 * descriptors, and starts and reaps one child after another. It has no thread-local storage of its
 * own, so the two share errno too: while the zygote works, init makes only calls that cannot fail.
 *
 * launch_plan.py mirrors `struct plan`; supervisor_python.py takes the same steps in Python. Each
 * layer is one function here, which returns 0, or -1 with errno set.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "zygote.h"

#define STREAMS 3
#define PENDING_SIGNALS 64 /* as in launch_plan.py */
#define BORROWED_STACK_BYTES (16 << 10) /* of a child that shares our memory until it execs */
#define INIT_STACK_BYTES ((16 << 10) + BORROWED_STACK_BYTES)
#define REAPED_ID (1 << 30) /* above every process id: init had reaped the child before its id was read */
#define FIRST_ID 2 /* in a pid namespace, after that of its init */
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef CAP_CHECKPOINT_RESTORE
#define CAP_CHECKPOINT_RESTORE 40
#endif

/* What zygote and init share about the child of one cell. */
struct init {
    uint8_t stack[INIT_STACK_BYTES];
    const struct plan *plan;
    sigset_t signals; /* of the child */
    jmp_buf resume;   /* where the child continues, on the zygote's stack */
    uint32_t settled, reaped; /* futexes: 1 once the child has started or failed to start; once it is reaped */
    pid_t child; /* its id in its namespace */
    int pidfd;
    int error; /* errno, if there is no child */
    struct ended ended;
};

static struct init inits[MAX_CHILDREN] __attribute__((aligned(16)));
static pid_t init_pids[MAX_CHILDREN]; /* or 0 */
static int init_bells[MAX_CHILDREN];  /* eventfds that signal an order */
static int init_ends[MAX_CHILDREN];   /* eventfds that signal that the child is reaped */
static int init_pidfds[MAX_CHILDREN];
static int own_pidfd, last_id;        /* see rlef_own_children */

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

/* Gives up all capabilities that come with a new user namespace, except those in `kept`. */
static int keep_capabilities(uint64_t kept)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    uint32_t low = (uint32_t)kept, high = (uint32_t)(kept >> 32);
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{low, low, 0}, {high, high, 0}};
    return (int)syscall(SYS_capset, &header, data);
}

static int limit(int resource, uint64_t soft, uint64_t hard)
{
    struct rlimit bound = {soft, hard};
    return setrlimit((__rlimit_resource_t)resource, &bound);
}

static int set_limits(const struct plan *plan)
{
    if (limit(RLIMIT_AS, plan->address_space_bytes, plan->address_space_bytes) != 0 ||
        limit(RLIMIT_CPU, plan->cpu_s, plan->cpu_s + 1) != 0 ||
        limit(RLIMIT_FSIZE, plan->file_bytes, plan->file_bytes) != 0 ||
        limit(RLIMIT_NOFILE, plan->open_files, plan->open_files) != 0 ||
        limit(RLIMIT_SIGPENDING, PENDING_SIGNALS, PENDING_SIGNALS) != 0)
        return -1;
    if (plan->stack_bytes && limit(RLIMIT_STACK, plan->stack_bytes, plan->stack_bytes) != 0)
        return -1;
    uint64_t counted = plan->threads + 1; /* init too */
    return plan->threads ? limit(RLIMIT_NPROC, counted, counted) : 0;
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
    uint32_t own_pid = (uint32_t)getpid();
    for (int index = 0; index < plan->own_pid_count; index++)
        *plan->own_pids[index] = own_pid;
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
    if (plan->namespaces && keep_capabilities(0) != 0)
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
    uint8_t stack[BORROWED_STACK_BYTES] __attribute__((aligned(16)));
    struct borrower borrower = {plan, getpid()};
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid_t pid = clone(run_executable, stack + BORROWED_STACK_BYTES,
                      CLONE_VM | CLONE_VFORK | SIGCHLD, &borrower);
    int number = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = number;
    return pid;
}

/* Returns the child's id, and 0 in the child of a plan without an executable. */
static pid_t start(const struct plan *plan)
{
    if (plan->executable >= 0)
        return spawn_executable(plan);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0)
        confine(plan, parent);
    return pid;
}

/* In init: starts the child. Returns 0 or errno. */
static int start_from_init(struct init *init)
{
    int has_ids = (init->plan->namespaces & CLONE_NEWPID) != 0;
    if (has_ids && waitpid(-1, NULL, WNOHANG) >= 0) { /* left by a program that could fork */
        kill(-1, SIGKILL);
        while (waitpid(-1, NULL, 0) > 0)
            continue;
    }
    if (keep_capabilities(1ULL << CAP_CHECKPOINT_RESTORE) != 0 ||
        (has_ids && pwrite(last_id, "1", 1, 0) != 1)) /* the next is 2, whatever ran here before */
        return errno;
    init->child = start(init->plan);
    if (init->child == 0) { /* the child, in a copy of the zygote's memory */
        sigprocmask(SIG_SETMASK, &init->signals, NULL);
        longjmp(init->resume, 1);
    }
    if (init->child < 0)
        return errno;
    /* F_GETOWN returns the id that the process has in the reader's namespace */
    init->pidfd = (int)syscall(SYS_pidfd_open, init->child, 0);
    int error = init->pidfd < 0 || fcntl(init->pidfd, F_SETOWN, init->child) != 0 ? errno : 0;
    if (error == 0 && has_ids && init->child != FIRST_ID)
        error = EEXIST;
    if (error) {
        kill(init->child, SIGKILL);
        waitpid(init->child, NULL, 0);
        close(init->pidfd);
    }
    return error;
}

static void say(uint32_t *futex)
{
    __atomic_store_n(futex, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, futex, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static int be_init(void *argument)
{
    static const uint64_t ring = 1;
    struct init *init = argument;
    struct pollfd awaited[] = {{init_bells[init - inits], POLLIN, 0}, {own_pidfd, POLLIN, 0}};
    uint64_t rung;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0)
        _exit(1);
    for (;;) {
        /* if the zygote died before that call, its pidfd tells */
        if (poll(awaited, 2, -1) < 0 || awaited[1].revents != 0 ||
            read(awaited[0].fd, &rung, sizeof rung) < 0)
            _exit(1); /* the kernel then ends the namespaces */
        init->error = start_from_init(init);
        int failed = init->error != 0;
        say(&init->settled);
        if (failed)
            continue;
        /* no siginfo_t, which later children would find in their copy of this stack */
        waitid(P_PID, (id_t)init->child, NULL, WEXITED | WNOWAIT);
        init->ended.lost_memory = rlef_lost_memory(init->child);
        wait4(init->child, &init->ended.wait_status, 0, &init->ended.usage);
        say(&init->reaped);
        if (write(init_ends[init - inits], &ring, sizeof ring) < 0)
            _exit(1);
    }
}

/* Waits until a cell's init sets `futex`. If init is gone, this process ends: a fault, after which its
 * runs are repeated. */
static void await(int cell, uint32_t *futex)
{
    static const struct timespec patience = {1, 0};
    while (!__atomic_load_n(futex, __ATOMIC_SEQ_CST))
        if (syscall(SYS_futex, futex, FUTEX_WAIT_PRIVATE, 0, &patience, NULL, 0) != 0 &&
            waitpid(init_pids[cell], NULL, WNOHANG) != 0)
            _exit(1);
}

/* Makes the init of a cell, in new namespaces. Returns 0, or -1 with errno set. */
static int make_init(int cell, int namespaces)
{
    struct init *init = &inits[cell];
    sigset_t all, before;
    init_bells[cell] = eventfd(0, EFD_CLOEXEC);
    init_ends[cell] = eventfd(0, EFD_CLOEXEC);
    sigfillset(&all); /* no handler may run on its stack */
    sigprocmask(SIG_SETMASK, &all, &before);
    pid_t pid = clone(be_init, init->stack + sizeof init->stack,
                      CLONE_VM | CLONE_FILES | namespaces | SIGCHLD, init);
    int error = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (pid < 0) {
        close(init_bells[cell]);
        close(init_ends[cell]);
        errno = error;
        return -1;
    }
    init_pids[cell] = pid;
    init_pidfds[cell] = (int)syscall(SYS_pidfd_open, pid, 0);
    return 0;
}

/* Starts a child through its cell's init. Returns 1, or 0 in the child, or -1 with errno set. */
static __attribute__((noinline)) int start_in_namespaces(const struct plan *plan, int cell,
                                                         struct started *child)
{
    static const uint64_t ring = 1;
    struct init *init = &inits[cell];
    if (init_pids[cell] == 0 && make_init(cell, plan->namespaces) != 0)
        return -1;
    init->plan = plan;
    sigprocmask(SIG_SETMASK, NULL, &init->signals);
    if (setjmp(init->resume) != 0) {
        memset(init_pids, 0, sizeof init_pids); /* they reveal how many processes there were */
        return 0;
    }
    init->settled = init->reaped = 0;
    if (write(init_bells[cell], &ring, sizeof ring) < 0)
        return -1;
    await(cell, &init->settled);
    if (init->error) {
        errno = init->error;
        return -1;
    }
    pid_t id = fcntl(init->pidfd, F_GETOWN);
    *child = (struct started){id > 0 ? id : REAPED_ID, init->pidfd, 1,
                              {init_ends[cell], init_pidfds[cell]}};
    return 1;
}

/* Prepares this process to start children. Their namespaces end with it. `last_id_file` is the
 * `last_id` of `rlef_listen`. */
void rlef_own_children(int last_id_file)
{
    own_pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (own_pidfd < 0)
        _exit(1);
    last_id = last_id_file;
}

/* Starts a child by `plan`, in a cell that no other has. Returns 1, or 0 in the child of a plan
 * without an executable, or -1 with errno set if there is no child. */
int rlef_spawn(const struct plan *plan, int cell, struct started *child)
{
    if (plan->namespaces)
        return start_in_namespaces(plan, cell, child);
    child->by_init = 0;
    child->pid = start(plan);
    if (child->pid <= 0)
        return child->pid;
    child->pidfd = (int)syscall(SYS_pidfd_open, child->pid, 0);
    if (child->pidfd < 0) {
        int number = errno;
        kill(child->pid, SIGKILL);
        waitpid(child->pid, NULL, 0);
        errno = number;
        return -1;
    }
    child->awaited[0] = child->pidfd;
    child->awaited[1] = -1;
    return 1;
}

/* Waits for a child to end, and releases its id and pidfd. */
void rlef_reap(int cell, const struct started *child, struct ended *ended)
{
    if (child->by_init) {
        uint64_t rung;
        await(cell, &inits[cell].reaped);
        if (read(init_ends[cell], &rung, sizeof rung) < 0)
            _exit(1);
        *ended = inits[cell].ended;
        memset(&inits[cell].ended, 0, sizeof *ended); /* children have a copy of this memory */
    } else {
        ended->lost_memory = rlef_lost_memory(child->pid);
        wait4(child->pid, &ended->wait_status, 0, &ended->usage);
    }
    close(child->pidfd);
}

/* Returns whether the reaper set a process's address-space limit to 0, because it had too many page
 * tables (page_tables.py). */
int rlef_lost_memory(pid_t pid)
{
    struct rlimit limit;
    return prlimit(pid, RLIMIT_AS, NULL, &limit) == 0 && limit.rlim_max == 0;
}

static struct started probe;

/* Starts a child that probes its layers, as `rlef_spawn` does. */
int rlef_fork(const struct plan *plan)
{
    return rlef_spawn(plan, 0, &probe);
}

/* Returns the wait status of the child that `rlef_fork` started. */
int rlef_wait(void)
{
    struct ended ended;
    rlef_reap(0, &probe, &ended);
    return ended.wait_status;
}
