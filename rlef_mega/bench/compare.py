"""`rlef bench compare OLD.json NEW.json`: compare the figures of two files.

Whether more is better follows from the unit. A figure is worse if its median is beyond the
tolerance *and* the samples of the two files do not overlap: on a shared machine a median moves
without a change of the code. Files of different devices are compared with a warning.
"""

import json
from pathlib import Path
from typing import Any

from rlef_mega.bench.results import markdown, readable
from rlef_mega.config import ConfigError

MORE_IS_BETTER = ("/s", "/s/rank", "/s/GPU", "/hour")
LESS_IS_BETTER = ("s", "s a step", "ms", "us", "MiB", "GiB", "GB", "bytes", "B", "GPU hours")


def compare(old: Path, new: Path, *, tolerance: float) -> list[str]:
    """Print the table. Returns the names of the figures that became worse by more than `tolerance`,
    a fraction. Raises ConfigError for a file without figures, or files with none in common."""
    before, after = read(old), read(new)
    names = [name for name in before["figures"] if name in after["figures"]]
    if not names:
        raise ConfigError(
            f"{old} and {new} have no figure in common; are they of the same benchmark?"
        )
    for what in ("device", "layout", "critic_layout", "dtype", "model"):
        if before.get(what) != after.get(what):
            print(f"WARNING: {what} differs: {before.get(what)} and {after.get(what)}")
    rows = [["figure", "old", "new", "unit", "change", ""]]
    worse = []
    for name in names:
        first, second = before["figures"][name], after["figures"][name]
        unit = first["unit"]
        change = second["median"] / first["median"] - 1 if first["median"] else 0.0
        verdict = judge_change(first, second, change, tolerance)
        if verdict == "worse":
            worse.append(name)
        cells = [readable(figure["median"], unit) for figure in (first, second)]
        rows.append([name, *cells, unit, f"{change:+.1%}", verdict])
    print(markdown(rows))
    for path, others in ((new, before), (old, after)):
        if missing := [name for name in others["figures"] if name not in names]:
            print(f"not in {path}: {', '.join(missing)}")
    return worse


def judge_change(
    first: dict[str, Any], second: dict[str, Any], change: float, tolerance: float
) -> str:
    """Return "worse" or "better", or "" if the figure is neither or cannot be judged."""
    more, less = first["unit"].endswith(MORE_IS_BETTER), first["unit"] in LESS_IS_BETTER
    apart = first["low"] > second["high"] or first["high"] < second["low"]
    if not (more or less) or not apart or abs(change) <= tolerance:
        return ""
    return "better" if (change > 0) == more else "worse"


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        figures, notes = content["figures"], content.get("notes", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        figures, notes = {}, []
    if figures:
        return content
    if notes:
        raise ConfigError(f"{path} holds no figures: {'; '.join(notes)}")
    raise ConfigError(f"{path} holds no figures; `rlef bench WHAT --json {path}` writes one")
