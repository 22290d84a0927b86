"""Tests that are code, and checkers that are programs: each confined in a process of its own."""

from __future__ import annotations

import hashlib
import resource
import time

import pytest

from rlef_sandbox import CheckerProgram, CheckTest, Limits, Sandbox, Status, Test, code_check

SECRET = 8675309124
CHECK = f"""
def check(candidate):
    secret = {SECRET}
    assert candidate(1) == secret + 1
    assert candidate(2) == secret + 2
"""
RIGHT = f"def f(n): return n + {SECRET}"
SHORT = Limits(cpu_s=0.5, wall_s=15)
DIGEST = hashlib.sha256(str(SECRET).encode()).hexdigest()

CHEATS = {
    "equal_to_everything": (
        "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\n"
        "def f(n): return E(0)"
    ),
    "adds_to_anything": ("class E:\n    def __eq__(s, o): return True\ndef f(n): return E()"),
    "frames": (
        "import sys\ndef f(n):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'secret' in frame.f_locals: return frame.f_locals['secret'] + n\n"
        "        frame = frame.f_back"
    ),
    "constants_of_the_check": (
        "import gc, types\ndef f(n):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, types.FunctionType) and o.__name__ == 'check':\n"
        "            return o.__code__.co_consts[1] + n"
    ),
    "leaves_early": "import os\ndef f(n): os._exit(0)",
    "exits_politely": "def f(n): raise SystemExit(0)",
    "leaves_at_import": "raise SystemExit(0)",
    "patches_the_assertion": (
        "import builtins\nbuiltins.AssertionError = Warning\ndef f(n): return 0"
    ),
    "raises_what_a_check_might_expect": "def f(n): raise AssertionError('passed')",
    "forges_a_reply": (
        "import os, struct\ndef f(n):\n"
        "    os.write(4, struct.pack('<Q', 5) + b'=true'); os._exit(0)"
    ),
    "floods_the_check": "import os\ndef f(n):\n    while True: os.write(4, b'\\xff' * 4096)",
    "sends_a_bomb": (
        "import os, struct\ndef f(n):\n    os.write(4, struct.pack('<Q', 2**63)); os._exit(0)"
    ),
    "sends_nonsense": (
        "import os, struct\ndef f(n):\n"
        "    os.write(4, struct.pack('<Q', 9) + b'={\"x\": [}'); return 0"
    ),
    "returns_a_program": "def f(n): return lambda: 0",
    "returns_a_deep_value": (
        "def f(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x"
    ),
    "writes_the_exit_code_of_the_check": "import os\ndef f(n):\n    os.write(3, b'true\\ntrue')",
}


def test_a_right_program_passes(sandbox: Sandbox) -> None:
    (result,) = sandbox.grade(RIGHT, [CheckTest("f", CHECK)])
    assert result.status is Status.OK


def test_a_wrong_program_fails_with_the_assertions_words(sandbox: Sandbox) -> None:
    code = "def check(candidate):\n    got = candidate(1)\n    assert got == 5, f'got {got}'"
    (result,) = sandbox.grade("def f(n): return n", [CheckTest("f", code)])
    assert result.status is Status.WRONG_ANSWER
    assert b"AssertionError: got 1" in result.stderr


@pytest.mark.parametrize("source", CHEATS.values(), ids=CHEATS)
def test_no_cheat_passes_a_check(sandbox: Sandbox, source: str) -> None:
    (result,) = sandbox.grade(source, [CheckTest("f", CHECK)], SHORT)
    assert result.status not in (Status.OK, Status.SANDBOX_ERROR), result
    assert str(SECRET).encode() not in result.stdout


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("def f(n): return 1 / 0", Status.RUNTIME_ERROR),
        ("def f(n):\n    while True: pass", Status.TIME_LIMIT),
        ("def f(n): return [0] * 10**9", Status.MEMORY_LIMIT),
        ("def f(n):", Status.COMPILE_ERROR),
        ("def g(n): return n", Status.RUNTIME_ERROR),
        ("import ctypes\ndef f(n): ctypes.string_at(0)", Status.RUNTIME_ERROR),
        (
            "import ctypes\ndef f(n): ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
            Status.SECURITY_VIOLATION,
        ),
    ],
)
def test_the_programs_end_is_the_verdict(sandbox: Sandbox, source: str, status: Status) -> None:
    limits = Limits(cpu_s=0.5, wall_s=15, memory_bytes=128 << 20)
    (result,) = sandbox.grade(source, [CheckTest("f", CHECK)], limits)
    assert result.status is status, result


