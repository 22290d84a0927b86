"""Draw the packages of docs/design.md's table and their imports, from the code itself:
`python -m tests.draw_packages docs/images/packages.png`.

Each row is a level, and a wider box has more lines of code. An arrow means that the upper package
imports the lower one; arrows that follow from others are left out.
"""

import sys
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from tests.test_layers import EDGES, FILES, LEVELS, package_of


def package_imports() -> dict[str, set[str]]:
    """Return each package's imports, without those that it also reaches through another one."""
    direct: dict[str, set[str]] = {name: set() for name in LEVELS}
    for file, imported in EDGES.items():
        for other in imported:
            if (
                package_of(other) in LEVELS
                and package_of(file) in LEVELS
                and package_of(other) != package_of(file)
            ):
                direct[package_of(file)].add(package_of(other))

    def reached(name: str) -> set[str]:
        return direct[name] | {far for near in direct[name] for far in reached(near)}

    return {
        name: {other for other in near if not any(other in reached(via) for via in near - {other})}
        for name, near in direct.items()
    }


def lines_of_code() -> dict[str, int]:
    lines: dict[str, int] = defaultdict(int)
    for file, path in FILES.items():
        lines[package_of(file)] += len(path.read_text().splitlines())
    return lines


def draw(path: str) -> None:
    lines, rows = lines_of_code(), defaultdict(list)
    for name, level in LEVELS.items():
        rows[level].append(name)
    figure, axes = plt.subplots(figsize=(13, 9))
    centres: dict[str, tuple[float, float]] = {}
    arrows = package_imports()

    def above_its_imports(name: str) -> float:
        below = [centres[other][0] for other in arrows[name]]
        return sum(below) / len(below) if below else 0.0

    for level in sorted(rows):
        names = sorted(rows[level], key=above_its_imports)  # fewer arrows cross
        widths = {name: 1.5 + lines[name] ** 0.5 / 34 for name in names}
        gap = (18 - sum(widths.values())) / (len(names) + 1)
        left = gap
        for name in names:
            box = FancyBboxPatch(
                (left, 1.6 * level),
                widths[name],
                0.75,
                "round,pad=0.06",
                fc="#eef3fa",
                ec="#4a6fa5",
                zorder=2,
            )
            axes.add_patch(box)
            label = name.removeprefix("rlef_mega.").replace(".", "/")
            middle = left + widths[name] / 2
            axes.text(
                middle, 1.6 * level + 0.46, label, ha="center", va="center", fontsize=10, zorder=3
            )
            about = f"{lines[name]:,} lines"
            axes.text(
                middle, 1.6 * level + 0.17, about, ha="center", va="center", fontsize=7, zorder=3
            )
            centres[name] = (middle, 1.6 * level)
            left += widths[name] + gap
    for name, imported in arrows.items():
        for other in imported:
            (x, y), (to_x, to_y) = centres[name], centres[other]
            arrow = {"arrowstyle": "->", "color": "#8899aa", "lw": 0.9}
            axes.annotate("", (to_x, to_y + 0.82), (x, y - 0.07), arrowprops=arrow, zorder=1)
    axes.set_xlim(0, 18)
    axes.set_ylim(1.2, 1.6 * max(rows) + 1.2)
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    draw(sys.argv[1])
