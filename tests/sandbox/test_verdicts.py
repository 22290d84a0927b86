"""What each end of a program is called."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rlef_sandbox import Limits, Sandbox, Status

LIMITS = Limits(cpu_s=1.0, wall_s=3.0, memory_bytes=128 << 20, output_bytes=64 << 10)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as shared:
        yield shared


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
def test_an_end_has_one_name(sandbox: Sandbox, source: str, status: Status) -> None:
    assert sandbox.run(source, limits=LIMITS).status is status


def test_waiting_instead_of_working_is_an_idle_limit(sandbox: Sandbox) -> None:
    limits = Limits(cpu_s=0.2, wall_s=0.4)
    assert sandbox.run("import time; time.sleep(9)", limits=limits).status is Status.IDLE_LIMIT
