"""HumanEval+ and MBPP+ (Liu et al. 2023), from evalplus' files: base tests are shown, all decide.

The files hold inputs and a canonical solution, but no expected outputs. The solution, run in the
sandbox, gives them, and they are stored with the problems. Outputs are compared as evalplus 0.3.1
does, including its special oracles; the constants below are from its `eval/_special_oracle.py` and
`data/mbpp.py`. A private test checks a hundred inputs in one run of the program.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlef_mega.problems.asserts import SHOW
from rlef_mega.problems.jsonl import python_literal
from rlef_mega.problems.mutants import mutants
from rlef_mega.problems.rows import FieldError, Parsed, Read, Row, SourceOptions, expect, read_each
from rlef_mega.types import AssertTest, PrivateTests, Problem
from rlef_sandbox import CheckTest, Limits, Sandbox, Status, Test

LIMITS = Limits(cpu_s=10.0)  # RLEF A.2; of each public test and of each private check
REFERENCE_LIMITS = Limits(cpu_s=120.0, memory_bytes=4 << 30, output_bytes=256 << 20)
SHOWN = 16  # base inputs; six tasks of HumanEval have more, up to 105
INPUTS_A_CHECK = 100

# --- argument types of MBPP that JSON has no form for, by the task's number

Convert = Callable[[list[Any]], list[Any]]


def tuples(depth: int) -> Callable[[Any], Any]:
    """Return a function that turns all lists at nesting depth `depth` into tuples."""
    if depth == 0:
        return tuple
    return lambda value: [tuples(depth - 1)(item) for item in value]


def tuples_within(value: Any) -> Any:
    return tuple(map(tuples_within, value)) if isinstance(value, list) else value


def each(convert: Callable[[Any], Any]) -> Convert:
    return lambda given: [convert(argument) for argument in given]


def at(position: int, convert: Callable[[Any], Any] = tuple) -> Convert:
    return lambda given: [convert(a) if n == position else a for n, a in enumerate(given)]


CONVERSIONS: tuple[tuple[Convert, str], ...] = (
    (each(tuple), "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740"),
    (each(tuple), "744 809"),
    (each(tuples(1)), "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780"),
    (at(0, tuples(1)), "75 413 444 753"),
    (at(1), "106 750"),
    (at(0, lambda items: [set(item) if item else {} for item in items]), "115"),
    (at(0), "250 405 446 617 720 763 808 307"),
    (each(lambda value: tuple(map(tuple, value))), "259 401 445"),
    (each(lambda value: tuple(tuple(v) if isinstance(v, list) else v for v in value)), "278"),
    (at(0, lambda table: {key: tuple(value) for key, value in table.items()}), "722"),
    (lambda given: list(map(tuples_within, given)), "580 615 791"),
)
CONVERSION_OF = {int(task): convert for convert, tasks in CONVERSIONS for task in tasks.split()}
COMPLEX = {124, 252}  # complex numbers do not cross into the sandbox

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


def check_code(entry_point: str, atol: float, cases: Sequence[tuple[list[Any], Any]]) -> str:
    """Return the code of a `check(candidate)` over these inputs and expected outputs."""
    code = (
        (PRELUDE + SHOW + CHECK).replace("RIGHT", rule_of(entry_point)).replace("ATOL", repr(atol))
    )
    text = json.dumps(repr([(tuple(given), expected) for given, expected in cases]))
    # a string, evaluated in the sandbox: parsing a literal of this size here would take long
    cases_of = f"eval({text}, dict(inf=inf, nan=nan))"
    return code.replace("CASES()", cases_of)


# --- expected outputs

DRIVER = """

import copy as _copy, math as _math, sys as _sys
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
for _given in eval(_sys.stdin.read(), dict(inf=_math.inf, nan=_math.nan)):
    _out, _text = ENTRY(*_copy.deepcopy(_given)), ""
    try:
        if _leaves(_out, 1 << 19) <= 1 << 19:  # of 3 characters each, with what parts them
            _text = repr(_out is not None if NONE else _plain(_out))
    except ValueError:  # an integer of more than 4,300 digits
        pass
    _out = None  # one of task 255's has 1.2 GB
    print(_text if 0 < len(_text) <= 1 << 20 else "...")
