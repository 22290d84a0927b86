"""`rlef bench sandbox`: how fast programs are graded, compared with other ways to run them.

Runs the sandbox's own benchmark (sandbox/benchmarks/bench_grade.py) and returns its figures as
the other benchmarks do."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from rlef_mega.bench.results import Figure, Results, describe_benchmark
from rlef_mega.config import ConfigError

SCRIPT = Path(__file__).parents[2] / "sandbox/benchmarks/bench_grade.py"


def benchmark(*, rounds: int = 5, runs: int = 200) -> Results:
    if not SCRIPT.is_file():
        raise ConfigError(f"no file {SCRIPT}: this benchmark needs a checkout of the repository")
    machine = {"kernel": platform.release(), "cores": os.cpu_count()}
    load_before = os.getloadavg()[0]
    command = [sys.executable, str(SCRIPT), str(rounds), str(runs)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    figures = tuple(
        Figure(name, unit, tuple(samples)) for name, (unit, samples) in json.loads(output).items()
    )
    about = describe_benchmark(**machine, load_before=load_before, rounds=rounds)
    return Results("rlef bench sandbox", about, figures)
