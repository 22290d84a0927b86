"""Our own problem files: JSON Lines, one problem a line.

    {"id": "double", "statement": "Read n and print 2n.",
     "public_tests": [{"stdin": "2\\n", "expected": "4\\n"}],
     "private_tests": [{"stdin": "5\\n", "expected": "10\\n"}]}

Required: `id` (unique in the file), `statement`, and at least one test in `public_tests` (shown to
the model as feedback) or `private_tests` (they decide the reward, and default to none: then the
public tests decide).

A test is either of a program, {"stdin": TEXT, "expected": TEXT}, or of a function, {"args": "([1,
2], 0.3)", "expected": "True"}: Python literals as text, because JSON has no tuples or sets. The
function is the problem's `entry_point`, or the test's own. Or it is an assert statement, {"assert":
"assert f(2) == 4"}, with code to run before it in `setup`. A private test may also be code in the
form of HumanEval's, {"check": "def check(candidate): assert candidate(2) == 4"}.

Optional: `limits` {cpu_s, wall_s, memory_bytes, output_bytes, processes}, `checker` (tokens, exact,
codecontests, livecodebench, unordered_lines, or {"program": "def check(stdin, expected, actual):
..."}, which returns a bool and is given bytes), `language` (python, cpp), `template` (codecontests,
humaneval, mbpp, curriculum), `entry_point`, `prelude` (code that stands before every program),
`family`, `difficulty` and `tags` (breakdowns in reports), `wrong_programs` (known to fail: what
random feedback is made from). Unknown keys are refused.
"""

import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rlef_mega.problems.asserts import assert_test
from rlef_mega.problems.rows import (
    FieldError,
    Read,
    expect,
    malformed,
    read_rows,
    refuse_broken_text,
)
from rlef_mega.types import LANGUAGES, TEMPLATE_NAMES, AssertTest, PrivateTests, Problem
from rlef_sandbox import AnyTest, CallTest, CheckerProgram, CheckTest, Limits, Test
from rlef_sandbox.checkers import checker_named
from rlef_sandbox.values import encode, matches

KEYS = tuple(field.name for field in fields(Problem))
LIMIT_KEYS = tuple(field.name for field in fields(Limits))
DEFAULT_LIMITS = Limits()


def read(path: Path) -> Iterator[Read]:
    """What came of each line."""
    line_of: dict[str, int] = {}
    for place, row in read_rows(path):
        try:
            if isinstance(row, FieldError):
                raise row
            problem = parse_problem(row)
            if problem.id in line_of:
                raise FieldError(
                    f"id: {problem.id!r} is also that of line {line_of[problem.id]}; "
                    "give each problem an id of its own"
                )
        except FieldError as error:
            yield malformed(place, error)
            continue
        line_of[problem.id] = place.number
        yield Read(problem)


def read_jsonl(path: str | Path) -> list[Problem]:
    """All problems of a file. ValueError names file, line, field and remedy."""
    problems: list[Problem] = []
    for outcome in read(Path(path)):
        for drop in outcome.drops:
            raise ValueError(f"{drop.place}: {drop.detail}")
        if outcome.problem is not None:
            problems.append(outcome.problem)
    if not problems:
        raise ValueError(f"{path}: holds no problems; write one JSON object a line")
    return problems


def parse_problem(row: dict[str, Any]) -> Problem:
    refuse_unknown(row, KEYS, "")
    entry_point = expect(row, "entry_point", str, None)
    private = parse_tests(row, "private_tests", entry_point)
    public = []
    for test in parse_tests(row, "public_tests", entry_point):
        if isinstance(test, CheckTest) and not isinstance(test, AssertTest):
            raise FieldError(
                "public_tests: a check has no input and output to show as feedback; "
                "move it to private_tests"
            )
        public.append(test)
    if not (public or private):
        raise FieldError("public_tests, private_tests: no tests; give the problem at least one")
    language = one_of(row, "language", LANGUAGES)
    return Problem(
        id=expect(row, "id", str),
        statement=expect(row, "statement", str),
        public_tests=tuple(public),
        private_tests=PrivateTests(private),
        limits=parse_limits(expect(row, "limits", dict, {})),
        checker=parse_checker(row),
        language=language,
        template=one_of(row, "template", TEMPLATE_NAMES),
        entry_point=entry_point,
        prelude=parse_prelude(expect(row, "prelude", str, ""), language),
        family=expect(row, "family", str, ""),
        difficulty=expect(row, "difficulty", str, ""),
        tags=texts(row, "tags"),
        wrong_programs=texts(row, "wrong_programs"),
    )


