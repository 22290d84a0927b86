"""Read recorded responses from a file and grade them again."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlef_mega.config import ConfigError
from rlef_mega.dialogues import programs, templates
from rlef_mega.dialogues.judge import Judge, JudgeError
from rlef_mega.dialogues.records import problem_record
from rlef_mega.dialogues.rollout import TRIES, show_private_tests
from rlef_mega.evaluation.dialogue_file import Key, Record
from rlef_mega.evaluation.protocols import (
    PROTOCOLS,
    SINGLE,
    PlannedDialogues,
    RunDialogue,
    graded_record,
)
from rlef_mega.problems.rows import FieldError, read_rows
from rlef_mega.run.guards import reason_of
from rlef_mega.types import Problem

# of each dialogue of a file: its responses, or why it was dropped
RecordedResponses = dict[Key, tuple[str, ...] | str]


def read_recorded(path: Path, turns: int) -> RecordedResponses:
    """Read an evaluation's own file, or lines {"problem_id", "response"} (single turns) and
    {"problem_id", "responses": [...]} (dialogues). Raises ConfigError for a bad line, with file and
    line, and if the file's evaluation allowed fewer turns than `turns`."""
    responses: RecordedResponses = {}
    count: Counter[tuple[str, str]] = Counter()
    for location, row in read_rows(path):
        match row:
            case FieldError():
                raise ConfigError(f"{location}: {row}")
            case {"rlef_eval": _, "asked": {"turns": int(most)}}:
                if most < turns:
                    raise ConfigError(
                        f"{path} has dialogues of at most {most} turns; lower --turns to that"
                    )
            case {"session": _} | {"released": _}:
                pass
            case _:
                protocol, name, number, texts = read_dialogue(row, location)
                if number is None:
                    number = count[protocol, name]
                    count[protocol, name] += 1
                responses[Key(protocol, name, number)] = texts
    if not responses:
        raise ConfigError(f"{path}: holds no responses")
    return responses


def read_dialogue(row: Record, location: str) -> tuple[str, str, int | None, tuple[str, ...] | str]:
    """Return a line's protocol, problem, number (if it has one) and responses, or why it was
    dropped."""
    protocol = row.get("protocol", SINGLE if "response" in row else PROTOCOLS["true"])
    if protocol not in (known := (*PROTOCOLS.values(), SINGLE)):
        raise ConfigError(f"{location}: unknown protocol {protocol!r}; known: {', '.join(known)}")
    name, number = row.get("problem_id", row.get("task_id")), row.get("number")
    texts: tuple[Any, ...] | str
    match row:
        case {"dropped": str(reason)} if reason:
            texts = reason
        case {"response": str(text)}:
            texts = (text,)
        case {"responses": [*found]} | {"turns": [*found]}:
            texts = tuple(
                turn.get("response") if isinstance(turn, dict) else turn for turn in found
            )
        case _:
            texts = ()
    whole = texts and all(isinstance(text, str) for text in texts)
    if not (whole and isinstance(name, str) and isinstance(number, int | None)):
        raise ConfigError(
            f"{location}: not a dialogue: its keys are {', '.join(sorted(row))}; give each line "
            "problem_id and response (a text) or responses (a list of texts)"
        )
    return protocol, name, number, texts


def grade_again(
    recorded: RecordedResponses, judge: Judge, part: PlannedDialogues, which: programs.Which
) -> RunDialogue:
    """Return a function that grades the recorded responses of a dialogue again.

    A dialogue ends with its first program that passes the public tests now. If the program that
    ended the recorded dialogue fails now, there are no more responses, and it is not solved.
    """

    async def run(problem: Problem, key: Key) -> Record:
        responses = recorded[key]
        if isinstance(responses, str):
            return {"dropped": responses}
        shows_private = part.protocol == PROTOCOLS["private"]
        shown = show_private_tests(problem) if shows_private else problem
        reason = ""
        for _ in range(TRIES):
            try:
                return await regrade(shown, responses[: part.turns])
            except JudgeError as fault:
                reason = reason_of(fault)
        return {"dropped": reason}

    async def regrade(problem: Problem, responses: Sequence[str]) -> Record:
        begun = templates.response_start(problem.statement, problem.template)
        turns: list[dict[str, Any]] = []
        for number, response in enumerate(responses, start=1):
            found = programs.extract_program(response, problem.language, begun, which)
            verdict = await judge.judge(problem, found, last_turn=number == len(responses))
            turns.append({"response": response, **graded_record(found.program, verdict, problem)})
            if verdict.public_passed:
                break
        return {**problem_record(problem), "solved": bool(turns[-1]["solved"]), "turns": turns}

    return run
