"""The tables and the roofline plot of docs/kernels.md, from what `rlef bench kernels --json` wrote.

    python -m rlef_mega.bench.roofline RESULTS.json [PLOT.png]

prints the tables; with a second path it draws the plot. The roofs are the same run's own: the rate
of cuBLAS for the largest product alone, and of copying memory.

    rate = products 2 T V D / time        intensity = products 2 T V D / bytes
    bytes: bf16 hidden and head read once forward; backward their gradients written besides, the
    head's in fp32 read and written
"""

import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORWARD, WHOLE = "forward", "forward and backward"
ROOF = "product alone (cuBLAS)"


@dataclass(frozen=True)
class Row:
    """A method on a case: milliseconds and MiB by quantity."""

    shape: str
    tokens: int
    masked: str
    method: str
    values: dict[str, float]


def read_rows(results: dict[str, Any]) -> list[Row]:
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for name, figure in results["figures"].items():
        *case, quantity = name.split(" | ")
        if len(case) == 4:
            found[tuple(case)][quantity] = statistics.median(figure["samples"])
    return [
        Row(shape, int(tokens), masked, method, values)
        for (shape, tokens, masked, method), values in found.items()
    ]


def flops(results: dict[str, Any], row: Row, quantity: str) -> float:
    width, vocabulary = results["shapes"][row.shape]
    products = results["products"][row.method][0 if quantity == FORWARD else 1]
    return products * 2.0 * row.tokens * width * vocabulary


def least_bytes(results: dict[str, Any], row: Row, quantity: str) -> float:
    width, vocabulary = results["shapes"][row.shape]
    hidden, head = 2.0 * row.tokens * width, 2.0 * vocabulary * width
    return hidden + head if quantity == FORWARD else 2 * hidden + head + 4 * head


def teraflops(results: dict[str, Any], row: Row, quantity: str) -> float:
    return flops(results, row, quantity) / row.values[quantity] / 1e9


def tables(results: dict[str, Any]) -> str:
    """Markdown: a table a case, then the small kernels."""
    lines: list[str] = []
    heading = None
    for row in read_rows(results):
        if heading != (row.shape, row.tokens, row.masked):
            heading = row.shape, row.tokens, row.masked
            width, vocabulary = results["shapes"][row.shape]
            lines += [
                "",
                f"{row.shape} ({width} x {vocabulary:,}), {row.tokens:,} tokens, "
                f"{row.masked} masked:",
                "",
                "| method | forward, ms | TFLOP/s | MiB | forward + backward, ms | TFLOP/s | MiB |",
                "|---|---|---|---|---|---|---|",
            ]
        cells = [cell for what in (FORWARD, WHOLE) for cell in quantity_cells(results, row, what)]
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    lines += ["", "| figure | median | unit |", "|---|---|---|"]
    for name, figure in results["figures"].items():
        if name.count(" | ") < 4:
            shown = name.replace(" | ", ", ")
            lines.append(f"| {shown} | {figure['median']:.3g} | {figure['unit']} |")
    return "\n".join(lines[1:])


def quantity_cells(results: dict[str, Any], row: Row, quantity: str) -> list[str]:
    if quantity not in row.values:
        return ["", "", ""]
    rate = teraflops(results, row, quantity) if row.masked == "0%" else None
    memory = row.values[f"{quantity}, memory"]
    shown = "" if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    return [f"{row.values[quantity]:.3g}", shown, f"{memory:,.0f}"]


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_rows(results) if row.masked == "0%"]
    peak = max(teraflops(results, row, FORWARD) for row in rows if row.method == ROOF)
    trained = [row for row in rows if WHOLE in row.values]
    copy_rate = results["figures"]["copy, bandwidth"]["median"] / 1e3  # TB/s
    figure, axes = pyplot.subplots(figsize=(8, 5))
    ridge = peak / copy_rate
    most = max(flops(results, row, WHOLE) / least_bytes(results, row, WHOLE) for row in trained)
    intensities = [ridge / 10, ridge, max(2 * most, 10 * ridge)]
    roof = [min(peak, intensity * copy_rate) for intensity in intensities]
    axes.plot(intensities, roof, color="black", label=f"{peak:.3g} TFLOP/s, {copy_rate:.3g} TB/s")
    for method in dict.fromkeys(row.method for row in trained):
        points = [
            (
                flops(results, row, WHOLE) / least_bytes(results, row, WHOLE),
                teraflops(results, row, WHOLE),
            )
            for row in trained
            if row.method == method
        ]
        intensity, rate = zip(*points, strict=True)
        axes.scatter(intensity, rate, label=method, s=18)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP / byte that must move",
        ylabel="TFLOP/s, forward and backward",
        title=results.get("gpu") or results["device"],
    )
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    contents = json.loads(Path(sys.argv[1]).read_text())
    print(tables(contents))
    if len(sys.argv) > 2:
        draw(contents, Path(sys.argv[2]))
