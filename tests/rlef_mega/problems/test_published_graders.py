"""Verdicts of the published graders and ours on the same programs.

The published verdicts were obtained by running LiveCodeBench's `check_correctness` (lcb_runner/
evaluation/compute_code_generation_metrics.py at 28fef95) and evalplus' `untrusted_check`
(evalplus/eval/__init__.py at 26d6d00) on these cases, with Python 3.11. Where ours differs, the
case says why; docs/problems.md says it too.
"""

import asyncio
import json
from typing import NamedTuple

import pytest

from rlef_mega.dialogues.judge import EmbeddedGrader, Judge
from rlef_mega.dialogues.programs import Extracted
from rlef_mega.problems import load_problems
from rlef_sandbox import Sandbox


class Case(NamedTuple):
    """A program, and whether the published grader passes it. `why` is set where ours does not
    agree."""

    program: str
    given: str
    expected: str
    passes: bool
    why: str = ""


def method(body: str) -> str:
    return f"class Solution:\n    def f(self, x):\n        return {body}"


LONG = "1" + "0" * 5000
TOLERANT = "floats within 1e-6 are right in all function-call tests"
TUPLES = "a tuple is right where a list is expected, at any depth"
SCRIPT = "we run the program as a script, as contests do"
CALLS = {
    "1 for true": Case(method("1"), "3", "true", True),
    "1.0 for true": Case(method("1.0"), "3", "true", True),
    "true for 1": Case(method("True"), "3", "1", True),
    "2 for true": Case(method("2"), "3", "true", False),
    "none for false": Case(method("None"), "3", "false", False),
    "an integer for a float": Case(method("2"), "3", "2.0", True),
    "a float for an integer": Case(method("2.0"), "3", "2", True),
    "a fraction": Case(
        "from fractions import Fraction\n" + method("Fraction(1, 2)"), "3", "0.5", True
    ),
    "a decimal": Case("from decimal import Decimal\n" + method("Decimal(3)"), "3", "3", True),
    "an enum of text": Case(
        "from enum import Enum\nclass E(str, Enum):\n    A = 'x'\n" + method("E.A"),
        "3",
        '"x"',
        True,
    ),
    "a counter": Case(method("Counter('aab')"), "3", '{"a": 2, "b": 1}', True),
    "a tuple": Case(method("(1, 2)"), "3", "[1, 2]", True),
    "a tuple within": Case(method("[(1, 2)]"), "3", "[[1, 2]]", False, TUPLES),
    "a set": Case(method("{1, 2}"), "3", "[1, 2]", False),
    "a generator": Case(method("(i for i in [1, 2])"), "3", "[1, 2]", False),
    "a deque": Case(method("deque([1, 2])"), "3", "[1, 2]", False),
    "a range": Case(method("range(2)"), "3", "[0, 1]", False),
    "text for a number": Case(method("'3'"), "3", "3", False),
    "a rounding error": Case(method("0.1 + 0.2"), "3", "0.3", False, TOLERANT),
    "not a number": Case(method("nan"), "3", "NaN", False, "NaN is right where it is expected"),
    "an integer of 5,001 digits": Case(method("10 ** x"), "5000", LONG, True),
    "a function without class Solution": Case("def f(x): return x", "3", "3", True),
    "no function": Case("def g(x): return x", "3", "3", False),
    "a method of another name": Case(
        "class Solution:\n    def g(self, x): return x", "3", "3", False
    ),
    "exit in a call": Case(method("sys.exit(0)"), "3", "3", False),
}
PROGRAMS = {
    "exit code 1": Case("print(input())\nsys.exit(1)", "5", "5", True),
    "exit() with a code": Case("print(input())\nexit(3)", "5", "5", True),
    "a raised SystemExit": Case("print(input())\nraise SystemExit('bye')", "5", "5", True),
    "exit in a function": Case(
        "import sys\ndef main():\n    print(input())\n    sys.exit(2)\nmain()", "5", "5", True
    ),
    "exit before the answer": Case("sys.exit(0)\nprint(input())", "5", "5", False),
    "an error after the answer": Case("print(input())\n1 / 0", "5", "5", False),
    "5,001 digits printed": Case("print(10 ** int(input()))", "5000", LONG, True),
    "5,000 digits read": Case("print(str(int(input()))[:3])", "1" * 5000, "111", True),
    "a number in another form": Case("print('1.0')", "5", "1", True),
    "an underscore in a number": Case("print('1_0')", "5", "10", True),
    "infinity": Case("print('Infinity')", "5", "inf", True),
    "another last digit": Case("print('0.333')", "5", "0.3333", False),
    "space around lines": Case("print(' 1 \\n2 ')", "5", "1\n2\n", True),
    "another line break": Case("print(1, 2)", "5", "1\n2", False),
    "a blank line": Case("print('1\\n\\n2')", "5", "1\n2", False),
    "two spaces between words": Case("print('a  b')", "5", "a b", False),
    "two spaces between numbers": Case("print('1  2')", "5", "1 2", True),
    "another case": Case("print('YES')", "5", "Yes", False),
    "main guard at the end": Case(
        "def main():\n    print(input())\nif __name__ == '__main__':\n    main()", "5", "5", True
    ),
    "a global that a function changes": Case(
        "n = 0\ndef f():\n    global n\n    n += 5\nf()\nprint(n)", "5", "5", False, SCRIPT
    ),
    "bytes written": Case("sys.stdout.buffer.write(b'5')", "5", "5", False, SCRIPT),
    "return outside a function": Case("print(5)\nreturn", "5", "5", True, SCRIPT),
}
PLUS = {  # of a function `f`, whose solution returns `expected`
    "1 for True": Case("def f(x): return 1", "0", "True", True),
    "a fraction": Case(
        "from fractions import Fraction\ndef f(x): return Fraction(1, 2)", "0", "0.5", True
    ),
    "an enum of text": Case(
        "from enum import Enum\nclass E(str, Enum):\n    A = 'x'\ndef f(x): return E.A",
        "0",
        "'x'",
        True,
    ),
    "floats in a set": Case("def f(x): return {1.0}", "0", "{1}", True),
    "a frozenset": Case("def f(x): return frozenset({1})", "0", "{1}", True),
    "a tuple for a list": Case("def f(x): return (1, 2)", "0", "[1, 2]", False),
    "a rounding error": Case("def f(x): return 0.1 + 0.2", "0", "0.3", True),
    "a rounding error in a list": Case("def f(x): return [0.1 + 0.2]", "0", "[0.3]", True),
    "a rounding error in a list within": Case(
        "def f(x): return [[0.1 + 0.2]]", "0", "[[0.3]]", False
    ),
    "an integer near a float": Case("def f(x): return 3", "0", "3.0000001", False),
    "an integer of 5,001 digits": Case("def f(x): return 10**5000", "0", "10**5000", True),
    "a long integer off by one": Case("def f(x): return 10**5000 + 1", "0", "10**5000", False),
    "none for an empty list": Case("def f(x): return None", "0", "[]", False),
    "an exit": Case("def f(x): raise SystemExit(0)", "0", "0", False),
    "text that is printed too": Case(
        "def f(x):\n    print(x)\n    return '\U0001f600'", "0", "'\U0001f600'", True
    ),
}