def test_a_check_may_call_from_several_threads(sandbox: Sandbox) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def check(f):\n"
        "    with ThreadPoolExecutor(4) as pool:\n"
        "        assert list(pool.map(f, range(50))) == [i * i for i in range(50)]\n"
    )
    [outcome] = sandbox.grade("def f(n): return n * n", [CheckTest("f", code)])
    assert outcome.status is Status.OK, outcome


def test_an_expected_exception_arrives_by_its_name(sandbox: Sandbox) -> None:
    code = (
        "def check(candidate):\n    try: candidate('x')\n    except ValueError as e:\n"
        "        assert 'invalid literal' in str(e)\n    else: assert False"
    )
    (result,) = sandbox.grade("def f(s): return int(s)", [CheckTest("f", code)])
    assert result.status is Status.OK


@pytest.mark.parametrize(
    ("raises", "caught", "then"),
    [
        ("b'\\xff'.decode()", "UnicodeDecodeError", "e.start == 0 and 'invalid start' in str(e)"),
        ("E('neg')", "ValueError", "str(e) == 'neg' and type(e).__name__ == 'E'"),
        ("F(1, 2)", "LookupError", "str(e) == 'own words'"),
        ("__import__('json').loads('{')", "ValueError", "'line 1 column 2' in str(e)"),
        ("__import__('decimal').Decimal('x')", "ArithmeticError", "'Conversion' in str(e)"),
        ("KeyError('x')", "KeyError", "e.args == ('x',) and str(e) == \"'x'\""),
        ("OSError(2, 'no')", "FileNotFoundError", "e.errno == 2 and str(e) == '[Errno 2] no'"),
        ("ExceptionGroup('many', [ValueError(1)])", "Exception", "'many' in str(e)"),
    ],
)
def test_an_exception_arrives_as_its_nearest_builtin_class(
    sandbox: Sandbox, raises: str, caught: str, then: str
) -> None:
    source = (
        "class E(ValueError): pass\n"
        "class F(KeyError):\n    def __str__(self): return 'own words'\n"
        f"def f(n): raise {raises}"
    )
    code = (
        f"def check(f):\n    try: f(1)\n    except {caught} as e: assert {then}, repr(e)\n"
        "    else: assert False"
    )
    (result,) = sandbox.grade(source, [CheckTest("f", code)])
    assert result.status is Status.OK, result


def test_calls_keep_the_programs_state_and_take_keywords(sandbox: Sandbox) -> None:
    source = "seen = []\ndef f(x, *, n=1):\n    seen.append(x)\n    return seen * n"
    code = (
        "def check(candidate):\n    assert candidate('a') == ['a']\n"
        "    assert candidate('b', n=2) == ['a', 'b', 'a', 'b']"
    )
    assert sandbox.grade(source, [CheckTest("f", code)])[0].status is Status.OK


@pytest.mark.parametrize(
    "code",
    [
        "x = 1 / 0",
        "def other(candidate): pass",
        "def check(candidate): candidate(object())",
        "def check(candidate):\n    import numpy\n    assert candidate(1) == 2",
        "def check(candidate):\n    x = helper(3)\n    assert candidate(1) == 2",
        "def check(candidate): candidate(1)\nreturn",
        "def check(candidate): candidate(1)\nbreak",
        "import sys\ndef check(candidate):\n    candidate(1)\n    sys.exit()",
        "import os\ndef check(candidate):\n    candidate(1)\n    os._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef check(f): assert f(1) == 2",
        "async def check(candidate): assert candidate(1) == 2",
        "check = lambda candidate: (yield candidate(1))",
        "def check(candidate): return map(candidate, [1])",
        "def check(candidate): return candidate(1) == 2",
        "check = lambda candidate: candidate(1) == 2",
        "def check(candidate):\n    for n in []: assert candidate(n) == 2",
    ],
    ids=[
        "fails_on_its_own",
        "defines_no_check",
        "calls_with_other_than_plain_data",
        "imports_what_is_not_there",
        "fails_before_it_calls",
        "returns_outside_a_function",
        "breaks_outside_a_loop",
        "exits",
        "exits_at_once",
        "exits_in_place_of_its_failure",
        "is_async",
        "is_a_generator",
        "returns_calls_not_made",
        "returns_its_verdict",
        "is_an_expression",
        "calls_nothing",
    ],
)
def test_a_broken_check_is_not_a_verdict(sandbox: Sandbox, code: str) -> None:
    (result,) = sandbox.grade(RIGHT, [CheckTest("f", code, compiled=False)])
    assert result.status is Status.SANDBOX_ERROR
    assert b"CheckTest is broken" in result.stderr.splitlines()[-1]


