"""`rlef bench`: throughput of the parts, measured on this machine and written with the device,
versions and command they were measured with.

A figure is a median over repeats, after a warm-up, with its lowest and highest sample. Figures of
one run can be compared; those of different runs only if the machine was otherwise idle in both.
docs/benchmarks.md defines each figure.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the kernels' tests import `bench.measure` where the trainer is not installed
    from rlef_mega.bench.results import Results

# Each is a module of this package with a function `benchmark`.
OF_A_RECIPE = ("kernels", "slice", "train", "rollout", "e2e", "publish", "checkpoint")
OF_NO_RECIPE = ("convert", "sandbox")
OPTIONS = {"slice": ("layers", "recompute", "minutes"), "kernels": ("cases", "methods", "minutes")}


def run_benchmark(what: str, recipe: str, out: Path | None, **options: Any) -> None:
    """Measure, print the tables, and write the figures to `out` if it is given.

    For `kernels`, `recipe` is "cpu", or anything else for the GPU. An option that is None counts as
    not given. Raises ConfigError for an unknown benchmark or an option that it does not have.
    """
    results = measured(what, recipe, **options)
    if out is not None:
        results.write(out)
        print(f"wrote {out}")
    results.show()


def measured(what: str, recipe: str, **options: Any) -> "Results":
    from rlef_mega.config import ConfigError

    if what not in (*OF_A_RECIPE, *OF_NO_RECIPE):
        raise ConfigError(f"no benchmark {what!r}; known: {', '.join(OF_A_RECIPE + OF_NO_RECIPE)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in OPTIONS.get(what, ()):
            owners = "|".join(of for of, names in OPTIONS.items() if name in names)
            raise ConfigError(f"--{name} is an option of `rlef bench {owners}`, not {what!r}")
    # imported here: each needs its own part of the trainer, and `python -m` would load it twice
    benchmark = import_module(f"rlef_mega.bench.{what}").benchmark
    return benchmark(recipe, **given) if what in OF_A_RECIPE else benchmark()
