"""CodeContests rows in the published column shape (own content)."""

import json

import pytest

from rlef_mega.problems import load_problems
from rlef_mega.problems.codecontests import read_codecontests
from rlef_sandbox import Limits, Test

NONE = {"input": [], "output": []}
ROW = {
    "name": "1_A. Double",
    "description": "Print 2n.",
    "public_tests": {"input": ["2\n"], "output": ["4\n"]},
    "private_tests": {"input": ["3\n"], "output": ["6\n"]},
    "generated_tests": {"input": ["5\n", "7\n"], "output": ["10\n", "14\n"]},
    "solutions": {"language": [3], "solution": ["print(2*int(input()))"]},
    "time_limit": {"seconds": 1, "nanos": 500_000_000},
    "memory_limit_bytes": 256_000_000,
    "input_file": "",
    "output_file": "",
    "source": 2,
    "cf_tags": ["math", ""],
}


def write(tmp_path, *rows) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_private_and_generated_tests_decide_and_public_ones_are_shown(tmp_path):
    (problem,) = load_problems("codecontests:" + write(tmp_path, ROW))
    assert problem.public_tests == (Test("2\n", "4\n"),)
    assert [t.stdin for t in problem.private_tests.tests] == [b"3\n", b"5\n", b"7\n"]
    assert problem.limits == Limits(cpu_s=1.5, memory_bytes=256_000_000)
    assert problem.tags == ("math",)
    assert "solution" not in problem.statement


@pytest.mark.parametrize(
    "given",
    [{"time_limit": None, "memory_limit_bytes": 0}, {"time_limit": {"seconds": 0, "nanos": 0}}],
)
def test_limits_that_are_not_given_are_the_papers(tmp_path, given):
    row = {k: v for k, v in ROW.items() if k != "memory_limit_bytes"} | given
    ((problem,), _) = read_codecontests(write(tmp_path, row))
    assert problem.limits == Limits(cpu_s=10.0, memory_bytes=1 << 30)


def test_problems_that_cannot_be_graded_are_dropped_and_counted(tmp_path):
    empty = dict.fromkeys(("public_tests", "private_tests", "generated_tests"), NONE)
    rows = [
        ROW,
        {**ROW, **empty, "name": "none"},
        {**ROW, **empty, "name": "none either"},
        {**ROW, "name": "file", "input_file": "in.txt"},
        {**ROW, "name": "public only", "private_tests": NONE, "generated_tests": NONE},
    ]
    problems, drops = read_codecontests(write(tmp_path, *rows))
    assert [p.id for p in problems] == ["1_A. Double", "public only"]
    assert list(drops.values()) == [2, 1] and "no tests" in drops


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path):
    empty = dict.fromkeys(("public_tests", "private_tests", "generated_tests"), NONE)
    with pytest.raises(ValueError, match=r"no problem that can be graded.*no tests"):
        load_problems("codecontests:" + write(tmp_path, {**ROW, **empty}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"public_tests": {"input": ["1"], "output": []}}, "public_tests: 1 inputs but 0 outputs"),
        ({"generated_tests": ["1"]}, "generated_tests: .* is no object"),
        ({"private_tests": {"input": [1], "output": ["1"]}}, "private_tests: 1 is no string"),
        ({"name": ""}, "name: empty"),
        ({"time_limit": 3}, "time_limit: 3 is no dict"),
        ({"time_limit": {"seconds": -1}}, "time_limit: .*-1"),
        ({"time_limit": {"seconds": "1"}}, "seconds: '1' is no int"),
    ],
)
def test_a_wrong_row_is_named_with_file_line_and_field(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2: {message}"):
        read_codecontests(write(tmp_path, ROW, {**ROW, "name": "other", **change}))


def test_a_missing_column_is_named(tmp_path):
    row = {k: v for k, v in ROW.items() if k != "generated_tests"}
    with pytest.raises(ValueError, match="line 1: generated_tests: missing"):
        read_codecontests(write(tmp_path, row))