def parse_prelude(prelude: str, language: str) -> str:
    """It stands right before the program, so it ends its last line."""
    if language == "python":
        try:
            ast.parse(prelude)
        except (SyntaxError, ValueError) as error:
            raise FieldError(f"prelude: no Python ({error})") from None
    return prelude + "\n" if prelude and not prelude.endswith("\n") else prelude


def texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    values = expect(row, key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise FieldError(f"{key}: {values!r} holds something else than strings")
    return tuple(values)


def known(row: dict[str, Any], key: str, default: str, look_up: Any) -> str:
    """A name that must be known to `look_up`."""
    name = expect(row, key, str, default)
    try:
        look_up(name)
    except ValueError as error:
        raise FieldError(f"{key}: {error}") from None
    return name


def parse_checker(row: dict[str, Any]) -> str | CheckerProgram:
    checker = row.get("checker")
    if not isinstance(checker, dict):
        return known(row, "checker", "tokens", checker_named)
    refuse_unknown(checker, ("program",), "checker.")
    try:
        return CheckerProgram(expect(checker, "program", str))
    except ValueError as error:
        raise FieldError(f"checker.program: {error}") from None


def one_of(row: dict[str, Any], key: str, names: tuple[str, ...]) -> str:
    """Return the row's name, by default the first known one."""
    name = expect(row, key, str, names[0])
    if name not in names:
        raise FieldError(f"{key}: unknown {key} {name!r}; known: {', '.join(names)}")
    return name


def refuse_unknown(row: dict[str, Any], keys: Iterable[str], place: str) -> None:
    unknown = sorted(set(row) - set(keys))
    if unknown:
        raise FieldError(f"{place}{unknown[0]}: unknown key; known: {', '.join(keys)}")


def parse_limits(row: dict[str, Any]) -> Limits:
    refuse_unknown(row, LIMIT_KEYS, "limits.")
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FieldError(f"limits.{key}: {value!r} is no number")
        if not key.endswith("_s") and not isinstance(value, int):
            raise FieldError(f"limits.{key}: {value!r} is no whole number")
    try:
        return Limits(**row)
    except ValueError as error:
        raise FieldError(f"limits: {error}") from None


def parse_tests(row: dict[str, Any], key: str, entry_point: str | None) -> tuple[AnyTest, ...]:
    tests = expect(row, key, list, [])
    return tuple(
        parse_test(test, f"{key}[{place}]", entry_point) for place, test in enumerate(tests)
    )


def parse_test(test: Any, place: str, entry_point: str | None) -> AnyTest:
    if not isinstance(test, dict):
        raise FieldError(f"{place}: {test!r} is no object; write stdin or args, and expected")
    for key, value in test.items():
        if not isinstance(value, str):
            raise FieldError(f"{place}.{key}: {value!r} is no string")
        refuse_broken_text(value, f"{place}.{key}")
    if set(test) == {"stdin", "expected"}:
        return Test(test["stdin"], test["expected"])
    if set(test) - {"entry_point"} in ({"check"}, {"assert"}, {"assert", "setup"}, CARRIED_OUT):
        return parse_check(test, place, called(test, place, entry_point))
    if not {"args", "expected"} <= set(test) <= {"args", "expected", "entry_point"}:
        raise FieldError(
            f"{place}: has the keys {', '.join(sorted(test)) or 'none'}; "
            "a test has stdin and expected, args and expected, assert, or check (and entry_point)"
        )
    name = called(test, place, entry_point)
    args = literal(test["args"], f"{place}.args")
    if not isinstance(args, tuple):
        raise FieldError(f"{place}.args: {test['args']!r} is no tuple; write one argument as (x,)")
    expected = literal(test["expected"], f"{place}.expected")
    for key, value in (("args", args), ("expected", expected)):
        try:
            encode(value)
        except (TypeError, ValueError) as error:
            raise FieldError(f"{place}.{key}: {error}") from None
    return CallTest(name, args, expected)


CARRIED_OUT = {"assert", "check"}  # an assert whose code is not to be had from its text


def parse_check(test: dict[str, str], place: str, entry_point: str) -> CheckTest:
    try:
        if "assert" not in test:
            return CheckTest(entry_point, test["check"])
        if "check" in test:
            return AssertTest(entry_point, test["check"], statement=test["assert"])
        return assert_test(test["assert"], entry_point, test.get("setup", ""))
    except ValueError as error:
        raise FieldError(f"{place}.{'assert' if 'assert' in test else 'check'}: {error}") from None


def called(test: dict[str, str], place: str, entry_point: str | None) -> str:
    name = test.get("entry_point", entry_point)
    if not name:
        raise FieldError(f"{place}: calls a function, but entry_point does not say which")
    return name


def literal(text: str, place: str) -> Any:
    try:
        return python_literal(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise FieldError(f"{place}: {text[:80]!r} is no Python literal") from None


def python_literal(text: str) -> Any:
    """`ast.literal_eval`, with inf and nan as `repr` writes them. ValueError, SyntaxError."""
    if "inf" not in text and "nan" not in text:
        return ast.literal_eval(text)
    return ast.literal_eval(NotFinite().visit(ast.parse(text.strip(), mode="eval")))


class NotFinite(ast.NodeTransformer):
    """The names inf and nan to the floats."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def write_jsonl(problems: Iterable[Problem], path: str | Path) -> None:
    """Write what `read_jsonl` reads back to equal problems. ValueError where the format cannot hold
    one.
    """
    rows = [json.dumps(to_row(problem), ensure_ascii=False) for problem in problems]
    Path(path).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def to_row(problem: Problem) -> dict[str, Any]:
    """Optional keys that hold their defaults are left out."""
    row: dict[str, Any] = {"id": problem.id, "statement": problem.statement}
    try:
        row["public_tests"] = [to_test(test) for test in problem.public_tests]
        row["private_tests"] = [to_test(test) for test in problem.private_tests.tests]
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r} cannot be written as JSONL: {error}") from None
    limits = asdict(problem.limits)
    changed = {k: v for k, v in limits.items() if v != getattr(DEFAULT_LIMITS, k)}
    if changed:
        row["limits"] = changed
    for field in fields(Problem):
        value = getattr(problem, field.name)
        if field.name not in row and field.name != "limits" and value != field.default:
            row[field.name] = plain(value)
    return row


def plain(value: object) -> object:
    if isinstance(value, CheckerProgram):
        return {"program": value.source}
    return list(value) if isinstance(value, tuple) else value


def to_test(test: AnyTest) -> dict[str, str]:
    if isinstance(test, Test):
        return {"stdin": test.stdin.decode(), "expected": test.expected.decode()}
    if isinstance(test, AssertTest):
        return {"entry_point": test.entry_point, "assert": test.statement, "check": test.code}
    if isinstance(test, CheckTest):
        return {"entry_point": test.entry_point, "check": test.code}
    row = {"args": repr(test.args), "expected": repr(test.expected)}
    for text, value in ((row["args"], test.args), (row["expected"], test.expected)):
        again = python_literal(text)
        # NaN equals nothing; `matches` is told that it does
        if again != value and not matches(value, encode(again)):
            raise ValueError(f"{test!r} is not a Python literal")
    return {"entry_point": test.entry_point, **row}
