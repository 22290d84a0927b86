/* The supervisor: takes requests, starts children, enforces their limits, sends their outcomes.
 *
 * Theory of operation. After each fork all pages of the zygote are copy-on-write again, so Python
 * code between two runs costs a page fault for every page that it writes. This loop writes only a
 * few. Policy stays in Python (zygote.py), which makes the plan of each kind of request once.
 * `rlef_serve` returns in the zygote when a request has no plan yet (PREPARE), and in a forked
 * child that runs a Python program next.
 *
 * One thread polls the channel of the requests, the controller's pidfd and, for each child, what
 * shows its end (`process.awaited`) and the session on which the controller waits for its outcome.
 * supervisor_python.py does the same without a compiler; protocol.py defines the messages.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "zygote.h"

#define MAX_PLANS 32
#define MAX_REQUEST_BYTES 64
#define FAULT_BYTES 256
#define OUTCOME_BYTES 30    /* protocol.OUTCOME */
#define REQUEST_CPU_S_AT 1  /* protocol.REQUEST: the task in one byte, then */
#define REQUEST_WALL_S_AT 9 /* two doubles */
#define LEAST_WAIT_S 0.005
/* supervisor_python.py explains these */
#define SLEEP_WINDOW_S 0.1
#define SLEEP_SHARE 0.05
#define STARVED_SHARE 0.01
#define STARVED_EXTENSION 2
#define NEVER 1e300
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif

enum { PREPARE = 0, CHILD = 1 };                         /* returned by rlef_serve; by start, in the child */
enum turn { HAS_TURN, SLEEPS, ASKS_FOR_TURN };              /* what the controller was told */
enum { PAUSE = 'p', RESUME = 'r', TURN = 't' };             /* protocol.py */
enum { ENDED_ITSELF = 0, CPU_LIMIT = 1, WALL_LIMIT = 2, MEMORY_LIMIT = 3 }; /* protocol.Ending */

struct prepared {
    uint8_t message[MAX_REQUEST_BYTES]; /* the request, with its number of files */
    int32_t length;
    int32_t file_count;
    struct plan plan;
};

struct child {
    struct started process; /* with an id of 0 this cell is free */
    int session;
    int session_open; /* polled until the controller closes it */
    int ending;
    enum turn turn;
    double paused; /* since when, or 0 */
    double cpu_s, wall_s;
    double started, next_check, window_started, window_cpu_s;
};

struct server {
    /* the newest request; supervisor_native.py reads these */
    uint8_t message[MAX_REQUEST_BYTES];
    int32_t length;
    int32_t file_count;
    int task; /* protocol.Task */
    int files[MAX_FILES];
    int session;
    int pending; /* the request waits for its plan, or for its child's start */
    int channel;
    int controller;
    int cell;              /* of the child that rlef_serve returns in */
    struct progress *page; /* MAX_CHILDREN cells */
    int plan_count;
    struct prepared plans[MAX_PLANS];
    struct child children[MAX_CHILDREN];
};

