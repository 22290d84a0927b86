"""The easy functions: splits share no template, no constant answer passes, and JSONL can store
them."""

import itertools

from rlef_mega.dialogues import templates
from rlef_mega.problems import load_problems
from rlef_mega.problems.jsonl import parse_problem, to_row
from rlef_sandbox import Sandbox, Status

PROBLEMS = {split: load_problems(f"functions:{split}") for split in ("train", "valid", "test")}
EVERY = [problem for problems in PROBLEMS.values() for problem in problems]


def test_splits_share_no_kind_of_function():
    kinds = {split: {p.family for p in problems} for split, problems in PROBLEMS.items()}
    for one, other in itertools.combinations(kinds.values(), 2):
        assert one and other and not one & other
    assert len({p.id for p in EVERY}) == len(EVERY) >= 70


def test_returning_the_public_value_fails_a_private_test_of_every_problem():
    for problem in EVERY:
        public, *_ = problem.public_tests
        others = [test.expected for test in problem.private_tests.tests]
        assert any(repr(value) != repr(public.expected) for value in others), problem.id


def test_private_arguments_differ_from_public_ones():
    for problem in EVERY:
        shown = [test.args for test in problem.public_tests]
        assert not any(test.args in shown for test in problem.private_tests.tests), problem.id


def test_the_prompt_names_the_function_and_quotes_only_the_public_test():
    for problem in EVERY:
        prompt = templates.first_prompt(problem.statement, problem.template, problem.public_tests)
        assert f"`{problem.entry_point}(" in prompt
        assert templates.assertion(problem.public_tests[0]) in prompt
        assert not any(templates.assertion(t) in prompt for t in problem.private_tests.tests)


def test_jsonl_can_store_them():
    assert [parse_problem(to_row(problem)) for problem in EVERY] == EVERY


def test_a_right_program_passes_and_the_value_of_a_wrong_one_is_reported():
    problem = next(p for p in EVERY if p.entry_point == "square")
    tests = problem.public_tests + problem.private_tests.tests
    with Sandbox(workers=1) as sandbox:
        for result in sandbox.grade("def square(x): return x * x", tests):
            assert result.status is Status.OK
        (result,) = sandbox.grade("def square(x): return x + x", problem.public_tests)
        assert (result.status, result.returned) == (Status.WRONG_ANSWER, "10")
