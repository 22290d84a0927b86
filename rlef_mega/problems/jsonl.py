"""Our own problem files: JSON Lines, one problem per line.

    {"id": "double", "statement": "Read n and print 2n.",
     "public_tests": [{"stdin": "2\\n", "expected": "4\\n"}],
     "private_tests": [{"stdin": "5\\n", "expected": "10\\n"}]}

Required: `id` (unique in the file), `statement`, and at least one test in `public_tests` (shown to
the model as feedback) or `private_tests` (they decide the reward; without them the public tests
do).

A test is one of:

    {"stdin": TEXT, "expected": TEXT}                   of a program
    {"args": "([1, 2], 0.3)", "expected": "True"}       of a function, in Python literals, because
                                                        JSON has no tuples or sets
    {"assert": "assert f(2) == 4", "setup": CODE}       an assert; `setup` runs before it
    {"check": "def check(candidate): ..."}              code as in HumanEval, which raises if the
                                                        program is wrong; private tests only

The function is the problem's `entry_point`, or the test's own.

Optional: `limits` {cpu_s, wall_s, memory_bytes, output_bytes, processes, time_factors}, where
"time_factors": {"python": 3} multiplies the times of problems in that language; `checker` (tokens,
exact, codecontests, livecodebench, livecodebench_floats, unordered_lines, or {"program": "def
check(stdin, expected, actual): ..."}, which gets bytes and returns a bool, or {"program": CODE,
"language": "cpp"}, a checker in the style of testlib), `language` (python; cpp for gnu++17; cpp11,
cpp14, cpp17, cpp20, cpp23), `template` (codecontests, humaneval, mbpp, functions, curriculum),
`entry_point`, `prelude` (code put before every program), `family`, `difficulty` and `tags`
(breakdowns in reports). Unknown keys are refused.
"""

from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rlef_mega.problems.asserts import assert_test
from rlef_mega.problems.literals import python_literal, to_literal
from rlef_mega.problems.rows import (
    FieldError,
    Row,
    expect,
    expect_strings,
    read_rows,
    refuse_broken_text,
    unless_too_deep,
)
from rlef_mega.types import LANGUAGES, TEMPLATE_NAMES, AssertTest, PrivateTests, Problem
from rlef_sandbox import AnyTest, CallTest, CheckerProgram, CheckTest, Limits, Test
from rlef_sandbox.checkers import CHECKERS
from rlef_sandbox.code_check import fault_of
from rlef_sandbox.values import encode, matches

KEYS = tuple(field.name for field in fields(Problem))
LIMIT_KEYS = tuple(field.name for field in fields(Limits))
DEFAULT_LIMITS = Limits()


def read_jsonl(path: str | Path) -> list[Problem]:
    """Read all problems of a file. Raises ValueError with file, line, field and remedy."""
    problems: dict[str, Problem] = {}
    line_of: dict[str, str] = {}
    for location, row in read_rows(Path(path)):
        try:
            problem = unless_too_deep(parse_problem, row)
            if problem.id in problems:
                raise FieldError(
                    f"id: {problem.id!r} is also that of {line_of[problem.id]}; "
                    "give each problem an id of its own"
                )
        except FieldError as error:
            raise ValueError(f"{location}: {error}") from None
        problems[problem.id] = problem
        line_of[problem.id] = location.rpartition(", ")[2]
    if not problems:
        raise ValueError(f"{path}: holds no problems; write one JSON object per line")
    return list(problems.values())


def parse_problem(row: Row, *, compiled: bool = True) -> Problem:
    """Return the problem of a row. Raises FieldError with the field and the remedy. The code of a
    row that was read before need not be `compiled` again.
    """
    refuse_unknown(row, KEYS, "")
    entry_point = expect(row, "entry_point", str, None)
    private = parse_tests(row, "private_tests", entry_point, compiled)
    public = []
    for test in parse_tests(row, "public_tests", entry_point, compiled):
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
        limits=parse_limits(expect(row, "limits", dict, {}), language),
        checker=parse_checker(row, compiled),
        language=language,
        template=one_of(row, "template", TEMPLATE_NAMES),
        entry_point=entry_point,
        prelude=parse_prelude(expect(row, "prelude", str, ""), language, compiled),
        family=expect(row, "family", str, ""),
        difficulty=expect(row, "difficulty", str, ""),
        tags=expect_strings(row, "tags"),
    )


def parse_prelude(prelude: str, language: str, compiled: bool) -> str:
    """Return the prelude, with its last line ended: the program follows it directly."""
    if compiled and language == "python" and (fault := fault_of(prelude.encode())):
        raise FieldError(f"prelude: {fault}")
    return prelude + "\n" if prelude and not prelude.endswith("\n") else prelude


def parse_checker(row: Row, compiled: bool) -> str | CheckerProgram:
    checker = row.get("checker")
    if not isinstance(checker, dict):
        return one_of(row, "checker", tuple(CHECKERS))
    refuse_unknown(checker, ("program", "language"), "checker.")
    try:
        source, language = expect(checker, "program", str), one_of(checker, "language", LANGUAGES)
        return CheckerProgram(source, language=language, compiled=compiled)
    except ValueError as error:
        raise FieldError(f"checker.program: {error}") from None


def one_of(row: Row, key: str, names: tuple[str, ...]) -> str:
    """Return `row[key]`, by default names[0]. Raises FieldError if it is none of `names`."""
    name = expect(row, key, str, names[0])
    if name not in names:
        raise FieldError(f"{key}: unknown {key} {name!r}; known: {', '.join(names)}")
    return name


def refuse_unknown(row: Row, keys: Iterable[str], section: str) -> None:
    unknown = sorted(set(row) - set(keys))
    if unknown:
        raise FieldError(f"{section}{unknown[0]}: unknown key; known: {', '.join(keys)}")


