"""Who may run now: a bounded number of programs that work, and of programs that wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turn:
    """One job's turn. It counts as working until it is told to sleep."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.asleep = False

    def sleep(self) -> None:
        """A run of the job waits instead of working: another job may start beside it."""
        self._turns.sleep(self)

    def wake(self) -> None:
        """Its next run works until it is seen to sleep. It goes on at once: until others end, as
        many more are at work, and none starts."""
        self._turns.wake(self)


class Turns:
    """At most `working` jobs at work and `open_jobs` under way, first come, first served or not:
    threads wait for their turn, in no promised order.
    """

    def __init__(self, working: int, open_jobs: int) -> None:
        self._condition = threading.Condition()
        self._working, self._open = working, open_jobs
        self._closed = False

    @contextlib.contextmanager
    def take(self) -> Iterator[Turn]:
        turn = Turn(self)
        with self._condition:
            self._condition.wait_for(lambda: self._closed or min(self._working, self._open) > 0)
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            self._working -= 1
            self._open -= 1
        try:
            yield turn
        finally:
            with self._condition:
                self._open += 1
                self._working += not turn.asleep
                self._condition.notify()

    def sleep(self, turn: Turn) -> None:
        with self._condition:
            if not turn.asleep:
                turn.asleep = True
                self._working += 1
                self._condition.notify()

    def wake(self, turn: Turn) -> None:
        with self._condition:
            if turn.asleep:
                turn.asleep = False
                self._working -= 1

    def close(self) -> None:
        """Whoever waits for a turn is told that there will be none."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
