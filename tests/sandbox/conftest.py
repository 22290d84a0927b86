"""One sandbox per test module, and a fixture that tries attacks in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from rlef_sandbox import Limits, Result, Sandbox, Status, Test

ATTACK_LIMITS = Limits(cpu_s=4.0, wall_s=20.0, memory_bytes=128 << 20, output_bytes=64 << 10)
ESCAPED = b"ESCAPED"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as shared:
        yield shared


@pytest.fixture
def attempt(sandbox: Sandbox) -> Iterator[Callable[[str], Result]]:
    """Return a function that runs an attack, which prints ESCAPED if it succeeds. The sandbox must
    still grade afterwards."""

    def run(source: str) -> Result:
        result = sandbox.run(source, b"input\n", ATTACK_LIMITS)
        assert ESCAPED not in result.stdout, result
        assert result.status is not Status.SANDBOX_ERROR, result
        return result

    yield run
    (after,) = sandbox.grade("print(input())", [Test(b"alive", b"alive")])
    assert after.status is Status.OK