def parse_limits(row: Row, language: str) -> Limits:
    """Return the limits, with the time multiplied by the factor of the problem's language."""
    refuse_unknown(row, (*LIMIT_KEYS, "time_factors"), "limits.")
    factors = expect(row, "time_factors", dict, {})
    refuse_unknown(factors, LANGUAGES, "limits.time_factors.")
    bounds = {key: value for key, value in row.items() if key != "time_factors"}
    for key, value in (*bounds.items(), *factors.items()):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FieldError(f"limits.{key}: {value!r} is not a number")
        if key in LIMIT_KEYS and not key.endswith("_s") and not isinstance(value, int):
            raise FieldError(f"limits.{key}: {value!r} is not a whole number")
    factor = factors.get(language, 1.0)
    try:
        limits = Limits(**bounds)
        wall_s = limits.wall_s and limits.wall_s * factor
        return replace(limits, cpu_s=limits.cpu_s * factor, wall_s=wall_s)
    except (ValueError, OverflowError) as error:
        raise FieldError(f"limits: {error}") from None


def parse_tests(row: Row, key: str, entry_point: str | None, compiled: bool) -> tuple[AnyTest, ...]:
    tests = enumerate(expect(row, key, list, []))
    return tuple(parse_test(test, f"{key}[{n}]", entry_point, compiled) for n, test in tests)


def parse_test(test: Any, name: str, entry_point: str | None, compiled: bool) -> AnyTest:
    """Return a test; errors call it `name`, such as public_tests[0]."""
    if not isinstance(test, dict):
        raise FieldError(f"{name}: {test!r} is not an object; write stdin or args, and expected")
    for key, value in test.items():
        if not isinstance(value, str):
            raise FieldError(f"{name}.{key}: {value!r} is not a string")
        refuse_broken_text(value, f"{name}.{key}")
    if set(test) == {"stdin", "expected"}:
        return Test(test["stdin"], test["expected"])
    kind = next((kind for kind in CALL_FORMS if set(test) - {"entry_point"} == kind), None)
    if kind is None:
        raise FieldError(
            f"{name}: has the keys {', '.join(sorted(test)) or 'none'}; "
            "a test has stdin and expected, args and expected, assert, or check (and entry_point)"
        )
    called = test.get("entry_point", entry_point)
    if not called:
        raise FieldError(f"{name}: calls a function, but entry_point does not say which")
    if "args" not in kind:
        return parse_check(test, name, called, compiled)
    args, expected = (literal(test[key], f"{name}.{key}") for key in ("args", "expected"))
    if not isinstance(args, tuple):
        raise FieldError(
            f"{name}.args: {test['args'][:80]!r} is not a tuple; write one argument as (x,)"
        )
    return CallTest(called, args, expected)


# keys of a test that calls a function; the last: an assert with its code, as `to_test` writes it
CALL_FORMS = ({"args", "expected"}, {"check"}, {"assert"}, {"assert", "setup"}, {"assert", "check"})


def parse_check(test: dict[str, str], name: str, entry_point: str, compiled: bool) -> CheckTest:
    try:
        if "assert" not in test:
            return CheckTest(entry_point, test["check"], compiled=compiled)
        if "check" in test:
            return AssertTest(
                entry_point, test["check"], compiled=compiled, statement=test["assert"]
            )
        return assert_test(test["assert"], entry_point, test.get("setup", ""))
    except ValueError as error:
        raise FieldError(f"{name}.{'assert' if 'assert' in test else 'check'}: {error}") from None


def literal(text: str, name: str) -> Any:
    try:
        value = python_literal(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise FieldError(f"{name}: {text[:80]!r} is not a Python literal ({error})") from None
    try:
        encode(value)
    except (TypeError, ValueError) as error:
        raise FieldError(f"{name}: {error}") from None
    return value


def to_row(problem: Problem) -> Row:
    """Return the JSONL row of a problem, which `parse_problem` turns back into an equal problem.

    Keys that have their default values are left out. Raises ValueError if the format has no form
    for one of the tests.
    """
    row: Row = {"id": problem.id, "statement": problem.statement}
    try:
        row["public_tests"] = [to_test(test) for test in problem.public_tests]
        row["private_tests"] = [to_test(test) for test in problem.private_tests.tests]
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r} cannot be written as JSONL: {error}") from None
    for field in fields(Problem):
        value = getattr(problem, field.name)
        if field.name not in row and value not in (field.default, DEFAULT_LIMITS):
            row[field.name] = plain(value)
    return row


def plain(value: object) -> object:
    if isinstance(value, CheckerProgram):
        is_python = value.language == LANGUAGES[0]
        return {"program": value.source, **({} if is_python else {"language": value.language})}
    if isinstance(value, Limits):
        return {k: v for k, v in asdict(value).items() if v != getattr(DEFAULT_LIMITS, k)}
    return list(value) if isinstance(value, tuple) else value


def to_test(test: AnyTest) -> dict[str, str]:
    if isinstance(test, Test):
        return {"stdin": test.stdin.decode(), "expected": test.expected.decode()}
    if isinstance(test, AssertTest):
        return {"entry_point": test.entry_point, "assert": test.statement, "check": test.code}
    if isinstance(test, CheckTest):
        return {"entry_point": test.entry_point, "check": test.code}
    row = {"args": to_literal(test.args), "expected": to_literal(test.expected)}
    for text, value in ((row["args"], test.args), (row["expected"], test.expected)):
        again = python_literal(text)
        # `==` fails for NaN, `matches` does not
        if again != value and not matches(value, encode(again)):
            raise ValueError(f"{test!r} is not a Python literal")
    return {"entry_point": test.entry_point, **row}
