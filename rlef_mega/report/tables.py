"""The comparison before and after, as a table in the terminal."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlef_mega.report.comparison import Comparison, Rate, Row, compare, evaluations_of
from rlef_mega.report.display import percent, points, visible
from rlef_mega.report.run_files import named, read_runs


def print_comparison(*runs: Path, console: Console | None = None) -> None:
    """Print what the evaluations under `eval` of each run say.

    Raises ValueError when a run is not a directory.
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
    table = comparison_table(comparison.rows, comparison, first_column="")
    table.title = Text(visible(comparison.setting), style="bold")
    table.caption = (
        "% with 95% intervals; the interval of a change is paired, over the same problems"
    )
    console.print(table)
    for breakdown in comparison.breakdowns:
        console.print(comparison_table(breakdown.rows, comparison, first_column=breakdown.title))


def comparison_table(rows: tuple[Row, ...], comparison: Comparison, *, first_column: str) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # 80 columns hold the rows of MEASURES unbroken
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column(Text(first_column), overflow="fold")
    for name in comparison.columns:
        table.add_column(Text(visible(name)), justify="right", no_wrap=True)
    table.add_column("change", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(visible(row.label)), *(cell(rate) for rate in row.cells), change_cell(row.change)
        )
    return table


def cell(rate: Rate | None) -> Text:
    return Text("—", style="dim") if rate is None else with_interval(percent(rate.value, ""), rate)


def change_cell(rate: Rate | None) -> Text:
    return Text("—", style="dim") if rate is None else with_interval(points(rate.value), rate)


def with_interval(value: str, rate: Rate) -> Text:
    text = Text(value, style="bold")
    if rate.low is not None and rate.high is not None:
        text.append(f" [{percent(rate.low, '')}, {percent(rate.high, '')}]", style="not bold dim")
    return text
