"""Dialogues that run while the trainer trains, and batches of those that have finished.

Theory of operation. Everything runs in one event loop. Dialogues have numbers and start in that
order. At most `open_dialogues` run at a time. While the trainer's weights have `version`, at most

    batch * (version - first version + 1 + max_staleness)

dialogues have been started in all. So at most `max_staleness` + 1 batches are started and not yet
taken: this bounds the queue, and makes the engine wait for the trainer.

`take` waits until a batch of dialogues has finished, and until so few others are left that later
batches can take them before they are more than `max_staleness` versions old. For each v, at most

    batch * (v + max_staleness - version)

of the dialogues that started with version v or before may be left, because that many fit into the
batches until then. Before each `take` at most one batch more than that is left, so it is enough
that one batch of them has finished. Finished dialogues are taken in the order in which they
started. Of the oldest dialogues (one batch of them), at most the share `max_passed_over` may be
missing; without this bound, one batch would have the short dialogues and the next the long ones.

So every dialogue is taken exactly once, and before it is too old. A batch closes without the
longest dialogues; these are in a later batch. With `max_staleness` 0 this is synchronous training.

`close` cancels the running dialogues. If a dialogue raises an error, `take` raises it.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

START_TOGETHER = 200  # dialogues that start before the event loop runs anything else

Outcome = TypeVar("Outcome")


class Stream(Generic[Outcome]):
    """Runs dialogues: `run(number)` returns the outcome of one. `numbers` gives their order; their
    count must be a multiple of `batch`. `version` is that of the trainer's weights; call `advance`
    with each newer one, after a `take`."""

    def __init__(
        self,
        run: Callable[[int], Coroutine[Any, Any, Outcome]],
        numbers: Iterator[int],
        *,
        batch: int,
        version: int,
        max_staleness: int,
        open_dialogues: int,
        max_passed_over: float = 0.1,
    ) -> None:
        assert batch > 0 and open_dialogues > 0 and max_staleness >= 0
        self.run, self.numbers, self.batch = run, numbers, batch
        self.max_staleness, self.open_dialogues = max_staleness, open_dialogues
        self.max_passed_over = int(max_passed_over * batch)
        self.first_version = self.version = version
        self.started = 0
        # the version with which each untaken dialogue started, in the order of their starts
        self.versions: dict[int, int] = {}
        self.running: dict[int, asyncio.Task[Outcome]] = {}
        self.done: dict[int, Outcome] = {}
        self.error: BaseException | None = None
        self.changed = asyncio.Event()

    def fill(self) -> None:
        """Start the dialogues that may run, START_TOGETHER in each iteration of the event loop."""
        may_start = self.batch * (self.version - self.first_version + 1 + self.max_staleness)
        most = self.started + START_TOGETHER
        while self.started < may_start and len(self.running) < self.open_dialogues:
            if self.started == most:
                asyncio.get_running_loop().call_soon(self.fill)
                return
            number = next(self.numbers, None)
            if number is None:
                return
            self.started += 1
            self.versions[number] = self.version
            task = asyncio.get_running_loop().create_task(self.run(number))
            self.running[number] = task
            task.add_done_callback(partial(self.note, number))

    def note(self, number: int, task: "asyncio.Task[Outcome]") -> None:
        """Store the outcome or the error of a dialogue that has ended, unless it was cancelled."""
        if self.running.pop(number, None) is None or task.cancelled():
            return
        if error := task.exception():
            self.error = self.error or error
        else:
            self.done[number] = task.result()
            self.fill()
        self.changed.set()

    async def take(self) -> dict[int, Outcome]:
        """Wait for the next batch. Returns its outcomes by number, in order."""
        self.fill()
        while self.error is None and not self.may_close():
            self.changed.clear()
            await self.changed.wait()
        if self.error is not None:
            raise self.error
        oldest = [number for number in self.versions if number in self.done][: self.batch]
        for number in oldest:
            del self.versions[number]
        return {number: self.done.pop(number) for number in oldest}

    def may_close(self) -> bool:
        """Return whether a batch has finished, few of the oldest dialogues are missing, and those
        that are left can be taken before they are too old."""
        if len(self.done) < self.batch:
            return False
        oldest = itertools.islice(self.versions, self.batch)
        if sum(number in self.running for number in oldest) > self.max_passed_over:
            return False
        left = ready = 0
        untaken = Counter(self.versions.values())
        finished = Counter(self.versions[number] for number in self.done)
        for version in range(self.version - self.max_staleness, self.version + 1):
            left += untaken[version]
            ready += finished[version]
            batches_to_come = version + self.max_staleness - self.version
            if left - min(ready, self.batch) > self.batch * batches_to_come:
                return False
        return True

    def advance(self, version: int) -> None:
        """Note that the trainer has published weights of this version, and start more dialogues."""
        assert version == self.version + 1, "a batch is taken for each version"
        self.version = version
        self.fill()

    async def close(self) -> None:
        """Cancel what runs, and wait until it has ended."""
        self.open_dialogues = 0
        tasks = list(self.running.values())
        self.running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
