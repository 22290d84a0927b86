"""`rlef bench`: throughput of the parts, measured on this machine and written with what it was
measured on.

Every figure is a median over repeats, after a warm-up, with its lowest and highest sample. Figures
of one run share a machine and a minute; compare those, and figures of different runs only when the
machine was quiet in both. docs/benchmarks.md says what each one means.
"""

from pathlib import Path

from rlef_mega.bench.figures import Report, show, write
from rlef_mega.config import ConfigError

BENCHMARKS = ("train", "rollout", "step", "sandbox", "kernels", "packing")


def run_benchmark(what: str, recipe: str, out: Path | None, *, against_trl: bool) -> None:
    """Measure, print the table, and write the figures to `out` if there is one. `recipe` is a run
    directory for `step`, "cpu" or unused for `kernels`, and unused for `sandbox` and `packing`."""
    if against_trl and what != "train":
        raise ConfigError(f"--against-trl goes with `rlef bench train`, not with {what!r}")
    report = measure(what, recipe, against_trl=against_trl)
    show(report)
    if out is not None:
        write(report, out)
        print(f"wrote {out}")


def measure(what: str, recipe: str, *, against_trl: bool) -> Report:
    # imported where needed: each brings its part of the trainer, and the workers run as modules
    match what:
        case "train" if against_trl:
            from rlef_mega.bench import against_trl as beside_trl

            return beside_trl.benchmark(recipe)
        case "train":
            from rlef_mega.bench import train

            return train.benchmark(recipe)
        case "rollout":
            from rlef_mega.bench import rollout

            return rollout.benchmark(recipe)
        case "step":
            from rlef_mega.bench import step

            return step.benchmark(Path(recipe))
        case "sandbox":
            from rlef_mega.bench import sandbox

            return sandbox.benchmark()
        case "kernels":
            from rlef_mega.bench import kernels

            return kernels.benchmark(recipe)
        case "packing":
            from rlef_mega.bench import packing

            return packing.benchmark()
    raise ConfigError(f"no benchmark {what!r}; known: {', '.join(BENCHMARKS)}")
