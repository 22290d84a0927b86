"""Run the dialogues of an evaluation's protocols that its file lacks.

Theory of operation: a fixed number of workers, all in one event loop, take missing dialogues from a
queue. A worker runs a dialogue and writes it to the file before it takes the next one. A dialogue
opens its session of the engine as soon as the one before it has closed its own, so the embedded
engine's batches stay full. A fault of engine or sandbox drops the dialogue; the file records why.
A lost engine, a full disk or a wrong request ends the evaluation; the dialogues in the file remain.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.records import TEXT_LIMIT, judged_record, problem_record
from rlef_mega.dialogues.rollout import DialogueLoop, Distractor, derive_seed
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
    keys: tuple[Key, ...]


def run_missing(
    part: PlannedDialogues,
    problems: Mapping[str, Problem],
    run: RunDialogue,
    file: DialogueFile,
    at_once: int,
) -> None:
    """Run the dialogues of the part that the file lacks; write each as it finishes."""
    missing = [key for key in part.keys if key not in file.settled]
    if not missing:
        return
    seen: Counter[str] = Counter()
    done = len(part.keys) - len(missing)

    async def work(queue: Iterator[Key]) -> None:
        for key in queue:
            record = await run(problems[key.problem_id], key)
            file.append({**key._asdict(), **record})
            seen["dropped" if "dropped" in record else "finished"] += 1
            seen["solved"] += record.get("solved", False)
            progress.step(f"solved {seen['solved']}/{seen['finished']}  dropped {seen['dropped']}")

    async def work_together() -> None:
        queue = iter(missing)
        await asyncio.gather(*(work(queue) for _ in range(min(at_once, len(missing)))))

    with StepProgress(part.protocol, done=done, total=len(part.keys), shown=True) as progress:
        asyncio.run(work_together())


# ------------------------------------------------------------------------------------- sampled


def sampling(dialogues: DialogueLoop, seed: int) -> RunDialogue:
    """Return a function that samples a dialogue. Its seed follows from its key only, so the order
    does not matter."""

    async def run(problem: Problem, key: Key) -> Record:
        outcome = await dialogues.run(problem, derive_seed(seed, *key))
        if isinstance(outcome, str):
            return {"dropped": outcome}
        if any(max(turn.completion.weight_versions) > 0 for turn in outcome.turns):
            raise RuntimeError("another process publishes weights to these servers; use others")
        return sampled_record(outcome, dialogues.chat, problem)

    return run


def sampled_record(episode: Episode, chat: ChatFormat, problem: Problem) -> Record:
    """Return the record of a dialogue, with complete responses, so that it can be graded again."""
    turns = [
        {
            "observation": chat.decode(turn.observed_ids)[:TEXT_LIMIT],
            "response": chat.decode(turn.completion.token_ids),
            **graded_record(turn.program, turn.verdict, problem),
            "tokens": len(turn.completion.token_ids),
            "logprob_mean": sum(turn.completion.logprobs) / len(turn.completion.logprobs),
        }
        for turn in episode.turns
    ]
    return {**problem_record(problem), "solved": episode.solved, "turns": turns}


def graded_record(program: str | None, verdict: Verdict, problem: Problem) -> Record:
    record = judged_record(program, verdict, problem)
    for shown, outcome in zip(record["public"], verdict.public, strict=True):
        shown |= {"exit_code": outcome.result.exit_code, "signal": outcome.result.signal}
    return {**record, "outcome": outcome_of(program, verdict)}


def shown_again(record: Mapping[str, Any], test: PublicTest) -> TestOutcome:
    """Return the outcome of a public test from its record, for use in feedback."""
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
    """Return the verdicts on failed first responses, public tests only: those of independent
    samples or, if these cover fewer than two problems, of multi-turn dialogues."""
    pools: dict[str, dict[Key, Distractor]] = {SINGLE: {}, PROTOCOLS["true"]: {}}
    for record in read_dialogues(path):
        key = key_of(record)
        if key.protocol in pools and "turns" in record and not record["turns"][0]["public_passed"]:
            first, tests = record["turns"][0], problems[key.problem_id].public_tests
            outcomes = tuple(map(shown_again, first["public"], tests))  # of the tests that were run
            verdict = Verdict(outcomes, public_passed=False, solved=None, invalid=first["fault"])
            pools[key.protocol][key] = Distractor(key.problem_id, verdict)
    # a pool of one problem has no other problem's outcomes
    wide = (pool for pool in pools.values() if len({key.problem_id for key in pool}) > 1)
    chosen: dict[Key, Distractor] = next(wide, {})
    # sorted: the order does not depend on which finished first
    return tuple(chosen[key] for key in sorted(chosen))
