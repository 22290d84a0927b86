"""Messages between controller and zygote: round trips, and a zygote that sends arbitrary bytes.

A zygote is trusted, but a broken one must be a fault: never a verdict that its bytes do not encode,
never an exception other than the documented ones, never a passed test.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlef_sandbox import CallTest, Limits, Sandbox, Status, Test, worker
from rlef_sandbox.protocol import OUTCOME, Ending, Outcome, Phase, Task, ZygoteRequest
from rlef_sandbox.worker import ZygoteLostError
from tests.sandbox import hostile_zygote

sizes = st.integers(0, 2**64 - 1)
requests = st.builds(
    ZygoteRequest,
    st.sampled_from(Task),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
    sizes,
    sizes,
    st.integers(0, 2**32 - 1),
)
outcomes = st.builds(
    Outcome,
    st.sampled_from(Phase),
    st.sampled_from(Ending),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
    sizes,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(requests)
@settings(max_examples=200, deadline=None)
def test_a_request_comes_back_as_it_went(request: ZygoteRequest) -> None:
    assert ZygoteRequest.unpack(request.pack()) == request


@given(outcomes)
@settings(max_examples=200, deadline=None)
def test_an_outcome_comes_back_as_it_went(outcome: Outcome) -> None:
    assert Outcome.unpack(outcome.pack()) == outcome


@given(st.binary(max_size=80))
@settings(max_examples=500, deadline=None)
def test_bytes_that_are_not_an_outcome_are_a_value_error(message: bytes) -> None:
    try:
        outcome = Outcome.unpack(message)
    except ValueError:
        return
    assert len(message) >= OUTCOME.size
    assert outcome.phase in Phase and outcome.ending in Ending


@pytest.fixture(scope="module")
def hostile_sandbox() -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "COMMAND", [*worker.COMMAND[:-1], hostile_zygote.command()])
        with Sandbox(workers=1) as sandbox:
            yield sandbox


def test_an_answer_that_makes_sense_is_believed(hostile_sandbox: Sandbox) -> None:
    """So the other tests fail because of what is sent, not because nothing arrives."""
    ended = Outcome(Phase.RUNNING, Ending.ITSELF, 0, 0.01, 0.02, 1 << 20)
    result = hostile_sandbox.run(ended.pack(), limits=Limits(cpu_s=0.1, wall_s=0.1))
    assert (result.status, result.cpu_s) == (Status.OK, 0.01)


def says_nothing(message: bytes) -> bool:
    """Return whether these bytes are neither an outcome nor the notice of a sleep."""
    try:
        Outcome.unpack(message)
    except ValueError:
        return message != worker.SLEEPING
    return False


@given(message=st.binary(min_size=1, max_size=60).filter(says_nothing))
@FUZZ
def test_a_zygote_that_makes_no_sense_is_a_fault(hostile_sandbox: Sandbox, message: bytes) -> None:
    result = hostile_sandbox.run(message, limits=Limits(cpu_s=0.1, wall_s=0.1))
    assert result.status is Status.SANDBOX_ERROR


@given(outcome=outcomes, tail=st.binary(max_size=9))
@FUZZ
def test_no_outcome_passes_a_test_by_itself(
    hostile_sandbox: Sandbox, outcome: Outcome, tail: bytes
) -> None:
    """The program wrote nothing, so nothing can match, whatever outcome the zygote sends."""
    message = outcome.pack() + tail
    tests = [Test(b"", b"1"), CallTest("f", (), 1), Test(b"", b"x")]
    limits = Limits(cpu_s=0.1, wall_s=0.1)
    for result in hostile_sandbox.grade(message, tests, limits, stop_at_first_failure=False):
        assert result.status is not Status.OK


@given(numbers=st.tuples(*[st.integers(0, 255)] * 2, st.floats(), st.floats()))
@FUZZ
def test_an_outcome_with_unknown_numbers_never_passes(
    hostile_sandbox: Sandbox, numbers: tuple[int, int, float, float]
) -> None:
    phase, ending, cpu_s, wall_s = numbers
    message = struct.pack(OUTCOME.format, phase, ending, 0, cpu_s, wall_s, 0)
    (result,) = hostile_sandbox.grade(message, [Test(b"", b"1")], Limits(cpu_s=0.1, wall_s=0.1))
    assert result.status is not Status.OK


def test_a_zygote_that_dies_at_every_request_is_a_fault(hostile_sandbox: Sandbox) -> None:
    assert hostile_sandbox.run("DIE").status is Status.SANDBOX_ERROR


@pytest.mark.parametrize(
    "greeting",
    [b"x", b"[]", b"null", b"{}", b"\xff", b'"namespaces"', b"[" * 10_000, b'{"seccomp": 1}'],
    ids=repr,
)
def test_a_greeting_that_makes_no_sense_is_a_lost_zygote(
    monkeypatch: pytest.MonkeyPatch, greeting: bytes
) -> None:
    command = hostile_zygote.command(greeting)
    monkeypatch.setattr(worker, "COMMAND", [*worker.COMMAND[:-1], command])
    with pytest.raises(ZygoteLostError):
        Sandbox(workers=1)
