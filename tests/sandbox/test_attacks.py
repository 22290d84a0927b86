"""Every attack of the suite, tried with all layers of this machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_sandbox import CallTest, Sandbox, Status, Test
from tests.sandbox.attacks import naive_grader
from tests.sandbox.attacks.attack import Attack
from tests.sandbox.attacks.hacking import BEATS_A_NAIVE_GRADER, FUNCTIONS, HACKS, PROGRAMS
from tests.sandbox.attacks.suite import ATTACKS, X86
from tests.sandbox.attacks.table import page
from tests.sandbox.attacks.worlds import attempt, is_stopped, layers_reported

PAGE = Path(__file__).parents[2] / "sandbox" / "ATTACKS.md"


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    if request.param.partition(".")[0] in X86 and platform.machine() != "x86_64":
        pytest.skip("calls x86-64 system-call numbers")
    return ATTACKS[request.param]


def test_an_attack_is_stopped(sandbox: Sandbox, attack: Attack) -> None:
    if not is_stopped(attack, layers_reported(sandbox.isolation)):
        pytest.skip(f"this machine has none of {', '.join(attack.stopped_by)}")
    end = attempt(sandbox, attack)
    assert end["held"], end
    (after,) = sandbox.grade("print(input())", [Test(b"alive", b"alive")])
    assert after.status is Status.OK


@pytest.mark.parametrize("attack", HACKS, ids=lambda attack: attack.name)
def test_no_hack_passes_one_of_several_tests(sandbox: Sandbox, attack: Attack) -> None:
    assert attack.test is not None
    tests = [attack.test] * 2
    for result in sandbox.grade(attack.source, tests, attack.limits, stop_at_first_failure=False):
        assert result.status in attack.statuses, result


@pytest.mark.parametrize("name", BEATS_A_NAIVE_GRADER)
def test_a_hack_fools_a_naive_grader(name: str) -> None:
    kind = "function" if name in {attack.name for attack in FUNCTIONS} else "program"
    (source,) = [attack.source for attack in HACKS if attack.name == name]
    command = [sys.executable, naive_grader.__file__, kind]
    verdict = subprocess.run(command, input=source, text=True, capture_output=True, timeout=60)
    assert verdict.stdout.strip().endswith("PASS"), verdict


@pytest.mark.parametrize(
    "source",
    ["print('7351980246')", "print(open(0).read() and 7351 * 10**6 + 980246)"],
)
def test_an_honest_program_passes_where_hacks_fail(sandbox: Sandbox, source: str) -> None:
    assert isinstance(PROGRAMS[0].test, Test)
    assert sandbox.grade(source, [PROGRAMS[0].test])[0].status is Status.OK


def test_an_honest_function_passes_where_hacks_fail(sandbox: Sandbox) -> None:
    assert isinstance(FUNCTIONS[0].test, CallTest)
    source = "def solve(n): return 7351 * 10**6 + 980246"
    assert sandbox.grade(source, [FUNCTIONS[0].test])[0].status is Status.OK


def test_the_page_of_attacks_is_made_from_the_table() -> None:
    assert PAGE.read_text() == page()
