"""HumanEval+ and MBPP+ (Liu et al. 2023), from evalplus' files.

The first base inputs become public tests, and all inputs private tests. The files hold inputs and
a canonical solution, but no expected outputs: the solution is run in the sandbox, and its outputs
are stored with the problems. Outputs are compared as evalplus 0.3.1 does, including its special
oracles; the constants below are from its `eval/_special_oracle.py` and `data/mbpp.py`. A private
test checks up to 25 inputs in one run of the program.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlef_mega.problems.asserts import SHOW
from rlef_mega.problems.graded_rows import SOLUTION_FAILS, grade_solution, read_graded
from rlef_mega.problems.literals import MOST_DIGITS, python_literal, to_literal
from rlef_mega.problems.rows import FieldError, Parsed, Read, Row, SourceOptions, expect
from rlef_mega.types import AssertTest, PrivateTests, Problem
from rlef_sandbox import CheckTest, Limits, Sandbox, Status, Test
from rlef_sandbox.values import encode

LIMITS = Limits(cpu_s=10.0)  # RLEF A.2; of each public test and of each private check
REFERENCE_LIMITS = Limits(cpu_s=120.0, memory_bytes=4 << 30, output_bytes=256 << 20)
SHOWN = 16  # base inputs; six tasks of HumanEval have more, up to 105
INPUTS_PER_CHECK = 25
BYTES_PER_CHECK = 1 << 20  # of Python literals; the check holds them as objects
TIME_FACTOR = 4  # over the canonical solution, as evalplus allows for each input

# --- argument types of MBPP that JSON cannot express, by the task's number

Convert = Callable[[list[Any]], list[Any]]


def tuples(value: Any) -> list[tuple[Any, ...]]:
    """Turn the lists in a list into tuples."""
    return [tuple(item) for item in value]


def tuples_within(value: Any) -> Any:
    return tuple(map(tuples_within, value)) if isinstance(value, list) else value


def each(convert: Callable[[Any], Any]) -> Convert:
    return lambda given: [convert(argument) for argument in given]


def at(position: int, convert: Callable[[Any], Any] = tuple) -> Convert:
    return lambda given: [convert(a) if n == position else a for n, a in enumerate(given)]


# 124 and 252 take complex numbers, which the sandbox cannot pass: their solutions fail
CONVERSIONS: tuple[tuple[Convert, str], ...] = (
    (each(tuple), "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740"),
    (each(tuple), "744 809"),
    (each(tuples), "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780"),
    (at(0, tuples), "75 413 444 753"),
    (at(1), "106 750"),
    (at(0, lambda items: [set(item) if item else {} for item in items]), "115"),
    (at(0), "250 405 446 617 720 763 808 307"),
    (each(lambda value: tuple(map(tuple, value))), "259 401 445"),
    (each(lambda value: tuple(tuple(v) if isinstance(v, list) else v for v in value)), "278"),
    (at(0, lambda table: {key: tuple(value) for key, value in table.items()}), "722"),
    (lambda given: list(map(tuples_within, given)), "580 615 791"),
)
CONVERSION_OF = {int(task): convert for convert, tasks in CONVERSIONS for task in tasks.split()}

# --- comparison, in the process that runs the check

NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}
AS_SETS = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}
ORACLES = {  # conditions under which an output is right though it differs from the expected one
    "are_equivalent": "True",
    "sum_div": "out == 0",
    "surface_Area": "abs(out - _surface_area(*given)) <= ATOL",
    "digit_distance_nums": "out == _digit_distance(*given)",
}
PRELUDE = """\
import math


def _surface_area(base, height):
    slant = math.sqrt((base / 2) ** 2 + height**2)
    return round(base**2 + 4 * (base * slant) / 2)


def _digit_distance(one, other):
    one, other = str(one), str(other)
    width = max(len(one), len(other))
    return sum(abs(int(a) - int(b)) for a, b in zip(one.zfill(width), other.zfill(width)))


def _floats(value):
    if isinstance(value, float):
        return True
    return isinstance(value, (list, tuple)) and value and all(isinstance(v, float) for v in value)


def _close(out, expected, atol):
    if isinstance(expected, (list, tuple)):
        return len(out) == len(expected) and all(_close(o, e, atol) for o, e in zip(out, expected))
    return out == expected or abs(out - expected) <= atol + 1e-7 * abs(expected)


def _equal(out, expected):
    if out == expected:
        return True
    atol = ATOL or (1e-6 if _floats(expected) else 0)
    return bool(atol) and type(out) is type(expected) and _close(out, expected, atol)


"""
CHECK = """

