"""Decide which programs may run: a bounded number that work, and others that sleep."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class WorkSlots:
    """At most `working` programs at work and `open_programs` under way. Threads get a slot in the
    order in which they asked, but none begins a program while `open_programs` are under way.
    """

    def __init__(self, working: int, open_programs: int) -> None:
        self.lock = threading.Lock()
        self.working, self._open = working, open_programs
        self._waiting: deque[tuple[threading.Event, int]] = deque()
        self._closed = False

    @contextlib.contextmanager
    def take(self) -> Iterator[WorkSlot]:
        """Wait for a slot. Raises RuntimeError if the sandbox is closed meanwhile."""
        self.acquire(1)
        slot = WorkSlot(self)
        try:
            yield slot
        finally:
            slot.sleep()
            with self.lock:
                self.release(0, 1)

    def acquire(self, opened: int) -> None:
        """Wait, in turn, until a program may work. `opened` is 1 for a program that begins, which
        counts as under way from then on, and 0 for one that was asleep.

        Raises RuntimeError if the sandbox is closed meanwhile.
        """
        asked = (threading.Event(), opened)
        with self.lock:
            self._waiting.append(asked)
            self.release(0, 0)
            if self._closed:
                asked[0].set()
        try:
            asked[0].wait()
        except BaseException:  # a keyboard interrupt
            with self.lock:
                if asked in self._waiting:
                    self._waiting.remove(asked)
                else:
                    self.release(1, opened)
            raise
        if self._closed:
            raise RuntimeError("the sandbox is closed")

    def release(self, working: int, opened: int) -> None:
        """Give back this many slots, with the lock held, and start programs that may run now."""
        self.working += working
        self._open += opened
        while self.working > 0:
            first = next((one for one in self._waiting if one[1] <= self._open), None)
            if first is None:
                return
            self._waiting.remove(first)
            self.working -= 1
            self._open -= first[1]
            first[0].set()

    def close(self) -> None:
        """Wake all threads that wait in `acquire`, which raises RuntimeError then."""
        with self.lock:
            self._closed = True
            for turn, _ in self._waiting:
                turn.set()


class WorkSlot:
    """The slot of one program, which counts as working unless it sleeps."""

    def __init__(self, slots: WorkSlots) -> None:
        self._slots = slots
        self._asleep = False

    def sleep(self) -> None:
        """Let another program start, because this one waits instead of working."""
        with self._slots.lock:
            if not self._asleep:
                self._asleep = True
                self._slots.release(1, 0)

    def wake(self, *, wait: bool = True) -> bool:
        """Count as working again, once that is allowed. Without `wait`, return False if it is not
        allowed now. Raises RuntimeError if the sandbox is closed meanwhile.
        """
        with self._slots.lock:
            if self._asleep and self._slots.working > 0:
                self._asleep = False
                self._slots.working -= 1
            if not self._asleep or not wait:
                return not self._asleep
        self._slots.acquire(0)
        self._asleep = False
        return True
