"""Dialogues that go on while the trainer trains, and batches of those that are done.

Theory of operation. Everything is of one event loop. Dialogues have numbers, and start in that
order. Who runs: at most `open_dialogues` at a time, and while the trainer's weights have version v,
no more have been started in all than

    batch * (v - first version + 1 + max_staleness)

so what is started and not yet taken is at most `max_staleness` + 1 batches: the queue is bounded,
and its bound is what holds the engine back. Who waits: `take` waits for a batch of outcomes, and
until what it leaves behind can still be taken in time: of the dialogues that started with weights
of version v or before, at most

    batch * (v + max_staleness - version)

may be left, for so many are the batches before they would be more than `max_staleness` versions
old. It can always be had, because before each `take` there is at most one batch more than that.
What is done is taken in the order in which it was started; of the oldest dialogues, a batch long,
at most `max_passed_over` (a share) may be missing. Without this bound a batch would be those that
end first, and the next one those that do not.

So every dialogue that was started is taken, exactly once, and none when it is too old; a batch
closes without the longest ones, which are in a later one, neither dropped nor rare. With
`max_staleness` 0 this is synchronous training.

What ends it: `close`, which cancels what runs. An error of a dialogue is raised by `take`.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

START_TOGETHER = 200  # dialogues, before the loop looks after what else is ready

Outcome = TypeVar("Outcome")


class Stream(Generic[Outcome]):
    """Holds dialogues: `hold(number)` is one of them, to its outcome. `numbers` says which, in
    order; where it ends, whole batches must be left to take. `version` is that of the trainer's
    weights; `advance` tells of each newer one, after a `take`."""

    def __init__(
        self,
        hold: Callable[[int], Coroutine[Any, Any, Outcome]],
        numbers: Iterator[int],
        *,
        batch: int,
        version: int,
        max_staleness: int,
        open_dialogues: int,
        max_passed_over: float = 0.1,
    ) -> None:
        assert batch > 0 and open_dialogues > 0 and max_staleness >= 0
        self.hold, self.numbers, self.batch = hold, numbers, batch
        self.max_staleness, self.open_dialogues = max_staleness, open_dialogues
        self.max_passed_over = int(max_passed_over * batch)
        self.first_version = self.version = version
        self.started = 0
        # of the weights as each started that is not taken, in the order in which they did
        self.versions: dict[int, int] = {}
        self.left: Counter[int] = Counter()  # how many of these, by version,
        self.ready: Counter[int] = Counter()  # and how many of them are done
        self.running: dict[int, asyncio.Task[Outcome]] = {}
        self.done: dict[int, Outcome] = {}
        self.error: BaseException | None = None
        self.changed = asyncio.Event()

    def fill(self) -> None:
        """Start as many as may run; of very many, not all in one turn of the loop."""
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
            self.left[self.version] += 1
            task = asyncio.get_running_loop().create_task(self.hold(number))
            self.running[number] = task
            task.add_done_callback(partial(self.note, number))

    def note(self, number: int, task: "asyncio.Task[Outcome]") -> None:
        """One has ended, with its outcome or an error, or because of `close`."""
        if self.running.pop(number, None) is None or task.cancelled():
            return
        if error := task.exception():
            self.error = self.error or error
        else:
            self.done[number] = task.result()
            self.ready[self.versions[number]] += 1
            self.fill()
        self.changed.set()

    async def take(self) -> dict[int, Outcome]:
        """The next batch: outcomes by number, in order."""
        self.fill()
        while self.error is None and not self.may_close():
            self.changed.clear()
            await self.changed.wait()
        if self.error is not None:
            raise self.error
        oldest = itertools.islice((n for n in self.versions if n in self.done), self.batch)
        taken = {number: self.done.pop(number) for number in list(oldest)}
        for number in taken:
            version = self.versions.pop(number)
            self.left[version] -= 1
            self.ready[version] -= 1
        return taken

    def may_close(self) -> bool:
        """A batch is done, of the oldest few are missing, and what is left behind can be taken
        before it is too old."""
        if len(self.done) < self.batch:
            return False
        oldest = itertools.islice(self.versions, self.batch)
        if sum(number in self.running for number in oldest) > self.max_passed_over:
            return False
        left = ready = 0
        for version in range(self.version - self.max_staleness, self.version + 1):
            left += self.left[version]
            ready += self.ready[version]
            batches_to_come = version + self.max_staleness - self.version
            if left - min(ready, self.batch) > self.batch * batches_to_come:
                return False
        return True

    def advance(self, version: int) -> None:
        """The trainer's weights have this version from now on."""
        assert version == self.version + 1, "a batch is taken for each version"
        self.version = version
        self.fill()

    async def close(self) -> None:
        """Ends what runs, and waits until it has ended."""
        self.open_dialogues = 0
        tasks = list(self.running.values())
        self.running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
