"""Read recorded responses from a file and grade them again."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlef_mega.config import ConfigError
from rlef_mega.dialogues import templates
from rlef_mega.dialogues.judge import Judge, JudgeError
from rlef_mega.dialogues.records import problem_record
from rlef_mega.dialogues.rollout import TRIES, show_private_tests
from rlef_mega.evaluation.dialogue_file import Key, Record, key_of
from rlef_mega.evaluation.protocols import (
    PROTOCOLS,
    SINGLE,
    Feedback,
    PlannedDialogues,
    RunDialogue,
    graded_record,
)
from rlef_mega.problems.rows import FieldError, read_rows
from rlef_mega.types import Problem


@dataclass(frozen=True)
class RecordedResponses:
    """The responses of each dialogue of a file, or why it was dropped."""

    responses: dict[Key, tuple[str, ...] | str]
    turns: int | None  # at most, if the file records it

    def parts(self, turns: int) -> list[PlannedDialogues]:
        names: dict[str, Feedback] = {name: how for how, name in PROTOCOLS.items()}
        return [
            PlannedDialogues(
                protocol,
                1 if protocol == SINGLE else turns,
                names.get(protocol, "true"),
                tuple(key for key in self.responses if key.protocol == protocol),
            )
            for protocol in (*names, SINGLE)
            if any(key.protocol == protocol for key in self.responses)
        ]


def read_recorded(path: Path) -> RecordedResponses:
    """Read an evaluation's own file, or lines {"problem_id", "response"} (single turns) and
    {"problem_id", "responses": [...]} (dialogues). Raises ConfigError with file and line."""
    responses: dict[Key, tuple[str, ...] | str] = {}
    turns: int | None = None
    count: Counter[tuple[str, str]] = Counter()
    for place, row in read_rows(path):
        if isinstance(row, FieldError):
            raise ConfigError(f"{place}: {row}")
        if "rlef_eval" in row:
            turns = turns_asked(row, str(place))
        elif "protocol" in row:
            key, texts = own_responses(row, str(place))
            responses[key] = texts
        elif "session" not in row:
            protocol, name, texts = foreign_responses(row, str(place))
            responses[Key(protocol, name, count[protocol, name])] = texts
            count[protocol, name] += 1
    if not responses:
        raise ConfigError(f"{path}: holds no responses")
    return RecordedResponses(responses, turns)


def turns_asked(header: Record, place: str) -> int:
    asked = header.get("asked")
    turns = asked.get("turns") if isinstance(asked, dict) else None
    if not isinstance(turns, int):
        raise ConfigError(f"{place}: the header has no number of turns; the file is damaged")
    return turns


def own_responses(row: Record, place: str) -> tuple[Key, tuple[str, ...] | str]:
    known = (*PROTOCOLS.values(), SINGLE)
    if row["protocol"] not in known:
        raise ConfigError(
            f"{place}: unknown protocol {row['protocol']!r}; known: {', '.join(known)}"
        )
    dropped, turns = row.get("dropped"), row.get("turns")
    if not (isinstance(row.get("problem_id"), str) and isinstance(row.get("number"), int)):
        raise ConfigError(f"{place}: this dialogue lacks problem_id or number")
    if isinstance(dropped, str) and dropped:
        return key_of(row), dropped
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        turns = []
    texts = [turn.get("response") for turn in turns]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{place}: this dialogue lacks turns, or a turn lacks its response")
    return key_of(row), tuple(texts)


def foreign_responses(row: Record, place: str) -> tuple[str, str, tuple[str, ...]]:
    name = row.get("problem_id", row.get("task_id"))
    single = "response" in row
    texts = [row["response"]] if single else row.get("responses")
    if not (isinstance(name, str) and isinstance(texts, list) and texts):
        raise ConfigError(
            f"{place}: has {', '.join(sorted(row))}; give each line problem_id, and response (a "
            "text) or responses (a list of texts)"
        )
    if not all(isinstance(response, str) for response in texts):
        raise ConfigError(f"{place}: a response is not a text")
    return SINGLE if single else PROTOCOLS["true"], name, tuple(texts)


def grade_again(recorded: RecordedResponses, judge: Judge, part: PlannedDialogues) -> RunDialogue:
    """Return a function that grades the recorded responses of a dialogue again.

    A dialogue ends with its first program that passes the public tests now. If the program that
    ended the recorded dialogue fails now, there are no more responses, and it is not solved.
    """

    async def run(problem: Problem, key: Key) -> Record:
        responses = recorded.responses[key]
        if isinstance(responses, str):
            return {"dropped": responses}
        shown = show_private_tests(problem) if part.feedback == "private" else problem
        reason = ""
        for _ in range(TRIES):
            try:
                return await regrade(shown, responses[: part.turns])
            except JudgeError as fault:
                reason = type(fault).__name__
        return {"dropped": reason}

    async def regrade(problem: Problem, responses: Sequence[str]) -> Record:
        begun = templates.response_start(problem.statement, problem.template)
        turns: list[dict[str, Any]] = []
        for number, response in enumerate(responses, start=1):
            program = templates.extract_program(response, problem.language, begun)
            verdict = await judge.judge(problem, program, last_turn=number == len(responses))
            turns.append({"response": response, **graded_record(program, verdict, problem)})
            if verdict.public_passed:
                break
        return {**problem_record(problem), "solved": bool(turns[-1]["solved"]), "turns": turns}

    return run


def refuse_unknown(keys: Iterable[Key], problems: Mapping[str, Problem], path: Path) -> None:
    unknown = sorted({key.problem_id for key in keys} - problems.keys())
    if unknown:
        raise ConfigError(
            f"{path} has responses to {len(unknown)} problems that --data does not have, such as "
            f"{', '.join(unknown[:3])}; give the problem source that they were sampled for"
        )
