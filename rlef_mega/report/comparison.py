"""The numbers of before and after RLEF, shared by the page and the terminal.

A change is measured on the same problems, so its interval is that of the paired difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlef_mega.report.run_files import Json, RunFiles, lookup, named, number, table, text

RESAMPLES = 2000  # of the paired bootstrap; the paper resamples 200 times (RLEF B.1)


@dataclass(frozen=True)
class Rate:
    """A fraction with its 95% interval, where one was measured."""

    value: float
    low: float | None = None
    high: float | None = None
    problems: int | None = None


@dataclass(frozen=True)
class Row:
    label: str
    meaning: str
    cells: tuple[Rate | None, ...]  # one a column of the comparison
    change: Rate | None  # after minus before


@dataclass(frozen=True)
class Breakdown:
    """Multi-turn solve rates by family or by kind of statement."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Comparison:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    breakdowns: tuple[Breakdown, ...]
    errors: tuple[tuple[str, tuple[int | None, ...]], ...]  # kinds of failure at turn 1
    setting: str
    warnings: tuple[str, ...]


# label, protocol, key, what it means; {turns} is the turn limit of the evaluation
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
SAME_SETTING = ("data", "problems", "seed", "temperature", "top_p", "turns")


Pair = tuple[str, str]
BEFORE_AFTER: Pair = ("before", "after")


def compare(evaluations: Mapping[str, Json], pair: Pair = BEFORE_AFTER) -> Comparison:
    """`evaluations` by name; the second of the pair minus the first is the change."""
    contents = tuple(evaluations.values())
    newest = evaluations.get(pair[1]) or (contents[-1] if contents else {})
    return Comparison(
        columns=tuple(evaluations),
        rows=tuple(measure_rows(evaluations, pair, text(newest, "turns") or "3")),
        breakdowns=tuple(
            Breakdown(title, breakdown_rows(evaluations, pair, key))
            for title, key in (("family", "by_family"), ("kind of statement", "by_kind"))
            if any(table(content, "protocols", "multi_turn", key) for content in contents)
        ),
        errors=tuple(error_rows(contents)),
        setting=describe_setting(newest),
        warnings=tuple(warn_of_differences(evaluations, pair)),
    )


def evaluations_of(runs: Mapping[str, RunFiles]) -> tuple[dict[str, Json], Pair]:
    """All of them, and the two whose difference is the change: before and after of one run, or the
    last of the first run and of the last."""
    found = {
        named(label, name): evaluation
        for label, files in runs.items()
        for name, evaluation in files.evaluations.items()
    }
    if len(runs) == 1:
        return found, BEFORE_AFTER
    first, *_, last = [named(label, "after") for label in runs]
    return found, (first, last)


def measure_rows(evaluations: Mapping[str, Json], pair: Pair, turns: str) -> list[Row]:
    others = {name for content in evaluations.values() for name in table(content, "protocols")}
    measures = MEASURES + tuple(
        ("1@{turns} " + name.replace("_", " "), name, "solve_rate", "")
        for name in sorted(others - KNOWN_PROTOCOLS)
    )
    return [
        Row(
            # replace, not format: a protocol's own name may hold braces
            label.replace("{turns}", turns),
            meaning.replace("{turns}", turns),
            tuple(
                rate(lookup(content, "protocols", protocol, key))
                for content in evaluations.values()
            ),
            change(evaluations, pair, protocol, key),
        )
        for label, protocol, key, meaning in measures
    ]


def breakdown_rows(evaluations: Mapping[str, Json], pair: Pair, key: str) -> tuple[Row, ...]:
    tables = {
        name: table(content, "protocols", "multi_turn", key)
        for name, content in evaluations.items()
    }
    members = sorted({member for found in tables.values() for member in found})
    return tuple(
        Row(
            member,
            "",
            cells := tuple(rate(found.get(member)) for found in tables.values()),
            difference(*pick(dict(zip(tables, cells, strict=True)), pair)),
        )
        for member in members
    )