static double now_s(clockid_t clock)
{
    struct timespec time;
    if (clock_gettime(clock, &time) != 0)
        return 0.0;
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Sends to a controller that may have closed the session. */
static void send_message(int session, const void *message, size_t length)
{
    (void)!send(session, message, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void send_outcome(int session, int phase, int ending, int wait_status, double cpu_s,
                         double wall_s, uint64_t rss_bytes, const char *fault)
{
    uint8_t message[OUTCOME_BYTES + FAULT_BYTES];
    int32_t status = wait_status;
    size_t fault_bytes = strnlen(fault, FAULT_BYTES);
    message[0] = (uint8_t)phase;
    message[1] = (uint8_t)ending;
    memcpy(message + 2, &status, 4);
    memcpy(message + 6, &cpu_s, 8);
    memcpy(message + 14, &wall_s, 8);
    memcpy(message + 22, &rss_bytes, 8);
    memcpy(message + OUTCOME_BYTES, fault, fault_bytes);
    send_message(session, message, OUTCOME_BYTES + fault_bytes);
}

static void signal_child(const struct child *child, int number)
{
    syscall(SYS_pidfd_send_signal, child->process.pidfd, number, NULL, 0);
}

static double cpu_s_of(const struct child *child)
{
    return now_s((clockid_t)((~(unsigned)child->process.pid << 3) | 2));
}

/* Pauses or resumes a child, as the controller's message says. Paused time is not wall time. */
static void obey(struct child *child, uint8_t word)
{
    double now = now_s(CLOCK_MONOTONIC);
    if (word == PAUSE && child->paused == 0 && child->next_check < NEVER) {
        signal_child(child, SIGSTOP);
        child->paused = now;
        child->next_check = NEVER;
    } else if (word != PAUSE && child->paused != 0) {
        signal_child(child, SIGCONT);
        child->started += now - child->paused;
        child->paused = 0;
        child->next_check = now;
    }
    if (word == TURN) {
        child->turn = HAS_TURN;
        child->window_started = now;
        child->window_cpu_s = cpu_s_of(child);
    }
}

static void close_files(struct server *server)
{
    for (int index = 0; index < server->file_count; index++)
        close(server->files[index]);
    server->file_count = 0;
}

/* Reads the next request. Returns 0 if there is none; exits if the controller is gone. */
static int receive(struct server *server)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int) * (MAX_FILES + 1))];
    } control;
    struct iovec part = {server->message, sizeof server->message};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.space,
                             .msg_controllen = sizeof control.space};
    int received[MAX_FILES + 1], count = 0;
    ssize_t length = recvmsg(server->channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (length < 0)
        return 0;
    if (length == 0)
        _exit(0);
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL;
         header = CMSG_NXTHDR(&message, header)) {
        count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(received, CMSG_DATA(header), (size_t)count * sizeof(int));
    }
    if (count < 1)
        return 0; /* it has no session to answer on */
    server->length = (int32_t)length;
    server->task = server->message[0];
    server->session = received[0];
    server->file_count = count - 1;
    memcpy(server->files, received + 1, (size_t)server->file_count * sizeof(int));
    return 1;
}

static struct prepared *plan_of_request(struct server *server)
{
    for (int index = 0; index < server->plan_count; index++) {
        struct prepared *prepared = &server->plans[index];
        if (prepared->length == server->length && prepared->file_count == server->file_count &&
            memcmp(prepared->message, server->message, (size_t)server->length) == 0)
            return prepared;
    }
    return NULL;
}

static void refuse(struct server *server, const char *fault)
{
    send_outcome(server->session, PHASE_SETUP, ENDED_ITSELF, 0, 0.0, 0.0, 0, fault);
    close_files(server);
    close(server->session);
}

static double seconds_in_request(const struct server *server, size_t offset)
{
    double seconds;
    memcpy(&seconds, server->message + offset, sizeof seconds);
    return seconds;
}

/* Starts the request's child. Returns CHILD in it, else -1. */
static int start(struct server *server, struct plan *plan)
{
    int cell = 0;
    struct started process;
    while (cell < MAX_CHILDREN && server->children[cell].process.pid != 0)
        cell++;
    if (cell == MAX_CHILDREN) {
        refuse(server, "too many children of one zygote");
        return -1;
    }
    memset((void *)&server->page[cell], 0, sizeof(struct progress));
    memcpy(plan->files, server->files, sizeof plan->files);
    plan->progress = &server->page[cell];
    server->cell = cell;
    int started = rlef_spawn(plan, cell, &process);
    if (started == 0) {
        server->page[cell].phase = PHASE_COMPILING;
        return CHILD;
    }
    if (started < 0) {
        char fault[FAULT_BYTES];
        snprintf(fault, sizeof fault, "start of a child: %s", strerror(errno));
        refuse(server, fault);
        return -1;
    }
    double now = now_s(CLOCK_MONOTONIC);
    double cpu_s = seconds_in_request(server, REQUEST_CPU_S_AT);
    double wall_s = seconds_in_request(server, REQUEST_WALL_S_AT);
    double first = cpu_s < wall_s ? cpu_s : wall_s;
    server->children[cell] = (struct child){
        .process = process,
        .session = server->session,
        .session_open = 1,
        .cpu_s = cpu_s,
        .wall_s = wall_s,
        .started = now,
        .window_started = now,
        .next_check = now + (first < SLEEP_WINDOW_S ? first : SLEEP_WINDOW_S),
    };
    close_files(server);
    return -1;
}

