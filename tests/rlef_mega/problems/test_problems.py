"""Sampling and our own JSONL: reading, writing, and the errors of wrong lines."""

import json
import math
import time
from collections import Counter

import pytest

from rlef_mega.problems import load_problems, sample
from rlef_mega.problems.jsonl import parse_problem, read_jsonl, to_row
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import (
    CallTest,
    CheckerProgram,
    CheckTest,
    Limits,
    Sandbox,
    Status,
    Test,
    code_check,
)

GOOD = {
    "id": "double",
    "statement": "Read n and print 2n.",
    "public_tests": [{"stdin": "2\n", "expected": "4\n"}],
    "private_tests": [{"stdin": "5\n", "expected": "10\n"}],
}


def numbered(count: int) -> list[Problem]:
    return [Problem(str(n), "", (Test("", ""),), PrivateTests(())) for n in range(count)]


def write(tmp_path, *rows) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("problems, count", [(10, 3), (10, 10), (7, 16), (1, 5)])
def test_sampling_takes_each_problem_once_per_epoch(problems, count):
    series = [p for step in range(3 * problems) for p in sample(numbered(problems), step, count, 0)]
    assert len(series) == 3 * problems * count
    for start in range(0, len(series), problems):
        assert set(Counter(p.id for p in series[start : start + problems]).values()) == {1}


def test_epochs_and_seeds_have_different_orders():
    series = [
        [p.id for p in sample(numbered(50), step, 50, seed)] for seed in (0, 1) for step in (0, 1)
    ]
    assert len({tuple(order) for order in series}) == 4


def test_a_batch_is_a_function_of_its_step_alone():
    problems = numbered(40)
    undisturbed = [sample(problems, step, 16, 3) for step in range(6)]
    assert sample(problems, 5, 16, 3) == undisturbed[5]  # as after a resume


def test_sampling_from_nothing_is_refused():
    with pytest.raises(ValueError, match="no problems"):
        sample([], 0, 4, 0)


def test_jsonl_gives_back_what_was_written(tmp_path):
    tests = (
        CallTest("f", ([1, (2.5, None)], {"a": {1, 2}}), b"\x00"),
        CallTest("g", (), "'\"\n"),
        Test("ä\n", "1\n"),
    )
    problems = [
        Problem("a", "do\nit", tests, PrivateTests(())),
        Problem(
            "b",
            "x",
            (),
            PrivateTests(tests),
            limits=Limits(cpu_s=1.5, wall_s=9.0),
            checker="exact",
            template="mbpp",
            entry_point="f",
            family="functions",
            tags=("easy", "new"),
        ),
        *load_problems("curriculum:valid"),
        *load_problems("humaneval:valid"),
    ]
    assert read_jsonl(write(tmp_path, *map(to_row, problems))) == problems


def test_times_are_multiplied_by_the_factor_of_the_language(tmp_path):
    limits = {"cpu_s": 2, "wall_s": 10, "time_factors": {"python": 2.5}}
    rows = [{**GOOD, "id": name, "language": name, "limits": limits} for name in ("python", "cpp")]
    python, cpp = read_jsonl(write(tmp_path, *rows))
    assert python.limits == Limits(cpu_s=5, wall_s=25) and cpp.limits == Limits(cpu_s=2, wall_s=10)
    assert parse_problem(to_row(python)) == python


@pytest.mark.parametrize("text", ["1" * 5000, "-" + "1" * 5000, f"[{'1' * 5000}, {{'a': (2,)}}]"])
def test_integers_of_more_than_4300_digits_are_read_and_written(tmp_path, text):
    test = {"args": "(5000,)", "expected": text, "entry_point": "f"}
    (problem,) = read_jsonl(write(tmp_path, {**GOOD, "public_tests": [test]}))
    (call,) = problem.public_tests
    found = call.expected[0] if isinstance(call.expected, list) else call.expected
    assert abs(found) == (10**5000 - 1) // 9
    assert parse_problem(to_row(problem)) == problem
    with Sandbox(workers=1) as sandbox:
        program = (
            f"def f(n):\n    ones = (10**n - 1) // 9\n    return {text.replace('1' * 5000, 'ones')}"
        )
        assert sandbox.grade(program, [call])[0].status is Status.OK


def test_integers_of_more_than_50000_digits_are_refused(tmp_path):
    test = {"args": "(1,)", "expected": "1" * 50_001, "entry_point": "f"}
    with pytest.raises(ValueError, match=r"public_tests\[0\].expected"):
        read_jsonl(write(tmp_path, {**GOOD, "public_tests": [test]}))


def test_what_the_format_cannot_hold_is_not_written():
    problem = Problem("a", "x", (CallTest("f", (frozenset({1}),), 1),), PrivateTests(()))
    with pytest.raises(ValueError, match="'a' cannot be written"):
        to_row(problem)