TABLE = "table = [[i] for i in range(5_000_000)]"
EXHAUSTED = {
    "memory": f"def check(f):\n    {TABLE}\n    assert f(1) == 1",
    "memory_at_import": f"{TABLE}\ndef check(f): assert f(1) == 1",
    "memory_afterwards": f"def check(f):\n    assert f(1) == 1\n    {TABLE}",
    "time": "def check(f):\n    while True: pass",
    "time_at_import": "while True: pass",
    "time_between_calls": "def check(f):\n    assert f(7) == 7\n    while True: pass",
    "waiting": "import time\ndef check(f):\n    assert f([0.25]) == [0.25]\n    time.sleep(60)",
    "output": "def check(f):\n    while True: print('x' * 999)",
    "stack": (
        "import sys\nsys.setrecursionlimit(10**8)\ndef g(n): return max(0, g(n + 1))\n"
        "def check(f): f(1); g(0)"
    ),
    "endless_calls": "def check(f):\n    while True: f(1)",
    "endless_assertions": "def check(f):\n    while True: assert f(1) == 1",
    "after_right_answers": (
        "def check(f):\n    assert len(f('ab')) == 2 and sorted(f([2, 1])) == [1, 2]\n"
        "    assert isinstance(f(1), int)\n    while True: pass"
    ),
    "a_crash": "import ctypes\ndef check(f): f(1); ctypes.string_at(0)",
}


@pytest.mark.parametrize("code", EXHAUSTED.values(), ids=EXHAUSTED)
def test_a_check_that_exhausts_itself_is_not_a_verdict(sandbox: Sandbox, code: str) -> None:
    limits = Limits(cpu_s=0.3, wall_s=2, memory_bytes=128 << 20, output_bytes=1 << 20)
    (result,) = sandbox.grade("def f(x): return x", [CheckTest("f", code)], limits)
    assert result.status is Status.SANDBOX_ERROR, result
    assert b"CheckTest is broken" in result.stderr


@pytest.mark.parametrize(
    ("returned", "use"),
    [
        ("10**12", "sum(range(got))"),
        ("1e12", "sum(range(int(got)))"),
        ("10**40", "[0] * min(got, 10**9)"),
        ("[0] * 10**6", "[[i] * 99 for i in got]"),
        ("'x' * 10**6", "[x * 999 for x in got]"),
    ],
)
def test_a_check_exhausted_by_what_the_program_returned_is_a_verdict(
    sandbox: Sandbox, returned: str, use: str
) -> None:
    code = f"def check(f):\n    got = f(1)\n    got = {use}\n    assert got == 5"
    limits = Limits(cpu_s=0.5, wall_s=5, memory_bytes=128 << 20)
    (result,) = sandbox.grade(f"def f(n): return {returned}", [CheckTest("f", code)], limits)
    assert result.status in (Status.TIME_LIMIT, Status.MEMORY_LIMIT), result


def test_a_checks_traceback_shows_no_frame_of_ours(sandbox: Sandbox) -> None:
    code = (
        "def check(candidate):\n    try: candidate(1)\n"
        "    except KeyError: assert False, 'it should not raise'"
    )
    (result,) = sandbox.grade("def f(n): raise KeyError(n)", [CheckTest("f", code)])
    assert result.status is Status.WRONG_ANSWER and b"should not raise" in result.stderr
    assert b"exchange.py" not in result.stderr and b"rlef_sandbox" not in result.stderr


@pytest.mark.parametrize(
    "code", ["def check(", "return", "await x", "nonlocal x", "def g(a, a): pass", "-" * 9999 + "1"]
)
def test_code_that_does_not_compile_is_refused_when_made(code: str) -> None:
    with pytest.raises(ValueError, match=r"CheckTest\.code of f is not Python: ."):
        CheckTest("f", code)


@pytest.mark.parametrize(
    "code",
    [
        "async def check(f): assert f(1)",
        "def check(f):\n    assert f(1)\n    yield",
        "def check(f): pass\nif True:\n    async def check(f):\n        yield",
        "class Case:\n    async def check(self, f): assert f(1)",
    ],
)
def test_an_async_or_generator_check_is_refused_when_made(code: str) -> None:
    with pytest.raises(ValueError, match="check that is async or a generator"):
        CheckTest("f", code, "Case.check" if "Case" in code else "check")
    CheckTest("f", f"{code}\ndef check(f): pass\nclass Case:\n    def check(self, f): pass")


@pytest.mark.parametrize(
    "body",
    ["return f(1) == 2", "assert f(1)\n    return True", "return 2 if f(1) else None"],
)
def test_a_check_that_returns_its_verdict_is_refused_when_made(body: str) -> None:
    """It would be ignored, and every program would pass."""
    with pytest.raises(ValueError, match="returns a value, which is ignored; raise Assertion"):
        CheckTest("f", f"def check(f):\n    {body}")
    nothing = "def g(): return 1\n    if f(g()): return\n    with g(): return None"
    CheckTest("f", f"def check(f):\n    {nothing}")
    CheckerProgram(f"def check(stdin, f, actual):\n    {body}")


