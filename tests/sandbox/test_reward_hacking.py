"""Passing a test without solving it: nothing that knows the answer is within reach."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from rlef_sandbox import CallTest, Result, Sandbox, Status, Test

Attempt = Callable[[str], Result]

# The expected output is a number that no honest program prints by chance.
ANSWER = 7351980246
ANSWER_SHA256 = hashlib.sha256(str(ANSWER).encode()).hexdigest()

PROGRAMS = {
    "early_exit": "import os; os._exit(0)",
    "exit_zero": "raise SystemExit(0)",
    "search_the_heap": (
        "import gc, re, hashlib\n"
        "for o in [*gc.get_objects(), *globals().values()]:\n"
        "    for number in re.findall(r'\\d{10}', repr(o)[:10**5]):\n"
        f"        if hashlib.sha256(number.encode()).hexdigest() == '{ANSWER_SHA256}':\n"
        "            print(number); raise SystemExit"
    ),
    "search_the_frames": (
        "import sys\n"
        "f = sys._getframe()\n"
        "while f:\n"
        "    for v in list(f.f_locals.values()) + list(f.f_globals.values()):\n"
        "        if getattr(v, 'expected', None): print(v.expected.decode())\n"
        "    f = f.f_back"
    ),
    "search_the_modules": (
        "import sys\n"
        "for m in list(sys.modules.values()):\n"
        "    for v in list(vars(m).values()):\n"
        "        if getattr(v, 'expected', None): print(v.expected)"
    ),
    "import_the_sandbox": "import rlef_sandbox.sandbox as s; print(s)",
    "patched_builtins": (
        "import builtins\n"
        "builtins.print = lambda *a: None\n"
        "builtins.bytes = builtins.str = type('E', (str,), {'__eq__': lambda s, o: True})"
    ),
    "forged_outcome_on_every_descriptor": (
        "import os, struct\n"
        "message = struct.pack('<BBiddQ', 2, 0, 0, 0.0, 0.0, 0)\n"
        "for fd in range(64):\n"
        "    try: os.write(fd, message)\n"
        "    except OSError: pass"
    ),
    "forged_verdict_on_the_output": "print('OK'); print('Status.OK')",
    "rewritten_input": "import os; os.ftruncate(0, 0); os.write(0, b'') ; print('')",
    "output_of_another_length": "print('\\x00' * 10)",
}

CALLS = {
    "equal_to_everything": (
        "class E(int):\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\n"
        "def solve(n): return E(0)"
    ),
    "equal_to_everything_with_a_lying_repr": (
        "class E(str):\n"
        "    def __eq__(self, other): return True\n"
        "    def __repr__(self): return '7351' + '980246'\n"
        "def solve(n): return E()"
    ),
    "true_for_one": "def solve(n): return True",
    "nan": "def solve(n): return float('nan')",
    "infinity": "def solve(n): return float('inf')",
    "own_result_written_early": (
        "import os\ndef solve(n):\n    os.write(3, b'true\\ntrue'); os._exit(0)"
    ),
    "caller_frames": (
        "import sys\n"
        "def solve(n):\n"
        "    f = sys._getframe()\n"
        "    while f:\n"
        "        if 'expected' in f.f_locals: return f.f_locals['expected']\n"
        "        f = f.f_back"
    ),
    "patched_encoder": (
        "import json\njson.dumps = lambda *a, **k: '{\"any\": []}'\ndef solve(n): return 0"
    ),
    "exit_before_the_call": "import os; os._exit(0)",
    "unserialisable": "def solve(n): return object()",
    "colliding_members": "def solve(n): return {i * (2**61 - 1) for i in range(20000)}",
    "deep_value": "def solve(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
}


@pytest.mark.parametrize("source", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("tests", [1, 2])
def test_no_program_passes_without_the_answer(sandbox: Sandbox, source: str, tests: int) -> None:
    test = Test(b"question", str(ANSWER).encode())
    for result in sandbox.grade(source, [test] * tests, stop_at_first_failure=False):
        assert result.status in (Status.WRONG_ANSWER, Status.RUNTIME_ERROR), result


@pytest.mark.parametrize("source", CALLS.values(), ids=CALLS)
def test_no_function_passes_without_the_answer(sandbox: Sandbox, source: str) -> None:
    (result,) = sandbox.grade(source, [CallTest("solve", (1,), ANSWER)])
    assert result.status in (Status.WRONG_ANSWER, Status.RUNTIME_ERROR), result


def test_a_failure_beats_the_right_output(sandbox: Sandbox) -> None:
    (result,) = sandbox.grade("print(input()); exit(1)", [Test(b"1", b"1")])
    assert result.status is Status.RUNTIME_ERROR


def test_nothing_is_left_for_the_next_run(sandbox: Sandbox) -> None:
    leave = (
        "import builtins, sys, os\n"
        "builtins.left = sys.left = 1; os.environ['LEFT'] = '1'; sys.modules['left'] = sys\n"
        "sys.path.append('/left'); sys.setrecursionlimit(99)"
    )
    look = (
        "import builtins, sys, os\n"
        "print(hasattr(builtins, 'left'), hasattr(sys, 'left'), 'LEFT' in os.environ,\n"
        "      'left' in sys.modules, '/left' in sys.path, sys.getrecursionlimit())"
    )
    assert sandbox.run(leave).status is Status.OK
    assert sandbox.run(look).stdout == b"False False False False False 1000\n"


def test_one_test_leaves_nothing_for_the_next(sandbox: Sandbox) -> None:
    source = (
        "import builtins\n"
        "seen = getattr(builtins, 'seen', 0); builtins.seen = seen + 1\n"
        "print(seen)"
    )
    results = sandbox.grade(source, [Test(b"", b"0")] * 3)
    assert [result.status for result in results] == [Status.OK] * 3


def test_the_sandbox_fault_cannot_be_claimed(attempt: Attempt) -> None:
    result = attempt("import os, sys\nprint('child set-up: failed', file=sys.stderr)\nos._exit(1)")
    assert result.status is Status.RUNTIME_ERROR
