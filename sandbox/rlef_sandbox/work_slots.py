"""Which programs may run now: a bounded number that work, and a larger one that also sleep."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class WorkSlots:
    """At most `working` programs at work and `open_programs` under way. Threads wait for a slot in
    no promised order.
    """

    def __init__(self, working: int, open_programs: int) -> None:
        self.condition = threading.Condition()
        self.working, self._open = working, open_programs
        self._closed = False

    @contextlib.contextmanager
    def take(self) -> Iterator[WorkSlot]:
        """Wait for a slot. Raises RuntimeError if the sandbox is closed meanwhile."""
        with self.condition:
            self.condition.wait_for(lambda: self._closed or min(self.working, self._open) > 0)
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            self.working -= 1
            self._open -= 1
        slot = WorkSlot(self)
        try:
            yield slot
        finally:
            slot.sleep()
            with self.condition:
                self._open += 1
                self.condition.notify()

    def close(self) -> None:
        """End the waiting of all threads with an error."""
        with self.condition:
            self._closed = True
            self.condition.notify_all()


class WorkSlot:
    """The slot of one program, which counts as working unless it sleeps."""

    def __init__(self, slots: WorkSlots) -> None:
        self._slots = slots
        self._asleep = False

    def sleep(self) -> None:
        """Let another program start: this one waits instead of working."""
        with self._slots.condition:
            if not self._asleep:
                self._asleep = True
                self._slots.working += 1
                self._slots.condition.notify()

    def wake(self) -> None:
        """Count as working again, at once. If others have started meanwhile, more than `working`
        programs are at work until some end, and none starts.
        """
        with self._slots.condition:
            if self._asleep:
                self._asleep = False
                self._slots.working -= 1
