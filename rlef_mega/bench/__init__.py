"""`rlef bench`: throughput of the parts, measured on this machine and written with what it was
measured on.

Every figure is a median over repeats, after a warm-up, with its lowest and highest sample. Figures
of one run share a machine and a minute; compare those, and figures of different runs only when the
machine was quiet in both. docs/benchmarks.md says what each one means.
"""

from dataclasses import dataclass
from pathlib import Path

from rlef_mega.bench.figures import Report, show, write
from rlef_mega.config import ConfigError

BENCHMARKS = (
    "train",
    "slice",
    "rollout",
    "e2e",
    "dialogues",
    "leaders",
    "overlap",
    "modes",
    "scale",
    "publish",
    "step",
    "checkpoint",
    "sandbox",
    "kernels",
    "packing",
    "plan",
    "convert",
    "data",
)


@dataclass(frozen=True)
class Options:
    """What only some benchmarks take."""

    against_trl: bool = False  # train
    against_hf: bool = False  # train
    layers: str = "auto"  # slice: a number, or what fits
    recompute: str = "none"  # slice: modes, with commas between

    def check(self, what: str) -> None:
        """ConfigError for an option that this benchmark does not know."""
        for option, benchmark in (
            ("against_trl", "train"),
            ("against_hf", "train"),
            ("layers", "slice"),
            ("recompute", "slice"),
        ):
            if getattr(self, option) != getattr(Options(), option) and what != benchmark:
                raise ConfigError(
                    f"--{option.replace('_', '-')} goes with `rlef bench {benchmark}`, "
                    f"not with {what!r}"
                )
        if self.against_trl and self.against_hf:
            raise ConfigError("--against-trl and --against-hf are two benchmarks; choose one")


def run_benchmark(what: str, recipe: str, out: Path | None, options: Options) -> None:
    """Measure, print the table, and write the figures to `out` if there is one. `recipe` is a run
    directory for `step`, "cpu" or unused for `kernels`, and unused for `sandbox`, `packing`,
    `modes`, `convert` and `data`."""
    report = report_of(what, recipe, options)
    show(report)
    if out is not None:
        write(report, out)
        print(f"wrote {out}")


def report_of(what: str, recipe: str, options: Options) -> Report:
    options.check(what)
    # imported where needed: each brings its part of the trainer, and the workers run as modules
    match what:
        case "train" if options.against_trl:
            from rlef_mega.bench import against_trl

            return against_trl.benchmark(recipe)
        case "train" if options.against_hf:
            from rlef_mega.bench import against_hf

            return against_hf.benchmark(recipe)
        case "train":
            from rlef_mega.bench import train

            return train.benchmark(recipe)
        case "slice":
            from rlef_mega.bench import slice as slice_of_model

            return slice_of_model.benchmark(
                recipe, layers=options.layers, recompute=options.recompute
            )
        case "rollout":
            from rlef_mega.bench import rollout

            return rollout.benchmark(recipe)
        case "e2e":
            from rlef_mega.bench import e2e

            return e2e.benchmark(recipe)
        case "dialogues":
            from rlef_mega.bench import dialogues

            return dialogues.benchmark()
        case "leaders":
            from rlef_mega.bench import leaders

            return leaders.benchmark()
        case "overlap":
            from rlef_mega.bench import overlap

            return overlap.benchmark()
        case "modes":
            from rlef_mega.bench import modes

            return modes.benchmark()
        case "scale":
            from rlef_mega.bench import scale

            return scale.benchmark()
        case "publish":
            from rlef_mega.bench import publish

            return publish.benchmark(recipe)
        case "step":
            from rlef_mega.bench import step

            return step.benchmark(Path(recipe))
        case "sandbox":
            from rlef_mega.bench import sandbox

            return sandbox.benchmark()
        case "convert":
            from rlef_mega.bench import convert

            return convert.benchmark()
        case "checkpoint":
            from rlef_mega.bench import checkpoint

            return checkpoint.benchmark(recipe)
        case "kernels":
            from rlef_mega.bench import kernels

            return kernels.benchmark(recipe)
        case "plan":
            from rlef_mega.bench import plan

            return plan.benchmark()
        case "data":
            from rlef_mega.bench import data

            return data.benchmark()
        case "packing":
            from rlef_mega.bench import packing

            return packing.benchmark()
    raise ConfigError(f"no benchmark {what!r}; known: {', '.join(BENCHMARKS)}")