/* Sends the outcome of a child that ended. */
static void finish(struct server *server, int number)
{
    struct child *child = &server->children[number];
    const struct progress *cell = &server->page[number];
    struct ended ended = {0};
    rlef_reap(number, &child->process, &ended);
    if (child->ending == ENDED_ITSELF && ended.lost_memory)
        child->ending = MEMORY_LIMIT;
    static const char *const names[] = {"", "PARENT", "NAMESPACE", "LIMITS",
                                        "FILES", "FILTER", "EXEC"};
    char fault[FAULT_BYTES] = "";
    /* an executable that the kernel refuses is the program's own fault: it exits with 1 */
    int shortage = cell->error == EAGAIN || cell->error == ENOMEM || cell->error == EMFILE ||
                   cell->error == ENFILE || cell->error == EPERM;
    if (cell->step != STEP_NONE &&
        (cell->step < STEP_EXEC || (cell->step == STEP_EXEC && shortage)))
        snprintf(fault, sizeof fault, "child set-up: %s: %s", names[cell->step],
                 strerror(cell->error));
    const struct rusage *usage = &ended.usage;
    double cpu_s = (double)(usage->ru_utime.tv_sec + usage->ru_stime.tv_sec) +
                   (double)(usage->ru_utime.tv_usec + usage->ru_stime.tv_usec) * 1e-6;
    send_outcome(child->session, fault[0] ? PHASE_SETUP : cell->phase, child->ending,
                 ended.wait_status, cpu_s, now_s(CLOCK_MONOTONIC) - child->started,
                 (uint64_t)usage->ru_maxrss * 1024, fault);
    close(child->session);
    child->process.pid = 0;
}

/* Kills a child that passed a limit; reports that it sleeps, or that it works again. */
static void check(struct child *child, double now)
{
    double cpu_s = cpu_s_of(child);
    double wall_s = child->wall_s, elapsed_s = now - child->started;
    if (elapsed_s >= wall_s && cpu_s >= STARVED_SHARE * wall_s)
        wall_s *= STARVED_EXTENSION;
    double cpu_left_s = child->cpu_s - cpu_s, wall_left_s = wall_s - elapsed_s;
    child->ending = cpu_left_s <= 0           ? CPU_LIMIT
                    : rlef_lost_memory(child->process.pid) ? MEMORY_LIMIT
                    : wall_left_s <= 0       ? WALL_LIMIT
                                             : ENDED_ITSELF;
    if (child->ending != ENDED_ITSELF) {
        signal_child(child, SIGKILL);
        child->next_check = NEVER;
        return;
    }
    double left_s = cpu_left_s < wall_left_s ? cpu_left_s : wall_left_s;
    if (child->turn != ASKS_FOR_TURN) {
        double window_s = now - child->window_started;
        if (window_s >= SLEEP_WINDOW_S) {
            int sleeps = cpu_s - child->window_cpu_s < SLEEP_SHARE * window_s;
            if (sleeps != (child->turn == SLEEPS))
                send_message(child->session, sleeps ? "~" : "!", 1);
            child->turn = sleeps ? SLEEPS : child->turn == SLEEPS ? ASKS_FOR_TURN : HAS_TURN;
            child->window_started = now;
            child->window_cpu_s = cpu_s;
        }
        if (left_s > SLEEP_WINDOW_S)
            left_s = SLEEP_WINDOW_S;
    }
    child->next_check = now + (left_s > LEAST_WAIT_S ? left_s : LEAST_WAIT_S);
}

static int until_next_check_ms(const struct server *server)
{
    double soonest = NEVER;
    for (int cell = 0; cell < MAX_CHILDREN; cell++)
        if (server->children[cell].process.pid != 0 && server->children[cell].next_check < soonest)
            soonest = server->children[cell].next_check;
    if (soonest == NEVER)
        return -1;
    double left_ms = (soonest - now_s(CLOCK_MONOTONIC)) * 1e3;
    return left_ms <= 0 ? 0 : left_ms > 1e6 ? 1000000 : (int)left_ms + 1;
}

