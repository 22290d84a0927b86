"""The supervisor in Python, a smaller csrc/serve.c and spawn.c for machines without a C compiler.

It runs Python programs only. It forks children, enforces their limits, reports when a child sleeps
or works again, and sends the outcome when a child ends.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from mmap import PAGESIZE, mmap  # programs get another `mmap.mmap`

from . import kernel
from .launch_plan import PENDING_SIGNALS, LaunchPlan
from .protocol import (
    PAUSE,
    SLEEPING,
    STARVED_EXTENSION,
    TURN,
    WOKE,
    Ending,
    Outcome,
    Phase,
    Task,
    ZygoteRequest,
    failed_to_start,
    receive,
)

LEAST_WAIT_S = 0.005  # between two readings of a child's CPU clock
# A child that used less than this share of a core over this long is asleep: a busy child gets 0.2
# of a core even on a machine with five busy processes per core.
SLEEP_WINDOW_S, SLEEP_SHARE = 0.1, 0.05
STARVED_SHARE = 0.01  # of its wall clock limit; a child that worked at least this much is starved
READABLE = select.POLLIN | 0x2000  # POLLRDHUP


class SupervisedChild:
    """A child, the page where it reports while it is trusted, and the session for its outcome."""

    def __init__(self, pid: int, page: mmap, session: int, request: ZygoteRequest) -> None:
        self.pid, self.pidfd = pid, pidfd_of(pid)
        self.page, self.session, self.request = page, session, request
        self.started = self.window_started = time.monotonic()
        self.window_cpu_s = 0.0
        self.clock = ~pid << 3 | 2  # the process's CPU clock, as clock_getcpuclockid(3) makes it
        self.ending = Ending.ITSELF
        self.told = TURN  # or SLEEPING, or WOKE: what the controller knows
        self.paused = 0.0  # since when
        self.next_check = self.started + min(request.cpu_s, request.wall_s, SLEEP_WINDOW_S)

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.next_check = math.inf

    def check(self, now: float) -> None:
        """Kill the child if it passed a limit; report that it sleeps, or that it works again."""
        cpu_s = time.clock_gettime(self.clock)
        cpu_left_s = self.request.cpu_s - cpu_s
        elapsed_s, wall_s = now - self.started, self.request.wall_s
        if elapsed_s >= wall_s and cpu_s >= STARVED_SHARE * wall_s:
            wall_s *= STARVED_EXTENSION
        left_s = min(cpu_left_s, wall_s - elapsed_s)
        if cpu_left_s <= 0:
            self.ending = Ending.CPU_LIMIT
        elif self.lost_its_memory():
            self.ending = Ending.MEMORY_LIMIT
        elif left_s <= 0:
            self.ending = Ending.WALL_LIMIT
        if self.ending is not Ending.ITSELF:
            self.kill()
            return
        if self.told != WOKE:
            window_s = now - self.window_started
            if window_s >= SLEEP_WINDOW_S:
                sleeps = cpu_s - self.window_cpu_s < SLEEP_SHARE * window_s
                if sleeps != (self.told == SLEEPING):
                    self.told = SLEEPING if sleeps else WOKE
                    send(self.session, self.told)
                self.window_started, self.window_cpu_s = now, cpu_s
            left_s = min(left_s, SLEEP_WINDOW_S)
        self.next_check = now + max(LEAST_WAIT_S, left_s)

    def obey(self, word: bytes) -> None:
        """Pause or resume, as the controller's message says. Paused time is not wall time."""
        now = time.monotonic()
        if word == PAUSE and not self.paused and self.next_check < math.inf:
            signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
            self.paused, self.next_check = now, math.inf
        elif word != PAUSE and self.paused:
            signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)
            self.started += now - self.paused
            self.paused, self.next_check = 0.0, now
        if word == TURN:
            self.told = TURN
            self.window_started, self.window_cpu_s = now, time.clock_gettime(self.clock)

    def lost_its_memory(self) -> bool:
        """Return whether the reaper set the address-space limit to 0, because of too many page
        tables (page_tables.py)."""
        return resource.prlimit(self.pid, resource.RLIMIT_AS)[1] == 0

    def finish(self) -> None:
        """Send the outcome of this child, which has ended, and close its files."""
        if self.ending is Ending.ITSELF and self.lost_its_memory():
            self.ending = Ending.MEMORY_LIMIT
        os.close(self.pidfd)
        _, wait_status, usage = os.wait4(self.pid, 0)
        fault = self.page[1:].rstrip(b"\0").decode()
        outcome = Outcome(
            Phase.SETUP if fault else Phase(self.page[0]),
            self.ending,
            wait_status,
            usage.ru_utime + usage.ru_stime,
            time.monotonic() - self.started,
            usage.ru_maxrss * 1024,
            fault,
        )
        send(self.session, outcome.pack())
        os.close(self.session)
        self.page.close()


