"""The numbers before and after RLEF, shared by the page and the terminal.

A change is measured on the same problems, so its interval is that of the paired difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlef_mega.report.intervals import bootstrap_interval
from rlef_mega.report.run_files import Json, RunFiles, lookup, named, number, table, text

RESAMPLES = 2000  # of the paired bootstrap; the paper resamples 200 times (RLEF B.1)


@dataclass(frozen=True)
class Rate:
    """A fraction and, if it was measured, its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MeasureRow:
    label: str
    meaning: str
    cells: tuple[Rate | None, ...]  # one per column of the comparison
    change: Rate | None  # after minus before


@dataclass(frozen=True)
class EvaluationComparison:
    columns: tuple[str, ...]
    rows: tuple[MeasureRow, ...]
    breakdowns: Mapping[str, tuple[MeasureRow, ...]]  # title -> multi-turn solve rates by group
    errors: tuple[tuple[str, tuple[int | None, ...]], ...]  # kinds of failure at turn 1
    setting: str
    warnings: tuple[str, ...]


# label, protocol, key, meaning; {turns} is the turn limit of the evaluation
MEASURES = (
    ("1@{turns} multi-turn", "multi_turn", "solve_rate", "one dialogue of up to {turns} turns"),
    ("1@{turns} independent", "independent", "solve_rate", "one of {turns} single-turn samples"),
    (
        "1@{turns} random feedback",
        "random_feedback",
        "solve_rate",
        "a dialogue whose feedback comes from another problem",
    ),
    ("solved at turn 1", "multi_turn", "turn1", "the first response of the dialogue"),
    ("repaired at turn 2", "multi_turn", "repaired_turn2", "of the failures of turn 1"),
    ("repaired at turn 3", "multi_turn", "repaired_turn3", "of the failures of turn 2"),
    ("without valid code", "multi_turn", "invalid_fraction", "of all responses"),
)
KNOWN_PROTOCOLS = {protocol for _, protocol, _, _ in MEASURES}
SAME_PROBLEMS = ("data", "problems", "seed")
SAME_SETTING = (*SAME_PROBLEMS, "temperature", "top_p", "turns")

Pair = tuple[str, str]
BEFORE_AFTER: Pair = ("before", "after")


def compare(evaluations: Mapping[str, Json], pair: Pair = BEFORE_AFTER) -> EvaluationComparison:
    """Compare evaluations, by name. The change is the second of the pair minus the first."""
    contents = tuple(evaluations.values())
    newest = evaluations.get(pair[1]) or (contents[-1] if contents else {})
    breakdowns = {
        title: breakdown_rows(evaluations, pair, key)
        for title, key in (("family", "by_family"), ("kind of statement", "by_kind"))
    }
    return EvaluationComparison(
        columns=tuple(evaluations),
        rows=measure_rows(evaluations, pair, text(newest, "turns") or "3"),
        breakdowns={title: rows for title, rows in breakdowns.items() if rows},
        errors=error_rows(contents),
        setting=describe_setting(newest),
        warnings=tuple(warn_of_differences(evaluations, pair)),
    )


def evaluations_of(runs: Mapping[str, RunFiles]) -> tuple[dict[str, Json], Pair]:
    """Return all evaluations by name, and the pair whose difference is the change: before and after
    of a single run, or "after" of the first run and "after" of the last run."""
    found = {
        named(label, name): evaluation
        for label, files in runs.items()
        for name, evaluation in files.evaluations.items()
    }
    if len(runs) == 1:
        return found, BEFORE_AFTER
    first, *_, last = [named(label, "after") for label in runs]
    return found, (first, last)


