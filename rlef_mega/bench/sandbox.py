"""How fast programs are graded, beside a bare subprocess that confines nothing: the sandbox's own
benchmark (sandbox/benchmarks/bench_grade.py), repeated, in the form of the other figures."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.config import ConfigError

SCRIPT = Path(__file__).parents[2] / "sandbox/benchmarks/bench_grade.py"
REPEATS = 3


def benchmark(*, runs: int = 500) -> Report:
    """`runs` of each kind of program a repeat, on one worker."""
    if not SCRIPT.is_file():
        raise ConfigError(f"no file {SCRIPT}: this benchmark needs a checkout of the repository")
    repeats = [run_script(runs) for _ in range(REPEATS)]
    figures = tuple(
        Figure(name, "runs/s", tuple(rows[name]["runs_per_s"] for rows in repeats))
        for name in repeats[0]
    )
    return Report("rlef bench sandbox", describe_benchmark(workers=1, runs=runs), figures)


def run_script(runs: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as folder:
        path = Path(folder) / "rows.json"
        subprocess.run(
            [sys.executable, str(SCRIPT), "--runs", str(runs), "--json", str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.loads(path.read_text())["rows"]
