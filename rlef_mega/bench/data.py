"""What reading a data set of enormous rows costs in memory: a CodeContests file in Parquet, all of
it in one row group, as a hub's copy may be, most of it in a few rows of 64 MB. The tests are random
and hardly compress.

Theory of operation: writing the file and each reading are processes of their own. A reading loads
the source as a run does, which writes the store of problems, and then draws problems from it; a
second one finds the store. The memory is the largest resident set, Python and PyArrow included,
beside what the process had when it had imported everything.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.config import ConfigError
from rlef_mega.problems import load_problems

ROWS, LARGE_EVERY = 480, 16
TESTS, TEST_BYTES = 100, 2_000  # of a row, and of an input
LARGE_TESTS, LARGE_TEST_BYTES = 160, 400_000  # 64 MB
DRAWN = 64
MIB = 1 << 20


def benchmark() -> Report:
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 8 << 30:
            raise ConfigError(f"{folder} has no room for 8 GB; set TMPDIR")
        run("generate", folder)
        first, second = run("read", folder), run("read", folder)
        file_bytes = (folder / "train.parquet").stat().st_size
    figures = [
        Figure("the file", "MiB", (file_bytes / MIB,)),
        Figure("its largest row", "MiB", (LARGE_TESTS * LARGE_TEST_BYTES / MIB,)),
        Figure("imports alone", "MiB", (first["before_bytes"] / MIB,)),
    ]
    for what, found in (("read and stored", first), ("found in the store", second)):
        figures.append(Figure(f"{what}, {DRAWN} drawn: peak", "MiB", (found["peak_bytes"] / MIB,)))
        figures.append(Figure(f"{what}, {DRAWN} drawn", "s", (found["seconds"],)))
    peak = first["peak_bytes"] / MIB
    return Report(
        "rlef bench data",
        describe_benchmark(rows=ROWS, load_average=load),
        tuple(figures),
        (f"largest resident set: {peak:,.0f} MiB; goal below 1,024 MiB",),
    )


def run(task: str, folder: Path) -> dict[str, float]:
    words = [sys.executable, "-m", "rlef_mega.bench.data", task, str(folder)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def generate(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    noise = os.urandom(LARGE_TEST_BYTES * LARGE_TESTS // 2 + ROWS).hex()

    def row(number: int) -> dict[str, object]:
        large = number % LARGE_EVERY == 0
        count, size = (LARGE_TESTS, LARGE_TEST_BYTES) if large else (TESTS, TEST_BYTES)
        inputs = [
            noise[number + place * size : number + (place + 1) * size] for place in range(count)
        ]
        none: dict[str, list[str]] = {"input": [], "output": []}
        return {
            "name": f"p{number}",
            "description": "Print the first letter.",
            "public_tests": {"input": ["7\n"], "output": ["7\n"]},
            "private_tests": none,
            "generated_tests": {"input": inputs, "output": [text[0] for text in inputs]},
            "source": 2,
        }

    table = pyarrow.Table.from_pylist([row(number) for number in range(ROWS)])
    parquet.write_table(table, folder / "train.parquet", row_group_size=ROWS)


def read(folder: Path) -> dict[str, float]:
    import pyarrow.parquet  # noqa: F401

    before_bytes, started = peak_bytes(), time.perf_counter()
    problems = load_problems(f"codecontests:{folder}/train.parquet", folder / "cache")
    assert len(problems) == ROWS
    drawn = [len(problems[place % ROWS].private_tests.tests) for place in range(DRAWN)]
    assert sum(drawn) == (DRAWN - DRAWN // LARGE_EVERY) * TESTS + DRAWN // LARGE_EVERY * LARGE_TESTS
    seconds = time.perf_counter() - started
    return {"before_bytes": before_bytes, "peak_bytes": peak_bytes(), "seconds": seconds}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    if task == "generate":
        generate(place)
    print(json.dumps(read(place) if task == "read" else {}))
