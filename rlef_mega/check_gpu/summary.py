"""Write a check's summary.md: figures that have a goal, then every figure of every step."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OURS = "8B | 8192 | 0% | rlef"
# What we aim at, and what others reach with the same work, in each figure's unit (ms, TFLOP/s,
# TB/s): 8,192 tokens, 4,096 x 128,256, bfloat16, on an H200.
GOALS = {
    f"{OURS} loss in head, fused | forward and backward": (
        "at most 40; Liger CuTe 34.4, QuACK 35.5, Liger Triton 154"
    ),
    f"{OURS} fused | forward": "Liger, verl about 12.3",
    f"{OURS} fused | forward and backward": "at most 52; backward alone: Liger 34.6, verl 51",
    "cuBLAS, 8192^3": "an H200: 769 to 798",
    "copy, read and written": "an H200: 4.3",
}
REHEARSED = Path(__file__).parents[2] / "benchmarks/results/slice_null_gpu.json"
NOT_RUN = {"passed": False, "wall_s": "", "figures": {}, "ended": "not run"}
HEAD = ("figure", "median", "lowest", "highest", "unit", "goal")


def write_summary(out: Path, steps: Sequence[str]) -> None:
    """Write OUT/summary.md from the results of the steps that have run."""
    results = {name: read(path) for name in steps if (path := out / f"{name}.json").exists()}
    goals = GOALS | {
        label: f"on the null GPU {figure['median']:,.0f}"
        for label, figure in (read(REHEARSED)["figures"] if REHEARSED.exists() else {}).items()
        if figure["unit"] == "MiB"
    }
    state = [("step", "result", "seconds", "figures")]
    for name in steps:
        found = results.get(name, NOT_RUN)
        result = "passed" if found["passed"] else found["ended"]
        state.append((name, result, str(found["wall_s"]), str(len(found["figures"]))))
    every = {label: figure for r in results.values() for label, figure in r["figures"].items()}
    aimed = {label: figure for label, figure in every.items() if label in goals}
    lines = ["# One GPU, checked", "", *conditions(results), "", *table(state), ""]
    lines += ["## Figures with a goal", "", *table([HEAD, *rows(aimed, goals)])]
    for name, found in results.items():
        lines += ["", f"## {name}", "", *table([HEAD, *rows(found["figures"], goals)]), ""]
        lines += [f"- {' '.join(text.split())}" for text in (*found["notes"], *found["failures"])]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def conditions(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return each device with its versions, once."""
    described = (found for found in results.values() if "versions" in found)
    return sorted(
        {", ".join([d["device"], *map(" ".join, d["versions"].items())]) for d in described}
    )


def rows(figures: dict[str, Any], goals: dict[str, str]) -> Iterator[Sequence[str]]:
    for label, figure in figures.items():
        numbers = (f"{figure[key]:,.4g}" for key in ("median", "low", "high"))
        yield label.replace(" | ", ", "), *numbers, figure["unit"], goals.get(label, "")


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return [first, "|---" * len(cells[0]) + "|", *others]
