"""Many runs with faults: each request is answered once and correctly, and nothing is left behind.

    PYTHONPATH=.:sandbox python -m tests.sandbox.soak --runs 50000 --json soak.json

Threads ask one Sandbox for runs whose verdicts are known, each with a token of its own that the
output must contain, while faults are injected: a random process of the sandbox is killed, the
controller runs out of descriptors or address space, or the scratch disk is full. A request may then
get the right answer, or a SANDBOX_ERROR, OSError or MemoryError, after which it is repeated. At the
end, when the faults are over, the process must hold no more than at the start. Prints a summary;
the exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlef_sandbox import Sandbox
from tests.sandbox.soak_requests import CPP_KINDS, KINDS, FaultError

PR_SET_CHILD_SUBREAPER = 36  # so that processes which the sandbox orphans become our children
TRIES = 50  # of one request
RSS_GROWTH_BYTES = 48 << 20  # allowed: arenas that the allocator keeps
FIRST_FAULT_S = 0.2  # of each kind, so that a short soak has every kind
FAULTS_S = {"kill": 0.4, "descriptors": 3.0, "memory": 5.0, "disk": 4.0}  # mean time between


def descendants(pid: int) -> dict[int, str]:
    """Return the descendants of `pid` and their states."""
    found: dict[int, str] = {}
    parents: dict[int, tuple[int, str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                parents[int(entry)] = int(fields[1]), fields[0]
    grown = True
    while grown:
        new = {p: s for p, (up, s) in parents.items() if up in {pid, *found} and p not in found}
        found.update(new)
        grown = bool(new)
    return found


def rss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def is_init(pid: int) -> bool:
    """Return whether a process is process 1 of a pid namespace below this one."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return len(line.split()) > 2 and line.split()[-1] == "1"
    return False


