"""The supervisor in C (csrc/serve.c): what it asks of Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from . import kernel
from .launch_plan import LaunchPlan
from .protocol import Started, Task, ZygoteRequest

MAX_REQUEST_BYTES = 64
PREPARE = 1  # rlef_serve returned because a request has no plan yet; 0 means: in a child


class SupervisorState(ctypes.Structure):
    """The head of `struct server` in serve.c, which owns the memory."""

    _fields_ = [
        ("message", ctypes.c_uint8 * MAX_REQUEST_BYTES),
        ("length", ctypes.c_int32),
        ("file_count", ctypes.c_int32),
        ("task", ctypes.c_int32),
    ]


class NativeSupervisor:
    """Supervises the children that are asked for over one channel; one at a time in a process."""

    name = "native"

    def __init__(
        self,
        library: str,
        channel: int,
        controller: int,
        plan_of: Callable[[ZygoteRequest, int], LaunchPlan],
        *,
        serves_program: bool,
    ) -> None:
        # PyDLL keeps the interpreter lock, as a fork requires. Sound in a process with one thread.
        self._functions = ctypes.PyDLL(library, use_errno=True)
        self._functions.rlef_listen.restype = ctypes.POINTER(SupervisorState)
        self._plan_of = plan_of
        self._state = self._functions.rlef_listen(channel, controller, int(serves_program))
        # looked up here: each child would do it anew
        self._leave_trust = self._functions.rlef_leave_trust

    def serve(self) -> Started:
        """Answer requests for ever. Returns only in forked children."""
        while self._functions.rlef_serve(self._state) == PREPARE:
            state = self._state.contents
            request = ZygoteRequest.unpack(bytes(state.message[: state.length]))
            plan = self._plan_of(request, state.file_count)
            self._functions.rlef_prepare(self._state, ctypes.byref(plan))
        state = self._state.contents
        return Started(Task(state.task), state.file_count)

    def leave_trust(self) -> None:
        """Report that the program begins; from now on this child cannot report anything."""
        self._leave_trust(self._state)

    def fork_confined(self, plan: LaunchPlan, files: list[int]) -> int:
        """Fork. Returns the child's id, and 0 in the child, which is confined by `plan`."""
        progress = ctypes.c_uint64()  # `struct progress`; it is not read here
        plan.files[: len(files)] = files
        plan.progress = ctypes.addressof(progress)
        return kernel.checked(self._functions.rlef_fork(ctypes.byref(plan)), "fork")
