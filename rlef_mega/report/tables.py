"""Evaluations as tables in the terminal: several side by side, and one in detail."""

from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlef_mega.report.comparison import MeasureRow, Rate, compare, evaluations_of, rate
from rlef_mega.report.display import percent, points, visible
from rlef_mega.report.run_files import Json, lookup, named, number, read_runs, table


def print_comparison(*runs: Path, console: Console | None = None) -> None:
    """Print the evaluations under `eval` of each run.

    Raises ValueError if a run is not a directory.
    """
    console = console or Console()
    files = read_runs(runs)
    comparison = compare(*evaluations_of(files))
    notes = [named(label, note) for label, run in files.items() for note in run.notes]
    for note in (*notes, *comparison.warnings):
        console.print(Text(visible(note), style="yellow"))
    if not comparison.columns:
        console.print(Text(f"No evaluation in {runs[0] / 'eval'} yet."))
        return
    main = comparison_table("", comparison.columns, comparison.rows)
    main.title = Text(visible(comparison.setting), style="bold")
    main.caption = (
        "% with 95% intervals; the interval of a change is paired, over the same problems"
    )
    console.print(main)
    for title, rows in comparison.breakdowns.items():
        console.print(comparison_table(title, comparison.columns, rows))


def comparison_table(title: str, columns: tuple[str, ...], rows: tuple[MeasureRow, ...]) -> Table:
    shown = plain_table(title, *columns, "change")
    for row in rows:
        shown.add_row(readable(row.label), *map(cell, row.cells), cell(row.change, show=points))
    return shown


def print_evaluation(evaluation: Json) -> None:
    """Print n@k of every protocol, solve rates by difficulty, turn budgets, and how the next turn
    repaired failures."""
    console = Console()
    protocols = {
        name.replace("_", " "): numbers for name, numbers in table(evaluation, "protocols").items()
    }
    for key, label in (("n_at_k", "{}"), ("pass_at_k", "pass@{}"), ("by_difficulty", "{}")):
        if any(table(numbers, key) for numbers in protocols.values()):
            console.print(protocol_table(protocols, key, label))
    if any(table(numbers, "turn_budget") for numbers in protocols.values()):
        console.print(budget_table(protocols))
    for name, numbers in protocols.items():
        if table(numbers, "became"):
            console.print(repair_table(name, numbers))
    for line in warnings_of(protocols):
        console.print(Text(visible(line), style="yellow"))


def protocol_table(protocols: Json, key: str, label: str) -> Table:
    """Return a table of the rates under `key`, one row per protocol."""
    members = list(dict.fromkeys(m for numbers in protocols.values() for m in table(numbers, key)))
    title = key.replace("_at_", "@").replace("_", " ")
    shown = plain_table(title, *(label.replace("{}", member) for member in members))
    for name, numbers in protocols.items():
        cells = (cell(rate(lookup(numbers, key, member))) for member in members)
        shown.add_row(readable(name), *cells)
    return shown


def budget_table(protocols: Json) -> Table:
    """Return a table of n@k by the limit on a dialogue's turns."""
    budgets = {
        f"{pair} {name}": curve
        for name, numbers in protocols.items()
        for pair, curve in table(numbers, "turn_budget").items()
    }
    turns = list(dict.fromkeys(turn for curve in budgets.values() for turn in curve))
    shown = plain_table("n@k by turn limit", *turns)
    for label, curve in budgets.items():
        values = (number(curve, turn, "value") for turn in turns)
        shown.add_row(readable(label), *(percent(value, "") for value in values))
    return shown


def repair_table(name: str, numbers: Json) -> Table:
    """Return a table of each turn's failures by kind: their number and, of those that had a next
    turn, the share that it solved."""
    turns = list(table(numbers, "error_kinds"))
    headings = (turn.replace("turn", "turn ") for turn in turns)
    shown = plain_table(f"{name}: failures, repaired next", *headings)
    for kind in sorted({kind for turn in turns for kind in table(numbers, "error_kinds", turn)}):
        cells = []
        for turn in turns:
            failed = number(numbers, "error_kinds", turn, kind) or 0
            after = table(numbers, "became", turn, kind)
            share = f"  {after.get('OK', 0) / sum(after.values()):4.0%}" if after else ""
            cells.append(f"{failed:,.0f}{share}")
        shown.add_row(readable(kind), *cells)
    similarity = [number(numbers, "chrf", turn, "mean") for turn in turns]
    if any(mean is not None for mean in similarity):
        cells = ["" if mean is None else f"{mean:.0f}" for mean in similarity]
        shown.add_row("chrF to the previous program", *cells, style="dim")
    return shown


def warnings_of(protocols: Json) -> list[str]:
    """Return warnings of dropped dialogues, of problems left out and of biased estimates."""
    lines = []
    for name, numbers in protocols.items():
        for reason, count in table(numbers, "dropped").items():
            lines.append(f"{name}: {count} dialogues were dropped ({reason})")
        if left_out := lookup(numbers, "problems_left_out"):
            lines.append(f"{name}: {len(left_out)} problems have no dialogue and are left out")
        lines += [
            f"{name}: {pair} draws {found['draws']} dialogues with replacement from fewer, which "
            "is biased downwards; increase --rollouts"
            for pair, found in table(numbers, "n_at_k").items()
            if number(found, "bootstrapped")
        ]
    return lines


def plain_table(*headings: str) -> Table:
    """Return a table with left-aligned row names; the rows of MEASURES fit 80 columns."""
    first, *others = map(readable, headings)
    shown = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column(first, overflow="fold")
    for heading in others:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


def readable(name: str) -> Text:
    """Return a name as text that is neither markup nor control characters."""
    return Text(visible(name))


def cell(rate: Rate | None, show: Callable[[float], str] = percent) -> Text:
    if rate is None:
        return Text("—", style="dim")
    text = Text(show(rate.value).removesuffix("%"), style="bold")
    if rate.low is not None and rate.high is not None:
        text.append(f" [{percent(rate.low, '')}, {percent(rate.high, '')}]", style="not bold dim")
    return text
