"""`rlef bench compare OLD.json NEW.json`: figure beside figure, and what became worse.

Which way is better follows from the unit. A figure is worse when its median is beyond the tolerance
*and* the samples of the two files do not overlap: on a shared machine medians alone move. Files of
different devices are compared, with a warning.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlef_mega.bench.figures import readable
from rlef_mega.config import ConfigError

MORE_IS_BETTER = ("/s", "/s/rank", "/s/GPU", "/hour")
LESS_IS_BETTER = ("s", "s a step", "ms", "us", "MiB", "GiB", "bytes", "B", "GPU hours")


def compare(old: Path, new: Path, *, tolerance: float) -> list[str]:
    """Print the table; names of the figures that became worse by more than `tolerance`, a
    fraction. ConfigError for a file without figures, or files without a figure in common."""
    before, after = read(old), read(new)
    names = [name for name in before["figures"] if name in after["figures"]]
    if not names:
        raise ConfigError(f"{old} and {new} have no figure in common; are they of one benchmark?")
    console = Console()
    for what in ("device", "layout", "dtype", "model"):
        if before.get(what) != after.get(what):
            console.print(f"WARNING: another {what}: {before.get(what)} and {after.get(what)}")
    table = Table("figure", "old", "new", "unit", "change", "", title=f"{old} and {new}")
    worse = []
    for name in names:
        first, second = before["figures"][name], after["figures"][name]
        unit = first["unit"]
        change = second["median"] / first["median"] - 1 if first["median"] else 0.0
        said = verdict(first, second, change, tolerance)
        if said == "worse":
            worse.append(name)
        cells = [readable(figure["median"], unit) for figure in (first, second)]
        table.add_row(name, *cells, unit, f"{change:+.1%}", said)
    console.print(table)
    for where, missing in ((new, before), (old, after)):
        lacking = [name for name in missing["figures"] if name not in names]
        if lacking:
            console.print(f"not in {where}: {', '.join(lacking)}")
    return worse


def verdict(first: dict[str, Any], second: dict[str, Any], change: float, tolerance: float) -> str:
    """ "worse", "better", or nothing when it is neither or cannot be said."""
    direction = better(first["unit"])
    apart = first["low"] > second["high"] or first["high"] < second["low"]
    if not direction or not apart or abs(change) <= tolerance:
        return ""
    return "better" if change * direction > 0 else "worse"


def better(unit: str) -> int:
    """1 when more is better, -1 when less is, 0 when it depends on the figure."""
    if unit.endswith(MORE_IS_BETTER):
        return 1
    return -1 if unit in LESS_IS_BETTER else 0


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if content["figures"]:
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} is no file of figures; `rlef bench WHAT --json {path}` writes one")