@pytest.fixture(scope="module")
def judge():
    with Sandbox(workers=1) as sandbox:
        yield Judge(EmbeddedGrader(sandbox, workers=1))


def agrees(judge: Judge, source: str, tmp_path, case: Case) -> bool:
    (problem,) = load_problems(source, tmp_path / "cache")
    verdict = asyncio.run(judge.judge(problem, Extracted(case.program), last_turn=True))
    return bool(verdict.solved) is (case.passes is not bool(case.why))


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(pytest.param("functional", case, id=name) for name, case in CALLS.items()),
        *(pytest.param("stdin", case, id=name) for name, case in PROGRAMS.items()),
    ],
)
def test_programs_are_graded_as_livecodebench_does(judge, tmp_path, kind, case):
    test = json.dumps([{"input": case.given, "output": case.expected, "testtype": kind}])
    row = {
        "question_id": "1",
        "question_content": "Do it.",
        "starter_code": "",
        "platform": "leetcode",
        "difficulty": "easy",
        "contest_date": "2024-01-01T00:00:00",
        "metadata": json.dumps({"func_name": "f"} if kind == "functional" else {}),
        "public_test_cases": test,
        "private_test_cases": test,
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    assert agrees(judge, f"livecodebench:{tmp_path}", tmp_path, case)


@pytest.mark.parametrize("case", PLUS.values(), ids=PLUS)
def test_functions_are_graded_as_evalplus_does(judge, tmp_path, case):
    row = {
        "task_id": "HumanEval/900",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": f"    return {case.expected}\n",
        "base_input": [[int(case.given)]],
        "plus_input": [],
        "atol": 0,
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert agrees(judge, f"evalplus:{tmp_path / 'rows.jsonl'}", tmp_path, case)
