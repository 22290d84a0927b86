"""Curves of a run as small SVG panels for the page.

They are drawn in stand-in colours that become CSS variables, so that one drawing serves a light and
a dark page; their text stays text. The palette is Okabe and Ito's, which colour-blind readers can
tell apart, and the lines of one panel also differ in their dashes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from rlef_mega.report.display import percent, significant
from rlef_mega.report.run_files import Json, named, number, series

INK, GRID = "#010203", "#040506"  # stand-ins, in no drawing by chance
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
# Any: matplotlib names the type of these keys only from 3.11 on
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.6,
}
MAX_POINTS = 200  # a panel is about 300 pixels wide
Z = 1.96  # of a 95% interval

Points = tuple[list[float], list[float]]
Runs = Mapping[str, tuple[Json, ...]]  # a label, empty where there is one run only, and its metrics


@dataclass(frozen=True)
class Panel:
    title: str
    meaning: str
    curves: tuple[tuple[str, str], ...]  # label, metric; "a.b" is b of a
    unit: str = ""  # "%" or none
    log: bool = False
    of_async: bool = False  # says something only where dialogues went on while the trainer trained
    trials: str = ""  # the metric that says of how many a curve without "validation" is a fraction


@dataclass(frozen=True)
class LegendEntry:
    label: str
    place: int  # in the palette
    dash: int  # in the dashes
    summary: str  # first and last value


@dataclass(frozen=True)
class Line:
    label: str
    place: int
    dash: int
    points: Points
    trials: Points  # how many each point is a fraction of, where it is one with an interval


@dataclass(frozen=True)
class Drawing:
    title: str
    meaning: str
    legend: tuple[LegendEntry, ...]
    svg: Markup
    area: bool = False  # the legend names areas, not lines


PANELS = (
    Panel(
        "Solved",
        "Episodes whose last program passes every test. Training batches with 95% intervals, and "
        "held-out problems.",
        (
            ("multi-turn", "solved"),
            ("at turn 1", "solved_turn1"),
            ("multi-turn, validation", "valid_solved"),
        ),
        unit="%",
        trials="episodes",
    ),
    Panel(
        "Repaired",
        "Failures of the turn before that this turn put right.",
        (("turn 2", "repaired_turn2"), ("turn 3", "repaired_turn3")),
        unit="%",
    ),
    Panel(
        "Reward",
        "Mean of an episode: the task alone, and with the KL penalty.",
        (("task reward", "reward"), ("return", "return")),
    ),
    Panel(
        "Responses without valid code",
        "Rises first when training comes apart.",
        (("invalid", "invalid_fraction"),),
        unit="%",
    ),
    Panel("KL to the initial policy", "Mean over the tokens of a turn.", (("KL", "kl"),)),
    Panel("Entropy", "Of the next token, in nats.", (("entropy", "entropy"),)),
    Panel(
        "Clipped",
        "Tokens and values outside the trust region.",
        (
            ("policy ratio", "clip_fraction"),
            ("value", "value_clip_fraction"),
        ),
        unit="%",
    ),
    Panel(
        "Explained variance of the critic",
        "1 is a perfect prediction of the return, 0 no better than its mean.",
        (("explained variance", "value_explained_variance"),),
    ),
    Panel(
        "Log-prob gap, engine to trainer",
        "How far the sampler's log-probs are from the trainer's.",
        (("largest", "logprob_gap_max"), ("mean", "logprob_gap_mean")),
        log=True,
    ),
    Panel(
        "Versions behind",
        "How old the weights are that sampled a token, when it is trained on.",
        (("mean", "staleness_mean"), ("largest", "staleness_max")),
        of_async=True,
    ),
    Panel(
        "Effective sample size",
        "Of the ratios between the policy trained and the one that sampled: 1 is on-policy.",
        (("effective sample size", "effective_sample_size"),),
        of_async=True,
    ),
    Panel(
        "Truncated ratios",
        "Tokens whose ratio min(pi / pi_b, 1) cuts, by more than 1%.",
        (("truncated", "truncated_fraction"),),
        unit="%",
        of_async=True,
    ),
    Panel(
        "Idle",
        "The trainer waits for episodes; servers have nothing to do (an upper bound).",
        (("trainer", "idle_time.trainer"), ("servers", "idle_time.engines")),
        unit="%",
    ),
    Panel(
        "Follow-up turns out of the cache",
        "Tokens of their contexts that the server had, and did not compute again.",
        (("cached", "servers.follow_up_cached_share"),),
        unit="%",
    ),
    Panel(
        "Gradient norm",
        "Before clipping.",
        (("policy", "policy_grad_norm"), ("critic", "critic_grad_norm")),
        log=True,
    ),
    Panel(
        "Losses",
        "Their size says little in PPO; a jump says much.",
        (("policy", "policy_loss"), ("value", "value_loss")),
    ),
    Panel("Response length", "Mean tokens of a response.", (("tokens", "response_tokens_mean"),)),
    Panel("Turns", "Mean responses of an episode.", (("turns", "turns_mean"),)),
)

PHASES = ("rollout", "score", "update", "publish", "checkpoint", "evaluate")


def draw_panels(runs: Runs) -> list[Drawing]:
    """One drawing for every panel that has something to show. Several runs differ in colour, the
    curves of one panel in their dashes."""
    stale = any(any(series(metrics, "staleness_max")[1]) for metrics in runs.values())
    drawings = [draw_curves(panel, runs) for panel in PANELS if stale or not panel.of_async]
    drawings += [draw_phases(label, metrics) for label, metrics in runs.items()]
    drawings.append(draw_throughput(runs))
    return [drawing for drawing in drawings if drawing]


def draw_curves(panel: Panel, runs: Runs) -> Drawing | None:
    lines = []
    for place, (run, metrics) in enumerate(runs.items()):
        for dash, (label, key) in enumerate(panel.curves):
            points = series(metrics, *key.split("."))
            counted = bool(panel.trials) and not key.startswith("valid")
            trials = series(metrics, panel.trials) if counted else ([], [])
            colour = place if len(runs) > 1 else dash
            lines.append(Line(named(run, label), colour, dash, points, trials))
    return draw_lines(panel, lines)


def draw_lines(panel: Panel, lines: list[Line]) -> Drawing | None:
    present = [line for line in lines if line.points[0]]
    if not present:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_panel(panel)
        legend = []
        for line in present:
            draw_line(axes, line)
            summary = summarise(line.points[1], panel.unit)
            legend.append(LegendEntry(line.label, line.place, line.dash, summary))
        settle_limits(axes, panel, [line.points for line in present])
        return Drawing(panel.title, panel.meaning, tuple(legend), to_svg(figure, panel.title))


def draw_line(axes: Axes, line: Line) -> None:
    steps, values = binned(line.points)
    if line.trials[0] == line.points[0]:
        counts = [count * len(line.points[0]) / len(steps) for count in binned(line.trials)[1]]
        low, high = wilson(values, counts)
        axes.fill_between(steps, low, high, color=PALETTE[line.place], alpha=0.18, linewidth=0)
    axes.plot(
        steps,
        values,
        color=PALETTE[line.place],
        linestyle=DASHES[line.dash % len(DASHES)],
        linewidth=1.6,
        marker="o" if len(steps) <= 12 else None,
        markersize=3.5,
    )


def wilson(rates: Sequence[float], counts: Sequence[float]) -> tuple[list[float], list[float]]:
    """The 95% interval of a rate among so many (Wilson 1927): it stays within 0 and 1."""
    low, high = [], []
    for rate, count in zip(rates, counts, strict=True):
        rate = min(1.0, max(0.0, rate))
        middle = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count) if count else 0.5
        half = Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2)) if count else 0.5
        half = half / (1 + Z**2 / count) if count else half
        low.append(middle - half)
        high.append(middle + half)
    return low, high


def settle_limits(axes: Axes, panel: Panel, curves: Sequence[Points]) -> None:
    """From zero where nothing is below it, so that noise does not look like a trend."""
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
        # a rate of zero still needs an axis, and a percent or two should look like little
        axes.set_ylim(0, max(1.1 * high, 0.05 if panel.unit == "%" else 1e-9))
    if panel.unit == "%":
        axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def draw_phases(label: str, metrics: tuple[Json, ...]) -> Drawing | None:
    """Where the seconds of each step went, stacked; what no phase accounts for is `other`."""
    whole = [record for record in metrics if number(record, "time", "step") is not None]
    if not whole:
        return None
    steps = [number(record, "step") or 0.0 for record in whole]
    stack = phase_seconds(whole)
    title = f"Seconds of a step, {label}" if label else "Seconds of a step"
    panel = Panel(title, "By phase; grading runs inside the rollout.", ())
    with matplotlib.rc_context(STYLE):
        figure, axes = new_panel(panel)
        layers = [binned((steps, seconds)) for seconds in stack.values()]
        centres = layers[0][0]
        half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else 0.5
        axes.stackplot(
            [edge for centre in centres for edge in (centre - half, centre + half)],
            *([height for height in seconds for _ in range(2)] for _, seconds in layers),
            colors=PALETTE[: len(stack)],
            linewidth=0,
            alpha=0.85,
        )
        axes.set_ylim(bottom=0)
        legend = tuple(
            LegendEntry(name, place, 0, f"{sum(seconds) / len(seconds):.2f} s")
            for place, (name, seconds) in enumerate(stack.items())
        )
        svg = to_svg(figure, panel.title)
        return Drawing(panel.title, panel.meaning, legend, svg, area=True)


def phase_seconds(metrics: Sequence[Json]) -> dict[str, list[float]]:
    """Seconds of each phase a step, and `other`, the rest of the step."""
    stack = {
        phase: [number(record, "time", phase) or 0.0 for record in metrics] for phase in PHASES
    }
    stack = {phase: seconds for phase, seconds in stack.items() if any(seconds)}
    totals = [number(record, "time", "step") or 0.0 for record in metrics]
    known = [sum(column) for column in zip(*stack.values(), strict=True)] or [0.0] * len(totals)
    stack["other"] = [max(0.0, total - part) for total, part in zip(totals, known, strict=True)]
    return stack


def draw_throughput(runs: Runs) -> Drawing | None:
    panel = Panel(
        "Tokens a second",
        "Tokens of the batch over the time of the step, evaluation left out.",
        (),
    )
    lines = [
        Line(label or "tokens/s", place, 0, throughput(metrics), ([], []))
        for place, (label, metrics) in enumerate(runs.items())
    ]
    return draw_lines(panel, lines)


def throughput(metrics: tuple[Json, ...]) -> Points:
    points: Points = ([], [])
    for record in metrics:
        step, tokens = number(record, "step"), number(record, "tokens")
        seconds = (number(record, "time", "step") or 0) - (number(record, "time", "evaluate") or 0)
        if step is not None and tokens is not None and seconds > 0:
            points[0].append(step)
            points[1].append(tokens / seconds)
    return points


def new_panel(panel: Panel) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, 2.1))
    # fixed margins line the panels up, and cost half of what a layout engine does
    axes = figure.add_axes((0.13, 0.12, 0.85, 0.84))
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(length=2.5, width=0.6)
    return figure, axes


def binned(points: Points) -> Points:
    """At most `MAX_POINTS` points: each the mean of as many neighbours as that takes."""
    steps, values = points
    size = -(-len(steps) // MAX_POINTS)
    if size <= 1:
        return points
    starts = range(0, len(steps), size)
    return (
        [mean(steps[start : start + size]) for start in starts],
        [mean(values[start : start + size]) for start in starts],
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summarise(values: Sequence[float], unit: str) -> str:
    first, last = (
        percent(value) if unit == "%" else significant(value) for value in (values[0], values[-1])
    )
    return first if len(values) == 1 else f"{first} → {last}"


def to_svg(figure: Figure, title: str) -> Markup:
    """The drawing as an element of a page: no prologue, no addresses, colours from CSS."""
    text = save_svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="[A-Za-z]*(\.\w+)?_\d+"', "", text)  # repeated in every drawing
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    for place, colour in enumerate(PALETTE):
        text = text.replace(colour, f"var(--series-{place})")
    text = text.replace(INK, "var(--ink-soft)").replace(GRID, "var(--grid)")
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return Markup(text)


def save_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # a fixed salt and no date: the same run gives the same page
    with matplotlib.rc_context({"svg.hashsalt": "rlef"}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return buffer.getvalue()
