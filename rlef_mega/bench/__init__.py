"""`rlef bench`: throughput of the parts, measured on this machine and written with what it was
measured on.

Every figure is a median over repeats, after a warm-up, with its lowest and highest sample. Figures
of one run share a machine and a minute; compare those, and figures of different runs only when the
machine was quiet in both. docs/benchmarks.md says what each one means.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
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
# what the second word of the command is to them; the others take none
OF_A_RECIPE = {"train", "slice", "rollout", "e2e", "publish", "checkpoint", "kernels"}
OF_A_RUN = {"step"}


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
    directory for `step`, "cpu" or unused for `kernels`, and unused for what is in neither
    `OF_A_RECIPE` nor `OF_A_RUN`."""
    report = report_of(what, recipe, options)
    if out is not None:
        write(report, out)
        print(f"wrote {out}")
    show(report)


def report_of(what: str, recipe: str, options: Options) -> Report:
    options.check(what)
    if what not in BENCHMARKS:
        raise ConfigError(f"no benchmark {what!r}; known: {', '.join(BENCHMARKS)}")
    name = "against_trl" if options.against_trl else "against_hf" if options.against_hf else what
    # imported where needed: each brings its part of the trainer, and the workers run as modules
    benchmark: Callable[..., Report] = import_module(f"rlef_mega.bench.{name}").benchmark
    if what == "slice":
        return benchmark(recipe, layers=options.layers, recompute=options.recompute)
    if what in OF_A_RECIPE:
        return benchmark(recipe)
    return benchmark(Path(recipe)) if what in OF_A_RUN else benchmark()
