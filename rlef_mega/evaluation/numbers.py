"""From dialogues to an evaluation's numbers, which are written as JSON: rates with intervals, by
family, tag and difficulty, curves over the number of turns, and what the model did. Pure."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from rlef_mega import metrics
from rlef_mega.evaluation import behaviour
from rlef_mega.evaluation.behaviour import NO_VALID_CODE, Dialogue, tally
from rlef_mega.evaluation.dialogue_file import (
    Key,
    Record,
    key_of,
    read_dialogues,
    read_header,
    read_lines,
)
from rlef_mega.evaluation.estimators import Estimate, estimate, per_problem
from rlef_mega.evaluation.held import PROTOCOLS, SINGLE, Part
from rlef_mega.types import Problem

NAtK = tuple[int, int]
Tallies = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class About:
    """What breakdowns need of a problem."""

    id: str
    family: str = ""
    difficulty: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, problem: Problem) -> Self:
        return cls(problem.id, problem.family, problem.difficulty, problem.tags)


# Of each breakdown, the groups that a problem is in.
BREAKDOWNS: dict[str, Callable[[About], tuple[str, ...]]] = {
    "by_family": lambda problem: (problem.family or "all",),
    "by_kind": lambda problem: problem.tags,
    "by_difficulty": lambda problem: (problem.difficulty,) if problem.difficulty else (),
}


@dataclass(frozen=True)
class Held:
    """What came of one protocol, whose dialogues had at most so many `turns`."""

    turns: int
    dialogues: Sequence[Dialogue]
    drops: Counter[str] = field(default_factory=Counter)


def summarize(
    problems: Sequence[About],
    held: Held,
    *,
    samples: int,
    n_at_k: Sequence[NAtK] = (),
    single: Held | None = None,
    chrf: bool = False,
) -> dict[str, Any]:
    """All numbers of a protocol. Its solve rate is 1@`samples`. `single` are single-turn dialogues,
    for the first point of the curves over turns. Problems all of whose dialogues were dropped are
    left out; their outcome is None. RuntimeError where that are all of them."""
    counts = tally(held.dialogues, held.turns)
    known = [problem for problem in problems if problem.id in counts]
    if not known:
        raise RuntimeError(
            f"every dialogue of the evaluation was dropped: {dict(held.drops) or 'none was held'}"
        )
    solved = rates(known, counts, (1, samples), held.turns)
    rate_of = {problem.id: rate for problem, rate in zip(known, solved, strict=True)}
    first = rates(known, tally(held.dialogues, 1), (1, 1), 1)
    responses = [outcome for dialogue in held.dialogues for outcome in dialogue.outcomes]
    pairs = {pair: f"{pair[0]}@{pair[1]}" for pair in ((1, samples), *n_at_k)}
    return {
        "solve_rate": metrics.bootstrap_interval(solved),
        # a place for each problem, so that those of two evaluations can be paired
        "outcomes": [rate_of.get(problem.id) for problem in problems],
        **breakdowns(known, solved),
        "n_at_k": {name: measure(known, held, pair) for pair, name in pairs.items()},
        "pass_at_k": {str(k): measure(known, held, (k, k)) for k in sorted({k for _, k in pairs})},
        "turn1": metrics.bootstrap_interval(first),
        "invalid_fraction": responses.count(NO_VALID_CODE) / len(responses),
        "error_kinds": {
            f"turn{turn + 1}": behaviour.failures(held.dialogues, turn)
            for turn in range(held.turns)
        },
        **(turns_of(known, held, pairs, single) if held.turns > 1 else {}),
        **(chrf_of(held) if held.turns > 1 and chrf else {}),
        "dialogues": len(held.dialogues),
        "dropped": dict(held.drops),
        "problems_left_out": [problem.id for problem in problems if problem.id not in counts],
    }


def turns_of(
    problems: Sequence[About], held: Held, pairs: Mapping[NAtK, str], single: Held | None
) -> dict[str, Any]:
    """What only dialogues of several turns have."""
    return {
        **{
            f"repaired_turn{turn + 1}": behaviour.repair_rate(held.dialogues, turn)
            for turn in range(1, max(3, held.turns))
        },
        "became": {
            f"turn{turn}": behaviour.became(held.dialogues, turn - 1)
            for turn in range(1, held.turns)
        },
        # dialogues of at most t turns, at the same number k of samples
        "turn_budget": {
            name: {
                str(turns): measure(
                    problems, single if single and turns == 1 else held, pair, turns
                )
                for turns in range(1, held.turns + 1)
            }
            for pair, name in pairs.items()
        },
    }


def chrf_of(held: Held) -> dict[str, Any]:
    """Of each turn but the first, beside the turn before it."""
    return {
        "chrf": {
            f"turn{turn + 1}": behaviour.chrf_of_next(held.dialogues, turn - 1)
            for turn in range(1, held.turns)
        }
    }


def rates(problems: Sequence[About], counts: Tallies, pair: NAtK, turns: int) -> list[float]:
    """n@k of each problem, in dialogues of at most so many turns."""
    n, k = pair
    held, passed, correct = np.array([counts[problem.id] for problem in problems]).T
    return per_problem(held, passed, correct, n=n, draws=k // turns).tolist()


def measure(
    problems: Sequence[About], held: Held, pair: NAtK, turns: int | None = None
) -> dict[str, Any]:
    """n@k over problems, of the dialogues as if no more than `turns` had been allowed."""
    turns = turns or held.turns
    n, k = pair
    counts = tally(held.dialogues, turns)
    found = np.array([counts[problem.id] for problem in problems if problem.id in counts]).T
    return written(estimate(*found, n=n, draws=k // turns), draws=k // turns)


def written(found: Estimate, draws: int) -> dict[str, Any]:
    """`draws` is how many dialogues make the k samples."""
    sampling = None
    if found.sampling_low is not None:
        sampling = {"low": found.sampling_low, "high": found.sampling_high}
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "sampling": sampling,
        "problems": found.problems,
        "draws": draws,
        "bootstrapped": found.bootstrapped,
    }


def breakdowns(problems: Sequence[About], solved: Sequence[float]) -> dict[str, Any]:
    """Solve rates of each group of problems."""
    tables: dict[str, Any] = {}
    for name, groups_of in BREAKDOWNS.items():
        members: dict[str, list[float]] = {}
        for problem, value in zip(problems, solved, strict=True):
            for member in groups_of(problem):
                members.setdefault(member, []).append(value)
        tables[name] = {
            member: {**metrics.bootstrap_interval(values), "problems": len(values)}
            for member, values in sorted(members.items())
        }
    return tables


Ended = dict[Key, tuple[Dialogue | str, int]]  # the dialogue, or why it was dropped; tokens


def numbers_of(
    path: Path, parts: Sequence[Part], *, turns: int, n_at_k: Sequence[NAtK]
) -> dict[str, Any]:
    """What is written as JSON, of the parts that were held. Of those, every dialogue that was
    asked for has ended or was dropped: `asked` = `dialogues` + the sum of `dropped`. A part of
    which faults have dropped all is in `all_dropped` alone; RuntimeError if that are all parts."""
    problems = [
        About(**{**about, "tags": tuple(about["tags"])}) for about in read_header(path)["problems"]
    ]
    ended: Ended = {key_of(record): brief(record) for record in read_dialogues(path)}  # the later
    parts = [part for part in parts if any(key in ended for key in part.keys)]
    held = {part.protocol: gather(part, ended) for part in parts}
    lost = {name: dict(one.drops) for name, one in held.items() if not one.dialogues}
    if len(lost) == len(held):
        raise RuntimeError(
            f"every dialogue of the evaluation was dropped: {lost or 'none was held'}"
        )
    single = None if SINGLE in lost else held.get(SINGLE)
    return {
        "n_at_k": [f"{n}@{k}" for n, k in n_at_k],
        "protocols": {
            part.protocol: {
                "asked": len(part.keys),
                "response_tokens": sum(ended[key][1] for key in part.keys),
                **summarize(
                    problems,
                    held[part.protocol],
                    samples=turns,
                    n_at_k=n_at_k,
                    # with private tests shown, passing them is another thing
                    single=None if part.protocol == PROTOCOLS["private"] else single,
                    chrf=True,
                ),
            }
            for part in parts
            if part.protocol not in lost
        },
        "all_dropped": lost,
        "sessions": [line["session"] for line in read_lines(path) if "session" in line],
    }


def brief(record: Record) -> tuple[Dialogue | str, int]:
    if "dropped" in record:
        return record["dropped"], 0
    turns = record["turns"]
    dialogue = Dialogue(
        record["problem_id"],
        tuple(turn["outcome"] for turn in turns),
        tuple(turn["program"] for turn in turns),
    )
    return dialogue, sum(turn.get("tokens", 0) for turn in turns)


def gather(part: Part, ended: Ended) -> Held:
    missing = sum(key not in ended for key in part.keys)
    assert not missing, f"{missing} dialogues of {part.protocol} neither ended nor were dropped"
    outcomes = [ended[key][0] for key in part.keys]
    return Held(
        part.turns,
        [outcome for outcome in outcomes if isinstance(outcome, Dialogue)],
        Counter(outcome for outcome in outcomes if isinstance(outcome, str)),
    )