def check(candidate):
    inf, nan = math.inf, math.nan
    for given, expected in CASES():
        out = candidate(*given)
        if not (RIGHT):
            raise AssertionError(_show(out) + " != " + _show(expected))
"""


def rule_of(entry_point: str) -> str:
    """Return the condition for a right `out`, an expression of `given` and `expected`."""
    if entry_point == "find_zero":
        return "abs(sum(c * math.pow(out, i) for i, c in enumerate(given[0]))) <= ATOL"
    if entry_point in AS_SETS:
        return "set(out) == set(expected)"
    if entry_point in NOT_NONE:
        return "out == expected if isinstance(out, bool) else expected == (out is not None)"
    if entry_point in ORACLES:
        return f"_equal(out, expected) or ({ORACLES[entry_point]})"
    return "_equal(out, expected)"


class Case(NamedTuple):
    """One input of a task: its arguments, the expected output and the CPU time."""

    given: list[Any]
    expected: Any
    cpu_s: float  # of the canonical solution

    @property
    def literal(self) -> str:
        return to_literal((tuple(self.given), self.expected))


def check_code(entry_point: str, atol: float, cases: Sequence[str]) -> str:
    """Return the code of a `check(candidate)` over these cases, which are literals."""
    code = (
        (PRELUDE + SHOW + CHECK).replace("RIGHT", rule_of(entry_point)).replace("ATOL", repr(atol))
    )
    # a string, evaluated in the sandbox: parsing a literal of this size here would take long
    text = f"[{', '.join(cases)}]"
    return code.replace("CASES()", f"eval({text!r}, dict(inf=inf, nan=nan))")


def checks(entry_point: str, atol: float, cases: Sequence[Case]) -> Iterator[CheckTest]:
    """Yield tests of all cases. One limit holds for a whole test, so its number of inputs, their
    bytes, and the CPU seconds that the canonical solution takes for them are bounded."""
    literals: list[str] = []
    cpu_s = 0.0
    for case in cases:
        literal = case.literal
        if literals and (
            len(literals) == INPUTS_PER_CHECK
            or sum(map(len, literals)) + len(literal) > BYTES_PER_CHECK
            or (cpu_s + case.cpu_s) * TIME_FACTOR > LIMITS.cpu_s
        ):
            yield CheckTest(entry_point, check_code(entry_point, atol, literals))
            literals, cpu_s = [], 0.0
        literals.append(literal)
        cpu_s += case.cpu_s
    yield CheckTest(entry_point, check_code(entry_point, atol, literals))


# --- expected outputs

DRIVER = """

import copy as _copy, math as _math, sys as _sys, time as _time
def _plain(value):
    if isinstance(value, dict): return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        kind = next(k for k in (list, tuple, set) if isinstance(value, k))
        return kind(_plain(v) for v in value)
    return value
def _leaves(value, most):
    if not isinstance(value, (dict, list, tuple, set)) or not value: return 1
    found = 0
    for item in value.values() if isinstance(value, dict) else value:
        found += _leaves(item, most - found)
        if found > most: break
    return found
_sys.set_int_max_str_digits(MOST_DIGITS)
_answers, _sys.stdout = _sys.stdout, _sys.stderr  # the solution may print
for _given in eval(_sys.stdin.read(), dict(inf=_math.inf, nan=_math.nan)):
    _given, _text, _began = _copy.deepcopy(_given), "", _time.process_time()
    _out = ENTRY(*_given)
    _took = _time.process_time() - _began
    try:
        if _leaves(_out, 1 << 19) <= 1 << 19:  # more, at 3 characters each, exceed 1 << 20
            _text = repr(_out is not None if NONE else _plain(_out))
    except ValueError:  # an integer of more digits
        pass
    _out = None  # one of task 255's has 1.2 GB
    print(f"{_took:.4f}", _text if 0 < len(_text) <= 1 << 20 else "...", file=_answers)
