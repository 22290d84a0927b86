"""Rows in APPS' and TACO's published formats: both kinds of tests, limits, graded solutions."""

import json

import pytest

from rlef_mega.problems import load_problems, read_data_set
from rlef_sandbox import CallTest, Limits, Test

DOUBLE = {  # APPS; the authors' files name the first column `id`
    "problem_id": 7,
    "question": "Print 2n.",
    "solutions": json.dumps(["print(int(input()) * 2)", "while True: pass # not the shortest"]),
    "input_output": json.dumps({"inputs": ["2\n", ["3", ""]], "outputs": ["4\n", ["6", ""]]}),
    "difficulty": "introductory",
    "url": "https://example.org/7",
    "starter_code": "",
}
COUNT = {  # TACO
    "question": "Count the letters.",
    "solutions": json.dumps(["def count(s): return 0", "def count(s, k=1): return {1: len(s)}"]),
    "input_output": json.dumps(
        {"fn_name": "count", "inputs": [["ab"], [""]], "outputs": [[{"1": 2}], [{"1": 0}]]}
    ),
    "difficulty": "EASY",
    "source": "codewars",
    "url": "https://example.org/count",
    "starter_code": "def count(s):\n\t",
    "time_limit": "1.5 seconds",
    "memory_limit": "256.0 megabytes",
}


def write(tmp_path, *rows) -> str:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_programs_and_functions_are_read_with_their_tests_and_limits(tmp_path):
    path = write(tmp_path, DOUBLE, COUNT)
    double, count = load_problems(f"apps:{path}?time_factor=2", tmp_path)
    assert (double.id, double.family, double.difficulty) == ("apps/7", "apps", "introductory")
    assert double.public_tests == (Test("2\n", "4\n"),)
    assert double.private_tests.tests == (Test("3\n", "6\n"),)
    assert double.limits == Limits(cpu_s=8.0)
    assert (count.id, count.family) == ("https://example.org/count", "codewars")
    assert count.public_tests == (CallTest("Solution.count", ("ab",), {1: 2}),)
    assert count.private_tests.tests == (CallTest("Solution.count", ("",), {1: 0}),)
    assert count.limits == Limits(cpu_s=3.0, memory_bytes=256 << 20)
    assert count.statement.endswith("Complete this code:\n\ndef count(s):\n\t")


def test_options_leave_rows_out(tmp_path):
    path = write(tmp_path, DOUBLE, COUNT, {**COUNT, "url": None, "source": None})
    for options, kept in {
        "difficulties=easy&sources=codewars": ["https://example.org/count"],
        "sources=apps": ["apps/7", "taco/digest"],
        "max_test_bytes=1": [],
    }.items():
        store = read_data_set(f"taco:{path}?{options}", tmp_path)
        assert len(store) == len(kept), options
        assert [p.id for p in store if "taco/" not in p.id] == [n for n in kept if "taco/" not in n]
    with pytest.raises(ValueError, match="time_factor"):
        load_problems(f"taco:{path}?time_factor=0", tmp_path)


def test_a_problem_is_kept_if_one_of_its_shortest_solutions_passes(tmp_path):
    wrong = {**DOUBLE, "problem_id": 8, "solutions": json.dumps(["print(int(input()) ** 2)"])}
    none = {**DOUBLE, "problem_id": 9, "solutions": ""}
    path = write(tmp_path, DOUBLE, wrong, none, COUNT)
    store = read_data_set(f"apps:{path}?graded_solutions=2", tmp_path)
    assert [problem.id for problem in store] == ["apps/7", "apps/9", "https://example.org/count"]
    (drop,) = store.drops
    assert drop.reason == "its own solution fails" and "test 2 of 2: WRONG_ANSWER" in drop.detail
    assert len(read_data_set(f"apps:{path}?graded_solutions=1", tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_output": "{"}, "input_output: not valid JSON"),
        ({"input_output": "[]"}, "input_output: a list instead of an object"),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs but 0 outputs"),
        (
            {"input_output": '{"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}'},
            "not lists of arguments",
        ),
        ({"time_limit": "1000000 seconds"}, "time_limit, memory_limit: Limits.cpu_s is"),
        ({"question": None}, "question: None is not a string"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, change, message):
    path = write(tmp_path, DOUBLE, {**COUNT, **change})
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2: .*{message}"):
        load_problems(f"taco:{path}", tmp_path)
