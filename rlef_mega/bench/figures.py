"""Figures: samples to a median with its spread, a table on the terminal, a JSON file to keep.

    python -m rlef_mega.bench.figures RESULTS.json

prints a results file as the table for docs/benchmarks.md.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlef_mega.run.directory import write_atomically
from rlef_mega.run.manifest import describe


@dataclass(frozen=True)
class Figure:
    """One measured quantity: a sample a repeat."""

    name: str
    unit: str  # "tokens/s", "TFLOP/s", "runs/s", "s", "MiB", "ratio", or "share" (0 to 1)
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)


@dataclass(frozen=True)
class Report:
    """A benchmark's figures with what they were measured on."""

    title: str
    about: dict[str, Any]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
    # figures named "what | quantity": shown as a row a what, medians only
    pivoted: bool = False


def describe_benchmark(**more: Any) -> dict[str, Any]:
    """Versions, device, date and command, and what the benchmark adds."""
    return describe(command=" ".join(["rlef", *sys.argv[1:]]), **more)


def shares(phases: Sequence[dict[str, float]]) -> list[Figure]:
    """What fraction of each repeat its phases took; all but `step`, which is the repeat's wall
    time."""
    names = sorted({name for times in phases for name in times} - {"step"})
    return [
        Figure(
            f"share: {name}",
            "share",
            tuple(times.get(name, 0.0) / times["step"] for times in phases),
        )
        for name in names
    ]


def readable(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def show(report: Report) -> None:
    console = Console()
    figures = list(report.figures)
    if report.pivoted:
        console.print(pivot({figure.name: figure for figure in figures}, report.title))
        figures = [figure for figure in figures if " | " not in figure.name]
    if figures:
        table = Table("figure", "median", "lowest", "highest", "unit", title=report.title)
        for figure in figures:
            unit = "" if figure.unit == "share" else figure.unit
            cells = [readable(v, figure.unit) for v in (figure.median, figure.low, figure.high)]
            table.add_row(figure.name, *cells, unit)
        console.print(table)
    where = [report.about[name] for name in ("model", "device") if name in report.about]
    for note in (*report.notes, "measured on: " + ", ".join(where)):
        console.print(note)


def pivot(figures: dict[str, Figure], title: str) -> Table:
    named = [name.split(" | ") for name in figures if " | " in name]
    rows, columns = (list(dict.fromkeys(part)) for part in zip(*named, strict=True))
    units = {column: unit_of(figures, column) for column in columns}
    headings = [f"{c}, {units[c]}" if units[c] not in (c, "share") else c for c in columns]
    table = Table("phase", *headings, title=f"{title}, medians")
    for row in rows:
        cells = [figures.get(f"{row} | {column}") for column in columns]
        table.add_row(row, *(readable(f.median, f.unit) if f else "" for f in cells))
    return table


def unit_of(figures: dict[str, Figure], column: str) -> str:
    return next(f.unit for name, f in figures.items() if name.endswith(f" | {column}"))


def markdown(path: Path) -> str:
    """A results file as the table that docs/benchmarks.md shows."""
    rows = ["| figure | median | lowest | highest | unit |", "|---|---|---|---|---|"]
    for name, figure in json.loads(path.read_text())["figures"].items():
        unit = figure["unit"]
        values = [readable(figure[part], unit) for part in ("median", "low", "high")]
        rows.append(f"| {' | '.join([name, *values, '' if unit == 'share' else unit])} |")
    return "\n".join(rows)


def write(report: Report, path: Path) -> None:
    content = {
        "title": report.title,
        **report.about,
        "notes": list(report.notes),
        "figures": {
            figure.name: {
                "unit": figure.unit,
                "median": figure.median,
                "low": figure.low,
                "high": figure.high,
                "samples": list(figure.samples),
            }
            for figure in report.figures
        },
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
