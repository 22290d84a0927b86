"""Compute an evaluation's numbers from its dialogues: rates with intervals, by family, tag and
difficulty, curves over the number of turns, and the model's behaviour. They are written as JSON."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from rlef_mega.evaluation import behaviour
from rlef_mega.evaluation.behaviour import NO_VALID_CODE, PASSED, SOLVED, DialogueOutcomes
from rlef_mega.evaluation.dialogue_file import Record, key_of, read_dialogues, read_lines
from rlef_mega.evaluation.estimators import Ints, NAtK, estimate, per_problem
from rlef_mega.evaluation.protocols import PROTOCOLS, SINGLE, PlannedDialogues
from rlef_mega.report.intervals import bootstrap_interval
from rlef_mega.run.guards import kinds_of, most_frequent
from rlef_mega.types import Problem

# name of each breakdown -> the groups that a problem belongs to
BREAKDOWNS: dict[str, Callable[[Problem], tuple[str, ...]]] = {
    "by_family": lambda problem: (problem.family or "all",),
    "by_kind": lambda problem: problem.tags,
    "by_difficulty": lambda problem: (problem.difficulty,) if problem.difficulty else (),
}


@dataclass(frozen=True)
class FinishedDialogues:
    """The dialogues of one protocol, of at most `turns` turns each, and counts of the dropped ones
    by reason."""

    turns: int
    dialogues: Sequence[DialogueOutcomes]
    drops: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, turns: int, outcomes: Sequence[DialogueOutcomes | str]) -> Self:
        """Divide dialogues into the finished ones and the reasons why others were dropped."""
        finished = [found for found in outcomes if isinstance(found, DialogueOutcomes)]
        return cls(turns, finished, Counter(found for found in outcomes if isinstance(found, str)))

    def counts(self, problems: Sequence[Problem], turns: int) -> Ints:
        """Return for each problem how many dialogues there are, how many passed the public tests,
        and how many are correct (3 x problems), as if at most `turns` turns had been allowed.
        Problems without dialogues are left out."""
        last: dict[str, list[str]] = {}
        for dialogue in self.dialogues:
            last.setdefault(dialogue.problem_id, []).append(dialogue.outcomes[:turns][-1])
        found = [last[problem.id] for problem in problems if problem.id in last]
        passed = [sum(outcome in PASSED for outcome in each) for each in found]
        return np.array([[*map(len, found)], passed, [each.count(SOLVED) for each in found]])


def summarize(
    problems: Sequence[Problem],
    finished: FinishedDialogues,
    *,
    samples: int,
    n_at_k: Sequence[NAtK] = (),
    single: FinishedDialogues | None = None,
    chrf: bool = False,
) -> dict[str, Any]:
    """Return all numbers of a protocol; its solve rate is 1@`samples`. The curves over turns take
    their first point from `single`, the single-turn dialogues, if given. A problem whose dialogues
    were all dropped counts in no rate, and is None in `outcomes`.

    Raises RuntimeError if all dialogues were dropped.
    """
    dialogues, turns = finished.dialogues, finished.turns
    if not dialogues:
        raise_all_dropped(finished.drops)
    present = {dialogue.problem_id for dialogue in dialogues}
    known = [problem for problem in problems if problem.id in present]
    counts = finished.counts(known, turns)
    solved = per_problem(counts, n=1, draws=samples // turns).tolist()
    rate_of = {problem.id: rate for problem, rate in zip(known, solved, strict=True)}
    first = per_problem(finished.counts(known, 1), n=1, draws=1)
    responses = [outcome for dialogue in dialogues for outcome in dialogue.outcomes]
    pairs = {pair: f"{pair[0]}@{pair[1]}" for pair in ((1, samples), *n_at_k)}
    numbers = {
        "solve_rate": bootstrap_interval(solved),
        # one entry per problem, so that the outcomes of two evaluations can be paired
        "outcomes": [rate_of.get(problem.id) for problem in problems],
        **breakdowns(known, solved),
        "n_at_k": {name: estimate(counts, n=n, draws=k // turns) for (n, k), name in pairs.items()},
        "pass_at_k": {
            str(k): estimate(counts, n=k, draws=k // turns) for k in sorted({k for _, k in pairs})
        },
        "turn1": bootstrap_interval(first),
        "invalid_fraction": responses.count(NO_VALID_CODE) / len(responses),
        "error_kinds": {
            f"turn{turn + 1}": behaviour.failures(dialogues, turn) for turn in range(turns)
        },
    }
    if turns > 1:
        numbers |= turn_numbers(known, finished, pairs, single)
        if chrf:
            numbers["chrf"] = {
                f"turn{turn + 1}": behaviour.chrf_of_next(dialogues, turn - 1)
                for turn in range(1, turns)
            }
    return numbers | {
        "dialogues": len(dialogues),
        "dropped": dict(kinds_of(finished.drops)),
        "problems_left_out": [problem.id for problem in problems if problem.id not in present],
    }


def turn_numbers(
    problems: Sequence[Problem],
    finished: FinishedDialogues,
    pairs: Mapping[NAtK, str],
    single: FinishedDialogues | None,
) -> dict[str, Any]:
    """Return the numbers that only dialogues of several turns have."""
    dialogues, most = finished.dialogues, finished.turns

    def budget(n: int, k: int, turns: int) -> dict[str, Any]:
        """Return n@k of dialogues of at most `turns` turns, with the same number k of samples."""
        used = single if single and turns == 1 else finished
        return estimate(used.counts(problems, turns), n=n, draws=k // turns)

    return {
        **{
            f"repaired_turn{turn + 1}": behaviour.repair_rate(dialogues, turn)
            for turn in range(1, max(3, most))
        },
        "became": {f"turn{turn}": behaviour.became(dialogues, turn - 1) for turn in range(1, most)},
        "turn_budget": {
            name: {str(turns): budget(n, k, turns) for turns in range(1, most + 1)}
            for (n, k), name in pairs.items()
        },
    }


def breakdowns(problems: Sequence[Problem], solved: Sequence[float]) -> dict[str, Any]:
    """Return the solve rates of each group of problems."""
    tables: dict[str, Any] = {}
    for name, groups_of in BREAKDOWNS.items():
        groups: dict[str, list[float]] = {}
        for problem, value in zip(problems, solved, strict=True):
            for group in groups_of(problem):
                groups.setdefault(group, []).append(value)
        tables[name] = {
            group: {**bootstrap_interval(values), "problems": len(values)}
            for group, values in sorted(groups.items())
        }
    return tables


def raise_all_dropped(reasons: Mapping[str, int]) -> None:
    told = most_frequent(reasons) or "none ran"
    raise RuntimeError(f"every dialogue of the evaluation was dropped: {told}")


def numbers_of(
    path: Path,
    problems: Sequence[Problem],
    parts: Sequence[PlannedDialogues],
    *,
    turns: int,
    n_at_k: Sequence[NAtK],
) -> dict[str, Any]:
    """Return the JSON content of an evaluation, from its file of dialogues.

    Parts of which nothing ran are left out. Of every other part, each planned dialogue has finished
    or was dropped: `asked` = `dialogues` + the sum of `dropped`. A part whose dialogues were all
    dropped is listed in `all_dropped` only.

    Raises RuntimeError if all dialogues of all parts were dropped.
    """
    # of two records with the same key, the later counts
    records = {key_of(record): outcome(record) for record in read_dialogues(path)}
    parts = [part for part in parts if any(key in records for key in part.keys)]
    finished = {
        part.protocol: FinishedDialogues.of(part.turns, [records[key] for key in part.keys])
        for part in parts
    }
    lost = {name: dict(kinds_of(one.drops)) for name, one in finished.items() if not one.dialogues}
    if len(lost) == len(finished):
        raise_all_dropped(sum((one.drops for one in finished.values()), Counter[str]()))
    single = None if SINGLE in lost else finished.get(SINGLE)
    return {
        "n_at_k": [f"{n}@{k}" for n, k in n_at_k],
        "protocols": {
            part.protocol: {
                "asked": len(part.keys),
                "response_tokens": sum(d.tokens for d in finished[part.protocol].dialogues),
                **summarize(
                    problems,
                    finished[part.protocol],
                    samples=turns,
                    n_at_k=n_at_k,
                    # it shows private tests too, so its programs are selected by more tests
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


def outcome(record: Record) -> DialogueOutcomes | str:
    if "dropped" in record:
        return DialogueOutcomes.of(record["problem_id"], record["dropped"])
    turns = record["turns"]
    return DialogueOutcomes(
        record["problem_id"],
        tuple(turn["outcome"] for turn in turns),
        tuple(turn["program"] for turn in turns),
        sum(turn.get("tokens", 0) for turn in turns),
    )
