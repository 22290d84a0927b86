"""One evaluation, as tables in the terminal and as a picture."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlef_mega.report.comparison import rate
from rlef_mega.report.display import percent, visible
from rlef_mega.report.panels import PALETTE
from rlef_mega.report.plots import STYLE
from rlef_mega.report.run_files import Json, lookup, number, table
from rlef_mega.report.tables import cell

SHOWN_KINDS = 8


def print_evaluation(evaluation: Json, console: Console | None = None) -> None:
    """n@k of every protocol, solve rates by difficulty, and what each turn made of failures."""
    console = console or Console()
    protocols = table(evaluation, "protocols")
    for key, label in (("n_at_k", "{}"), ("pass_at_k", "pass@{}"), ("by_difficulty", "{}")):
        shown = protocol_table(protocols, key, label)
        if len(shown.columns) > 1:
            console.print(shown)
    if any(table(numbers, "turn_budget") for numbers in protocols.values()):
        console.print(budget_table(protocols))
    for name, numbers in protocols.items():
        if table(numbers, "became"):
            console.print(repair_table(name, numbers))
    for line in notes(protocols):
        console.print(Text(visible(line), style="yellow"))


def protocol_table(protocols: Json, key: str, label: str) -> Table:
    """A row a protocol."""
    shown = plain_table(key.replace("_at_", "@").replace("_", " "))
    members = list(dict.fromkeys(m for numbers in protocols.values() for m in table(numbers, key)))
    for member in members:
        shown.add_column(Text(visible(label.format(member))), justify="right", no_wrap=True)
    for name, numbers in protocols.items():
        cells = (cell(rate(lookup(numbers, key, member))) for member in members)
        shown.add_row(Text(visible(name.replace("_", " "))), *cells)
    return shown


def plain_table(title: str) -> Table:
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column(Text(visible(title)), overflow="fold")
    return shown


def budget_table(protocols: Json) -> Table:
    """n@k by the turns that dialogues may have."""
    budgets = {
        f"{pair} {name.replace('_', ' ')}": points
        for name, numbers in protocols.items()
        for pair, points in table(numbers, "turn_budget").items()
    }
    shown = plain_table("turns at equal samples")
    turns = list(dict.fromkeys(turn for points in budgets.values() for turn in points))
    for turn in turns:
        shown.add_column(turn, justify="right")
    for label, points in budgets.items():
        values = (number(points, turn, "value") for turn in turns)
        shown.add_row(Text(visible(label)), *(percent(value, "") for value in values))
    return shown


def repair_table(name: str, numbers: Json) -> Table:
    """How responses failed, and the share of those that were answered which the next turn
    solved."""
    turns = list(table(numbers, "error_kinds"))
    shown = plain_table(f"{name.replace('_', ' ')}: failures, repaired next")
    for turn in turns:
        shown.add_column(turn.replace("turn", "turn "), justify="right")
    for kind in sorted({kind for turn in turns for kind in table(numbers, "error_kinds", turn)}):
        cells = []
        for turn in turns:
            failed = number(numbers, "error_kinds", turn, kind) or 0
            after = table(numbers, "became", turn, kind)
            share = after.get("OK", 0) / sum(after.values()) if after else None
            cells.append(f"{failed:,.0f}" + ("" if share is None else f"  {share:4.0%}"))
        shown.add_row(Text(visible(kind)), *cells)
    similar = [number(numbers, "chrf", turn, "mean") for turn in turns]
    if any(mean is not None for mean in similar):
        cells = ["" if mean is None else f"{mean:.0f}" for mean in similar]
        shown.add_row("chrF, with the program before", *cells, style="dim")
    return shown


def notes(protocols: Json) -> list[str]:
    """What the numbers do not cover."""
    lines = []
    for name, numbers in protocols.items():
        for reason, count in table(numbers, "dropped").items():
            lines.append(f"{name}: {count} dialogues were dropped ({reason})")
        left_out = lookup(numbers, "problems_left_out") or []
        if left_out:
            lines.append(f"{name}: {len(left_out)} problems have no dialogue and are left out")
        for pair, found in table(numbers, "n_at_k").items():
            if number(found, "bootstrapped"):
                lines.append(
                    f"{name}: {pair} draws {found['draws']} dialogues with repetition from fewer, "
                    "which is biased downwards; ask for more --rollouts"
                )
    return lines


# --------------------------------------------------------------------------------------- picture


def save_evaluation_figure(evaluation: Json, path: Path) -> Path:
    """n@k with intervals, the turn budget, failures and their repair, chrF; whatever of these there
    is. The suffix of `path` says the format."""
    protocols = table(evaluation, "protocols")
    told: dict[str, Any] = next(
        (numbers for numbers in protocols.values() if table(numbers, "became")), {}
    )
    panels: list[Callable[[Axes], None]] = [lambda axes: draw_n_at_k(axes, protocols)]
    if table(told, "turn_budget"):
        panels.append(lambda axes: draw_turn_budget(axes, protocols))
        panels.append(lambda axes: draw_failures(axes, told))
    if any(table(told, "chrf").values()):
        panels.append(lambda axes: draw_chrf(axes, told))
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, draw in zip(every, panels, strict=True):
            draw(axes)
        figure.savefig(path, dpi=160, facecolor="white")
    return path


def draw_n_at_k(axes: Axes, protocols: Json) -> None:
    pairs = list(dict.fromkeys(p for numbers in protocols.values() for p in numbers["n_at_k"]))
    for place, (name, numbers) in enumerate(protocols.items()):
        for group, pair in enumerate(pairs):
            found = rate(lookup(numbers, "n_at_k", pair))
            if found is None:
                continue
            across = group + 0.14 * (place - (len(protocols) - 1) / 2)
            label = name.replace("_", " ") if group == 0 else None
            axes.plot(across, found.value, "o", color=PALETTE[place], markersize=4, label=label)
            if found.low is not None and found.high is not None:
                axes.plot([across] * 2, [found.low, found.high], color=PALETTE[place], lw=1.4)
    axes.set_title("n@k, with 95% intervals")
    axes.set_xticks(range(len(pairs)), pairs)
    axes.set_xlim(-0.5, len(pairs) - 0.5)
    as_shares(axes)
    axes.legend(fontsize=7)


def draw_turn_budget(axes: Axes, protocols: Json) -> None:
    """n@k of dialogues of at most so many turns, all with k samples."""
    told = {name: table(numbers, "turn_budget") for name, numbers in protocols.items()}
    for place, (name, pairs) in enumerate(told.items()):
        for dash, (pair, points) in zip(cycle(("-", "--", ":", "-.")), pairs.items(), strict=False):
            label = f"{pair} {name.replace('_', ' ')}"
            turns, values = list(map(int, points)), [found["value"] for found in points.values()]
            (line,) = axes.plot(turns, values, marker="o", ms=3, label=label)
            line.set(color=PALETTE[place], linestyle=dash)
            enough = [at for at, found in enumerate(points.values()) if not found["bootstrapped"]]
            line.set(markevery=enough)
    axes.set_title("Turns, at equal samples")
    axes.set_xlabel("turns a dialogue may have")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    as_shares(axes)
    axes.legend(fontsize=6)


def draw_failures(axes: Axes, numbers: Json) -> None:
    """How first responses failed, and what turn 2 made of those."""
    after = table(numbers, "became", "turn1")
    failed = table(numbers, "error_kinds", "turn1")
    kinds = sorted(failed, key=lambda kind: -failed[kind])[:SHOWN_KINDS][::-1]
    repaired = [table(after, kind).get("OK", 0) for kind in kinds]
    axes.barh(range(len(kinds)), [failed[kind] for kind in kinds], color=PALETTE[6], alpha=0.5)
    axes.barh(range(len(kinds)), repaired, color=PALETTE[2], label="repaired at turn 2")
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ").lower() for kind in kinds])
    axes.set_title("Failures of turn 1")
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=7)


def draw_chrf(axes: Axes, numbers: Json) -> None:
    for place, (turn, found) in enumerate(table(numbers, "chrf").items()):
        if not found:
            continue
        label = f"turn {turn.removeprefix('turn')} with the one before"
        shares = [count / found["scored"] for count in found["by_ten"]]
        axes.stairs(shares, range(0, 101, 10), color=PALETTE[place % len(PALETTE)], label=label)
    axes.set_title("chrF of successive programs")
    axes.set_xlabel("chrF")
    as_shares(axes)
    axes.legend(fontsize=7)


def as_shares(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
