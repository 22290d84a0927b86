"""Curves of a run as small SVG panels for the page; `panels.json` lists the panels of metrics.

They are drawn in placeholder colours that become CSS variables, so that one drawing serves a light
and a dark page; text stays text. The curves of one run also differ in their dashes.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from rlef_mega.report.display import percent, significant
from rlef_mega.report.intervals import wilson_interval
from rlef_mega.report.plots import PALETTE, STYLE
from rlef_mega.report.run_files import Json, named, number, series

INK, GRID = "#010203", "#040506"  # placeholders that no drawing uses otherwise
INKS = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
PANEL_STYLE: dict[Any, Any] = {
    **STYLE,
    **dict.fromkeys(INKS, INK),
    "grid.color": GRID,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.6,
}
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
MAX_POINTS = 200  # a panel is about 300 pixels wide

Points = tuple[list[float], list[float]]
Runs = Mapping[str, tuple[Json, ...]]  # label (empty for a single run) -> metrics


@dataclass(frozen=True)
class Panel:
    title: str
    meaning: str
    curves: Mapping[str, str]  # label -> metric; "a.b" is b of a
    unit: str = ""  # "%" or none
    log: bool = False
    of_async: bool = False  # shown only if some token was sampled by older weights
    trials: str = ""  # the metric that counts the trials of a rate; validation has no such count


@dataclass(frozen=True)
class Line:
    label: str
    color: int  # index into PALETTE
    dash: int  # index into DASHES
    summary: str  # for the legend: first and last value
    points: Points = ([], [])
    trials: Points = ([], [])  # the number of trials of each point, if it has an interval


@dataclass(frozen=True)
class Drawing:
    title: str
    meaning: str
    legend: tuple[Line, ...]
    svg: Markup
    area: bool = False  # the legend names areas, not lines


PANELS_FILE = Path(__file__).with_name("panels.json")
PANELS = tuple(Panel(**panel) for panel in json.loads(PANELS_FILE.read_text(encoding="utf-8")))
PHASES = ("rollout", "score", "update", "publish", "checkpoint", "evaluate")


def draw_panels(runs: Runs) -> list[Drawing]:
    """Draw every panel for which some run has data. Several runs differ in colour, the curves of
    one panel in their dashes."""
    stale = any(any(series(metrics, "staleness_max")[1]) for metrics in runs.values())
    runs = {
        label: tuple({**record, "tokens_per_s": tokens_per_s(record)} for record in metrics)
        for label, metrics in runs.items()
    }
    drawings = [draw_curves(panel, runs) for panel in PANELS if stale or not panel.of_async]
    drawings += [draw_phases(label, metrics) for label, metrics in runs.items()]
    return [drawing for drawing in drawings if drawing]


def draw_curves(panel: Panel, runs: Runs) -> Drawing | None:
    lines = []
    for color, (run, metrics) in enumerate(runs.items()):
        for dash, (label, key) in enumerate(panel.curves.items()):
            points = series(metrics, *key.split("."))
            counted = panel.trials and not key.startswith("valid")
            trials = series(metrics, panel.trials) if counted else ([], [])
            own = color % len(PALETTE) if len(runs) > 1 else dash
            ends = summary(points[1], panel.unit)
            if points[0]:
                lines.append(Line(named(run, label), own, dash, ends, points, trials))
    if not lines:
        return None
    with matplotlib.rc_context(PANEL_STYLE):
        figure, axes = new_panel()
        for line in lines:
            draw_line(axes, line)
        set_limits(axes, panel, [line.points for line in lines])
        return Drawing(panel.title, panel.meaning, tuple(lines), to_svg(figure, panel.title))


def draw_line(axes: Axes, line: Line) -> None:
    steps, values = binned(line.points)
    if line.trials[0] == line.points[0]:
        counts = [count * len(line.points[0]) / len(steps) for count in binned(line.trials)[1]]
        low, high = wilson_interval(values, counts)
        axes.fill_between(steps, low, high, color=PALETTE[line.color], alpha=0.18, linewidth=0)
    axes.plot(
        steps,
        values,
        color=PALETTE[line.color],
        linestyle=DASHES[line.dash % len(DASHES)],
        linewidth=1.6,
        marker="o" if len(steps) <= 12 else None,
        markersize=3.5,
    )


def set_limits(axes: Axes, panel: Panel, curves: Sequence[Points]) -> None:
    """Start the y axis at zero, so that noise does not look like a trend, unless a value is
    negative or the axis is logarithmic."""
    steps = {step for found, _ in curves for step in found}
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, max(steps) + 1)
    values = [value for _, found in curves for value in found]
    low, high = min(values), max(*values, axes.dataLim.y1)  # with the intervals
    if panel.log and low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if low >= 0:
        # a rate of zero still needs an axis, and one or two percent should look small
        axes.set_ylim(0, max(1.1 * high, 0.05 if panel.unit == "%" else 1e-9))
    if panel.unit == "%":
        axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def draw_phases(label: str, metrics: tuple[Json, ...]) -> Drawing | None:
    """Draw the seconds of each step as stacked phases; `other` is the rest of the step."""
    timed = [record for record in metrics if number(record, "time", "step") is not None]
    if not timed:
        return None
    steps = [number(record, "step") or 0.0 for record in timed]
    phases = phase_seconds(timed)
    whole = sum(map(sum, phases.values())) or 1.0
    title = f"Seconds of a step, {label}" if label else "Seconds of a step"
    with matplotlib.rc_context(PANEL_STYLE):
        figure, axes = new_panel()
        layers = [binned((steps, seconds)) for seconds in phases.values()]
        centres = layers[0][0]
        half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else 0.5
        axes.stackplot(
            [edge for centre in centres for edge in (centre - half, centre + half)],
            *([height for height in seconds for _ in range(2)] for _, seconds in layers),
            colors=PALETTE[: len(phases)],
            linewidth=0,
            alpha=0.85,
        )
        axes.set_ylim(bottom=0)
        legend = tuple(
            Line(name, color, 0, f"{fmean(seconds):.2f} s, {percent(sum(seconds) / whole)}")
            for color, (name, seconds) in enumerate(phases.items())
        )
        meaning = "By phase, with means and shares of the whole run; the rollout includes grading."
        return Drawing(title, meaning, legend, to_svg(figure, title), area=True)


def phase_seconds(metrics: Sequence[Json]) -> dict[str, list[float]]:
    """Return the seconds of each phase in each step, and of `other`, the rest of the step."""
    columns = {
        phase: [number(record, "time", phase) or 0.0 for record in metrics]
        for phase in (*PHASES, "step")
    }
    totals = columns.pop("step")
    phases = {phase: seconds for phase, seconds in columns.items() if any(seconds)}
    known = [sum(step) for step in zip(*phases.values(), strict=True)] or [0.0] * len(totals)
    phases["other"] = [max(0.0, total - part) for total, part in zip(totals, known, strict=True)]
    return phases


def tokens_per_s(record: Json) -> float | None:
    """Return a step's speed: the tokens of its batch per second, evaluation not counted."""
    tokens = number(record, "tokens")
    seconds = (number(record, "time", "step") or 0) - (number(record, "time", "evaluate") or 0)
    return tokens / seconds if tokens is not None and seconds > 0 else None