static void supervise(struct server *server, const struct pollfd *polled, const int *cells,
                      int count)
{
    uint8_t word;
    for (int index = 2; index < count; index++) {
        struct child *child = &server->children[cells[index]];
        if (polled[index].revents == 0 || child->process.pid == 0)
            continue;
        if (polled[index].fd != child->session) {
            finish(server, cells[index]);
        } else if (recv(child->session, &word, 1, MSG_DONTWAIT) == 1) {
            obey(child, word);
        } else if (child->session_open) { /* the controller closed it */
            child->session_open = 0;
            signal_child(child, SIGKILL);
            child->next_check = NEVER;
        }
    }
    double now = now_s(CLOCK_MONOTONIC);
    for (int cell = 0; cell < MAX_CHILDREN; cell++)
        if (server->children[cell].process.pid != 0 && server->children[cell].next_check <= now)
            check(&server->children[cell], now);
}

/* Makes this process a supervisor of the requests on `channel`, with no child yet. `last_id` is
 * LAST_ID_FILE of zygote.py, open for writing, or -1. */
struct server *rlef_listen(int channel, int controller, int last_id)
{
    static struct server server;
    memset(&server, 0, sizeof server);
    server.channel = channel;
    server.controller = controller;
    rlef_own_children(last_id);
    server.page = mmap(NULL, sizeof(struct progress) * MAX_CHILDREN, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (server.page == MAP_FAILED)
        _exit(1);
    return &server;
}

/* Stores the plan of the pending request; discards all older plans if there is no room. */
void rlef_prepare(struct server *server, const struct plan *plan)
{
    if (server->plan_count == MAX_PLANS)
        server->plan_count = 0;
    struct prepared *kept = &server->plans[server->plan_count++];
    memcpy(kept->message, server->message, sizeof kept->message);
    kept->length = server->length;
    kept->file_count = server->file_count;
    kept->plan = *plan;
}

/* In a child, the last step before the program's first line: unmaps the memory in which it reports,
 * so that the program cannot report anything. */
void rlef_leave_trust(struct server *server)
{
    server->page[server->cell].phase = PHASE_RUNNING;
    memset(server->children, 0, sizeof server->children); /* ids and times of other runs */
    munmap((void *)server->page, sizeof(struct progress) * MAX_CHILDREN);
}

/* Serves until Python must act: see above. Returns PREPARE, or in a child 256 times its task plus the
 * number of its files. */
int rlef_serve(struct server *server)
{
    struct pollfd polled[2 + 3 * MAX_CHILDREN];
    int cells[2 + 3 * MAX_CHILDREN];
    for (;;) {
        if (server->pending) {
            struct prepared *prepared = plan_of_request(server);
            if (prepared == NULL)
                return PREPARE;
            server->pending = 0;
            if (start(server, &prepared->plan) == CHILD)
                return server->task << 8 | server->file_count;
        }
        int count = 2;
        polled[0] = (struct pollfd){server->channel, POLLIN | POLLRDHUP, 0};
        polled[1] = (struct pollfd){server->controller, POLLIN, 0};
        for (int cell = 0; cell < MAX_CHILDREN; cell++) {
            const struct child *child = &server->children[cell];
            if (child->process.pid == 0)
                continue;
            for (int index = 0; index < 2; index++) { /* poll skips -1 */
                cells[count] = cell;
                polled[count++] = (struct pollfd){child->process.awaited[index], POLLIN, 0};
            }
            if (child->session_open) {
                cells[count] = cell;
                polled[count++] = (struct pollfd){child->session, POLLIN | POLLRDHUP, 0};
            }
        }
        if (poll(polled, (nfds_t)count, until_next_check_ms(server)) < 0)
            continue; /* a signal */
        if (polled[1].revents != 0)
            _exit(0);
        supervise(server, polled, cells, count);
        if (polled[0].revents != 0)
            server->pending = receive(server);
    }
}
