"""The status of each way in which a program can end."""

from __future__ import annotations

import pytest

from rlef_sandbox import Limits, Sandbox, Status, Test

LIMITS = Limits(cpu_s=1.0, wall_s=20.0, memory_bytes=128 << 20, output_bytes=64 << 10)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("print(1)", Status.OK),
        ("import sys; sys.exit(0)", Status.OK),
        ("exit()", Status.OK),
        ("1/0", Status.RUNTIME_ERROR),
        ("print(1); exit(3)", Status.RUNTIME_ERROR),
        ("import os; os.abort()", Status.RUNTIME_ERROR),
        ("while True: pass", Status.TIME_LIMIT),
        ("x = [0] * 10**9", Status.MEMORY_LIMIT),
        ("while True: print('x' * 1000)", Status.OUTPUT_LIMIT),
        ("def f(:", Status.COMPILE_ERROR),
        ("\0", Status.COMPILE_ERROR),
        ("(" * 100_000, Status.COMPILE_ERROR),
    ],
)
def test_each_way_to_end_has_its_status(sandbox: Sandbox, source: str, status: Status) -> None:
    assert sandbox.run(source, limits=LIMITS).status is status


def test_a_program_that_only_waits_reaches_the_idle_limit(sandbox: Sandbox) -> None:
    limits = Limits(cpu_s=0.2, wall_s=0.4)
    assert sandbox.run("import time; time.sleep(9)", limits=limits).status is Status.IDLE_LIMIT


def test_a_nonzero_exit_keeps_its_code_and_a_signal_its_number(sandbox: Sandbox) -> None:
    assert sandbox.run("raise SystemExit(7)").exit_code == 7
    aborted = sandbox.run("import os; os.abort()")
    assert (aborted.exit_code, aborted.signal) == (None, 6)


def test_time_and_memory_are_measured(sandbox: Sandbox) -> None:
    result = sandbox.run("x = bytearray(50 << 20)\nfor i in range(10**6): pass")
    assert 50 << 20 < result.max_rss_bytes < 200 << 20
    assert 0.005 < result.cpu_s <= result.wall_s + 0.1


def test_the_traceback_shows_the_programs_frames_only(sandbox: Sandbox) -> None:
    result = sandbox.run("def f():\n    return 1 / 0\nf()\n")
    assert result.stderr.decode() == (
        "Traceback (most recent call last):\n"
        '  File "solution.py", line 3, in <module>\n'
        "    f()\n"
        '  File "solution.py", line 2, in f\n'
        "    return 1 / 0\n"
        "           ~~^~~\n"
        "ZeroDivisionError: division by zero\n"
    )


def test_grading_stops_at_the_first_failure_unless_told_otherwise(sandbox: Sandbox) -> None:
    tests = [Test(b"1", b"1"), Test(b"2", b"0"), Test(b"3", b"3")]
    passed, wrong = Status.OK, Status.WRONG_ANSWER
    stopped = sandbox.grade("print(input())", tests)
    assert [r.status for r in stopped] == [passed, wrong]
    all_results = sandbox.grade("print(input())", tests, stop_at_first_failure=False)
    assert [r.status for r in all_results] == [passed, wrong, passed]


@pytest.mark.parametrize("count", [1, 2])
def test_a_program_without_code_fails_every_test(sandbox: Sandbox, count: int) -> None:
    results = sandbox.grade("def f(:", [Test(b"", b"")] * count, stop_at_first_failure=False)
    assert [r.status for r in results] == [Status.COMPILE_ERROR] * count
    assert b"SyntaxError" in results[0].stderr


def test_a_program_with_several_tests_is_compiled_once(sandbox: Sandbox) -> None:
    """As the compiler's warning shows."""
    first, second = sandbox.grade("print(input() is 1)", [Test(b"1", b"False")] * 2)
    assert first.status is second.status is Status.OK
    assert b"SyntaxWarning" in first.stderr and second.stderr == b""


def test_code_that_is_longer_than_an_output_may_be_passes_every_test(sandbox: Sandbox) -> None:
    tests = [Test(b"1", b"1"), Test(b"2", b"2")]
    results = sandbox.grade("print(input())", tests, Limits(output_bytes=2))
    assert [r.status for r in results] == [Status.OK] * 2


def test_no_tests_give_no_results(sandbox: Sandbox) -> None:
    assert sandbox.grade("print(1)", []) == []


def test_limits_are_checked_when_made() -> None:
    with pytest.raises(ValueError, match="cpu_s"):
        Limits(cpu_s=0)
    with pytest.raises(ValueError, match="memory_bytes"):
        Limits(memory_bytes=1000)


def test_unknown_names_are_refused_with_the_known_ones(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="known: tokens"):
        sandbox.grade("", [], checker="no such checker")
    with pytest.raises(ValueError, match="known: python"):
        sandbox.run("", language="cobol")
    with pytest.raises(ValueError, match="known: default, minimal"):
        Sandbox(isolation="none")


@pytest.mark.parametrize(
    "field",
    [
        {"cpu_s": 1e18},
        {"cpu_s": float("nan")},
        {"wall_s": float("inf")},
        {"memory_bytes": 10**30},
        {"memory_bytes": 10**5000},
        {"output_bytes": 1e30},
        {"processes": 10**9},
    ],
    ids=range(7),
)
def test_a_limit_out_of_bounds_is_refused_with_its_bounds(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"Limits\.{next(iter(field))} is .*; it must be between"):
        Limits(**field)  # type: ignore[arg-type]


def test_the_largest_limits_hold(sandbox: Sandbox) -> None:
    most = Limits(86400, None, 1 << 40, 1 << 30, 1 << 16)
    assert sandbox.run("print(1)", limits=most).status is Status.OK
