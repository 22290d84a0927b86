"""Where the loop's batches of episodes come from: rolled out when it asks, or taken from a stream
that never stands still.

Theory of operation. Dialogue n of a run is the same problem with the same seed in both modes, on
any number of ranks. In sync mode each rank holds its share of a batch's dialogues while the trainer
waits. In async mode each rank has a thread with an event loop, in which a `Stream` holds its share
of the dialogues, number after number, while the rank's main thread trains; `batch` takes this
rank's share of what is done, and gathers all ranks'. Evaluations go on beside, in the same loop.

What ends it: leaving the `with` block cancels the dialogues under way. A run that goes on from a
checkpoint holds those anew that were not taken when it was saved: `state` has their numbers. None
that was taken is held again.
"""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

import torch.distributed as dist

from rlef_mega.config import RolloutConfig
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge
from rlef_mega.dialogues.rollout import (
    DialogueLoop,
    Rollout,
    Rules,
    derive_seed,
    gather_unless_lost,
    roll_out_my_share,
    roll_out_on_all_ranks,
)
from rlef_mega.dialogues.stream import Stream
from rlef_mega.engines import Engine, EngineLostError
from rlef_mega.problems import sample
from rlef_mega.run.event_loop import LoopThread
from rlef_mega.types import Episode, Problem


class Dialogues:
    """Which problem, with which seed, is dialogue `number` of a run; and how it is held."""

    def __init__(
        self,
        problems: Sequence[Problem],
        engine: Engine,
        judge: Judge,
        chat: ChatFormat,
        rules: Rules,
        *,
        batch: int,
        seed: int,
    ) -> None:
        self.problems, self.batch, self.seed = problems, batch, seed
        self.engine, self.judge, self.chat, self.rules = engine, judge, chat, rules
        self.loop = DialogueLoop(engine, judge, chat, rules)
        self.drawn: dict[int, list[Problem]] = {}  # by step, those asked for last

    def of_step(self, step: int) -> list[Problem]:
        """Those of numbers (step - 1) * batch and on."""
        if step not in self.drawn:
            drawn = sample(self.problems, step, self.batch, self.seed)
            self.drawn = {**dict(list(self.drawn.items())[-7:]), step: drawn}
        return self.drawn[step]

    async def hold(self, number: int) -> Episode | str:
        before, place = divmod(number, self.batch)
        problem = self.of_step(before + 1)[place]
        seed = derive_seed(derive_seed(self.seed, before + 1), place)
        return await self.loop.hold(problem, seed)


class Rollouts(Protocol):
    """Two ways to the same dialogues."""

    def batch(self, step: int) -> Rollout:
        """Of all ranks, collective. EngineLostError on all where one has lost its engine."""

    def begin(self, problems: Sequence[Problem], rules: Rules, seed: int) -> Future[Rollout]:
        """This rank's share of dialogues that are not trained on, with a future for it."""

    def published(self, version: int) -> None:
        """The engine has the weights of this version, and the batch before them was taken."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the run that goes on from it loses no dialogue."""


class RolloutsOnDemand:
    """A batch's dialogues are held when it is asked for, and the trainer waits."""

    def __init__(self, dialogues: Dialogues) -> None:
        self.dialogues = dialogues

    def batch(self, step: int) -> Rollout:
        d = self.dialogues
        seed = derive_seed(d.seed, step)
        return roll_out_on_all_ranks(d.of_step(step), d.engine, d.judge, d.chat, d.rules, seed)

    def begin(self, problems: Sequence[Problem], rules: Rules, seed: int) -> Future[Rollout]:
        d, done = self.dialogues, Future[Rollout]()
        share = roll_out_my_share(problems, d.engine, d.judge, d.chat, rules, seed)
        try:
            done.set_result(asyncio.run(share))
        except EngineLostError as error:
            done.set_exception(error)
        return done

    def published(self, version: int) -> None:
        """The next batch will have them."""

    def state(self) -> dict[str, Any]:
        return {}


class StreamedRollouts:
    """Dialogues go on in a thread; a context manager. `state` is what `state()` was at the
    checkpoint that this run goes on from, `version` that of its weights. After `steps` steps all
    dialogues before number `steps` * batch were taken: the last batches wait for the last ones."""

    def __init__(
        self,
        dialogues: Dialogues,
        *,
        version: int,
        steps: int,
        max_staleness: int,
        open_dialogues: int,
        max_passed_over: float,
        state: dict[str, Any],
    ) -> None:
        self.dialogues = dialogues
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.next_number = state.get("next_dialogue", version * dialogues.batch)
        self.passed_over = set(state.get("dialogues_passed_over", ()))  # and not taken yet
        new = range(self.next_number, steps * dialogues.batch)
        numbers = itertools.chain(sorted(self.passed_over), new)
        self.thread = LoopThread("rollouts")
        self.stream = Stream(
            dialogues.hold,
            itertools.islice(numbers, rank, None, ranks),
            batch=dialogues.batch // ranks,
            version=version,
            max_staleness=max_staleness,
            open_dialogues=open_dialogues,
            max_passed_over=max_passed_over,
        )

    def __enter__(self) -> "StreamedRollouts":
        self.thread.start()
        self.thread.loop.call_soon_threadsafe(self.stream.fill)
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.wait_for(self.stream.close())
        self.thread.close()

    def batch(self, step: int) -> Rollout:
        shares = gather_unless_lost(lambda: self.thread.wait_for(self.stream.take()))
        taken = {number: outcome for share in shares for number, outcome in share.items()}
        after_newest = max(self.next_number, 1 + max(taken))
        self.passed_over |= set(range(self.next_number, after_newest))
        self.passed_over -= taken.keys()
        self.next_number = after_newest
        return Rollout(tuple(taken[number] for number in sorted(taken)))

    def begin(self, problems: Sequence[Problem], rules: Rules, seed: int) -> Future[Rollout]:
        d = self.dialogues
        return self.thread.submit(
            roll_out_my_share(problems, d.engine, d.judge, d.chat, rules, seed)
        )

    def published(self, version: int) -> None:
        self.thread.loop.call_soon_threadsafe(self.stream.advance, version)

    def state(self) -> dict[str, Any]:
        """The first number after all that were taken, and those before it that were not."""
        return {
            "next_dialogue": self.next_number,
            "dialogues_passed_over": sorted(self.passed_over),
        }


@contextmanager
def open_rollouts(
    dialogues: Dialogues, rollout: RolloutConfig, *, version: int, steps: int, state: dict[str, Any]
) -> Iterator[Rollouts]:
    """As `rollout.mode` says; in async mode dialogues begin at once."""
    if rollout.mode == "sync":
        yield RolloutsOnDemand(dialogues)
        return
    servers = rollout.servers
    with StreamedRollouts(
        dialogues,
        version=version,
        steps=steps,
        max_staleness=rollout.max_staleness,
        open_dialogues=rollout.open_dialogues or servers.concurrency * len(servers.addresses),
        max_passed_over=rollout.max_passed_over,
        state=state,
    ) as streamed:
        yield streamed
