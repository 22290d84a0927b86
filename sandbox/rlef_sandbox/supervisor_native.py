"""The Python side of the supervisor in C (csrc/serve.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from .launch_plan import LaunchPlan
from .protocol import Task, ZygoteRequest

MAX_REQUEST_BYTES = 64
TASKS = {int(task): task for task in Task}  # a call of the enum takes longer
PREPARE = 0  # rlef_serve returned because a request has no plan yet


class SupervisorState(ctypes.Structure):
    """The head of `struct server` in serve.c, which owns the memory."""

    _fields_ = [
        ("message", ctypes.c_uint8 * MAX_REQUEST_BYTES),
        ("length", ctypes.c_int32),
        ("file_count", ctypes.c_int32),
    ]


class NativeSupervisor:
    """Supervises the children requested over the control channel."""

    name = "native"

    def __init__(
        self,
        library: str,
        channel: int,
        controller: int,
        last_id: int,
        plan_of: Callable[[ZygoteRequest, int], LaunchPlan],
    ) -> None:
        # PyDLL holds the GIL, as a fork requires. This is safe in a process with one thread.
        self._functions = ctypes.PyDLL(library)
        self._functions.rlef_listen.restype = ctypes.POINTER(SupervisorState)
        self._plan_of = plan_of
        state = self._functions.rlef_listen(channel, controller, last_id)
        # made here once, rather than in each child, which copies every page that it writes
        self._state, self._address = state.contents, ctypes.byref(state.contents)
        self._leave_trust = self._functions.rlef_leave_trust

    def serve(self) -> tuple[Task, int]:
        """Answer requests until the process ends. Returns only in a forked child, with its task and
        the number of its files.
        """
        state = self._state
        while (started := self._functions.rlef_serve(self._address)) == PREPARE:
            request = ZygoteRequest.unpack(bytes(state.message[: state.length]))
            plan = self._plan_of(request, state.file_count)
            self._functions.rlef_prepare(self._address, ctypes.byref(plan))
        return TASKS[started >> 8], started & 0xFF

    def leave_trust(self) -> None:
        """Report that the program begins; from now on this child cannot report anything."""
        self._leave_trust(self._address)

    def fork_confined(self, plan: LaunchPlan, files: list[int]) -> int:
        """Fork. Returns 1, and 0 in the child, which is confined by `plan`."""
        progress = ctypes.c_uint64()  # `struct progress`; it is not read here
        plan.files[: len(files)] = files
        plan.progress = ctypes.addressof(progress)
        started = self._functions.rlef_fork(ctypes.byref(plan))
        if started < 0:
            raise OSError("no child with the layers of this plan can be started")
        return started

    def wait(self, _: int) -> int:
        """Return the wait status of the child that `fork_confined` started."""
        return self._functions.rlef_wait()
