"""The style of all plots, and the plots of an evaluation."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlef_mega.report.comparison import rate
from rlef_mega.report.run_files import Json, lookup, table

# Okabe and Ito's colours, which colour-blind readers can tell apart
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
# Any: matplotlib names the type of these keys only from 3.11 on
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlef",  # the same data give the same file
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
KINDS_SHOWN = 8


def save_evaluation_figure(evaluation: Json, path: Path) -> Path:
    """Draw n@k with intervals and, if recorded, n@k by turn limit, failures and repairs, and chrF.
    The suffix of `path` selects the format."""
    protocols = table(evaluation, "protocols")
    dialogues: Json = next(
        (numbers for numbers in protocols.values() if table(numbers, "became")), {}
    )
    panels: list[Callable[[Axes], None]] = [lambda axes: draw_n_at_k(axes, protocols)]
    if table(dialogues, "turn_budget"):
        panels.append(lambda axes: draw_turn_budget(axes, protocols))
        panels.append(lambda axes: draw_failures(axes, dialogues))
    if any(table(dialogues, "chrf").values()):
        panels.append(lambda axes: draw_chrf(axes, dialogues))
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
        for axes, draw in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw(axes)
        figure.savefig(path, dpi=160, facecolor="white")
    return path


def draw_n_at_k(axes: Axes, protocols: Json) -> None:
    pairs = list(dict.fromkeys(p for numbers in protocols.values() for p in numbers["n_at_k"]))
    for number, (name, numbers) in enumerate(protocols.items()):
        for group, pair in enumerate(pairs):
            found = rate(lookup(numbers, "n_at_k", pair))
            if found is None:
                continue
            x = group + 0.14 * (number - (len(protocols) - 1) / 2)
            label = name.replace("_", " ") if group == 0 else None
            axes.plot(x, found.value, "o", color=PALETTE[number], markersize=4, label=label)
            if found.low is not None and found.high is not None:
                axes.plot([x, x], [found.low, found.high], color=PALETTE[number], lw=1.4)
    axes.set_title("n@k, with 95% intervals")
    axes.set_xticks(range(len(pairs)), pairs)
    axes.set_xlim(-0.5, len(pairs) - 0.5)
    finish(axes, legend_size=7)


def draw_turn_budget(axes: Axes, protocols: Json) -> None:
    """Draw n@k over the limit on turns, at the same k samples. A point that was estimated from too
    few dialogues has no marker."""
    for color, (name, numbers) in zip(PALETTE, protocols.items(), strict=False):
        pairs = table(numbers, "turn_budget")
        for dash, (pair, points) in zip(cycle(("-", "--", ":", "-.")), pairs.items(), strict=False):
            label = f"{pair} {name.replace('_', ' ')}"
            turns, values = list(map(int, points)), [found["value"] for found in points.values()]
            marked = [at for at, found in enumerate(points.values()) if not found["bootstrapped"]]
            style = f"{dash}o"
            axes.plot(turns, values, style, color=color, ms=3, markevery=marked, label=label)
    axes.set_title("n@k by turn limit, at equal k")
    axes.set_xlabel("turn limit")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes, legend_size=6)


def draw_failures(axes: Axes, numbers: Json) -> None:
    """Draw how first responses failed, and how many of each kind turn 2 repaired."""
    after = table(numbers, "became", "turn1")
    failed = table(numbers, "error_kinds", "turn1")
    kinds = sorted(failed, key=lambda kind: -failed[kind])[:KINDS_SHOWN][::-1]
    repaired = [table(after, kind).get("OK", 0) for kind in kinds]
    axes.barh(range(len(kinds)), [failed[kind] for kind in kinds], color=PALETTE[6], alpha=0.5)
    axes.barh(range(len(kinds)), repaired, color=PALETTE[2], label="repaired at turn 2")
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ").lower() for kind in kinds])
    axes.set_title("Failures of turn 1")
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=7)


def draw_chrf(axes: Axes, numbers: Json) -> None:
    for number, (turn, found) in enumerate(table(numbers, "chrf").items()):
        if not found:
            continue
        label = f"turn {turn.removeprefix('turn')} and the turn before"
        shares = [count / found["scored"] for count in found["by_ten"]]
        axes.stairs(shares, range(0, 101, 10), color=PALETTE[number % len(PALETTE)], label=label)
    axes.set_title("chrF of successive programs")
    axes.set_xlabel("chrF")
    finish(axes, legend_size=7)


def finish(axes: Axes, *, legend_size: int) -> None:
    """Show the y axis as percent from 0, and the legend."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(fontsize=legend_size)
