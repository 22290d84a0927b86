"""Rows in LiveCodeBench's published format: both kinds of tests, packed tests, filters."""

import asyncio
import base64
import io
import json
import pickle
import zlib

import pytest

from rlef_mega.dialogues.judge import EmbeddedGrader, Judge
from rlef_mega.dialogues.programs import Extracted
from rlef_mega.problems import load_problems, read_data_set
from rlef_mega.problems.jsonl import parse_problem, to_row
from rlef_sandbox import CallTest, Sandbox, Status, Test


def pack(held: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(held))).decode()


def case(given: str, output: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": given, "output": output, "testtype": kind}


DOUBLE = {
    "question_title": "A. Double",
    "question_content": "Print 2n.",
    "platform": "codeforces",
    "question_id": "1_A",
    "contest_id": "1",
    "contest_date": "2023-08-21T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([case("2\n", "4\n")]),
    "private_test_cases": pack(json.dumps([case("3\n", "6\n"), case("0\n", "0\n")])),
    "metadata": "{}",
}
TOTAL = {
    **DOUBLE,
    "question_content": "Return the sum of the numbers and x.",
    "platform": "leetcode",
    "question_id": "3000",
    "contest_date": "2024-09-01T00:00:00",
    "starter_code": "class Solution:\n    def total(self, nums: List[int], x: int) -> int:\n"
    "        ",
    "difficulty": "hard",
    "public_test_cases": json.dumps([case("[1, 2]\n3", "6", "functional")]),
    "private_test_cases": json.dumps([case("[]\n-1\n", "-1", "functional")]),
    "metadata": '{"func_name": "total"}',
}


def write(tmp_path, *rows) -> str:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"livecodebench:{tmp_path}"


def test_programs_and_methods_are_read_with_their_tests(tmp_path):
    double, total = load_problems(write(tmp_path, DOUBLE, TOTAL), tmp_path)
    assert double.public_tests == (Test("2\n", "4\n"),)
    assert double.private_tests.tests == (Test("3\n", "6\n"), Test("0\n", "0\n"))
    assert total.public_tests == (CallTest("Solution.total", ([1, 2], 3), 6),)
    assert total.private_tests.tests == (CallTest("Solution.total", ([], -1), -1),)
    assert total.statement.endswith(TOTAL["starter_code"]) and total.difficulty == "hard"
    assert [parse_problem(to_row(problem)) for problem in (double, total)] == [double, total]


def test_programs_have_the_imports_of_the_benchmarks_grader_and_tracebacks_count_their_own_lines(
    tmp_path,
):
    double, total = load_problems(write(tmp_path, DOUBLE, TOTAL), tmp_path)
    with Sandbox(workers=1) as sandbox:
        judge = Judge(EmbeddedGrader(sandbox, workers=1))

        def verdict(problem, program):
            return asyncio.run(judge.judge(problem, Extracted(program), last_turn=True))

        right = TOTAL["starter_code"] + "return reduce(add, nums, x)"
        assert verdict(total, right).solved
        assert verdict(double, "print(pow(2, 1) * int(input()))").solved
        (outcome,) = verdict(total, TOTAL["starter_code"] + "return 1 / 0").public
        assert outcome.result.status is Status.RUNTIME_ERROR
        assert b'File "solution.py", line 3, in total' in outcome.result.stderr
        (outcome,) = verdict(double, "x =").public
        assert b'File "solution.py", line 1\n' in outcome.result.stderr


class Evil:
    def __reduce__(self):
        return (print, ("never",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"private_test_cases": pack(Evil())}, "a pickle that holds more than text"),
        ({"private_test_cases": pack(["[]"])}, "a pickled list instead of text"),
        ({"private_test_cases": pack("[")}, "not valid JSON"),
        ({"private_test_cases": "no tests"}, "neither JSON nor packed tests"),
        ({"private_test_cases": pack("[]")[:-8] + "AAAAAAAA"}, "neither JSON nor packed tests"),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(b"\x80\x04.")).decode()},
            "damaged pickle|neither",
        ),
        ({"public_test_cases": None}, "a NoneType instead of a list of tests"),
        ({"public_test_cases": json.dumps([case("", "", "file")])}, "neither stdin nor functional"),
        ({"public_test_cases": TOTAL["public_test_cases"]}, "metadata has no func_name"),
        ({"metadata": "{"}, "metadata: not valid JSON"),
        ({"contest_date": "yesterday"}, "contest_date: .*write 2024-08-01"),
    ],
)
def test_a_wrong_row_is_named_and_nothing_of_it_runs(tmp_path, capsys, change, message):
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 2: .*({message})"):
        load_problems(write(tmp_path, TOTAL, {**DOUBLE, **change}), tmp_path)
    assert "never" not in capsys.readouterr().out


def test_protocol_0_and_bytes_unpack_too(tmp_path):
    held = io.BytesIO()
    pickle.Pickler(held, 0).dump(json.dumps([case("3", "6")]))
    old = base64.b64encode(zlib.compress(held.getvalue())).decode()
    new = pack(json.dumps([case("3", "6")]).encode())
    rows = [
        {**DOUBLE, "question_id": n, "private_test_cases": t} for n, t in (("a", old), ("b", new))
    ]
    for problem in load_problems(write(tmp_path, *rows), tmp_path):
        assert problem.private_tests.tests == (Test("3", "6"),)


def test_options_leave_rows_out_and_count_them(tmp_path):
    source = write(tmp_path, DOUBLE, TOTAL, {**DOUBLE, "question_id": "same words"})
    for options, kept in {
        "since=2024-09-01": ["3000"],
        "until=2023-08-21&max_tests=1": ["1_A", "same words"],
        "difficulties=hard,medium": ["3000"],
        "platforms=codeforces,atcoder": ["1_A", "same words"],
    }.items():
        store = read_data_set(f"{source}?{options}", tmp_path)
        assert [problem.id for problem in store] == kept
        assert len(store.drops) == 3 - len(kept)
    assert len(load_problems(f"{source}?max_tests=1", tmp_path)[0].private_tests.tests) == 1
    store = load_problems(f"{source}?max_test_bytes=3", tmp_path)
    assert "2 private tests, of up to 4 bytes" in store.drops[0].detail
    for wrong in ("since=2024", "max_tests=x", "platform=leetcode"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            load_problems(f"{source}?{wrong}", tmp_path)
    with pytest.raises(ValueError, match=r"download test\*\.jsonl"):
        load_problems("livecodebench:nowhere", tmp_path)
