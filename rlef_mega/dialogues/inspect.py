"""`rlef data inspect`: describe the problems of a source, and why others were dropped."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlef_mega.dialogues import templates
from rlef_mega.problems import contamination, is_data_set, load_problems, read_data_set
from rlef_mega.problems.rows import Drop
from rlef_mega.problems.store import ProblemStore
from rlef_mega.run.hub import DESCRIPTION, find_model
from rlef_mega.types import Problem

SHOWN = 10  # dropped problems of each reason, overlaps with another source


def inspect(source: str, *, tokenizer: Path | None, against: str | None) -> None:
    """Print counts, limits, lengths and drops and, with `against`, the problems of that evaluation
    set that `source` has too. Lengths are in tokens if `tokenizer`, a model folder, is given."""
    problems = read_data_set(source) if is_data_set(source) else load_problems(source)
    drops = problems.drops if isinstance(problems, ProblemStore) else ()
    console = Console(emoji=False)  # else `:train` of a source could become an emoji
    table = Table("what", "found", title=source)
    for what, found in summarize(problems, *length_of(tokenizer)).items():
        table.add_row(what, str(found))
    for reason, count in Counter(drop.reason for drop in drops).most_common():
        table.add_row(f"dropped: {reason}", str(count))
    console.print(table)
    print_drops(console, drops)
    if against is not None:
        overlaps = contamination.compare(problems, load_problems(against))
        summary, *lines = contamination.describe(overlaps)
        for line in (f"against {against}: {summary}", *lines[:SHOWN]):
            console.print(line, markup=False)


def print_drops(console: Console, drops: Sequence[Drop]) -> None:
    """Print some dropped problems of each reason, with their locations."""
    shown: Counter[str] = Counter()
    for drop in drops:
        shown[drop.reason] += 1
        if shown[drop.reason] <= SHOWN:
            line = f"{drop.location} {drop.id!r}: {drop.reason} {drop.detail}".rstrip()
            console.print(line, markup=False, soft_wrap=True)
    for reason, count in shown.items():
        if count > SHOWN:
            console.print(f"... and {count - SHOWN} more: {reason}", markup=False)


def length_of(tokenizer: Path | None) -> tuple[str, Callable[[str, str], int]]:
    """Return the unit of a prompt's length, and a function that counts it, from the first message
    and what begins the response."""
    if tokenizer is None:
        return "characters", lambda text, begun: len(text) + len(begun)
    from rlef_mega.dialogues.chat import ChatFormat

    chat = ChatFormat.from_folder(find_model(tokenizer, files=DESCRIPTION))
    return "tokens", lambda text, begun: len(chat.open(text, begun))


def summarize(
    problems: Sequence[Problem], unit: str, length: Callable[[str, str], int]
) -> dict[str, Any]:
    """Return the rows of the table, with prompts of `length` in `unit`. Only one problem is in
    memory at a time."""
    lengths, public, private = list[int](), list[int](), list[int]()
    times, memories = Counter[float](), Counter[int]()
    families, tags = Counter[str](), Counter[str]()
    for problem in problems:
        prompt = templates.first_prompt(problem.statement, problem.template, problem.public_tests)
        begun = templates.response_start(problem.statement, problem.template)
        lengths.append(length(prompt, begun))
        times[problem.limits.cpu_s] += 1
        memories[problem.limits.memory_bytes >> 20] += 1
        public.append(len(problem.public_tests))
        private.append(len(problem.private_tests.tests))
        families[problem.family or "none"] += 1
        tags.update(problem.tags)
    return {
        "problems": len(lengths),
        "families": most_common(families),
        "tests, public and private": f"{sum(public):,} and {sum(private):,}",
        "problems without public tests": public.count(0),
        "problems without private tests": private.count(0),
        "tests of a problem": quantiles(list(map(sum, zip(public, private, strict=True)))),
        "time limits in s": most_common(times),
        "memory limits in MiB": most_common(memories),
        f"prompt in {unit}": quantiles(lengths),
        "with an image": tags["image"],
        "with multiple answers": tags["multiple answers"],
    }


def most_common(counts: Counter[Any]) -> str:
    return ", ".join(f"{value}: {count}" for value, count in counts.most_common(8))


def quantiles(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    ordered = sorted(numbers)
    parts = {"min": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
    return ", ".join(
        f"{name} {ordered[round(part * (len(ordered) - 1))]:,}" for name, part in parts.items()
    )
