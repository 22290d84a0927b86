"""Without a C compiler, the supervisor in Python has the same duties, layers and verdicts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlef_sandbox import (
    CallTest,
    CheckerProgram,
    CheckTest,
    Limits,
    Result,
    Sandbox,
    Status,
    Test,
    native,
)
from tests.sandbox.attacks.suite import ATTACKS
from tests.sandbox.attacks.worlds import attempt
from tests.sandbox.test_lifetime import descendants, gone, kill_all, run_in_thread

LIMITS = Limits(cpu_s=0.5, wall_s=10.0, memory_bytes=128 << 20, output_bytes=64 << 10)
SLEEPS = Limits(cpu_s=0.2, wall_s=0.4)
ENDS = [
    ("print(input())", LIMITS),
    ("print(1); exit(3)", LIMITS),
    ("import os; os.abort()", LIMITS),
    ("while True: pass", LIMITS),
    ("import time; time.sleep(9)", SLEEPS),
    ("x = [0] * 10**9", LIMITS),
    ("while True: print('x' * 1000)", LIMITS),
    ("import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)", LIMITS),
    ("def f(:", LIMITS),
]
SECOND = [Test(b"1", b"1"), Test(b"2", b"2")]
CALL = [CallTest("f", (1,), 2)]
CHECK = [CheckTest("f", "def check(f): assert f(1) == 2")]
BY_PROGRAM = CheckerProgram("def check(stdin, expected, actual): return actual == b'1\\n'")


@pytest.fixture(scope="module")
def python_sandbox() -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "spawn_library", lambda: None)
        shared = Sandbox(workers=1)
    with shared:
        assert shared.isolation["launcher"] == "python"
        yield shared


def verdicts(sandbox: Sandbox) -> list[tuple[Status, int | None, int | None, bytes]]:
    results: list[Result] = []
    for source, limits in ENDS:
        results.append(sandbox.run(source, b"1", limits))
    for source in ("print(input())", "def f(n): return n + 1", "def f(n): return n", "def f(:"):
        for tests in (SECOND, CALL, CHECK):
            results += sandbox.grade(source, tests, LIMITS, stop_at_first_failure=False)
    results += sandbox.grade("print(input())", SECOND, LIMITS, BY_PROGRAM)
    return [(r.status, r.exit_code, r.signal, r.stdout) for r in results]


def test_verdicts_are_those_of_the_supervisor_in_c(
    python_sandbox: Sandbox, sandbox: Sandbox
) -> None:
    ours = verdicts(python_sandbox)
    assert ours == verdicts(sandbox)
    assert {status for status, *_ in ours} == {*Status} - {Status.SANDBOX_ERROR}


def test_the_layers_are_those_of_the_supervisor_in_c(
    python_sandbox: Sandbox, sandbox: Sandbox
) -> None:
    only_c = {"launcher": "native", "process_ids": sandbox.isolation["process_ids"]}
    assert {**python_sandbox.isolation, **only_c} == sandbox.isolation
    assert not python_sandbox.isolation["process_ids"]


@pytest.mark.parametrize(
    "name",
    [
        "reading.memory_of_the_parent",
        "network.inherited_descriptors",
        "processes.subprocess",
        "processes.wait_for_the_siblings",
        "sandbox_faults.kill_itself",
        "memory.anonymous_mapping",
        "time.ignored_signals",
        "output.sparse_output",
    ],
)
def test_an_attack_on_what_the_supervisor_does_is_stopped(
    python_sandbox: Sandbox, name: str
) -> None:
    end = attempt(python_sandbox, ATTACKS[name])
    assert end["held"], end


def test_no_child_can_report_for_itself_or_another(python_sandbox: Sandbox) -> None:
    """The pages on which children report are in no program's memory."""
    maps = "import gc, mmap\nfor page in gc.get_objects():\n"
    maps += "    if isinstance(page, mmap.mmap.__base__): print(page)"
    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(python_sandbox.run, "import time; time.sleep(1)")
        time.sleep(0.3)
        seen = python_sandbox.run(maps).stdout
        assert b"closed=True" in seen and b"closed=False" not in seen
        assert sleeper.result().status is Status.OK


@pytest.mark.timing
def test_a_sleeper_holds_up_nobody_and_a_starved_program_gets_more_time(
    python_sandbox: Sandbox,
) -> None:
    with ThreadPoolExecutor(6) as pool:
        sleeps = Limits(cpu_s=1.0, wall_s=3.0)
        started = time.monotonic()
        sleepers = [
            pool.submit(python_sandbox.run, "import time; time.sleep(30)", b"", sleeps)
            for _ in range(4)
        ]
        time.sleep(0.2)
        assert python_sandbox.run("print(1)").status is Status.OK
        assert time.monotonic() - started < 3.0, "the sleepers should still sleep"
        assert {sleeper.result().status for sleeper in sleepers} == {Status.IDLE_LIMIT}
    slow = "import time\nfor _ in range(9): time.sleep(0.05); sum(range(10**5))"
    assert python_sandbox.run(slow, limits=Limits(cpu_s=2, wall_s=0.4)).status is Status.OK


def test_a_lost_zygote_costs_a_rerun_and_closing_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "spawn_library", lambda: None)
    others = descendants(os.getpid())
    with Sandbox(workers=1) as sandbox:
        source = "import time; time.sleep(1); print(1)"
        thread, results = run_in_thread(sandbox, source, Limits(wall_s=20))
        kill_all(descendants(os.getpid()) - others)
        thread.join()
        assert [r.status for r in results] == [Status.OK]
        thread, results = run_in_thread(sandbox, "import time; time.sleep(30)", Limits())
        below = descendants(os.getpid()) - others
    thread.join()
    assert gone(below) and isinstance(results[0], RuntimeError)


def test_it_runs_only_python(python_sandbox: Sandbox) -> None:
    assert python_sandbox.languages == ("python",)
    with pytest.raises(ValueError, match=r"needs g\+\+ and a C compiler"):
        python_sandbox.run("int main() {}", language="cpp")
