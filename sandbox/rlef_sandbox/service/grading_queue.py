"""The work that waits for the sandbox or runs in it, and the answers that are kept.

Theory of operation. Everything here runs in the event loop's thread, except `work`, which blocks
and runs in a pool of threads. The pool has more threads than the sandbox has workers, so a program
that sleeps delays no other. A request becomes a `Grading`, which waits for its turn (the clients'
addresses take turns, and each is served in the order of arrival). Its clients wait for its answer
behind a shield, so one that leaves does not disturb the others. If the last one leaves before the
work begins, the answer is cancelled and the work leaves the queue. Work that has begun is finished
and its answer kept, since a client that lost its connection will ask again.

A request id names one piece of work. While that is queued, runs, or its answer is kept, a request
with the same id joins it; the same id with another body is refused. Answers are kept for a bounded
time, in bounded number and size, the oldest dropped first. Failures are not kept.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
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


class GradingRefusedError(Exception):
    """A request that is not served: an HTTP status and the reason."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers


class Grading:
    """One piece of work: queued, running, or finished and kept."""

    def __init__(
        self, request_id: str, digest: bytes, client: str, work: Callable[[], GradingAnswer]
    ) -> None:
        self.request_id = request_id
        self.digest = digest
        self.client = client
        self.work = work
        self.answer: asyncio.Future[GradingAnswer] = asyncio.get_running_loop().create_future()
        self.arrived_s = time.monotonic()
        self.finished_s = 0.0
        self.clients = 0
        self.run: asyncio.Task[None] | None = None  # once it has a thread


class GradingQueue:
    """At most `jobs` pieces of work run, and at most `queue` wait, MOST_SHARE of them for one
    client.
    """

    def __init__(self, settings: ServerSettings, metrics: GradingMetrics) -> None:
        self.running = 0
        self._settings = settings
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(settings.jobs, thread_name_prefix="grading")
        self._queued: dict[str, deque[Grading]] = {}  # by client, the next one first
        self._open: dict[str, Grading] = {}  # queued or running
        self._open_of: Counter[str] = Counter()  # by client
        self._kept: OrderedDict[str, Grading] = OrderedDict()  # oldest first
        self._kept_bytes = 0
        self._mean_run_s = 0.05
        self.idle = asyncio.Event()  # set while nothing is queued and nothing runs
        self.idle.set()

    @property
    def waiting(self) -> int:
        return len(self._open) - self.running

    def find(self, request_id: str, digest: bytes) -> Grading | None:
        """Return the work of this id. Raises GradingRefusedError if it names another request."""
        self._forget_old()
        grading = self._open.get(request_id) or self._kept.get(request_id)
        if grading and grading.digest != digest:
            reason = f"request id {request_id!r} names a request with another body"
            raise GradingRefusedError(409, reason)
        return grading

    def submit(
        self, request_id: str, digest: bytes, client: str, work: Callable[[], GradingAnswer]
    ) -> Grading:
        """Queue new work. Raises GradingRefusedError if the queue or the client's share is full."""
        assert request_id not in self._open and request_id not in self._kept
        jobs, queue = self._settings.jobs, self._settings.queue
        share = jobs + math.ceil(MOST_SHARE * queue)
        if len(self._open) >= jobs + queue or self._open_of[client] >= share:
            raise self.full("the queue, or one client's share, is full")
        grading = Grading(request_id, digest, client, work)
        grading.answer.add_done_callback(lambda _: self._close(grading))
        self._open[request_id] = grading
        self._open_of[client] += 1
        self.idle.clear()
        self._queued.setdefault(client, deque()).append(grading)
        self._start_some()
        return grading

    async def answer(self, grading: Grading) -> GradingAnswer:
        """Wait for the answer. Raises what `work` raised."""
        grading.clients += 1
        try:
            return await asyncio.shield(grading.answer)
        finally:
            grading.clients -= 1
            if not (grading.clients or grading.run or grading.answer.done()):
                grading.answer.cancel()
                self._take_from_queue(grading)
                self._open.pop(grading.request_id)  # the id is free for another try
                self._metrics.cancelled.add()

    def full(self, reason: str) -> GradingRefusedError:
        """Return a refusal; its Retry-After estimates when half of the queue is finished."""
        estimate_s = self.waiting / 2 * self._mean_run_s / self._settings.jobs
        retry_s = max(1, min(MOST_RETRY_AFTER_S, round(estimate_s)))
        reason = f"{reason}; retry in {retry_s} s"
        return GradingRefusedError(429, reason, **{"Retry-After": str(retry_s)})

    def shut_down(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take_from_queue(self, grading: Grading) -> None:
        turns = self._queued[grading.client]
        turns.remove(grading)
        if not turns:
            del self._queued[grading.client]

    def _start_some(self) -> None:
        while self._queued and self.running < self._settings.jobs:
            client, turns = next(iter(self._queued.items()))
            grading = turns[0]
            self._take_from_queue(grading)
            if turns:
                self._queued[client] = self._queued.pop(client)  # behind the others
            self.running += 1
            grading.run = asyncio.create_task(self._run(grading))

    async def _run(self, grading: Grading) -> None:
        started_s = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(self._threads, grading.work)
        except Exception as error:
            if isinstance(error, SANDBOX_FAULTS):
                self._metrics.faults.add(type(error).__name__)
            grading.answer.set_exception(error)
        else:
            self._metrics.wait_s.observe(started_s - grading.arrived_s)
            for status in answer.statuses:
                self._metrics.results.add(status)
                if status is Status.SANDBOX_ERROR:
                    self._metrics.faults.add(status)
            grading.answer.set_result(answer)
        self.running -= 1
        run_s = time.monotonic() - started_s
        self._mean_run_s += SMOOTHING * (run_s - self._mean_run_s)
        self._start_some()

    def _close(self, grading: Grading) -> None:
        """Keep the answer of work that has ended, if it has one."""
        del grading.work  # it holds the request's body
        self._open_of -= Counter([grading.client])  # also drops clients that have none left
        if self._open.get(grading.request_id) is grading:
            del self._open[grading.request_id]
        if not self._open:
            self.idle.set()
        # reading the exception also marks it as retrieved, if no client is left
        if grading.answer.cancelled() or grading.answer.exception() is not None:
            return
        grading.finished_s = time.monotonic()
        self._kept[grading.request_id] = grading
        self._kept_bytes += len(grading.answer.result().body)
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
            self._kept_bytes -= len(oldest.answer.result().body)
