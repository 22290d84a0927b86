"""Rows in MBPP's published format: which tests are shown, which decide, what is left out."""

import json

import pytest

from rlef_mega.dialogues import judge, templates
from rlef_mega.problems import load_problems, read_data_set
from rlef_mega.types import AssertTest
from rlef_sandbox import Sandbox, Status

DOUBLE = {  # as in mbpp.jsonl
    "text": "Write a function to double a number.",
    "code": "def helper(n):\r\n\treturn n\r\ndef double(n):\r\n    return 2 * helper(n)",
    "task_id": 11,
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(3)==(6)", "assert double(0) == 0"],
    "challenge_test_list": ["assert double(-5) == -10"],
}
ROOT = {  # as in sanitized-mbpp.json
    "source_file": "x.ipynb",
    "task_id": 601,
    "prompt": "Write a function to find a square root.",
    "code": "def root(x):\n    return x ** 0.5",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(root(2), 1.414, rel_tol=0.001)"],
}
DROPPED = [
    {**DOUBLE, "task_id": 12, "code": "def other(n): pass"},
    {
        **DOUBLE,
        "task_id": 13,
        "code": "class Node: pass\ndef double(n): return 2*n",
        "test_setup_code": "root = Node()",
    },
    {**DOUBLE, "task_id": 14, "test_list": ["assert double(2j) == 4j"]},  # not plain data
    {**DOUBLE, "task_id": 15, "test_list": ["assert double(2) == 5"]},
    {**DOUBLE, "task_id": 16, "test_list": []},
]
TWO_NAMES = "tests do not use exactly one name of the program"
FAILS = "its own solution fails"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mbpp")
    rows = [DOUBLE, ROOT, *DROPPED, {**DOUBLE, "task_id": 17, "test_list": ["double(1)"]}]
    (folder / "mbpp.json").write_text(json.dumps(rows))
    return read_data_set(f"mbpp:{folder}/mbpp.json", folder / "cache")


def test_the_first_test_is_shown_and_all_decide(store):
    double, root = store
    assert [test.statement for test in double.public_tests] == ["assert double(2) == 4"]
    assert len(double.private_tests.tests) == 3  # the challenge among them
    prompt = templates.first_prompt(double.statement, double.template, double.public_tests)
    assert prompt.startswith(
        "Provide a Python solution for the following problem: Write a function to double a number."
        "\nYour code should pass these tests:\nassert double(2) == 4\n"
    )
    assert "double(3)" not in prompt
    assert isinstance(root.public_tests[0], AssertTest) and not root.private_tests.tests


def test_programs_are_graded_by_all_tests(store):
    with Sandbox(workers=1) as sandbox:

        def failed(problem, program) -> str:
            results = sandbox.grade(program, judge.tests_of(problem), stop_at_first_failure=False)
            return "".join("." if result.status is Status.OK else "F" for result in results)

        double, root = store
        assert failed(double, "def double(n): return n + n") == "...."
        assert failed(double, "def double(n): return abs(n + n)") == "...F"
        assert failed(root, "def root(x): return x ** (1 / 2)") == "."
        assert failed(root, "def root(x): return x / 2") == "F"


def test_what_cannot_be_graded_is_counted_and_what_is_malformed_refused(store, tmp_path):
    found = [(drop.location[-7:], drop.reason) for drop in store.drops]
    assert found == [
        ("entry 3", TWO_NAMES),
        ("entry 4", TWO_NAMES),
        ("entry 5", FAILS),
        ("entry 6", FAILS),
        ("entry 7", "no tests"),
        ("entry 8", "malformed"),
    ]
    (tmp_path / "mbpp.json").write_text('{"task_id": 1}')
    with pytest.raises(ValueError, match="dict instead of an array"):
        load_problems(f"mbpp:{tmp_path}/mbpp.json", tmp_path)


def test_options_choose_a_split_and_how_much_is_shown(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (DOUBLE, ROOT)))
    (double,) = load_problems(f"mbpp:{path}?split=test&public_tests=3", tmp_path)
    assert len(double.public_tests) == 3 and len(double.private_tests.tests) == 1
    (root,) = load_problems(f"mbpp:{path}?split=train", tmp_path)
    assert root.id == "Mbpp/601"
    for wrong in ("split=valid", "public_tests=all", "tests=3"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            load_problems(f"mbpp:{path}?{wrong}", tmp_path)