def test_defaults_are_those_of_the_types(tmp_path):
    (problem,) = load_problems(write(tmp_path, GOOD))
    assert problem == Problem(
        "double",
        "Read n and print 2n.",
        (Test("2\n", "4\n"),),
        PrivateTests((Test("5\n", "10\n"),)),
    )


CALL = {"args": "(1,)", "expected": "2"}
WRONG = {
    "malformed": ('{"id": "a", ', "not valid JSON"),
    "truncated": (json.dumps(GOOD)[:-20], "not valid JSON"),
    "a list": ("[1]", "list instead of a JSON object"),
    "no id": ({**GOOD, "id": ""}, "id: empty"),
    "no statement": ({k: v for k, v in GOOD.items() if k != "statement"}, "statement: missing"),
    "statement of another type": ({**GOOD, "statement": 3}, "statement: 3 is not a string"),
    "no tests": ({**GOOD, "public_tests": [], "private_tests": []}, "no tests; give"),
    "tests of another type": ({**GOOD, "public_tests": "2"}, "public_tests: '2' is not a list"),
    "half a test": (
        {**GOOD, "public_tests": [{"stdin": ""}]},
        r"public_tests\[0\]: has the keys stdin",
    ),
    "a number in a test": (
        {**GOOD, "private_tests": [{"stdin": 3, "expected": "4"}]},
        r"private_tests\[0\].stdin: 3 is not a string",
    ),
    "a call to nothing": ({**GOOD, "public_tests": [CALL]}, "entry_point does not say which"),
    "one argument": (
        {**GOOD, "entry_point": "f", "public_tests": [{**CALL, "args": "1"}]},
        r"args: '1' is not a tuple; write one argument as \(x,\)",
    ),
    "code as argument": (
        {**GOOD, "entry_point": "f", "public_tests": [{**CALL, "args": "(exit(),)"}]},
        "not a Python literal",
    ),
    "unknown checker": (
        {**GOOD, "checker": "token"},
        "checker: unknown checker 'token'; known: tokens",
    ),
    "unknown template": (
        {**GOOD, "template": "x"},
        "template: unknown template 'x'; known: codecontests",
    ),
    "unknown language": (
        {**GOOD, "language": "perl"},
        "language: unknown language 'perl'; known: python",
    ),
    "unknown key": ({**GOOD, "test": []}, "test: unknown key; known: id, statement, public_tests"),
    "unknown limit": ({**GOOD, "limits": {"cpu": 1}}, "limits.cpu: unknown key; known: cpu_s"),
    "text as a limit": ({**GOOD, "limits": {"cpu_s": "1"}}, "limits.cpu_s: '1' is not a number"),
    "an unknown language": (
        {**GOOD, "limits": {"time_factors": {"c": 2}}},
        "time_factors.c: unknown",
    ),
    "a factor of 0": ({**GOOD, "limits": {"time_factors": {"python": 0}}}, "limits: .*cpu_s is 0"),
    "a limit out of bounds": ({**GOOD, "limits": {"cpu_s": 0}}, "limits: .*cpu_s"),
    "a lone surrogate": ({**GOOD, "statement": "x \ud83d"}, "statement: not valid text"),
    "a lone surrogate in a test": (
        {**GOOD, "public_tests": [{"stdin": "\ud83d", "expected": ""}]},
        r"public_tests\[0\].stdin: not valid text",
    ),
    "endless time": (
        {**GOOD, "limits": {"cpu_s": 1e18}},
        "limits: .*cpu_s is .*86400",
    ),
    "endless memory": ({**GOOD, "limits": {"memory_bytes": 10**30}}, "limits: Limits.memory_bytes"),
    "an endless product": ({**GOOD, "limits": {"time_factors": {"python": 1e9}}}, "Limits.cpu_s"),
    "infinite time": ({**GOOD, "limits": {"wall_s": math.inf}}, "limits: Limits.wall_s"),
    "half a byte": ({**GOOD, "limits": {"memory_bytes": 1.5e9}}, "memory_bytes: .*whole"),
    "a complex argument": (
        {**GOOD, "entry_point": "f", "public_tests": [{**CALL, "args": "(1j,)"}]},
        "args: a value of type complex cannot be judged",
    ),
    "a prelude that is not a program": ({**GOOD, "prelude": "def ("}, "prelude: is not Python"),
    "tags of numbers": ({**GOOD, "tags": [1]}, "tags: .*strings"),
}


