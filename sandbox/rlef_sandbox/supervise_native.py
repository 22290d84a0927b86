"""The zygote's loop in C (csrc/serve.c), and what it asks of Python."""

from __future__ import annotations

import ctypes

from .launch import RESERVED_DESCRIPTORS, NativeLauncher, NativePlan, Progress
from .protocol import Request, Task
from .supervise import PlanOf, Started

MAX_PLANS, MAX_REQUEST_BYTES = 32, 64
PREPARE = 1  # rlef_serve returns: a request has no plan yet; else 0, in a child


class Prepared(ctypes.Structure):
    """struct prepared in serve.c."""

    _fields_ = [
        ("message", ctypes.c_uint8 * MAX_REQUEST_BYTES),
        ("length", ctypes.c_int32),
        ("file_count", ctypes.c_int32),
        ("task", ctypes.c_int32),
        ("cpu_s", ctypes.c_double),
        ("wall_s", ctypes.c_double),
        ("plan", NativePlan),
    ]


class State(ctypes.Structure):
    """The head of struct server in serve.c, which owns the memory."""

    _fields_ = [
        ("channel", ctypes.c_int32),
        ("controller", ctypes.c_int32),
        ("serves_program", ctypes.c_int32),
        ("pending", ctypes.c_int32),
        ("message", ctypes.c_uint8 * MAX_REQUEST_BYTES),
        ("length", ctypes.c_int32),
        ("files", ctypes.c_int32 * RESERVED_DESCRIPTORS),
        ("file_count", ctypes.c_int32),
        ("session", ctypes.c_int32),
        ("task", ctypes.c_int32),
        ("cell", ctypes.c_int32),
        ("plan_count", ctypes.c_int32),
        ("page", ctypes.c_void_p),
        ("plans", Prepared * MAX_PLANS),
    ]


class NativeSupervisor:
    """The loop over one channel; one at a time in a process."""

    name = "native"

    def __init__(
        self,
        library: str,
        channel: int,
        controller: int,
        plan_of: PlanOf,
        *,
        serves_program: bool,
    ) -> None:
        # with the interpreter lock held, as befits a fork; sound in a process with one thread
        functions = ctypes.PyDLL(library, use_errno=True)
        functions.rlef_listen.restype = ctypes.POINTER(State)
        self.progress = Progress()
        self.launcher = NativeLauncher(functions, self.progress)
        self.plan_of = plan_of
        page = ctypes.c_void_p(self.progress.address)
        self._state = functions.rlef_listen(channel, controller, int(serves_program), page)
        self._serve = functions.rlef_serve

    def serve(self) -> Started:
        """Answer requests for ever. Returns only in forked children."""
        while self._serve(self._state) == PREPARE:
            self._prepare()
        state = self._state.contents
        return Started(Task(state.task), state.file_count, state.cell)

    def _prepare(self) -> None:
        """A plan for the request that waits; the oldest ones make room."""
        state = self._state.contents
        message = bytes(state.message[: state.length])
        request = Request.unpack(message)
        plan = self.plan_of(request, state.file_count)
        if state.plan_count == MAX_PLANS:
            state.plan_count = 0
        kept = state.plans[state.plan_count]
        kept.message[: len(message)] = message
        kept.length, kept.file_count, kept.task = len(message), state.file_count, request.task
        kept.cpu_s, kept.wall_s = request.cpu_s, request.wall_s
        kept.plan = self.launcher.prepared(plan)
        state.plan_count += 1

    def forget(self) -> None:
        """In a program server, before it listens to a channel of its own."""
