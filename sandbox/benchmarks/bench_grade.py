"""How fast programs are graded: this sandbox beside a bare subprocess that confines nothing.

    python sandbox/benchmarks/bench_grade.py [--runs 500] [--workers 1] [--json PATH]

Times are per run, in milliseconds; `cpu_ms` is the processor time of the controller, the zygotes
and the children together, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlef_sandbox import Sandbox, Status, Test

TRIVIAL = "print(sum(map(int, input().split())))"
SHORTEST_PATHS = """\
import heapq, sys
from collections import defaultdict

def main():
    data = list(map(int, sys.stdin.read().split()))
    n, m = data[0], data[1]
    graph = defaultdict(list)
    for i in range(m):
        a, b, w = data[2 + 3 * i : 5 + 3 * i]
        graph[a].append((b, w)); graph[b].append((a, w))
    distance = {1: 0}
    heap = [(0, 1)]
    while heap:
        d, u = heapq.heappop(heap)
        if d > distance[u]:
            continue
        for v, w in graph[u]:
            if d + w < distance.get(v, 1 << 60):
                distance[v] = d + w
                heapq.heappush(heap, (d + w, v))
    print(*[distance.get(i, -1) for i in range(1, n + 1)])

main()
"""
PROGRAMS = {
    "trivial": (TRIVIAL, Test(b"1 2 3\n", b"6\n")),
    "shortest_paths": (
        SHORTEST_PATHS,
        Test(b"5 6\n1 2 3\n2 3 4\n1 3 10\n3 4 1\n4 5 2\n1 5 100\n", b"0 3 7 8 10\n"),
    ),
}
TESTS_A_PROGRAM = 20


def measure(grade: Callable[[], None], runs: int, threads: int, runs_a_call: int) -> dict:
    """Call `grade` from `threads` threads until `runs` runs are done."""

    def timed(_: int) -> float:
        started = time.perf_counter()
        grade()
        return (time.perf_counter() - started) / runs_a_call

    calls = max(threads, runs // runs_a_call)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(timed, range(2 * threads)))  # warm up
        cpu_s, started = tree_cpu_s(), time.perf_counter()
        latencies_s = sorted(pool.map(timed, range(calls)))
        wall_s, cpu_s = time.perf_counter() - started, tree_cpu_s() - cpu_s
    runs = calls * runs_a_call
    return {
        "runs_per_s": round(runs / wall_s, 1),
        "p50_ms": round(1e3 * latencies_s[calls // 2], 3),
        "p99_ms": round(1e3 * latencies_s[calls * 99 // 100], 3),
        "cpu_ms": round(1e3 * cpu_s / runs, 3),
    }


def tree_cpu_s() -> float:
    """Processor time of this process and everything below it, the dead and waited for included."""
    parents, ticks = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    family, size = {os.getpid()}, 0
    while len(family) > size:
        size = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def grade_bare(source: str, test: Test) -> None:
    """A fresh interpreter, unconfined, and started as fast as it can be (without `site`)."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source],
        input=test.stdin,
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == test.expected.split()


def grade_confined(sandbox: Sandbox, source: str, tests: list[Test]) -> None:
    results = sandbox.grade(source, tests)
    assert [result.status for result in results] == [Status.OK] * len(tests), results


def benchmark(runs: int, workers: int) -> dict[str, dict]:
    rows = {}
    with Sandbox(workers=workers) as sandbox:
        for name, (source, test) in PROGRAMS.items():
            for count in (1, TESTS_A_PROGRAM):
                tests = [test] * count
                rows[f"{name}, {count} test{'s' * (count > 1)}"] = measure(
                    lambda s=source, t=tests: grade_confined(sandbox, s, t), runs, workers, count
                )
            rows[f"{name}, bare subprocess"] = measure(
                lambda s=source, t=test: grade_bare(s, t), max(20, runs // 5), workers, 1
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    rows = benchmark(arguments.runs, arguments.workers)
    for name, row in rows.items():
        print(f"{name:32s}", "  ".join(f"{key} {value:8.2f}" for key, value in row.items()))
    if arguments.json:
        report = {
            "benchmark": "sandbox_grade",
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load_before": load_before,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "workers": arguments.workers,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