"""


def expected_outputs(
    sandbox: Sandbox, solution: str, entry_point: str, inputs: Sequence[list[Any]]
) -> list[Any]:
    """Run the canonical solution. Returns its outputs, `...` for each that is too large to store.

    Raises FieldError if it fails or returns something other than plain data.
    """
    driver = DRIVER.replace("ENTRY", entry_point).replace("NONE", str(entry_point in NOT_NONE))
    given = repr([tuple(arguments) for arguments in inputs])
    (result,) = sandbox.grade(
        solution + driver, [Test(given.encode(), b"")], limits=REFERENCE_LIMITS, checker="exact"
    )
    if result.status not in (Status.OK, Status.WRONG_ANSWER):
        last = result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise FieldError(f"canonical_solution: {result.status} {last[:200]}")
    lines = result.stdout.decode().splitlines()
    try:
        outputs = [python_literal(line) for line in lines]
    except (ValueError, SyntaxError) as error:
        raise FieldError(f"canonical_solution: does not return plain data ({error})") from None
    if len(outputs) != len(inputs):
        raise FieldError(f"canonical_solution: {len(outputs)} outputs for {len(inputs)} inputs")
    return outputs


# --- rows


def read(files: Sequence[Path], _: SourceOptions) -> Iterator[Read]:
    """Yield the outcome of each task, in order; this runs the canonical solutions."""
    with Sandbox(workers=1) as sandbox:
        yield from read_each(files, "task_id", lambda row, path: parse(row, sandbox))


def parse(row: Row, sandbox: Sandbox) -> Parsed:
    task, prompt = expect(row, "task_id", str), expect(row, "prompt", str)
    entry_point = expect(row, "entry_point", str)
    atol = expect(row, "atol", int | float, 0)
    family, _, number = task.partition("/")
    if family not in ("HumanEval", "Mbpp") or not number.isdigit():
        raise FieldError(f"task_id: {task!r} is neither HumanEval/N nor Mbpp/N")
    is_mbpp = family == "Mbpp"
    if is_mbpp and int(number) in COMPLEX:
        return None, [("takes complex numbers, which do not cross into the sandbox", "")]
    base = expect(row, "base_input", list)
    plus = row.get("plus_input") or []  # one task of MBPP+ has an empty object
    convert = CONVERSION_OF.get(int(number)) if is_mbpp else None
    try:
        inputs = [(convert or list)(arguments(given)) for given in (*base, *plus)]
    except (TypeError, ValueError, AttributeError) as error:
        raise FieldError(f"base_input, plus_input: not arguments of this task ({error})") from None
    head = "" if is_mbpp else prompt
    solution = head + expect(row, "canonical_solution", str)
    outputs = expected_outputs(sandbox, solution, entry_point, inputs)
    every = list(zip(inputs, outputs, strict=True))
    cases, shown = ([c for c in part if c[1] is not ...] for part in (every, every[: len(base)]))
    if not cases:
        return None, [("no tests", "all expected outputs are too large")]
    problem = Problem(
        id=f"{task}+",
        statement=mbpp_statement(prompt) if is_mbpp else prompt.strip(),
        public_tests=tuple(shown_test(entry_point, atol, case) for case in shown[:SHOWN]),
        private_tests=PrivateTests(
            tuple(
                CheckTest(entry_point, check_code(entry_point, atol, cases[n : n + INPUTS_A_CHECK]))
                for n in range(0, len(cases), INPUTS_A_CHECK)
            )
        ),
        limits=LIMITS,
        template="mbpp" if is_mbpp else "humaneval",
        entry_point=entry_point,
        family="mbpp+" if is_mbpp else "humaneval+",
        wrong_programs=mutants(solution),
    )
    if len(cases) == len(every):
        return problem, []
    detail = f"{len(every) - len(cases)} of {len(every)} tests"
    return problem, [("expected outputs too large to write down (the problem is kept)", detail)]


def arguments(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise TypeError(f"{repr(given)[:80]} is not a list")
    return given


def shown_test(entry_point: str, atol: float, case: tuple[list[Any], Any]) -> AssertTest:
    """Return the test of one input, with the assert that states it."""
    given, expected = case
    call = f"{entry_point}({', '.join(map(repr, given))})"
    if entry_point in AS_SETS:
        statement = f"assert set({call}) == set({expected!r})"
    elif entry_point in NOT_NONE:
        statement = f"assert {'' if expected else 'not '}{call}"
    else:
        statement = f"assert {call} == {expected!r}"
    return AssertTest(entry_point, check_code(entry_point, atol, [case]), statement=statement)


def mbpp_statement(prompt: str) -> str:
    """Return the docstring without its assert: the template quotes that among the tests."""
    return prompt.strip().strip('"').partition("\nassert ")[0].strip()
