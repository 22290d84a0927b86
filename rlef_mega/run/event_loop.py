"""An asyncio event loop in a thread of its own, which runs while the caller's thread computes."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

Answer = TypeVar("Answer")


class LivesInLoop:
    """Base of an object that lives in an event loop of its own, which runs the coroutines that
    other threads submit. A context manager: `open` runs in the loop on entry, and `shut` on exit or
    when `open` fails."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self.thread.start()

    async def open(self) -> None:
        """Prepare the object; called first, in the loop. Its errors are raised to the caller."""
        raise NotImplementedError

    async def shut(self) -> None:
        """Release what the object holds: tasks, connections. Called last, in the loop, and also if
        `open` failed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.wait_for(self.open())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, work: Coroutine[Any, Any, Answer]) -> "Future[Answer]":
        """Start a coroutine in the loop, from another thread. Returns a future of its result or
        error."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def wait_for(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a coroutine and return its result, or raise its error."""
        return self.submit(work).result()

    def close(self) -> None:
        """Shut the object and end the loop. Its tasks must have ended before: the rest is
        abandoned, not cancelled."""
        self.wait_for(self.shut())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
