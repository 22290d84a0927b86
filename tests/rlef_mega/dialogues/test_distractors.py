"""Random feedback in training: made once, of programs that really fail, alike for the same seed."""

import ast

import pytest

from rlef_mega.config import ConfigError
from rlef_mega.dialogues import distractors
from rlef_mega.dialogues.distractors import POOL, collect_distractors, with_wrong_programs
from rlef_mega.dialogues.judge import EmbeddedGrader, Judge, JudgeError
from rlef_mega.problems import load_problems
from rlef_mega.problems.mutants import mutants
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Limits, Result, Sandbox, Status, Test


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def judge(sandbox) -> Judge:
    return Judge(EmbeddedGrader(sandbox, workers=1))


def double(name: str, *wrong: str, cpu_s: float = 10.0) -> Problem:
    return Problem(
        name,
        "Print 2n.",
        (Test("2\n", "4\n"),),
        PrivateTests((Test("3\n", "6\n"),)),
        limits=Limits(cpu_s=cpu_s),
        wrong_programs=wrong,
    )


def test_only_programs_that_fail_are_used_and_their_outcomes_are_those_of_their_own_tests(
    judge, monkeypatch
):
    monkeypatch.setattr(distractors, "MOST_CPU_S", 0.3)
    problems = [
        double("right", "print(2*int(input()))"),
        double("second", "print(2*int(input()))", "print(5)"),  # the first passes
        double("raises", "print(1/0)"),
        double("slow", "while True: pass"),  # but it may take 10 s
        double("endless", "while True: pass", cpu_s=0.2),
        double("noisy", "print('x'*100000)"),
        double("none"),
    ]
    found = collect_distractors(problems, "own", judge, seed=0)
    statuses = {d.problem_id: d.outcomes[0].result.status for d in found}
    assert statuses == {
        "second": Status.WRONG_ANSWER,
        "raises": Status.RUNTIME_ERROR,
        "endless": Status.TIME_LIMIT,
    }
    assert all([o.test for o in d.outcomes] == [Test("2\n", "4\n")] for d in found)


def test_data_without_wrong_programs_is_refused_with_the_remedy(judge):
    with pytest.raises(ConfigError, match=r"1 of own\.jsonl have any.*wrong_programs=2"):
        with_wrong_programs([double("a"), double("b", "print(1)")], "own.jsonl", 0)
    right = [double(name, "print(2*int(input()))") for name in "ab"]
    with pytest.raises(ConfigError, match=r"of 2 problems of own 0 have .*it passes"):
        collect_distractors(right, "own", judge, seed=0)


class FaultyGrader(EmbeddedGrader):
    """Fails on the first program, and always on `print(3)`."""

    failed = False

    async def grade(self, problem: Problem, program: str) -> list[Result]:
        if not self.failed or program == "print(3)":
            self.failed = True
            raise JudgeError("lost")
        return await super().grade(problem, program)


def test_a_fault_of_the_sandbox_is_tried_again_and_is_no_verdict(sandbox):
    problems = [double("a", "print(1)"), double("b", "print(1)"), double("c", "print(3)")]
    found = collect_distractors(problems, "own", Judge(FaultyGrader(sandbox, workers=1)), seed=0)
    assert {d.problem_id for d in found} == {"a", "b"}


def test_bundled_problems_bring_programs_that_fail(judge):
    for source in ("curriculum:train", "functions:train"):
        problems = load_problems(source)
        chosen = with_wrong_programs(problems, source, 3)
        found = collect_distractors(problems, source, judge, seed=3)
        assert len(found) >= 0.8 * len(chosen) and len(chosen) <= POOL
        assert [p.id for p in chosen] == [p.id for p in with_wrong_programs(problems, source, 3)]
        assert {d.problem_id for d in found} <= {p.id for p in chosen}


def test_a_mutant_differs_in_one_place_and_parses():
    source = "def f(xs):\n n = 0\n for x in xs:\n  if x < 3:\n   n += 2\n return n"
    found = mutants(source, 99)
    original = ast.unparse(ast.parse(source)).splitlines()
    assert len(found) == 6 and len(set(found)) == 6  # 0, <, 3, +, 2, return
    for mutant in found:
        lines = mutant.splitlines()
        assert sum(a != b for a, b in zip(lines, original, strict=True)) == 1
    assert mutants(source, 2) == found[:2]
    assert mutants("def f(): pass", 3) == ()