class PythonSupervisor:
    """Supervises the children requested over the control channel."""

    name = "python"

    def __init__(
        self, channel: int, controller: int, plan_of: Callable[[ZygoteRequest, int], LaunchPlan]
    ) -> None:
        self._channel, self._controller = socket.socket(fileno=channel), controller
        self._plan_of = plan_of
        self._watched: dict[int, SupervisedChild] = {}  # by pidfd, and by descriptor of the session
        self._page = mmap(-1, PAGESIZE)  # of the newest child
        self._poller = select.poll()
        self._poller.register(channel, READABLE)
        self._poller.register(controller, select.POLLIN)

    def serve(self) -> tuple[Task, int]:
        """Answer requests until the process ends. Returns only in a forked child, with its task and
        the number of its files.
        """
        while True:
            soonest = min((child.next_check for child in self._watched.values()), default=math.inf)
            wait_s = max(0.0, soonest - time.monotonic())
            for descriptor, _ in self._poller.poll(None if wait_s == math.inf else wait_s * 1e3):
                if descriptor == self._controller:
                    os._exit(0)
                elif descriptor == self._channel.fileno():
                    started = self._answer()
                    if started is not None:
                        return started
                elif descriptor in self._watched:
                    self._handle_event(self._watched[descriptor], descriptor)
            now = time.monotonic()
            for child in set(self._watched.values()):
                if child.next_check <= now:
                    child.check(now)

    def _handle_event(self, child: SupervisedChild, descriptor: int) -> None:
        """Finish a child that ended, obey a message about it, or kill it if its session closed."""
        if descriptor == child.pidfd:
            for watched in [fd for fd, other in self._watched.items() if other is child]:
                self._poller.unregister(watched)
                del self._watched[watched]
            child.finish()
        elif word := received(descriptor):
            child.obey(word)
        else:
            self._poller.unregister(descriptor)
            del self._watched[descriptor]
            child.kill()

    def _answer(self) -> tuple[Task, int] | None:
        """Act on the next request. Returns a task only in the child that it started."""
        message, files = receive(self._channel, socket.MSG_DONTWAIT)
        if not message:
            os._exit(0)  # the controller is gone
        request = ZygoteRequest.unpack(message)
        session = files.pop(0)
        self._page = mmap(-1, PAGESIZE)
        try:
            if request.task is Task.EXECUTE:
                raise OSError(errno.ENOSYS, f"{request.task.name} needs the C library")
            pid = self.fork_confined(self._plan_of(request, len(files)), files)
            if pid == 0:
                self._page[0] = Phase.COMPILING
                return request.task, len(files)
            child = SupervisedChild(pid, self._page, session, request)
        except OSError as error:
            send(session, failed_to_start(f"start of a child: {error}").pack())
            os.close(session)
        else:
            for descriptor, events in ((child.pidfd, select.POLLIN), (session, READABLE)):
                self._watched[descriptor] = child
                self._poller.register(descriptor, events)
        for descriptor in files:
            os.close(descriptor)
        return None

    def leave_trust(self) -> None:
        """Report that the program begins; from now on this child cannot report anything."""
        self._page[0] = Phase.RUNNING
        for page in (self._page, *(child.page for child in self._watched.values())):
            page.close()

    def fork_confined(self, plan: LaunchPlan, files: list[int]) -> int:
        """Fork. Returns the child's id, and 0 in the child, which is confined by `plan`."""
        parent = os.getpid()
        pid = kernel.checked(kernel.fork(), "fork")
        if pid:
            return pid
        step = "NAMESPACE"
        try:
            if plan.namespaces:  # but not a pid namespace, which takes another fork
                kernel.unshare(kernel.CLONE_NEWUSER)
                kernel.drop_capabilities()
            step = "PARENT"
            kernel.die_with_parent()
            if os.getppid() != parent:
                os._exit(1)
            os.setsid()  # one scheduling group (autogroup), however many threads
            step = "LIMITS"
            set_limits(plan)
            step = "FILES"
            for target, descriptor in enumerate(files):
                os.dup2(descriptor, target)
            kernel.close_from(len(files))
            step = "FILTER"
            if plan.call_filter is not None:
                plan.call_filter.install(os.getpid())
        except OSError as error:
            fault = f"child set-up: {step}: {os.strerror(error.errno or 0)}".encode()
            self._page[1 : 1 + len(fault)] = fault
            os._exit(1)
        return 0

    def wait(self, child: int) -> int:
        """Return the wait status of the child that `fork_confined` started."""
        return os.waitpid(child, 0)[1]


def pidfd_of(child: int) -> int:
    """Return a pidfd of a child. Kills the child if there can be none."""
    try:
        return os.pidfd_open(child)
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def set_limits(plan: LaunchPlan) -> None:
    """Set the limits of this process."""
    for kind, soft, hard in (
        (resource.RLIMIT_AS, plan.address_space_bytes, plan.address_space_bytes),
        (resource.RLIMIT_CPU, plan.cpu_s, plan.cpu_s + 1),
        (resource.RLIMIT_FSIZE, plan.file_bytes, plan.file_bytes),
        (resource.RLIMIT_NOFILE, plan.open_files, plan.open_files),
        (resource.RLIMIT_SIGPENDING, PENDING_SIGNALS, PENDING_SIGNALS),
        (resource.RLIMIT_NPROC, plan.threads, plan.threads),
    ):
        if kind != resource.RLIMIT_NPROC or plan.threads:
            resource.setrlimit(kind, (soft, hard))


def received(session: int) -> bytes:
    """Return the controller's message; empty if it closed the session."""
    with contextlib.suppress(OSError):
        return os.read(session, 1)
    return b""


def send(session: int, message: bytes) -> None:
    """Send to a controller that may have closed the session."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(session, message)