def measure_rows(evaluations: Mapping[str, Json], pair: Pair, turns: str) -> tuple[MeasureRow, ...]:
    others = {name for content in evaluations.values() for name in table(content, "protocols")}
    measures = MEASURES + tuple(
        ("1@{turns} " + name.replace("_", " "), name, "solve_rate", "")
        for name in sorted(others - KNOWN_PROTOCOLS)
    )
    return tuple(
        # replace, not format: a protocol's own name may contain braces
        row_of(
            evaluations,
            pair,
            label.replace("{turns}", turns),
            meaning.replace("{turns}", turns),
            protocol,
            key,
        )
        for label, protocol, key, meaning in measures
    )


def breakdown_rows(evaluations: Mapping[str, Json], pair: Pair, key: str) -> tuple[MeasureRow, ...]:
    groups = (table(each, "protocols", "multi_turn", key) for each in evaluations.values())
    members = sorted({member for group in groups for member in group})
    return tuple(row_of(evaluations, pair, name, "", "multi_turn", key, name) for name in members)


def row_of(
    evaluations: Mapping[str, Json], pair: Pair, label: str, meaning: str, protocol: str, *key: str
) -> MeasureRow:
    """Return the row of the rates at this path of keys of a protocol."""
    cells = (rate(lookup(each, "protocols", protocol, *key)) for each in evaluations.values())
    return MeasureRow(label, meaning, tuple(cells), change(evaluations, pair, protocol, *key))


def error_rows(contents: Sequence[Json]) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    tables = [
        table(content, "protocols", "multi_turn", "error_kinds", "turn1") for content in contents
    ]
    kinds = sorted({kind for found in tables for kind in found})
    return tuple(
        (kind, tuple(None if (n := number(t, kind)) is None else round(n) for t in tables))
        for kind in kinds
    )


def rate(record: Any) -> Rate | None:
    """Read a rate from {"value", "low", "high"} or from a bare number."""
    if not isinstance(record, dict):
        record = {"value": record}
    value = number(record, "value")
    return None if value is None else Rate(value, number(record, "low"), number(record, "high"))


def change(evaluations: Mapping[str, Json], pair: Pair, protocol: str, *key: str) -> Rate | None:
    """Return the second minus the first of the pair, with a paired interval if both record the
    outcome of each problem."""
    before, after = (evaluations.get(name, {}) for name in pair)
    first, second = (rate(lookup(one, "protocols", protocol, *key)) for one in (before, after))
    if first is None or second is None:
        return None
    found = Rate(second.value - first.value)
    outcomes = [outcomes_of(one, protocol) for one in (before, after)]
    same = all(lookup(before, setting) == lookup(after, setting) for setting in SAME_PROBLEMS)
    if key != ("solve_rate",) or not same or len({*map(len, outcomes)}) > 1:
        return found
    both = [each for each in zip(*outcomes, strict=True) if None not in each]
    if not both:
        return found
    paired = bootstrap_interval(np.diff(np.array(both, dtype=float))[:, 0], resamples=RESAMPLES)
    # if it is not their mean, the rate was not computed from these outcomes
    is_mean = abs(paired["value"] - found.value) < 1e-6
    return Rate(found.value, paired["low"], paired["high"]) if is_mean else found


def outcomes_of(evaluation: Json, protocol: str) -> list[float | None]:
    """Return one entry per problem; None if all its dialogues were dropped."""
    outcomes = lookup(evaluation, "protocols", protocol, "outcomes")
    return outcomes if isinstance(outcomes, list) else []


def describe_setting(evaluation: Json) -> str:
    settings = ((name, text(evaluation, name)) for name in SAME_SETTING)
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in settings if value)


def warn_of_differences(evaluations: Mapping[str, Json], pair: Pair) -> list[str]:
    before, after = (evaluations.get(name, {}) for name in pair)
    if not before or not after:
        return []
    return [
        f"These evaluations are not comparable: {name} is {text(before, name) or 'not given'} "
        f"{pair[0]} and {text(after, name) or 'not given'} {pair[1]}."
        for name in SAME_SETTING
        if lookup(before, name) != lookup(after, name)
    ]
