"""HumanEval+ and MBPP+: expected outputs from canonical solutions, compared as evalplus does."""

import gzip
import json
from pathlib import Path

import pytest

from rlef_mega.dialogues import judge
from rlef_mega.problems import load_problems
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Sandbox, Status

# Published tasks, for checks on machines that have them; nothing else needs them.
PUBLISHED = Path(__file__).parents[4] / "shared/data/HumanEvalPlus-Mini.jsonl.gz"

HALVES = {
    "task_id": "HumanEval/900",
    "prompt": 'def halves(xs):\n    """Half of each."""\n',
    "entry_point": "halves",
    "canonical_solution": "    return [x / 2 for x in xs]\n",
    "base_input": [[[1, 2]], [[]]],
    "plus_input": [[[n]] for n in range(150)],
    "atol": 0,
}
PAIRS = {  # a published number, whose arguments are tuples
    "task_id": "Mbpp/2",
    "prompt": '"""\nFind the shared elements.\nassert similar_elements((1,), (1,)) == (1,)\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[1, 2, 3], [3, 2]]],
    "plus_input": [[[1], [2]]],
    "atol": 0,
}
LARGE = {
    **HALVES,
    "task_id": "HumanEval/901",
    "entry_point": "power",
    "prompt": "def power(n):\n",
    "canonical_solution": "    return 10**n\n",
    "base_input": [[3], [5000]],
    "plus_input": [],
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> list[Problem]:
    folder = tmp_path_factory.mktemp("evalplus")
    file = folder / "tasks.jsonl.gz"
    rows = (HALVES, PAIRS, LARGE)
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    store = load_problems(f"evalplus:{file}", folder / "cache")
    assert [drop.detail for drop in store.drops] == ["1 of 2 tests"]
    return list(store)


def test_the_tests_that_only_decide_are_never_shown(tmp_path):
    """The first base output is too large to write down: the second is shown, and not the first of
    the plus tests in its place."""
    row = {**LARGE, "base_input": [[5000], [3]], "plus_input": [[7]]}
    file = tmp_path / "large.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (problem,) = load_problems(f"evalplus:{file}", tmp_path / "cache")
    assert [test.statement for test in problem.public_tests] == ["assert power(3) == 1000"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atol": "x"}, "atol: 'x' is not a number"),
        ({"base_input": [1, 2]}, "base_input.*1 is not a list"),
    ],
)
def test_a_malformed_task_is_named(tmp_path, change, message):
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({**HALVES, **change}) + "\n")
    with pytest.raises(ValueError, match=message):
        load_problems(f"evalplus:{file}", tmp_path / "cache")


def statuses(problem: Problem, program: str) -> list[Status]:
    with Sandbox(workers=1) as sandbox:
        results = sandbox.grade(
            program, judge.tests_of(problem), limits=problem.limits, stop_at_first_failure=False
        )
    return [result.status for result in results]


def test_base_tests_are_shown_with_expected_outputs_and_all_decide(problems):
    halves, pairs, large = problems
    assert [t.statement for t in halves.public_tests] == [
        "assert halves([1, 2]) == [0.5, 1.0]",
        "assert halves([]) == []",
    ]
    assert len(halves.private_tests.tests) == 2  # 152 inputs, a hundred a check
    (shown,) = pairs.public_tests
    assert shown.statement.startswith("assert set(similar_elements((1, 2, 3), (3, 2))) == set((")
    assert pairs.statement == "Find the shared elements."
    assert [t.statement for t in large.public_tests] == ["assert power(3) == 1000"]


@pytest.mark.parametrize(
    "body, public, private",
    [
        ("[x / 2 for x in xs]", "..", ".."),
        ("[x / 2 + 1e-8 for x in xs]", "..", ".."),  # floats within 1e-6
        ("[x / 2 + 1e-5 for x in xs]", "F.", "FF"),
        ("[x / 2 if x < 120 else 0.0 for x in xs]", "..", ".F"),
        ("tuple(x / 2 for x in xs)", "FF", "FF"),  # evalplus tells tuples from lists
        ("None", "FF", "FF"),
    ],
)
def test_outputs_are_compared_as_evalplus_does(problems, body, public, private):
    found = statuses(problems[0], f"def halves(xs):\n    return {body}\n")
    assert "".join("." if s is Status.OK else "F" for s in found) == public + private


def test_special_oracles_hold(problems):
    program = "def similar_elements(a, b):\n    return [x for x in b if x in a] * 2\n"
    assert set(statuses(problems[1], program)) == {Status.OK}  # as sets
    assert statuses(problems[1], "def similar_elements(a, b):\n    return (1,)\n")[0] is (
        Status.WRONG_ANSWER
    )


def test_the_published_solutions_pass_and_defective_ones_do_not(tmp_path):
    if not PUBLISHED.is_file():
        pytest.skip("../shared/data/HumanEvalPlus-Mini.jsonl.gz is not here")
    lines = gzip.decompress(PUBLISHED.read_bytes()).splitlines()
    chosen = [json.loads(lines[number]) for number in (0, 2, 32, 38, 50)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    for row, problem in zip(chosen, load_problems(f"evalplus:{file}", tmp_path), strict=True):
        assert isinstance(problem.private_tests, PrivateTests)
        found = statuses(problem, row["prompt"] + row["canonical_solution"])
        assert set(found) == {Status.OK}, problem.id
        found = statuses(problem, f"def {row['entry_point']}(*given):\n    return 'no'\n")
        assert Status.OK not in found, problem.id
