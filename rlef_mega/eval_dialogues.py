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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlef_mega import dialog
from rlef_mega.behaviour import outcome_of
from rlef_mega.chat import ChatFormat
from rlef_mega.config import ConfigError
from rlef_mega.dialogue_file import DialogueFile, Key, Record, key_of, read_dialogues
from rlef_mega.episode_records import TEXT_LIMIT, judged_record, problem_record
from rlef_mega.judge import Judge, JudgeError
from rlef_mega.problems.rows import FieldError, read_rows
from rlef_mega.progress import StepProgress
from rlef_mega.rollout import TRIES, DialogueLoop, Distractor, derive_seed, show_private_tests
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
Hold = Callable[[Problem, Key], Awaitable[Record]]


@dataclass(frozen=True)
class Part:
    """The dialogues of one protocol."""

    protocol: str
    turns: int
    feedback: Feedback
    keys: tuple[Key, ...]


def plan_part(
    protocol: str, turns: int, feedback: Feedback, problems: Sequence[Problem], each: int
) -> Part:
    """So many dialogues of each problem, the first of all problems first."""
    keys = tuple(Key(protocol, problem.id, n) for n in range(each) for problem in problems)
    return Part(protocol, turns, feedback, keys)


def hold_missing(
    part: Part,
    problems: Mapping[str, Problem],
    hold: Hold,
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


def sampling(dialogues: DialogueLoop, chat: ChatFormat, seed: int) -> Hold:
    """A dialogue's seed follows from its key, so that it does not matter when it is held."""

    async def hold(problem: Problem, key: Key) -> Record:
        outcome = await dialogues.hold(problem, derive_seed(seed, *key))
        if isinstance(outcome, str):
            return {"dropped": outcome}
        return sampled_record(outcome, chat, problem)

    return hold


def sampled_record(episode: Episode, chat: ChatFormat, problem: Problem) -> Record:
    """Responses whole, so that they can be graded again."""
    turns: list[Record] = []
    end = 0
    for turn in episode.turns:
        observed = episode.token_ids[end : turn.context_len]
        end = turn.context_len + len(turn.action_ids)
        mean = sum(turn.action_logprobs) / len(turn.action_logprobs)
        turns.append(
            {
                "observation": chat.decode(observed)[:TEXT_LIMIT],
                "response": chat.decode(turn.action_ids),
                **graded_record(turn.program, turn.verdict, problem),
                "tokens": len(turn.action_ids),
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


@dataclass(frozen=True)
class Recorded:
    """Responses of a file, or why a dialogue has none."""

    responses: dict[Key, tuple[str, ...] | str]
    turns: int | None  # at most, where the file says so

    def parts(self, turns: int) -> list[Part]:
        names: dict[str, Feedback] = {name: how for how, name in PROTOCOLS.items()}
        return [
            Part(
                protocol,
                1 if protocol == SINGLE else turns,
                names.get(protocol, "true"),
                tuple(key for key in self.responses if key.protocol == protocol),
            )
            for protocol in (*names, SINGLE)
            if any(key.protocol == protocol for key in self.responses)
        ]


def read_recorded(path: Path) -> Recorded:
    """Of an evaluation's own file, or of lines {"problem_id", "response"} (single turns) and
    {"problem_id", "responses": [...]} (dialogues). ConfigError, with file and line."""
    responses: dict[Key, tuple[str, ...] | str] = {}
    turns: int | None = None
    count: Counter[tuple[str, str]] = Counter()
    for place, row in read_rows(path):
        if isinstance(row, FieldError):
            raise ConfigError(f"{place}: {row}")
        if "rlef_eval" in row:
            turns = turns_asked(row, str(place))
        elif "protocol" in row:
            key, said = own_responses(row, str(place))
            responses[key] = said
        elif "session" not in row:
            protocol, name, texts = foreign_responses(row, str(place))
            responses[Key(protocol, name, count[protocol, name])] = texts
            count[protocol, name] += 1
    if not responses:
        raise ConfigError(f"{path}: holds no responses")
    return Recorded(responses, turns)


def turns_asked(header: Record, place: str) -> int:
    asked = header.get("asked")
    turns = asked.get("turns") if isinstance(asked, dict) else None
    if not isinstance(turns, int):
        raise ConfigError(f"{place}: says of no number of turns what was asked; it is damaged")
    return turns


def own_responses(row: Record, place: str) -> tuple[Key, tuple[str, ...] | str]:
    known = (*PROTOCOLS.values(), SINGLE)
    if row["protocol"] not in known:
        raise ConfigError(f"{place}: protocol {row['protocol']!r}; known: {', '.join(known)}")
    dropped, turns = row.get("dropped"), row.get("turns")
    if not (isinstance(row.get("problem_id"), str) and isinstance(row.get("number"), int)):
        raise ConfigError(f"{place}: a dialogue has problem_id and number; this one has not")
    if isinstance(dropped, str) and dropped:
        return key_of(row), dropped
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        turns = []
    texts = [turn.get("response") for turn in turns]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{place}: a dialogue has turns, each with a response; this one has not")
    return key_of(row), tuple(texts)


def foreign_responses(row: Record, place: str) -> tuple[str, str, tuple[str, ...]]:
    name = row.get("problem_id", row.get("task_id"))
    single = "response" in row
    texts = [row["response"]] if single else row.get("responses")
    if not (isinstance(name, str) and isinstance(texts, list) and texts):
        raise ConfigError(
            f"{place}: a line has problem_id, and response (a text) or responses (a list of them); "
            f"this one has {', '.join(sorted(row))}"
        )
    if not all(isinstance(response, str) for response in texts):
        raise ConfigError(f"{place}: a response is no text")
    return SINGLE if single else PROTOCOLS["true"], name, tuple(texts)


def regrading(recorded: Recorded, judge: Judge, part: Part) -> Hold:
    """Recorded responses, extracted and graded again as far as the dialogue would have gone.

    Where a program passes now that failed then, the dialogue ends with it; where one fails now that
    passed then, the dialogue has no more responses, and is not solved.
    """

    async def hold(problem: Problem, key: Key) -> Record:
        said = recorded.responses[key]
        if isinstance(said, str):
            return {"dropped": said}
        shown = show_private_tests(problem) if part.feedback == "private" else problem
        reason = ""
        for _ in range(TRIES):
            try:
                return await regrade(shown, said[: part.turns])
            except JudgeError as fault:
                reason = type(fault).__name__
        return {"dropped": reason}

    async def regrade(problem: Problem, said: Sequence[str]) -> Record:
        begun = dialog.response_start(problem.statement, problem.template)
        turns: list[dict[str, Any]] = []
        for number, response in enumerate(said, start=1):
            program = dialog.extract_program(response, problem.language, begun)
            verdict = await judge.judge(problem, program, last_turn=number == len(said))
            turns.append({"response": response, **graded_record(program, verdict, problem)})
            if verdict.public_passed:
                break
        return {**problem_record(problem), "solved": bool(turns[-1]["solved"]), "turns": turns}

    return hold


def refuse_unknown(keys: Iterable[Key], problems: Mapping[str, Problem], path: Path) -> None:
    unknown = sorted({key.problem_id for key in keys} - problems.keys())
    if unknown:
        raise ConfigError(
            f"{path} holds responses to {len(unknown)} problems that --data does not have, such as "
            f"{', '.join(unknown[:3])}; give the source that they were made with"
        )
