"""An event loop in a thread of its own: what it runs goes on while the caller's thread computes."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

Answer = TypeVar("Answer")


class LoopThread:
    """Runs coroutines that other threads hand to it, from `start` to `close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, work: Coroutine[Any, Any, Answer]) -> "Future[Answer]":
        """Begins it; the future has its result or its error."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def wait_for(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return self.submit(work).result()

    def close(self) -> None:
        """Ends the loop. What still runs in it is left where it stands: end it first."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class LivesInLoop:
    """What lives in an event loop of its own, beside its caller's thread: a context manager.
    Leaving it closes it, and so does an opening that fails."""

    def __init__(self, name: str) -> None:
        self.thread = LoopThread(name)

    async def open(self) -> None:
        """In the loop, first. What it raises, entering raises."""
        raise NotImplementedError

    async def shut(self) -> None:
        """In the loop, last."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.thread.start()
        try:
            self.thread.wait_for(self.open())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.thread.wait_for(self.shut())
        self.thread.close()
