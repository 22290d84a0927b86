"""Threads, killed processes and shutdown: each request is answered once, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rlef_sandbox
from rlef_sandbox import Limits, Result, Sandbox, Status, Test

SANDBOX_PATH = str(Path(rlef_sandbox.__file__).parents[1])
SLEEP = "import time; time.sleep(30)"


def descendants(pid: int) -> set[int]:
    """Return the descendants of `pid`, without itself."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def gone(pids: set[int], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


def kill_all(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # gone since it was listed
            os.kill(pid, signal.SIGKILL)


def run_in_thread(sandbox: Sandbox, source: str, limits: Limits) -> tuple[threading.Thread, list]:
    results: list[Result | Exception] = []

    def run() -> None:
        try:
            results.append(sandbox.run(source, limits=limits))
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
    return thread, results


def test_threads_share_a_sandbox() -> None:
    with Sandbox(workers=2) as sandbox, ThreadPoolExecutor(8) as pool:

        def grade(n: int) -> list[Status]:
            tests = [Test(str(n), str(n * n)), Test(str(n + 1), str((n + 1) ** 2))]
            return [r.status for r in sandbox.grade("print(int(input()) ** 2)", tests)]

        assert list(pool.map(grade, range(24))) == [[Status.OK] * 2] * 24


def test_a_lost_zygote_costs_only_a_rerun() -> None:
    with Sandbox(workers=1) as sandbox:
        source = "import time; time.sleep(1.5); print(1)"
        thread, results = run_in_thread(sandbox, source, Limits(wall_s=20))
        kill_all(descendants(os.getpid()))
        thread.join()
        assert [r.status for r in results] == [Status.OK]


def test_a_zygote_lost_between_two_tests_is_replaced() -> None:
    with Sandbox(workers=1) as sandbox:
        for _ in range(2):
            assert sandbox.run("print(1)").status is Status.OK
            kill_all(descendants(os.getpid()))
        tests = [Test(b"1", b"1")] * 3
        assert [r.status for r in sandbox.grade("print(input())", tests)] == [Status.OK] * 3


@pytest.mark.parametrize("process", [-1, -2], ids=["child", "process_1_of_its_namespaces"])
def test_a_child_killed_from_outside_is_run_again(process: int) -> None:
    with Sandbox(workers=1) as sandbox:
        source = "import time; time.sleep(1.5); print(1)"
        thread, results = run_in_thread(sandbox, source, Limits(wall_s=20))
        os.kill(sorted(descendants(os.getpid()))[process], signal.SIGKILL)
        thread.join()
        assert [r.status for r in results] == [Status.OK]


def test_closing_kills_what_runs() -> None:
    others = descendants(os.getpid())  # of other tests' fixtures
    sandbox = Sandbox(workers=1)
    thread, results = run_in_thread(sandbox, SLEEP, Limits())
    below = descendants(os.getpid()) - others
    sandbox.close()
    thread.join(10)
    assert gone(below)
    assert isinstance(results[0], RuntimeError)
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("print(1)")


def test_closing_leaves_no_descriptor_open() -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_descriptors()
    with Sandbox(workers=1) as sandbox:
        sandbox.run("print(1)")
        sandbox.grade("print(1)", [Test(b"", b"1")] * 3)
        inside = open_descriptors()
        for _ in range(5):
            sandbox.run("print(1)")
        assert open_descriptors() == inside
    assert open_descriptors() == before


def test_the_controllers_sudden_death_leaves_no_process() -> None:
    script = (
        "from rlef_sandbox import *; import threading, time\n"
        "s = Sandbox(workers=1)\n"
        f"threading.Thread(target=s.run, args=({SLEEP!r},)).start()\n"
        "time.sleep(0.5); print('running', flush=True); time.sleep(30)"
    )
    environment = {**os.environ, "PYTHONPATH": SANDBOX_PATH}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment
    ) as controller:
        controller.stdout.readline()
        below = descendants(controller.pid)
        assert len(below) in (3, 4)  # reaper, zygote, perhaps process 1 of the run, child
        controller.kill()
    assert gone(below)


def test_a_zygote_outlives_the_thread_that_started_it() -> None:
    made: list[Sandbox] = []
    starter = threading.Thread(target=lambda: made.append(Sandbox(workers=1)))
    starter.start()
    starter.join()
    with made[0] as sandbox:
        time.sleep(0.2)
        assert sandbox.run("print(1)").status is Status.OK


def test_a_fork_of_the_owner_may_not_use_or_close_the_sandbox() -> None:
    with Sandbox(workers=1) as sandbox:
        pid = os.fork()
        if pid == 0:
            try:
                sandbox.close()
                sandbox.run("print(1)")
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert sandbox.run("print(1)").status is Status.OK