def error_rows(contents: Sequence[Json]) -> list[tuple[str, tuple[int | None, ...]]]:
    tables = [
        table(content, "protocols", "multi_turn", "error_kinds", "turn1") for content in contents
    ]
    kinds = sorted({kind for found in tables for kind in found})
    return [
        (kind, tuple(None if (n := number(t, kind)) is None else round(n) for t in tables))
        for kind in kinds
    ]


def rate(record: Any) -> Rate | None:
    """A rate from {"value", "low", "high", "problems"} or from a bare number."""
    value = number({"value": record}, "value") if not isinstance(record, dict) else None
    if value is not None:
        return Rate(value)
    value, problems = number(record, "value"), number(record, "problems")
    if value is None:
        return None
    count = None if problems is None else round(problems)
    return Rate(value, number(record, "low"), number(record, "high"), count)


def pick(cells: Mapping[str, Rate | None], pair: Pair) -> tuple[Rate | None, Rate | None]:
    return cells.get(pair[0]), cells.get(pair[1])


def difference(before: Rate | None, after: Rate | None) -> Rate | None:
    return None if before is None or after is None else Rate(after.value - before.value)


def change(evaluations: Mapping[str, Json], pair: Pair, protocol: str, key: str) -> Rate | None:
    """The second minus the first; with a paired interval where both tell the outcome of each
    problem."""
    contents = {name: table(evaluations.get(name), "protocols") for name in pair}
    found = difference(
        *pick({name: rate(lookup(c, protocol, key)) for name, c in contents.items()}, pair)
    )
    outcomes = [outcome_list(contents[name], protocol) for name in pair]
    same = all(
        lookup(evaluations.get(pair[0]), setting) == lookup(evaluations.get(pair[1]), setting)
        for setting in ("data", "problems", "seed")
    )
    if found is None or key != "solve_rate" or not same:
        return found
    if not outcomes[0] or len(outcomes[0]) != len(outcomes[1]):
        return found
    both = [pair for pair in zip(*outcomes, strict=True) if None not in pair]
    if not both:
        return found
    mean, low, high = paired_interval(*zip(*both, strict=True))
    # several rollouts a problem: the outcomes are not what the rates were computed from
    return Rate(found.value, low, high) if abs(mean - found.value) < 1e-6 else found


def outcome_list(protocols: Json, protocol: str) -> list[float | None]:
    """A place for each problem; None where all its dialogues were dropped."""
    outcomes = lookup(protocols, protocol, "outcomes")
    if not isinstance(outcomes, list):
        return []
    return [None if outcome is None else float(outcome) for outcome in outcomes]


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference and its 95% percentile bootstrap interval over problems, whose outcomes are
    rates.

    Few differences are different, so to resample N of them is to draw their counts from a
    multinomial.
    """
    differences_N = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    different, counts = np.unique(differences_N, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(before), counts / len(before), size=RESAMPLES)
    low, high = np.percentile(drawn @ different / len(before), [2.5, 97.5])
    return float(differences_N.mean()), float(low), float(high)


def describe_setting(evaluation: Json) -> str:
    parts = [
        (text(evaluation, "problems"), "{} problems"),
        (text(evaluation, "data"), "{}"),
        (text(evaluation, "temperature"), "temperature {}"),
        (text(evaluation, "top_p"), "top-p {}"),
        (text(evaluation, "turns"), "up to {} turns"),
    ]
    return ", ".join(form.replace("{}", value) for value, form in parts if value)


def warn_of_differences(evaluations: Mapping[str, Json], pair: Pair) -> list[str]:
    before, after = (evaluations.get(name, {}) for name in pair)
    if not before or not after:
        return []
    return [
        f"Not like with like: {name} is {text(before, name) or 'not given'} {pair[0]} "
        f"and {text(after, name) or 'not given'} {pair[1]}."
        for name in SAME_SETTING
        if lookup(before, name) != lookup(after, name)
    ]
