"""The pictures and tables of docs/scaling.md:

    python -m rlef_mega.plan.plots docs/images benchmarks/results/plan.json

Of the paper's two recipes: memory by component and layout, a step as GPUs grow, sync beside async,
and the plan beside what was published. The tables go to standard output, as Markdown, and their
figures to the second path.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from rlef_mega.config import TrainConfig, find_recipe, load_config
from rlef_mega.plan import published
from rlef_mega.plan.command import SCALES, describe, short_layout, summary
from rlef_mega.plan.hardware import DEVICES, GIB, Device
from rlef_mega.plan.job import RECOMPUTE, Job, shape_of
from rlef_mega.plan.published import Comparison
from rlef_mega.plan.search import Split, scaling
from rlef_mega.report.plots import STYLE
from rlef_mega.run.directory import write_atomically

H100 = DEVICES["h100-80gb"]
RECIPES = {"8B": "llama31_8b", "70B": "llama31_70b"}
MODES = {"sync": 0, "async, max_staleness 1": 1, "async, max_staleness 4": 4}


def job_of(recipe: str) -> Job:
    config = load_config(find_recipe(recipe), [], TrainConfig)
    shape = shape_of(config)
    assert shape is not None, "the package's recipes state their shape"
    return Job.of(config, shape)


def variants(job: Job) -> dict[str, Job]:
    """The recipe's layout under each recomputation, and offloaded."""
    found = {
        f"recompute {mode}" + (" (recipe)" if mode == job.recompute else ""): replace(
            job, recompute=mode
        )
        for mode in RECOMPUTE
    }
    return found | {"idle state on the host": replace(job, offloads=True)}


