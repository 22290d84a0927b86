"""An event loop whose clock jumps to the next timer: hours of waiting pass in seconds, and a run
repeats exactly.

What is computed takes no time; only what is waited for does. Everything must be of this one loop:
where nothing is ready and no timer is set, nothing can ever happen, which is an error.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class JumpingSelector(selectors.DefaultSelector):
    """Sleeps by putting its clock forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("all coroutines wait for each other: no timer is set")
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def run(work: Coroutine[Any, Any, Answer]) -> Answer:
    """As asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