"""


class SolutionFailsError(Exception):
    """How the canonical solution fails."""


def answered(
    sandbox: Sandbox, solution: str, entry_point: str, inputs: Sequence[list[Any]]
) -> list[Case]:
    """Run the canonical solution. Returns a case for each input; its expected output is `...` if it
    is too large to store.

    Raises SolutionFailsError if it fails or returns something other than plain data.
    """
    driver = (
        DRIVER.replace("ENTRY", entry_point)
        .replace("NONE", str(entry_point in NOT_NONE))
        .replace("MOST_DIGITS", str(MOST_DIGITS))
    )
    given = to_literal([tuple(arguments) for arguments in inputs])
    (result,) = sandbox.grade(
        solution + driver, [Test(given.encode(), b"")], limits=REFERENCE_LIMITS, checker="exact"
    )
    if result.status not in (Status.OK, Status.WRONG_ANSWER):
        last = result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise SolutionFailsError(f"{result.status} {last[:200]}")
    lines = [line.split(" ", 1) for line in result.stdout.decode().splitlines()]
    try:
        outputs = [(python_literal(text), float(cpu_s)) for cpu_s, text in lines]
        for output, _ in outputs:
            if output is not ...:
                encode(output)
        return [Case(i, *output) for i, output in zip(inputs, outputs, strict=True)]
    except (ValueError, SyntaxError, TypeError) as error:
        raise SolutionFailsError(f"does not return plain data ({error})") from None


# --- rows


def read(files: Sequence[Path], _: SourceOptions, journal: Path) -> Iterator[Read]:
    """Yield the outcome of each task, in order; this runs the canonical solutions."""
    yield from read_graded(files, "task_id", journal, parse)


def parse(row: Row, sandbox: Sandbox) -> Parsed:
    task, prompt = expect(row, "task_id", str), expect(row, "prompt", str)
    entry_point = expect(row, "entry_point", str)
    atol = expect(row, "atol", int | float, 0)
    family, _, number = task.partition("/")
    if family not in ("HumanEval", "Mbpp") or not number.isdigit():
        raise FieldError(f"task_id: {task!r} is neither HumanEval/N nor Mbpp/N")
    is_mbpp = family == "Mbpp"
    base = expect(row, "base_input", list)
    plus = row.get("plus_input") or []  # one task of MBPP+ has an empty object
    convert = CONVERSION_OF.get(int(number)) if is_mbpp else None
    try:
        inputs = [(convert or list)(arguments(given)) for given in (*base, *plus)]
    except (TypeError, ValueError, AttributeError) as error:
        raise FieldError(f"base_input, plus_input: not arguments of this task ({error})") from None
    head = "" if is_mbpp else prompt
    solution = head + expect(row, "canonical_solution", str)
    try:
        every = answered(sandbox, solution, entry_point, inputs)
    except SolutionFailsError as error:
        return None, [(SOLUTION_FAILS, str(error))]
    cases, shown = (
        [c for c in part if c.expected is not ...] for part in (every, every[: len(base)])
    )
    if not cases:
        return None, [("no tests", "all expected outputs are too large")]
    problem = Problem(
        id=f"{task}+",
        statement=mbpp_statement(prompt) if is_mbpp else prompt.strip(),
        public_tests=tuple(shown_test(entry_point, atol, case) for case in shown[:SHOWN]),
        private_tests=PrivateTests(tuple(checks(entry_point, atol, cases))),
        limits=replace(LIMITS, cpu_s=max(LIMITS.cpu_s, *(TIME_FACTOR * c.cpu_s for c in cases))),
        template="mbpp" if is_mbpp else "humaneval",
        entry_point=entry_point,
        family="mbpp+" if is_mbpp else "humaneval+",
    )
    results, failure = grade_solution(problem, solution, sandbox)
    if failure:
        problem = with_memory(problem, REFERENCE_LIMITS.memory_bytes)
        results, failure = grade_solution(problem, solution, sandbox)
    if failure:
        return None, [(SOLUTION_FAILS, failure)]
    # as much again for programs that store more than the canonical solution
    peak_bytes = max(result.max_rss_bytes for result in results)
    problem = with_memory(problem, max(LIMITS.memory_bytes, 2 * peak_bytes))
    if len(cases) == len(every):
        return problem, []
    detail = f"{len(every) - len(cases)} of {len(every)} tests"
    return problem, [("expected outputs too large to write down (the problem is kept)", detail)]


def with_memory(problem: Problem, memory_bytes: int) -> Problem:
    return replace(problem, limits=replace(problem.limits, memory_bytes=memory_bytes))


def arguments(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise TypeError(f"{repr(given)[:80]} is not a list")
    return given


def shown_test(entry_point: str, atol: float, case: Case) -> AssertTest:
    """Return the test of one input, with the assert that states it."""
    call = f"{entry_point}({', '.join(map(to_literal, case.given))})"
    expected = to_literal(case.expected)
    if entry_point in AS_SETS:
        statement = f"assert set({call}) == set({expected})"
    elif entry_point in NOT_NONE:
        statement = f"assert {'' if case.expected else 'not '}{call}"
    else:
        statement = f"assert {call} == {expected}"
    code = check_code(entry_point, atol, [case.literal])
    return AssertTest(entry_point, code, statement=statement)


def mbpp_statement(prompt: str) -> str:
    """Return the docstring without its assert: the template quotes that among the tests."""
    return prompt.strip().strip('"').partition("\nassert ")[0].strip()