def holdings(scratch: str) -> dict[str, int]:
    """Count what this process and the system hold that a run could leave behind."""
    below = descendants(os.getpid())
    inits = sum(map(is_init, below))
    return {
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "threads": threading.active_count(),
        "processes": len(below) - inits,
        "inits": inits,
        "zombies": sum(state == "Z" for state in below.values()),
        "shared_memory_files": len(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else 0,
        "scratch_files": sum(len(files) + len(d) for _, d, files in os.walk(scratch)),
        "controller_rss_bytes": rss_bytes(os.getpid()),
        "largest_process_rss_bytes": max(map(rss_bytes, below), default=0),
    }


class Soak:
    """The requests, the faults, and the count of both."""

    def __init__(self, sandbox: Sandbox, count: int, scratch: str, seed: int) -> None:
        self.sandbox, self.count, self.scratch = sandbox, count, scratch
        self.random = random.Random(seed)
        self.kinds = dict(KINDS)
        if "cpp" in sandbox.languages:
            self.kinds.update(CPP_KINDS)
        self.lock = threading.Lock()
        self.asked = 0
        self.answers: collections.Counter[int] = collections.Counter()
        self.by_kind: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.retried: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()

    def work(self) -> None:
        """Make requests, in a thread, until there are enough."""
        while True:
            with self.lock:
                if self.asked == self.count:
                    return
                number, self.asked = self.asked, self.asked + 1
                weights = [weight for weight, _ in self.kinds.values()]
                (kind,) = self.random.choices([*self.kinds], weights)
                if number < 2 * len(self.kinds):  # every kind, so that every process has started
                    kind = [*self.kinds][number % len(self.kinds)]
            self.request(number, kind)

    def request(self, number: int, kind: str) -> None:
        judge = self.kinds[kind][1]
        for _ in range(TRIES):
            try:
                error_found = judge(self.sandbox, f"t{number}")
            except (FaultError, OSError, MemoryError, RuntimeError) as error:
                with self.lock:
                    self.retried[f"{type(error).__name__}: {error}"[:100]] += 1
                time.sleep(0.05)
                continue
            with self.lock:
                self.answers[number] += 1
                self.by_kind[kind] += 1
                if error_found:
                    self.wrong.append(f"{kind} {number}: {error_found}")
            return
        with self.lock:
            self.wrong.append(f"{kind} {number}: no answer in {TRIES} tries")

    def disturb(self, kind: str) -> None:
        """Inject one kind of fault, in a thread, until the soak is over; the first one soon."""
        wait_s = FIRST_FAULT_S
        while not self.over.wait(wait_s):
            wait_s = self.random.expovariate(1 / FAULTS_S[kind])
            with contextlib.suppress(OSError):
                getattr(self, f"_fault_of_{kind}")()
                self.faults[kind] += 1

    def _fault_of_kill(self) -> None:
        os.kill(self.random.choice([*descendants(os.getpid())]), signal.SIGKILL)

    def _fault_of_descriptors(self) -> None:
        with lowered(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + 2):
            time.sleep(0.05)

    def _fault_of_memory(self) -> None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with lowered(resource.RLIMIT_AS, mapped + (1 << 20)):
            time.sleep(0.05)

    def _fault_of_disk(self) -> None:
        """Fill the scratch disk, if it is one of our own that is small enough."""
        room = os.statvfs(self.scratch)
        if room.f_blocks * room.f_frsize > 256 << 20:
            raise OSError(errno.EFBIG, "not a disk to fill")
        filler = os.path.join(self.scratch, "filler")
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(0.2)
        os.unlink(filler)

    def run(self, threads: int, faults: list[str]) -> None:
        working = [threading.Thread(target=self.work) for _ in range(threads)]
        disturbing = [threading.Thread(target=self.disturb, args=(kind,)) for kind in faults]
        for thread in working + disturbing:
            thread.start()
        for thread in working:
            thread.join()
        self.over.set()
        for thread in disturbing:
            thread.join()


@contextlib.contextmanager
def lowered(kind: int, bound: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def settled(scratch: str, wanted: dict[str, int], within_s: float = 20.0) -> dict[str, int]:
    """Wait until no more is held than `wanted`, or the time is over. Returns what is held."""
    deadline = time.monotonic() + within_s
    held = holdings(scratch)
    while leaks(wanted, held) and time.monotonic() < deadline:
        time.sleep(0.1)
        _reap_orphans()
        held = holdings(scratch)
    return held


def _reap_orphans() -> None:
    """Reap processes that lost their parent, which is what process 1 would do."""
    for pid, state in descendants(os.getpid()).items():
        if state == "Z" and pid not in {child.pid for child in subprocess._active}:  # type: ignore[attr-defined]
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def leaks(
    before: dict[str, int], after: dict[str, int], kept: int = 0, inits: int = 0
) -> list[str]:
    """Return what grew. `kept` descriptors may be those of cached executables, and a zygote keeps
    an init for each of the children that it once had at the same time."""
    allowed = {"descriptors": kept, "inits": inits, "controller_rss_bytes": RSS_GROWTH_BYTES}
    allowed["largest_process_rss_bytes"] = RSS_GROWTH_BYTES
    return [
        f"{name}: {before[name]} before, {after[name]} after"
        for name in before
        if after[name] > before[name] + allowed.get(name, 0)
    ]


def soak(count: int, workers: int, threads: int, seed: int, faults: list[str]) -> dict[str, Any]:
    """Run the soak. Returns the summary, in which `leaks` and `wrong` are empty if all was well."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    scratch = tempfile.mkdtemp(prefix="rlef-soak-")
    small_disk = _mount_small_disk(scratch)
    tempfile.tempdir = scratch  # where the sandbox makes its own
    at_first = holdings(scratch)
    started = time.monotonic()
    with Sandbox(workers) as sandbox:
        Soak(sandbox, max(100, count // 50), scratch, seed).run(threads, [])
        warm = settled(scratch, {})
        tried = Soak(sandbox, count, scratch, seed + 1)
        tried.run(threads, faults)
        calm = Soak(sandbox, max(100, count // 50), scratch, seed + 2)
        calm.run(threads, [])
        kept = tried.by_kind["cpp_new"] + calm.by_kind["cpp_new"]
        after = settled(scratch, {**warm, "descriptors": warm["descriptors"] + kept})
        zygotes_started = sandbox.zygotes_started
    closed = settled(scratch, at_first)
    seconds = time.monotonic() - started
    everything_once = all(tried.answers[number] == 1 for number in range(count))
    summary = {
        "runs": count,
        "seconds": round(seconds, 1),
        "answered_exactly_once": everything_once,
        "wrong": (tried.wrong + calm.wrong)[:20],
        "leaks": leaks(warm, after, kept, inits=threads) + leaks(at_first, closed),
        "faults": dict(tried.faults),
        "full_disk_tried": small_disk,
        "asked_again": dict(tried.retried.most_common(12)),
        "asked_again_in_calm": dict(calm.retried),
        "zygotes_started": zygotes_started,
        "kinds": dict(tried.by_kind),
        "held_warm": warm,
        "held_after": after,
        "held_closed": closed,
    }
    tempfile.tempdir = None
    if small_disk:
        ctypes.CDLL(None).umount2(scratch.encode(), 2)
    with contextlib.suppress(OSError):
        os.rmdir(scratch)
    return summary


def _mount_small_disk(path: str) -> bool:
    """Mount a disk of 64 MB in our own mount namespace. Returns whether that is allowed."""
    libc = ctypes.CDLL(None)
    if os.getuid() != 0 or libc.unshare(0x00020000) != 0:
        return False
    libc.mount(b"none", b"/", b"", 16384 | 1 << 18, b"")
    return libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, b"size=64m") == 0


def failed(summary: dict[str, Any]) -> bool:
    once = summary["answered_exactly_once"]
    return bool(summary["wrong"] or summary["leaks"] or summary["asked_again_in_calm"] or not once)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", default=[*FAULTS_S], choices=[*FAULTS_S])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    summary = soak(
        arguments.runs, arguments.workers, arguments.threads, arguments.seed, arguments.faults
    )
    text = json.dumps(summary, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int(failed(summary))


if __name__ == "__main__":
    sys.exit(main())