@pytest.mark.parametrize("row, message", WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_named_with_file_line_and_field(tmp_path, row, message):
    first = {**GOOD, "id": "first"}
    path = write(tmp_path, first, "", row)
    with pytest.raises(ValueError, match=rf"problems\.jsonl, line 3: .*{message}"):
        load_problems(path)


NESTED = "".join(f"{' ' * d}try: pass\n{' ' * d}finally:\n" for d in range(19)) + f"{' ' * 19}x\n"
FIELDS = "f'" + "{a}" * 400_000 + "'"
COLLIDING = ", ".join(hex(n * (2**61 - 1)) for n in range(1, 40_000))
CALLED = {**GOOD, "entry_point": "f"}


def a_row(**test: str) -> dict[str, object]:
    return {**CALLED, "private_tests": [test]}


BOMBS = {
    "a check": (a_row(check=NESTED * 20), r"tests\[0\].check: .*nested too deep"),
    "a checker": ({**GOOD, "checker": {"program": NESTED * 20}}, "checker.program: .*too deep"),
    "a prelude": ({**GOOD, "prelude": NESTED * 20}, "prelude: .*nested too deep"),
    "the setup of an assert": (a_row(**{"assert": "assert f(1)"}, setup=NESTED * 20), "too deep"),
    "an assert with a long sum": (a_row(**{"assert": "assert 1" + " + 1" * 2500}), "too deep"),
    "an assert with a long path": (a_row(**{"assert": "assert f" + ".a" * 2000}), "too deep"),
    "an assert with many fields": (a_row(**{"assert": f"assert {FIELDS}"}), "more than 2 s"),
    "a literal with many fields": (a_row(args=f"({FIELDS},)", expected="1"), "not a Python lit"),
    "a set of equal hashes": (a_row(args="(1,)", expected=f"{{{COLLIDING}}}"), "hash like oth"),
    "keys of equal hashes": (
        a_row(args="(1,)", expected=f"{{{COLLIDING.replace(',', ':1,')}:1}}"),
        "hash like others",
    ),
}


@pytest.mark.parametrize("row, message", BOMBS.values(), ids=BOMBS)
@pytest.mark.timing
def test_a_row_that_takes_python_hours_is_refused_within_seconds(
    tmp_path, row, message, monkeypatch
):
    monkeypatch.setattr(code_check, "CPU_S", 2)
    path = write(tmp_path, row)
    began_s = time.process_time()
    with pytest.raises(ValueError, match=rf"problems\.jsonl, line 1: .*{message}"):
        load_problems(path)
    assert time.process_time() - began_s < 5


def test_a_prelude_ends_its_last_line(tmp_path):
    """The program follows it directly."""
    (problem,) = read_jsonl(write(tmp_path, {**GOOD, "prelude": "import math"}))
    assert problem.prelude == "import math\n"


def test_duplicate_ids_name_both_lines(tmp_path):
    with pytest.raises(ValueError, match=r"line 3: id: 'double' is also that of line 1"):
        load_problems(write(tmp_path, GOOD, {**GOOD, "id": "other"}, GOOD))


def test_an_empty_file_and_binary_rubbish_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no problems"):
        load_problems(write(tmp_path, "", " "))
    rubbish = tmp_path / "rubbish.jsonl"
    rubbish.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_problems(str(rubbish))


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "curiculum:train", "codecontests:no.jsonl", ""]
)
def test_an_unknown_source_names_the_known_ones(source):
    with pytest.raises(ValueError, match="curriculum:SPLIT, humaneval:SPLIT"):
        load_problems(source)


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match="no split 'dev'; use one of train, valid, test"):
        load_problems("curriculum:dev")


CHECK = "def check(candidate): assert candidate(2) == 4"
JUDGE = "def check(stdin, expected, actual): return actual == expected"


def test_checks_and_checker_programs_are_read_and_written(tmp_path):
    row = {
        **GOOD,
        "entry_point": "double",
        "private_tests": [{"check": CHECK}],
        "checker": {"program": JUDGE},
        "language": "cpp",
    }
    (problem,) = read_jsonl(write(tmp_path, row))
    assert problem.private_tests.tests == (CheckTest("double", CHECK),)
    assert problem.checker == CheckerProgram(JUDGE)
    assert read_jsonl(write(tmp_path, to_row(problem))) == [problem]
    row["checker"] = {"program": "int main() {}", "language": "cpp"}
    (problem,) = read_jsonl(write(tmp_path, row))
    assert problem.checker == CheckerProgram("int main() {}", language="cpp")
    assert read_jsonl(write(tmp_path, to_row(problem))) == [problem]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"public_tests": [{"check": CHECK, "entry_point": "f"}]}, "move it to private_tests"),
        ({"private_tests": [{"check": CHECK}]}, "entry_point does not say which"),
        ({"private_tests": [{"check": "def", "entry_point": "f"}]}, "is not? ?(valid)? Python"),
        ({"checker": {"program": "def"}}, "checker.program: .* is not? ?(valid)? Python"),
        ({"checker": {"source": ""}}, "checker.source: unknown key"),
        ({"checker": {"program": "x", "language": "c"}}, "language: unknown language 'c'"),
    ],
)
def test_code_that_cannot_judge_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        read_jsonl(write(tmp_path, {**GOOD, **change}))
