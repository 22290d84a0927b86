"""The zygote's loop in Python, for machines without a C compiler; csrc/serve.c is the same in C.

Takes requests, starts children, supervises them, tells of their ends. Policy is the zygote's
(`zygote.py`): what a request's limits mean is asked of it once, and kept as a plan.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from .launch import Plan, Progress, PythonLauncher
from .protocol import (
    MAX_DESCRIPTORS,
    MAX_MESSAGE_BYTES,
    SLEEPING,
    Ending,
    Outcome,
    Phase,
    Request,
    Task,
    failed_to_start,
)

KEPT_PLANS = 256
LEAST_WAIT_S = 0.005  # between two readings of a child's CPU clock
# A child that used less than this share of a core over this long is asleep: a machine four times
# overloaded still gives a busy one 0.2.
SLEEP_WINDOW_S, SLEEP_SHARE = 0.1, 0.05
# One that worked at least this share of its wall clock limit is starved, not idle, and gets as much
# wall clock time again.
STARVED_SHARE, STARVED_EXTENSION = 0.01, 2
READABLE = select.POLLIN | 0x2000  # POLLRDHUP

PlanOf = Callable[[Request, int], Plan]  # for a request with so many files


class Started(NamedTuple):
    """In a forked child: what it was started for."""

    task: Task
    file_count: int
    cell: int


class Running:
    """A child under supervision, and whom to tell of its end."""

    __slots__ = (
        "cell",
        "clock",
        "ending",
        "next_check",
        "pid",
        "pidfd",
        "request",
        "session",
        "slept",
        "started",
        "window_cpu_s",
        "window_started",
    )

    def __init__(self, pid: int, pidfd: int, cell: int, session: int, request: Request) -> None:
        self.pid, self.pidfd, self.cell = pid, pidfd, cell
        self.session, self.request = session, request
        self.started = self.window_started = time.monotonic()
        self.window_cpu_s = 0.0
        self.clock = ~pid << 3 | 2  # the process's CPU clock, as clock_getcpuclockid(3) makes it
        self.ending = Ending.ITSELF
        self.slept = False
        self.next_check = self.started + min(request.cpu_s, request.wall_s, SLEEP_WINDOW_S)

    def check(self, now: float) -> None:
        """Kill the child if it passed a limit; tell if it sleeps."""
        cpu_s = time.clock_gettime(self.clock)
        cpu_left_s = self.request.cpu_s - cpu_s
        elapsed_s, wall_s = now - self.started, self.request.wall_s
        if elapsed_s >= wall_s and cpu_s >= STARVED_SHARE * wall_s:
            wall_s *= STARVED_EXTENSION
        wall_left_s = wall_s - elapsed_s
        if cpu_left_s <= 0 or wall_left_s <= 0:
            self.ending = Ending.CPU_LIMIT if cpu_left_s <= 0 else Ending.WALL_LIMIT
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.next_check = float("inf")
            return
        left_s = min(cpu_left_s, wall_left_s)
        if not self.slept:
            window_s = now - self.window_started
            if window_s >= SLEEP_WINDOW_S:
                self.slept = cpu_s - self.window_cpu_s < SLEEP_SHARE * window_s
                if self.slept:
                    send(self.session, SLEEPING)
                self.window_started, self.window_cpu_s = now, cpu_s
            left_s = min(left_s, SLEEP_WINDOW_S)
        self.next_check = now + max(LEAST_WAIT_S, left_s)


class PythonSupervisor:
    """The loop over one channel."""

    name = "python"

    def __init__(
        self, channel: int, controller: int, plan_of: PlanOf, *, serves_program: bool
    ) -> None:
        self.channel, self.controller = socket.socket(fileno=channel), controller
        self.plan_of = plan_of
        self.serves_program = serves_program
        self.progress = Progress()
        self.launcher = PythonLauncher(self.progress)
        self.plans: dict[tuple[bytes, int], tuple[Request, Plan]] = {}
        self.running: dict[int, Running] = {}  # by pidfd
        self.awaited: dict[int, Running] = {}  # by the descriptor of the session
        self.poller = select.poll()
        self.poller.register(channel, READABLE)
        self.poller.register(controller, select.POLLIN)

    def serve(self) -> Started:
        """Answer requests for ever. Returns only in forked children."""
        channel = self.channel.fileno()
        while True:
            for descriptor, _ in self.poller.poll(self.until_next_check_ms()):
                if descriptor in self.running:
                    self.finish(self.running.pop(descriptor))
                elif descriptor == channel:
                    started = self.answer()
                    if started is not None:
                        return started
                elif descriptor in self.awaited:
                    self.abandon(self.awaited[descriptor])
                elif descriptor == self.controller:
                    os._exit(0)
            if self.running:
                self.keep_limits()

    def forget(self) -> None:
        """In a program server, before it listens to a channel of its own: all that this one held is
        closed already, and the numbers are others' now.
        """
        self.channel.detach()

    def until_next_check_ms(self) -> float | None:
        if not self.running:
            return None
        soonest = min(child.next_check for child in self.running.values())
        return None if soonest == float("inf") else max(0.0, soonest - time.monotonic()) * 1e3

    def keep_limits(self) -> None:
        now = time.monotonic()
        for child in self.running.values():
            if child.next_check > now:
                continue
            serves = child.request.task is Task.PROGRAM
            if serves and self.progress.phase(child.cell) is Phase.RUNNING:
                child.next_check = float("inf")  # its own children have limits of their own
            else:
                child.check(now)

    def answer(self) -> Started | None:
        """Act on the next request. Started only in the child that it started."""
        message, files = receive(self.channel, socket.MSG_DONTWAIT)
        if not message:
            os._exit(0)  # the controller is gone, or done with this program
        session = self.channel.fileno() if self.serves_program else files.pop(0)
        request, plan = self.prepared(message, len(files))
        if request.task is Task.EXECUTE:
            send(session, failed_to_start("compiled programs take the C library").pack())
            for descriptor in [*files, session]:
                os.close(descriptor)
            return None
        served = []
        if request.task is Task.PROGRAM:
            served = [session, self.controller]
        cell = self.progress.take()
        try:
            pid, pidfd = self.launcher.spawn(plan, [*files, *served], cell)
        except OSError as error:
            self.progress.give_back(cell)
            send(session, failed_to_start(f"start of a child: {error}").pack())
        else:
            if pid == 0:
                self.tell_progress(request.task, cell)
                return Started(request.task, len(files), cell)
            child = Running(pid, pidfd, cell, session, request)
            self.running[pidfd] = child
            self.poller.register(pidfd, select.POLLIN)
            if not (self.serves_program or served):
                self.awaited[session] = child
                self.poller.register(session, READABLE)
        for descriptor in files:
            os.close(descriptor)
        return None

    def tell_progress(self, task: Task, cell: int) -> None:
        """In a child that was set up. Of a compiled program's test the next line is the program's
        own, so this ends its being trusted.
        """
        if task is Task.TEST:
            self.progress.leave_trust(cell)
        else:
            self.progress.tell(cell, Phase.COMPILING)

    def prepared(self, message: bytes, file_count: int) -> tuple[Request, Plan]:
        """The request and the plan for it; the same message comes again and again."""
        key = message, file_count
        if key not in self.plans:
            if len(self.plans) >= KEPT_PLANS:
                self.plans.clear()
            request = Request.unpack(message)
            self.plans[key] = request, self.plan_of(request, file_count)
        return self.plans[key]

    def abandon(self, child: Running) -> None:
        """The controller gave the session up: kill what runs for it."""
        self.poller.unregister(child.session)
        del self.awaited[child.session]
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def finish(self, child: Running) -> None:
        """Say what became of a child that ended."""
        self.poller.unregister(child.pidfd)
        os.close(child.pidfd)
        _, wait_status, usage = os.wait4(child.pid, 0)
        phase, fault = self.progress.phase(child.cell), self.progress.fault(child.cell)
        self.progress.give_back(child.cell)
        if not (child.request.task is Task.PROGRAM and phase is Phase.RUNNING):
            outcome = Outcome(
                Phase.SETUP if fault else phase,
                child.ending,
                wait_status,
                usage.ru_utime + usage.ru_stime,
                time.monotonic() - child.started,
                usage.ru_maxrss * 1024,
                fault,
            )
            send(child.session, outcome.pack())
        if not self.serves_program:
            if self.awaited.pop(child.session, None) is not None:
                self.poller.unregister(child.session)
            os.close(child.session)


def send(session: int, message: bytes) -> None:
    """To a controller that may have given the session up."""
    try:
        os.write(session, message)
    except BrokenPipeError:
        return


def receive(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """The next message, empty at the end, and its descriptors."""
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
    message, ancillary, _, _ = channel.recvmsg(
        MAX_MESSAGE_BYTES, space, flags | socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return message, list(descriptors)