def draw_memory(jobs: dict[str, Job], device: Device, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(ncols=len(jobs), figsize=(9.5, 3.4), sharex=True)
        for axes, (name, job) in zip(panels, jobs.items(), strict=True):
            axes.set_title(f"{name}, {short_layout(job)}")
            stack_memory(axes, variants(job))
            axes.axvline(device.usable / GIB, color="#555555", linestyle="--", linewidth=1)
            axes.set_xlabel("GiB a GPU, of the fullest rank")
        panels[0].legend(fontsize=7, loc="lower right", bbox_to_anchor=(0.95, 0.0))
        panels[-1].set_yticklabels([])
        save(figure, path)


def stack_memory(axes: Axes, jobs: dict[str, Job]) -> None:
    fullest = [max(job.memory(), key=lambda rank: rank.total) for job in jobs.values()]
    left = [0.0] * len(fullest)
    for part in fullest[0].parts:
        sizes = [rank.parts[part] / GIB for rank in fullest]
        axes.barh(list(jobs), sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()


def draw_scaling(curves: dict[str, dict[str, list[tuple[int, Split]]]], path: Path) -> None:
    """Hours of the whole run; a curve a mode, and the paper's own run as a point."""
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(ncols=len(curves), figsize=(9.5, 3.6))
        for axes, (name, modes) in zip(panels, curves.items(), strict=True):
            for mode, found in modes.items():
                style: dict[str, Any] = {"marker": "o", "markersize": 3, "label": mode}
                if mode == "sync":
                    style |= {"color": "#555555", "linestyle": "--"}
                axes.plot([gpus for gpus, _ in found], hours(found), **style)
            row = next(r for r in published.rows("paper") if r["model"] == name)
            paper = (row["training"] + row["sampling"], row["hours"])
            axes.plot(*paper, marker="*", color="black", markersize=9, linestyle="", label="paper")
            axes.set(xscale="log", yscale="log", title=name, xlabel="H100s", ylabel="hours")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.legend(fontsize=7)
        save(figure, path)


def hours(found: Sequence[tuple[int, Split]]) -> list[float]:
    return [split.job.steps * split.step.seconds / 3600 for _, split in found]


def draw_published(groups: dict[str, list[Comparison]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.5, 3.2))
        for name, rows in groups.items():
            axes.scatter(
                [row.published for row in rows], [100 * row.error for row in rows], s=12, label=name
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="published, seconds a step", ylabel="plan's error, %")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=7, loc="lower center")
        save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def comparison_table(rows: Sequence[Comparison], unit: str) -> str:
    return table(
        ["", f"published, {unit}", "planned", "error"],
        [
            [
                row.what + (" (fitted)" if row.fitted else ""),
                f"{row.published:.2f}",
                f"{row.planned:.2f}",
                f"{row.error:+.1%}",
            ]
            for row in rows
        ],
    )


def scaling_table(found: Sequence[tuple[int, Split]]) -> str:
    return table(
        ["GPUs", "train + sample, servers of", "layout", "s/step", "hours", "GPU hours", "stops"],
        [
            [
                f"{gpus:,}",
                f"{each.job.training_gpus:,} + {each.sampling:,}, {each.job.server_gpus}",
                short_layout(each.job),
                f"{each.step.seconds:.1f}",
                f"{time:.1f}",
                f"{time * each.gpus:,.0f}",
                each.step.stopped_by,
            ]
            for (gpus, each), time in zip(found, hours(found), strict=True)
        ],
    )


def papers_tables(jobs: dict[str, Job]) -> tuple[str, dict[str, Any]]:
    """The recipes with the paper's numbers of GPUs, beside its own runs."""
    lines, content = [], {}
    for row in published.rows("paper"):
        job = jobs[row["model"]]
        split = Split(job, row["sampling"], job.step(H100, row["sampling"]))
        time = hours([(split.gpus, split)])[0]
        content[row["model"]] = describe(split, H100)
        lines.append(
            [
                row["model"],
                f"{row['training']:,} + {row['sampling']:,}",
                f"about {row['hours']}",
                f"{time:.1f}",
                f"{split.step.seconds:.1f}",
                f"{split.step.training:.1f}",
                f"{max(rank.total for rank in job.memory()) / GIB:.0f}",
                split.step.stopped_by,
            ]
        )
    heading = [
        "",
        "GPUs",
        "the paper's hours",
        "planned",
        "s/step",
        "of it training",
        "GiB",
        "stops",
    ]
    return table(heading, lines), content


def main(folder: Path, results: Path) -> None:
    jobs = {name: job_of(recipe) for name, recipe in RECIPES.items()}
    curves = {
        name: {
            mode: scaling(replace(job, max_staleness=staleness), H100, SCALES)
            for mode, staleness in MODES.items()
        }
        for name, job in jobs.items()
    }
    draw_memory(jobs, H100, folder / "plan_memory.png")
    draw_scaling(curves, folder / "plan_scaling.png")
    seconds = {
        "8B, 70B, 405B on H100": published.training_seconds(),
        "slices of 70B and 405B on B200": published.slice_seconds(),
    }
    draw_published(seconds, folder / "plan_published.png")
    beside, recipes = papers_tables(jobs)
    content: dict[str, Any] = {
        "command": f"python -m rlef_mega.plan.plots {folder} {results}",
        "device": H100.name,
        "published": {
            what: [vars(row) | {"error": row.error} for row in rows]
            for what, rows in (seconds | {"memory, GiB": published.memory()}).items()
        },
        "recipes": recipes,
        "scaling": {
            name: {
                mode: [{"gpus": gpus} | summary(each) for gpus, each in found]
                for mode, found in modes.items()
            }
            for name, modes in curves.items()
        },
    }
    write_atomically(results, json.dumps(content, indent=1) + "\n")
    print(beside)
    print(comparison_table(published.memory(), "GiB"))
    for rows in seconds.values():
        print(comparison_table(rows, "s"))
    for name, modes in curves.items():
        for mode, found in modes.items():
            print(f"{name}, {mode}\n\n{scaling_table(found)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
