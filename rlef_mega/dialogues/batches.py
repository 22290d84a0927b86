"""The batches of episodes of a run: rolled out when the training loop asks (sync mode), or taken
from a stream of dialogues that never pauses (async mode).

Theory of operation. Dialogue n of a run has the same problem and the same seed in both modes and on
any number of ranks. In sync mode each rank runs its share of a batch's dialogues while the trainer
waits. In async mode each rank has a thread with an event loop, in which a `Stream` starts the
rank's share of the groups in the order of their numbers, many at a time, while the main thread
trains; `batch` takes finished groups from it and gathers those of all ranks. Evaluations run in the
same event loop. A group has the `rollout.samples_per_problem` dialogues about one problem, and is
never divided.

Leaving the `with` block cancels the dialogues that are running. A checkpoint stores the numbers of
the groups not taken yet (`state`); a resumed run starts these dialogues again. No dialogue is
trained on twice.
"""

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch.distributed as dist

from rlef_mega.config import TrainConfig
from rlef_mega.dialogues.rollout import DialogueLoop, Rollout, derive_seed, gather_unless_lost
from rlef_mega.dialogues.stream import Stream
from rlef_mega.engines import EngineLostError
from rlef_mega.problems import sample
from rlef_mega.run.event_loop import LivesInLoop
from rlef_mega.types import Episode, Problem


class NumberedDialogues:
    """The dialogues of a run by number: which problem and seed each has, and how to run it. Those
    about the same problem, a group, have `samples` successive numbers."""

    def __init__(
        self, problems: Sequence[Problem], loop: DialogueLoop, config: TrainConfig
    ) -> None:
        self.problems, self.loop, self.seed = problems, loop, config.run.seed
        self.batch = config.rollout.episodes_per_batch
        self.samples = config.rollout.samples_per_problem
        self.of_step = lru_cache(maxsize=8)(self.draw)  # each group of a step asks for its problems

    def draw(self, step: int) -> list[Problem]:
        """Return the problems of the dialogues (step - 1) * batch to step * batch - 1."""
        chosen = sample(self.problems, step, self.batch // self.samples, self.seed)
        return [problem for problem in chosen for _ in range(self.samples)]

    async def run_group(self, number: int) -> tuple[Episode | str, ...]:
        """Run the dialogues of a group at the same time. Returns their outcomes."""
        steps_before, group = divmod(number, self.batch // self.samples)
        dialogues = range(group * self.samples, (group + 1) * self.samples)  # of the step
        problem = self.of_step(steps_before + 1)[dialogues[0]]
        step_seed = derive_seed(self.seed, steps_before + 1)
        seeds = [derive_seed(step_seed, dialogue) for dialogue in dialogues]
        return tuple(await asyncio.gather(*(self.loop.run(problem, seed) for seed in seeds)))


class RolloutsOnDemand:
    """Sync mode: a batch's dialogues run when it is asked for, and the trainer waits."""

    def __init__(self, dialogues: NumberedDialogues) -> None:
        self.dialogues = dialogues

    def batch(self, step: int) -> Rollout:
        """Return the step's outcomes of all ranks. Collective. Raises EngineLostError on all ranks
        if one has lost its engine."""
        dialogues = self.dialogues
        seed = derive_seed(dialogues.seed, step)
        return dialogues.loop.run_on_all_ranks(dialogues.of_step(step), seed)

    def begin(self, loop: DialogueLoop, problems: Sequence[Problem], seed: int) -> Future[Rollout]:
        """Run this rank's share of dialogues that are not trained on, as in an evaluation; the
        future that is returned has their outcomes already."""
        done = Future[Rollout]()
        try:
            done.set_result(asyncio.run(loop.run_my_share(problems, seed)))
        except EngineLostError as error:
            done.set_exception(error)
        return done

    def published(self, version: int) -> None:
        """Do nothing: the next batch will use these weights."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps so that a resumed run loses no dialogue."""
        return {}


class StreamedRollouts(LivesInLoop):
    """Async mode: dialogues run in a thread while the trainer trains; a context manager.

    `version` (of the weights) and `state` (what `state()` returned) come from the checkpoint from
    which the run resumes. A run takes exactly the dialogues before number `run.steps` * batch, so
    its last batches wait for its last dialogues. The stream's numbers are those of groups.
    """

    def __init__(
        self,
        dialogues: NumberedDialogues,
        config: TrainConfig,
        *,
        version: int,
        state: dict[str, Any],
    ) -> None:
        super().__init__("rollouts")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        batch = dialogues.batch // dialogues.samples
        self.next_number = state.get("next_dialogue", version * batch)
        self.passed_over = set(state.get("dialogues_passed_over", ()))  # not taken yet
        new = range(self.next_number, config.run.steps * batch)
        numbers = itertools.chain(sorted(self.passed_over), new)
        rollout, servers = config.rollout, config.rollout.servers
        open_dialogues = rollout.open_dialogues or servers.concurrency * len(servers.addresses)
        self.stream = Stream(
            dialogues.run_group,
            itertools.islice(numbers, rank, None, ranks),
            batch=batch // ranks,
            version=version,
            max_staleness=rollout.max_staleness,
            open_dialogues=max(1, open_dialogues // dialogues.samples),
            max_passed_over=rollout.max_passed_over,
        )

    async def open(self) -> None:
        self.stream.fill()

    async def shut(self) -> None:
        await self.stream.close()

    def batch(self, step: int) -> Rollout:
        shares = gather_unless_lost(lambda: self.wait_for(self.stream.take()))
        taken = {number: outcome for share in shares for number, outcome in share.items()}
        after_newest = max(self.next_number, 1 + max(taken))
        self.passed_over |= set(range(self.next_number, after_newest))
        self.passed_over -= taken.keys()
        self.next_number = after_newest
        return Rollout(tuple(outcome for number in sorted(taken) for outcome in taken[number]))

    def begin(self, loop: DialogueLoop, problems: Sequence[Problem], seed: int) -> Future[Rollout]:
        """Start this rank's share of dialogues that are not trained on, as in an evaluation; its
        outcomes are the future's result."""
        return self.submit(loop.run_my_share(problems, seed))

    def published(self, version: int) -> None:
        """Note that the engine has the weights of this version. Called once after each batch."""
        self.loop.call_soon_threadsafe(self.stream.advance, version)

    def state(self) -> dict[str, Any]:
        """Return the first number after all groups taken, and the earlier ones not taken."""
        return {
            "next_dialogue": self.next_number,
            "dialogues_passed_over": sorted(self.passed_over),
        }


Rollouts = RolloutsOnDemand | StreamedRollouts


def open_rollouts(
    dialogues: NumberedDialogues, config: TrainConfig, *, version: int, state: dict[str, Any]
) -> AbstractContextManager[Rollouts]:
    """Return the rollouts of `rollout.mode` as a context manager. In async mode dialogues start as
    it is entered."""
    if config.rollout.mode == "sync":
        return nullcontext(RolloutsOnDemand(dialogues))
    return StreamedRollouts(dialogues, config, version=version, state=state)
