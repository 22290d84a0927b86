"""The grading service under load: memory and latency with 2,000 requests in flight.

    python sandbox/benchmarks/bench_service.py [--in-flight 2000] [--workers N] [--json PATH]

One server on loopback, one client process, which keeps that many requests open: each answer is
followed by the next request, until `--requests` are answered or `--seconds` are over; then what is
open is finished. First the same with one request in flight, for the latency of the way itself, and
the sandbox called directly from as many threads as it has workers, for the throughput that the
service can reach at most. Latencies are of a request as the client sees it, in milliseconds: with
N in flight they are mostly waiting, N divided by the throughput. Memory is resident memory in MiB:
of the server process (idle, and its peak), and of all its sandbox processes at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlef_sandbox import Sandbox, Status, Test
from rlef_sandbox.service.client import SandboxClient

ROOT = Path(__file__).parents[1]
PROGRAM = "print(sum(map(int, input().split())))"
PADDING = "# " + "x" * 2000 + "\n"  # about the size of a model's answer
TESTS = [Test(b"1 2 3\n", b"6\n")]
MIB = 1 << 20


@contextmanager
def server(workers: int, queue: int) -> Iterator[tuple[int, str]]:
    """A server of its own process: pid and address."""
    command = [sys.executable, "-m", "rlef_sandbox", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--workers", str(workers), "--queue", str(queue)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        if not found:
            raise RuntimeError(f"the server did not start: {line}{process.stdout.read()}")
        yield process.pid, found[0]
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise RuntimeError(f"the server did not drain: exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def status_bytes(pid: int, field: str) -> int:
    """A memory field of /proc/PID/status: VmRSS, VmHWM (its peak)."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def children_bytes(pid: int) -> int:
    """Resident memory of everything below a process, shared pages counted in each."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    family, size = {pid}, 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(status_bytes(member, "VmRSS") for member in family - {pid})


async def load(url: str, in_flight: int, requests: int, seconds: float) -> dict[str, float]:
    """Keep `in_flight` requests open, each a program of its own, until there are enough."""
    latencies_s: list[float] = []
    statuses: Counter[Status] = Counter()
    begun = time.perf_counter()
    numbers = iter(range(requests))

    async def caller(client: SandboxClient) -> None:
        for number in numbers:
            if time.perf_counter() - begun > seconds:
                return
            started = time.perf_counter()
            source = f"{PADDING}{PROGRAM} # {number}"
            (result,) = await client.grade(source, TESTS)
            latencies_s.append(time.perf_counter() - started)
            statuses[result.status] += 1

    async with SandboxClient([url], connections=in_flight, heartbeat_s=60) as client:
        await asyncio.gather(*(caller(client) for _ in range(in_flight)))
    wall_s = time.perf_counter() - begun
    if statuses.keys() != {Status.OK}:
        raise RuntimeError(f"not every program passed: {statuses}")
    latencies_s.sort()
    return {
        "requests": len(latencies_s),
        "requests_per_s": round(len(latencies_s) / wall_s, 1),
        "p50_ms": round(1e3 * latencies_s[len(latencies_s) // 2], 2),
        "p99_ms": round(1e3 * latencies_s[len(latencies_s) * 99 // 100], 2),
        "max_ms": round(1e3 * latencies_s[-1], 2),
    }


def direct(workers: int, requests: int, seconds: float) -> dict[str, float]:
    """The same programs in a sandbox of this process."""
    begun = time.perf_counter()

    def call(number: int) -> bool:
        if time.perf_counter() - begun > seconds:
            return False
        (result,) = sandbox.grade(f"{PADDING}{PROGRAM} # {number}", TESTS)
        assert result.status is Status.OK, result
        return True

    with Sandbox(workers=workers) as sandbox, ThreadPoolExecutor(workers) as pool:
        done = sum(pool.map(call, range(requests)))
        wall_s = time.perf_counter() - begun
    return {"requests": done, "requests_per_s": round(done / wall_s, 1)}


def benchmark(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    rows = {"embedded sandbox": direct(arguments.workers, 4000, arguments.seconds / 4)}
    with server(arguments.workers, queue=arguments.in_flight) as (pid, url):
        rows["1 in flight"] = asyncio.run(load(url, 1, 2000, arguments.seconds / 4))
        idle = status_bytes(pid, "VmRSS")
        name = f"{arguments.in_flight} in flight"
        rows[name] = asyncio.run(
            load(url, arguments.in_flight, arguments.requests, arguments.seconds)
        )
        rows["memory"] = {
            "server_idle_mib": round(idle / MIB, 1),
            "server_peak_mib": round(status_bytes(pid, "VmHWM") / MIB, 1),
            "sandbox_processes_mib": round(children_bytes(pid) / MIB, 1),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--in-flight", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the measurement in flight")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if arguments.in_flight + 100 > most:
        parser.error(f"--in-flight is {arguments.in_flight}; ulimit -n allows {most} connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load_before = os.getloadavg()[0]
    rows = benchmark(arguments)
    for name, row in rows.items():
        print(f"{name:18s}", "  ".join(f"{key} {value:,}" for key, value in row.items()))
    if arguments.json:
        report = {
            "benchmark": "sandbox_service",
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load_before": load_before,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "workers": arguments.workers,
            "in_flight": arguments.in_flight,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
