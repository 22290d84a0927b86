"""`rlef bench sandbox`: how fast programs are graded, compared with other ways to run them.

Runs the sandbox's own benchmark (sandbox/benchmarks/bench_grade.py) and returns its figures as
the other benchmarks do."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rlef_mega.bench.results import Figure, Results, describe_benchmark
from rlef_mega.config import ConfigError

SCRIPT = Path(__file__).parents[2] / "sandbox/benchmarks/bench_grade.py"
ROUNDS = 5


def benchmark(*, rounds: int = ROUNDS, runs: int = 200) -> Results:
    if not SCRIPT.is_file():
        raise ConfigError(f"no file {SCRIPT}: this benchmark needs a checkout of the repository")
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as folder:
        path = Path(folder) / "figures.json"
        options = ["--rounds", str(rounds), "--runs", str(runs), "--json", str(path)]
        command = [sys.executable, str(SCRIPT), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(path.read_text())
    figures = tuple(
        Figure(name, unit, tuple(samples)) for name, (unit, samples) in report["figures"].items()
    )
    about = {name: report[name] for name in ("kernel", "cores", "load_before", "rounds")}
    return Results("rlef bench sandbox", describe_benchmark(**about), figures)
