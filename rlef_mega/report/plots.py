"""The picture of several seeds for a README: how training went, and what it came to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlef_mega.report.comparison import Rate, rate
from rlef_mega.report.panels import PALETTE, mean
from rlef_mega.report.run_files import Json, RunFiles, lookup, read_run, series, text

# Any: matplotlib names the type of these keys only from 3.11 on
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlef",  # the same runs give the same file
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
PROTOCOLS = {
    "multi_turn": "multi-turn",
    "independent": "independent\nsamples",
    "random_feedback": "random\nfeedback",
}


def save_learning_curves(runs: list[Path], out: Path) -> list[Path]:
    """Draw the runs, which differ in their seeds: each a thin line, their mean thick.

    `out` is a folder, which gets `curves.png` and `curves.svg`, or a file whose suffix says the
    format. Returns the files written. Raises ValueError when no run has metrics.
    """
    files = [read_run(run) for run in runs]
    metrics = [run.metrics for run in files if run.metrics]
    if not metrics:
        raise ValueError(f"no metrics.jsonl in any of {', '.join(map(str, runs)) or 'no runs'}")
    targets = [out] if out.suffix else [out / "curves.png", out / "curves.svg"]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = draw_summary(files, metrics)
        for target in targets:
            dateless = {"Date": None} if target.suffix == ".svg" else None
            figure.savefig(target, dpi=160, facecolor="white", metadata=dateless)
    return targets


def draw_summary(files: list[RunFiles], metrics: list[tuple[Json, ...]]) -> Figure:
    evaluated = [run.evaluations for run in files if {"before", "after"} <= set(run.evaluations)]
    figure = Figure(figsize=(10.5 if evaluated else 7.2, 3.0), layout="constrained")
    panels = figure.subplots(1, 3 if evaluated else 2)
    draw_seeds(
        panels[0],
        metrics,
        "Solved, training batches",
        {"multi-turn": "solved", "at turn 1": "solved_turn1"},
    )
    draw_seeds(
        panels[1],
        metrics,
        "Failures repaired",
        {"at turn 2": "repaired_turn2", "at turn 3": "repaired_turn3"},
    )
    if evaluated:
        draw_before_after(panels[2], evaluated)
    return figure


def draw_seeds(
    axes: Axes, metrics: list[tuple[Json, ...]], title: str, curves: dict[str, str]
) -> None:
    for place, (label, key) in enumerate(curves.items()):
        seeds = [dict(zip(*series(run, key), strict=True)) for run in metrics]
        seeds = [seed for seed in seeds if seed]
        if not seeds:
            continue
        for seed in seeds:
            axes.plot(list(seed), list(seed.values()), color=PALETTE[place], lw=0.8, alpha=0.45)
        # over the steps that every seed has: a mean over fewer seeds would jump where one ends
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        means = [mean([seed[step] for seed in seeds]) for step in steps]
        axes.plot(
            steps, means, color=PALETTE[place], lw=2.4, ls=("-", "--")[place % 2], label=label
        )
    count = len(metrics)
    axes.set_title(f"{title} ({count} seeds)" if count > 1 else title)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    if axes.lines:
        axes.legend(loc="upper left")


def draw_before_after(axes: Axes, evaluated: Sequence[dict[str, Json]]) -> None:
    """A group of bars a protocol, the mean over seeds; a dot and its 95% interval a seed."""
    names = [name for name in PROTOCOLS if any(solve_rates(evaluated, "after", name))]
    for side, (stage, colour) in enumerate({"before": PALETTE[6], "after": PALETTE[0]}.items()):
        for group, name in enumerate(names):
            rates = solve_rates(evaluated, stage, name)
            if not rates:
                continue
            middle = group + 0.4 * (side - 0.5)
            height = mean([found.value for found in rates])
            axes.bar(middle, height, 0.36, color=colour, alpha=0.8, label=None if group else stage)
            axes.annotate(
                f"{100 * height:.0f}", (middle, 0.01), ha="center", va="bottom", color="white"
            )
            draw_seed_intervals(axes, middle, rates)
    axes.set_title(f"1@{text(evaluated[0], 'after', 'turns') or 3} on held-out problems")
    axes.set_xticks(range(len(names)), [PROTOCOLS[name] for name in names])
    axes.set_ylim(0, 1.15)  # room for the legend
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right", ncols=2)


def draw_seed_intervals(axes: Axes, middle: float, rates: list[Rate]) -> None:
    for place, found in enumerate(rates):
        across = middle + 0.08 * (place - (len(rates) - 1) / 2)
        axes.plot(across, found.value, "o", color="black", markersize=2.5)
        if found.low is not None and found.high is not None:
            axes.plot([across, across], [found.low, found.high], color="black", lw=0.8)


def solve_rates(evaluated: Sequence[dict[str, Json]], stage: str, protocol: str) -> list[Rate]:
    found = [
        rate(lookup(evaluations, stage, "protocols", protocol, "solve_rate"))
        for evaluations in evaluated
    ]
    return [measured for measured in found if measured is not None]
