"""The work that waits for the sandbox or runs in it, and the answers that are kept.

Theory of operation. Everything here runs in the event loop's thread, except `work`, which blocks
and runs in a pool of threads. The pool has more threads than the sandbox has workers, so a program
that sleeps delays no other. A request becomes a `Grading`: an asyncio task that waits for its turn
(the clients' addresses take turns, and each is served in the order of arrival), then for its
thread. Its clients wait for the task behind a shield, so one that leaves does not disturb the
others. If the last one leaves before the work begins, the task is cancelled and leaves the queue.
Work that has begun is finished and its answer kept, since a client that lost its connection will
ask again.

A request id names one piece of work. While that is queued, runs, or its answer is kept, a request
with the same id joins it; the same id with another body is refused. Answers are kept for a bounded
time, in bounded number and size, the oldest dropped first. Failures are not kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..verdict import Status
from .command import ServerSettings
from .metrics import GradingMetrics

MOST_SHARE = 3 / 4  # of the queue, for one client
SMOOTHING = 0.05  # weight of the newest run in the mean from which Retry-After follows
MOST_RETRY_AFTER_S = 30
# Errors of the sandbox, not of the program.
SANDBOX_FAULTS = (OSError, RuntimeError, MemoryError)


class GradingAnswer(NamedTuple):
    """The body for the client, and the verdicts in it, for counting."""

    body: bytes
    statuses: tuple[Status, ...]


class QueueFullError(Exception):
    """The queue is full; retry after `retry_after_s`."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; retry after {retry_after_s} s")
        self.retry_after_s = retry_after_s


class IdTakenError(Exception):
    """The request id names another request."""


class Grading:
    """One piece of work: queued, running, or finished and kept."""

    def __init__(self, request_id: str, digest: bytes) -> None:
        self.request_id = request_id
        self.digest = digest
        self.arrived_s = time.monotonic()
        self.finished_s = 0.0
        self.clients = 0
        self.running = False
        self.task: asyncio.Task[GradingAnswer]


class Turns:
    """A number of places. When all are taken, clients take turns for those that become free."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by client, the next one first

    @contextlib.asynccontextmanager
    async def take(self, client: str) -> AsyncIterator[None]:
        """Wait for a place, and give it back in the end."""
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                turns = self._waiting.get(client, deque())
                if not turn.cancelled():  # it was this one's turn
                    self._pass_on()
                elif turn in turns:
                    turns.remove(turn)
                    if not turns:
                        del self._waiting[client]
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            client = next(iter(self._waiting))
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class GradingQueue:
    """At most `jobs` pieces of work run, and at most `queue` wait, MOST_SHARE of them for one
    client.
    """

    def __init__(self, settings: ServerSettings, metrics: GradingMetrics) -> None:
        self.running = 0
        self._settings = settings
        self._metrics = metrics
        self._turns = Turns(settings.jobs)
        self._threads = ThreadPoolExecutor(settings.jobs, thread_name_prefix="grading")
        self._open: dict[str, Grading] = {}
        self._open_of: Counter[str] = Counter()  # by client
        self._kept: OrderedDict[str, Grading] = OrderedDict()  # oldest first
        self._kept_bytes = 0
        self._mean_run_s = 0.05
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        return len(self._open) - self.running

    def find(self, request_id: str, digest: bytes) -> Grading | None:
        """Return the work of this id. Raises IdTakenError if the id names another request."""
        self._forget_old()
        grading = self._open.get(request_id) or self._kept.get(request_id)
        if grading and grading.digest != digest:
            raise IdTakenError(f"request id {request_id!r} names a request with another body")
        return grading

    def submit(
        self, request_id: str, digest: bytes, client: str, work: Callable[[], GradingAnswer]
    ) -> Grading:
        """Queue new work of a client. Raises QueueFullError if the queue, or its share, is full."""
        assert request_id not in self._open and request_id not in self._kept
        jobs, queue = self._settings.jobs, self._settings.queue
        share = jobs + math.ceil(MOST_SHARE * queue)
        if len(self._open) >= jobs + queue or self._open_of[client] >= share:
            raise QueueFullError(self.retry_after_s())
        grading = Grading(request_id, digest)
        self._open[request_id] = grading
        self._open_of[client] += 1
        self._idle.clear()
        grading.task = asyncio.create_task(self._do(grading, client, work))
        grading.task.add_done_callback(lambda _: self._close(grading, client))
        return grading

    async def answer(self, grading: Grading) -> GradingAnswer:
        """Wait for the answer. Raises what `work` raised."""
        grading.clients += 1
        try:
            return await asyncio.shield(grading.task)
        finally:
            grading.clients -= 1
            if not (grading.clients or grading.running or grading.task.done()):
                grading.task.cancel()
                self._open.pop(grading.request_id, None)  # the id is free for another try
                self._metrics.cancelled.add()

    def retry_after_s(self) -> int:
        """Estimate the whole seconds in which half of the queue will be finished."""
        estimate_s = self.waiting / 2 * self._mean_run_s / self._settings.jobs
        return max(1, min(MOST_RETRY_AFTER_S, round(estimate_s)))

    async def drained(self) -> None:
        """Wait until nothing is queued and nothing runs."""
        await self._idle.wait()

    def shut_down(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _do(
        self, grading: Grading, client: str, work: Callable[[], GradingAnswer]
    ) -> GradingAnswer:
        async with self._turns.take(client):
            grading.running = True
            self.running += 1
            started_s = time.monotonic()
            try:
                answer = await asyncio.get_running_loop().run_in_executor(self._threads, work)
            except SANDBOX_FAULTS as error:
                self._metrics.faults.add(type(error).__name__)
                raise
            finally:
                self.running -= 1
                run_s = time.monotonic() - started_s
                self._mean_run_s += SMOOTHING * (run_s - self._mean_run_s)
        self._metrics.wait_s.observe(started_s - grading.arrived_s)
        for status in answer.statuses:
            self._metrics.results.add(status)
            if status is Status.SANDBOX_ERROR:
                self._metrics.faults.add(status)
        return answer

    def _close(self, grading: Grading, client: str) -> None:
        """Keep the answer of a task that has ended, if it has one."""
        self._open_of -= Counter([client])  # and drop those that have none
        if self._open.get(grading.request_id) is grading:
            del self._open[grading.request_id]
        if not self._open:
            self._idle.set()
        # reading the exception also marks it as retrieved, if no client is left
        if grading.task.cancelled() or grading.task.exception() is not None:
            return
        grading.finished_s = time.monotonic()
        self._kept[grading.request_id] = grading
        self._kept_bytes += len(grading.task.result().body)
        self._forget_old()

    def _forget_old(self) -> None:
        keep, expired_s = self._settings, time.monotonic() - self._settings.keep_s
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if (
                oldest.finished_s >= expired_s
                and len(self._kept) <= keep.keep_answers
                and self._kept_bytes <= keep.keep_mib << 20
            ):
                return
            del self._kept[oldest.request_id]
            self._kept_bytes -= len(oldest.task.result().body)
