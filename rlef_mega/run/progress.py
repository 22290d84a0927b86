"""Show the progress of long work: on a terminal by a bar with the remaining time, else by lines for
the first step, the last one, and those at least 10 s after the last line."""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_EVERY_S = 10  # without a terminal


class StepProgress(Progress):
    """Progress of a run's steps; a context manager. Prints nothing where `shown` is False."""

    def __init__(self, label: str, *, done: int, total: int, shown: bool) -> None:
        super().__init__(
            TextColumn(f"[bold]{label}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            TextColumn("[cyan]{task.fields[phase]:<12}", markup=True),
            TextColumn("{task.description}", markup=False),
            console=Console(soft_wrap=True),
            disable=not (shown and sys.stdout.isatty()),
        )
        self.label, self.total, self.shown = label, total, shown
        self.first = self.done = done
        self.started = self.next_line = time.monotonic()
        self.bar = self.add_task("", total=total, completed=done, eta="", phase="starting")

    def phase(self, name: str) -> None:
        """Show the current phase, on a terminal."""
        self.update(self.bar, phase=name)

    def step(self, message: str) -> None:
        """Count one finished step, and show `message` with the time left."""
        self.done += 1
        now = time.monotonic()
        eta = self.eta(now)
        self.update(self.bar, completed=self.done, description=message, eta=eta)
        if self.disable and (now >= self.next_line or self.done == self.total):
            self.next_line = now + LINE_EVERY_S
            line = f"{self.label} {self.done}/{self.total}  {message}"
            self.say(f"{line}  {eta}" if eta else line)

    def eta(self, now: float) -> str:
        """Return the remaining time at this process's mean pace, or "" at the end; rich's own
        estimate uses only the last 30 s."""
        left = (self.total - self.done) * (now - self.started) / (self.done - self.first)
        return f"ETA {timedelta(seconds=round(left))}" if left > 0 else ""

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if not self.disable:
            self.console.print(message, markup=False)
        elif self.shown:
            print(message, flush=True)


class ByteProgress(Progress):
    """Progress of a conversion in bytes, on a terminal; a context manager."""

    def __init__(self, label: str) -> None:
        super().__init__(
            TextColumn(f"[bold]{label}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(soft_wrap=True),
            disable=not sys.stdout.isatty(),
        )
        self.bar = self.add_task(label, total=None)

    def __call__(self, done: int, total: int) -> None:
        self.update(self.bar, completed=done, total=total)


def training_line(record: dict[str, Any], times: dict[str, float]) -> str:
    """Return the few numbers of a step that show whether a run is healthy."""
    repaired = record.get("repaired_turn2")
    parts = [
        f"solved {record['solved']:.0%}",
        f"turn 1 {record['solved_turn1']:.0%}",
        f"repaired {repaired:.0%}" if repaired is not None else "",
        f"invalid {record['invalid_fraction']:.1%}",
        "" if record["kl"] is None else f"kl {record['kl']:.3f}",
        f"{record['tokens'] / times['step']:,.0f} tok/s",
    ]
    return "  ".join(part for part in parts if part)
