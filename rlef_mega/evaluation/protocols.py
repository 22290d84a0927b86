"""The dialogues of an evaluation: which there are, and holding those that its file lacks.

Theory of operation. So many workers, all in one event loop, take the next missing dialogue from one
queue, hold it, and write it down before they take another. A worker opens its next session as it
closes the last one, so the embedded engine's waves stay full. A fault of engine or sandbox drops
the dialogue, which is written down as such; a lost engine, a full disk or a request that is wrong
end the evaluation, and what was written stays.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.records import TEXT_LIMIT, judged_record, problem_record
from rlef_mega.dialogues.rollout import (
    DialogueLoop,
    Distractor,
    derive_seed,
)
from rlef_mega.evaluation.behaviour import outcome_of
from rlef_mega.evaluation.dialogue_file import DialogueFile, Key, Record, key_of, read_dialogues
from rlef_mega.run.progress import StepProgress
from rlef_mega.types import Episode, Problem, PublicTest, TestOutcome, Verdict
from rlef_sandbox import CallTest, Result, Status

Feedback = Literal["true", "none", "random", "private"]
PROTOCOLS: dict[Feedback, str] = {
    "true": "multi_turn",
    "none": "no_feedback",
    "random": "random_feedback",
    "private": "private_feedback",
}
SINGLE = "independent"
RunDialogue = Callable[[Problem, Key], Awaitable[Record]]


@dataclass(frozen=True)
class PlannedDialogues:
    """The dialogues of one protocol."""

    protocol: str
    turns: int
    feedback: Feedback
    keys: tuple[Key, ...]


def plan_dialogues(
    protocol: str, turns: int, feedback: Feedback, problems: Sequence[Problem], each: int
) -> PlannedDialogues:
    """So many dialogues of each problem, the first of all problems first."""
    keys = tuple(Key(protocol, problem.id, n) for n in range(each) for problem in problems)
    return PlannedDialogues(protocol, turns, feedback, keys)


def run_missing(
    part: PlannedDialogues,
    problems: Mapping[str, Problem],
    hold: RunDialogue,
    file: DialogueFile,
    at_once: int,
) -> None:
    """Everything of the part that the file lacks, written to it as it ends."""
    missing = [key for key in part.keys if key not in file.settled]
    if not missing:
        return
    seen: Counter[str] = Counter()
    done = len(part.keys) - len(missing)
    every = max(1, len(missing) // 20)

    async def work(queue: Iterator[Key]) -> None:
        for key in queue:
            record = await hold(problems[key.problem_id], key)
            file.append({**key._asdict(), **record})
            seen["dropped" if "dropped" in record else "held"] += 1
            seen["solved"] += record.get("solved", False)
            progress.step(f"solved {seen['solved']}/{seen['held']}  dropped {seen['dropped']}")

    async def work_together() -> None:
        queue = iter(missing)
        await asyncio.gather(*(work(queue) for _ in range(min(at_once, len(missing)))))

    with StepProgress(
        part.protocol, done=done, total=len(part.keys), shown=True, every=every
    ) as progress:
        asyncio.run(work_together())


# ------------------------------------------------------------------------------------- sampled


def sampling(dialogues: DialogueLoop, chat: ChatFormat, seed: int) -> RunDialogue:
    """A dialogue's seed follows from its key, so that it does not matter when it is held."""

    async def hold(problem: Problem, key: Key) -> Record:
        outcome = await dialogues.run(problem, derive_seed(seed, *key))
        if isinstance(outcome, str):
            return {"dropped": outcome}
        return sampled_record(outcome, chat, problem)

    return hold


def sampled_record(episode: Episode, chat: ChatFormat, problem: Problem) -> Record:
    """Responses whole, so that they can be graded again."""
    turns: list[Record] = []
    for turn in episode.turns:
        sampled = turn.completion
        mean = sum(sampled.logprobs) / len(sampled.logprobs)
        turns.append(
            {
                "observation": chat.decode(turn.observed_ids)[:TEXT_LIMIT],
                "response": chat.decode(sampled.token_ids),
                **graded_record(turn.program, turn.verdict, problem),
                "tokens": len(sampled.token_ids),
                "logprob_mean": None if math.isnan(mean) else mean,  # of a server that tells none
            }
        )
    return {**problem_record(problem), "solved": episode.solved, "turns": turns}


def graded_record(program: str | None, verdict: Verdict, problem: Problem) -> Record:
    record = judged_record(program, verdict, problem)
    for shown, outcome in zip(record["public"], verdict.public, strict=True):
        shown |= {"exit_code": outcome.result.exit_code, "signal": outcome.result.signal}
    return {**record, "outcome": outcome_of(program, verdict)}


def shown_again(record: Mapping[str, Any], test: PublicTest) -> TestOutcome:
    """What a record says of a test, as feedback would have shown it."""
    observed = record["observed"]
    result = Result(
        Status[record["status"]],
        observed.encode(),
        record["stderr"].encode(),
        exit_code=record["exit_code"],
        signal=record["signal"],
        returned=observed if isinstance(test, CallTest) else None,
    )
    return TestOutcome(test, result)


def distractors_in(path: Path, problems: Mapping[str, Problem]) -> tuple[Distractor, ...]:
    """What failed first responses did on their public tests: of single turns, if there are any."""
    pools: dict[str, dict[Key, Distractor]] = {SINGLE: {}, PROTOCOLS["true"]: {}}
    for record in read_dialogues(path):
        key = key_of(record)
        if key.protocol in pools and "turns" in record and not record["turns"][0]["public_passed"]:
            tests = problems[key.problem_id].public_tests
            shown = record["turns"][0]["public"]
            outcomes = tuple(map(shown_again, shown, tests[: len(shown)]))
            pools[key.protocol][key] = Distractor(key.problem_id, outcomes)
    # of one problem alone they would be no other problem's
    wide = (pool for pool in pools.values() if len({key.problem_id for key in pool}) > 1)
    chosen: dict[Key, Distractor] = next(wide, {})
    return tuple(chosen[key] for key in sorted(chosen))  # whatever order they ended in


# ------------------------------------------------------------------------------------- recorded
