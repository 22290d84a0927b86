"""The figures of a benchmark: samples with their median and spread, a table on the terminal, and a
JSON file with device, versions, date and command."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlef_mega.run.directory import write_atomically
from rlef_mega.run.manifest import describe


@dataclass(frozen=True)
class Figure:
    """One measured quantity, with a sample for each repeat.

    Figures named "what | quantity" share a table with a row for each `what`.
    """

    name: str
    unit: str  # such as "tokens/s", "s", "MiB" or "ratio"; "share" is 0 to 1, shown in percent
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def as_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "median": self.median,
            "low": min(self.samples),
            "high": max(self.samples),
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class Results:
    """A benchmark's figures and the conditions they were measured under."""

    title: str
    about: dict[str, Any]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        figures = {figure.name: figure.as_json() for figure in self.figures}
        content = {"title": self.title, **self.about, "notes": list(self.notes), "figures": figures}
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def show(self) -> None:
        """Print the figures as Markdown tables, which docs can quote."""
        plain = [figure for figure in self.figures if " | " not in figure.name]
        paired = [figure for figure in self.figures if " | " in figure.name]
        print(self.title)
        if paired:
            print(markdown(paired_rows(paired)))
        if plain:
            rows = [["figure", "median", "lowest", "highest", "unit"]]
            for figure in plain:
                values = (figure.median, min(figure.samples), max(figure.samples))
                unit = "" if figure.unit == "share" else figure.unit
                rows.append([figure.name, *(readable(v, figure.unit) for v in values), unit])
            print(markdown(rows))
        print("\n".join(self.notes))
        known = [self.about[name] for name in ("model", "device") if name in self.about]
        print("measured on: " + ", ".join(known))


def paired_rows(figures: Sequence[Figure]) -> list[list[str]]:
    """Return medians, with a row for each "what" and a column for each quantity."""
    cells = {tuple(figure.name.rsplit(" | ", 1)): figure for figure in figures}
    columns = {quantity: figure.unit for (_, quantity), figure in cells.items()}
    rows = [["medians", *(q if u in (q, "share") else f"{q}, {u}" for q, u in columns.items())]]
    for what in dict.fromkeys(what for what, _ in cells):
        row = [cells.get((what, quantity)) for quantity in columns]
        rows.append([what, *(readable(f.median, f.unit) if f else "" for f in row)])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table with the first row as its head; a cell's " | " becomes ", "."""
    rows = [[cell.replace(" | ", ", ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [map(str.ljust, row, widths) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded) + "\n"


def readable(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe_benchmark(**more: Any) -> dict[str, Any]:
    """Return versions, device, date and command, and what the benchmark adds."""
    return describe(command=" ".join(["rlef", *sys.argv[1:]]), **more)


def shares(repeats: Sequence[dict[str, float]]) -> list[Figure]:
    """Return each phase's fraction of the wall time, which each repeat has under `step`."""
    names = sorted({name for times in repeats for name in times} - {"step"})
    return [
        Figure(f"share: {name}", "share", tuple(t.get(name, 0.0) / t["step"] for t in repeats))
        for name in names
    ]
