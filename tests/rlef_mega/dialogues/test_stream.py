"""What the stream promises, for dialogues of random lengths: each is taken once, none too old, and
never more are under way than the bound allows."""

import asyncio
import itertools
import random

import pytest

from rlef_mega.dialogues.stream import Stream


class Dialogues:
    """Each lasts some turns of the event loop, a few of them very many."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.running = self.most_at_once = 0
        self.started: list[int] = []
        self.ended: list[int] = []

    async def hold(self, number: int) -> str:
        self.started.append(number)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            for _ in range(min(int(self.random.paretovariate(0.7)), 500)):
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        self.ended.append(number)
        return f"outcome {number}"


async def train(stream: Stream, dialogues: Dialogues, steps: int, pace: random.Random):
    """Take the batches of `steps` steps. Returns, for each dialogue of each batch, the version of
    the weights with which it started."""
    batches = []
    for _ in range(steps):
        started = dict(stream.versions)
        taken = await stream.take()
        batches.append({number: started.get(number, stream.version) for number in taken})
        assert all(outcome == f"outcome {number}" for number, outcome in taken.items())
        for _ in range(pace.randrange(40)):  # the trainer trains
            await asyncio.sleep(0)
        stream.advance(stream.version + 1)
    return batches


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_every_dialogue_is_taken_once_and_none_too_old(seed, max_staleness):
    async def run() -> None:
        pace = random.Random(seed)
        batch, open_dialogues = pace.choice([1, 2, 5, 16]), pace.choice([1, 7, 1000])
        max_passed_over = pace.choice([0, 0.2, 1])
        dialogues = Dialogues(seed)
        stream = Stream(
            dialogues.hold,
            itertools.count(),
            batch=batch,
            version=3,
            max_staleness=max_staleness,
            open_dialogues=open_dialogues,
            max_passed_over=max_passed_over,
        )
        steps = 30
        batches = await train(stream, dialogues, steps, pace)
        taken = [number for numbers in batches for number in numbers]
        assert [len(numbers) for numbers in batches] == [batch] * steps
        assert len(set(taken)) == len(taken)
        assert dialogues.started == list(range(len(dialogues.started)))  # in order
        assert sorted(taken + list(stream.versions)) == list(range(stream.started))  # none left out
        for step, numbers in enumerate(batches):
            assert all(3 + step - version <= max_staleness for version in numbers.values())
            oldest = [n for n in range(stream.started) if n not in taken[: step * batch]][:batch]
            assert len(set(oldest) - numbers.keys()) <= max_passed_over * batch
        assert dialogues.most_at_once <= open_dialogues
        assert stream.started <= batch * (steps + 1 + max_staleness)  # back-pressure
        await stream.close()
        assert dialogues.running == 0

    asyncio.run(run())


def test_without_staleness_a_batch_is_the_next_numbers():
    async def run() -> None:
        stream = Stream(
            Dialogues(0).hold,
            itertools.count(),
            batch=4,
            version=0,
            max_staleness=0,
            open_dialogues=9,
        )
        for step in range(3):
            assert list(await stream.take()) == [4 * step + place for place in range(4)]
            stream.advance(step + 1)
        await stream.close()

    asyncio.run(run())


class Patient:
    """Dialogues that end when they are told to."""

    def __init__(self) -> None:
        self.ends: dict[int, asyncio.Event] = {}

    async def hold(self, number: int) -> int:
        self.ends[number] = asyncio.Event()
        await self.ends[number].wait()
        return number

    async def end(self, *numbers: int) -> None:
        await asyncio.sleep(0.001)
        for number in numbers:
            self.ends[number].set()
        await asyncio.sleep(0.001)


def test_long_dialogues_are_passed_over_until_they_would_be_too_old():
    """max_staleness 2, a batch of 1: dialogues 0 and 1 last long, and both began with version 0. So
    one of them must be taken at version 1, although newer ones are done; else the other would
    become too old."""

    async def run() -> None:
        patient = Patient()
        stream = Stream(
            patient.hold,
            itertools.count(),
            batch=1,
            version=0,
            max_staleness=2,
            open_dialogues=9,
            max_passed_over=1,
        )
        taking = asyncio.ensure_future(stream.take())
        await patient.end(2)
        assert list(await taking) == [2]
        stream.advance(1)
        taking = asyncio.ensure_future(stream.take())
        await patient.end(3)
        assert not taking.done()
        await patient.end(1)
        assert list(await taking) == [1]
        stream.advance(2)
        taking = asyncio.ensure_future(stream.take())
        await patient.end(4)
        assert not taking.done()
        await patient.end(0)
        assert list(await taking) == [0]
        assert list(stream.versions) == [3, 4]
        await stream.close()

    asyncio.run(run())


def test_an_error_of_a_dialogue_is_raised_where_batches_are_taken():
    async def fail(number: int) -> None:
        raise ValueError(f"dialogue {number}")

    async def run() -> None:
        stream = Stream(
            fail, itertools.count(), batch=2, version=0, max_staleness=1, open_dialogues=2
        )
        with pytest.raises(ValueError, match="dialogue 0"):
            await stream.take()
        await stream.close()

    asyncio.run(run())