def new_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, 2.1))
    # fixed margins line the panels up, and cost half of what a layout engine does
    axes = figure.add_axes((0.13, 0.12, 0.85, 0.84))
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(length=2.5, width=0.6)
    return figure, axes


def binned(points: Points) -> Points:
    """Average groups of neighbouring points so that at most `MAX_POINTS` remain."""
    size = -(-len(points[0]) // MAX_POINTS)
    if size <= 1:
        return points
    steps, values = (
        [fmean(column[start : start + size]) for start in range(0, len(column), size)]
        for column in points
    )
    return steps, values


def summary(values: Sequence[float], unit: str) -> str:
    """Return the first and the last value for the legend."""
    ends = dict.fromkeys((0, len(values) - 1)) if values else {}
    return " → ".join((percent if unit == "%" else significant)(values[end]) for end in ends)


def to_svg(figure: Figure, title: str) -> Markup:
    """Return the drawing as an element of a page: without prologue and namespaces, with colours
    from CSS."""
    buffer = io.StringIO()
    # without a date, so that the same run gives the same page
    without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=without)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="[A-Za-z]*(\.\w+)?_\d+"', "", text)  # repeated in every drawing
    for side in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?)\s{side}="[^"]*"', r"\1", text, count=1)
    variables = {color: f"var(--series-{n})" for n, color in enumerate(PALETTE)}
    for color, variable in (variables | {INK: "var(--ink-soft)", GRID: "var(--grid)"}).items():
        text = text.replace(color, variable)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