NESTED = "".join(f"{' ' * d}try: pass\n{' ' * d}finally:\n" for d in range(19)) + f"{' ' * 19}x\n"
BOMBS = {
    "blocks_that_double": NESTED * 20,
    "blocks_that_double_in_an_encoding": "# coding: utf_7\n"
    + (NESTED * 20).replace("finally", "+AGYAaQBuAGEAbABsAHk-"),
    "fields": "f'" + "{a}" * 400_000 + "'",
    "definitions": "def f(): pass\n" * 400_000,
}


@pytest.mark.parametrize("code", BOMBS.values(), ids=BOMBS)
@pytest.mark.timing
def test_code_that_takes_hours_to_compile_is_refused_when_made(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_check, "CPU_S", 2)
    began_s = time.process_time()
    children_began_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for make in (lambda: CheckTest("f", code), lambda: CheckerProgram(code)):
        with pytest.raises(ValueError, match=r"nested too deep|more than 2 s .* to compile"):
            make()
    assert time.process_time() - began_s < 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - children_began_s < 5


def test_long_code_is_compiled_within_its_bounds() -> None:
    CheckTest("f", "def check(f):\n" + "    assert f(1) == 2\n" * 20_000)


def test_a_broken_checker_is_refused_when_made() -> None:
    with pytest.raises(ValueError, match=r"CheckerProgram\.source has a check that is async"):
        CheckerProgram("async def check(stdin, expected, actual): return True")
    with pytest.raises(ValueError, match=r"CheckerProgram\.source is not Python"):
        CheckerProgram("def check(")


ANY_ORDER = CheckerProgram(
    "def check(stdin, expected, actual):\n"
    "    return sorted(expected.split()) == sorted(actual.split())"
)


def test_a_problems_own_checker_decides(sandbox: Sandbox) -> None:
    tests = [Test("", "1 2 3"), Test("", "4 5")]
    results = sandbox.grade("print(3, 1, 2)", tests, checker=ANY_ORDER, stop_at_first_failure=False)
    assert [r.status for r in results] == [Status.OK, Status.WRONG_ANSWER]


def test_a_programs_failure_beats_its_checker(sandbox: Sandbox) -> None:
    (result,) = sandbox.grade("print(1); exit(1)", [Test("", "1")], checker=ANY_ORDER)
    assert result.status is Status.RUNTIME_ERROR


@pytest.mark.parametrize(
    "source",
    [
        "def check(stdin, expected, actual): raise RuntimeError",
        "def check(stdin, expected, actual):\n    while True: pass",
        "def check(stdin, expected, actual): return 'yes'",
        "def check(stdin, expected, actual): return 1",
        "import os; os._exit(0)",
    ],
)
def test_a_broken_checker_is_not_a_verdict(sandbox: Sandbox, source: str) -> None:
    checker = CheckerProgram(source, Limits(cpu_s=0.3, wall_s=15))
    (result,) = sandbox.grade("print(1)", [Test("", "1")], checker=checker)
    assert result.status is Status.SANDBOX_ERROR
    assert b"checker program is broken" in result.stderr


def test_a_checker_cannot_be_reached_from_the_output(sandbox: Sandbox) -> None:
    """What a program prints reaches its checker as bytes, whatever they look like."""
    for output in (r"\xff\xfe", "true", "__import__('os')._exit(0)", "1\\n" * 1000):
        source = f"import sys; sys.stdout.buffer.write(b'''{output}''')"
        (result,) = sandbox.grade(source, [Test("", "1 2")], checker=ANY_ORDER)
        assert result.status is Status.WRONG_ANSWER


def test_a_checker_is_confined(sandbox: Sandbox) -> None:
    checker = CheckerProgram("def check(s, e, a):\n    open('/etc/passwd')\n    return True")
    (result,) = sandbox.grade("print(1)", [Test("", "1")], checker=checker)
    assert result.status is Status.SANDBOX_ERROR
    assert b"FileNotFoundError" in result.stderr or b"PermissionError" in result.stderr


def test_the_answer_is_not_in_the_programs_process(sandbox: Sandbox) -> None:
    """The program searches the whole heap of its process, which serves the calls."""
    source = (
        "import gc, re, hashlib\n"
        "def f(n):\n"
        "    for o in gc.get_objects():\n"
        "        for number in re.findall(r'\\d{10}', repr(o)[:10**5]):\n"
        f"            if hashlib.sha256(number.encode()).hexdigest() == '{DIGEST}':\n"
        "                return int(number) + n\n"
        "    return 0"
    )
    (result,) = sandbox.grade(source, [CheckTest("f", CHECK)])
    assert result.status is Status.WRONG_ANSWER
