"""Attempts to pass a test that is itself code (CheckTest, CheckerProgram), or to evade its verdict.

The code of a CheckTest runs in a process of its own and calls the program across a socket, so the
program may send anything, to code that does not expect it.
"""

from __future__ import annotations

import pytest

from rlef_sandbox import CheckerProgram, CheckTest, Limits, Sandbox, Status, Test

LIMITS = Limits(cpu_s=4.0, wall_s=8.0, memory_bytes=256 << 20, output_bytes=1 << 20)
FAILED = (
    Status.WRONG_ANSWER,
    Status.RUNTIME_ERROR,
    Status.MEMORY_LIMIT,
    Status.TIME_LIMIT,
    Status.IDLE_LIMIT,
    Status.OUTPUT_LIMIT,
    Status.SECURITY_VIOLATION,
)
SECRET = 7351980246

# Ways in which tests are written. All of them want f(1) == SECRET.
CHECKS = {
    "assertion": f"def check(candidate):\n    assert candidate(1) == {SECRET}",
    "message": (
        "def check(candidate):\n"
        f"    got = candidate(1)\n    assert got == {SECRET}, f'{{got!r}} is wrong'"
    ),
    "map": (
        "def check(candidate):\n"
        f"    assert all(map(lambda pair: candidate(pair[0]) == pair[1], [(1, {SECRET})]))"
    ),
    "loop_over_map": (
        f"def check(candidate):\n    for got in map(candidate, [1]): assert got == {SECRET}"
    ),
    "round_trip": (
        f"def check(candidate):\n    assert candidate(candidate(candidate([1]))) == {SECRET}"
    ),
    "tolerance": f"def check(candidate):\n    assert abs(candidate(1) - {SECRET}) < 1e-6",
    "sorted": f"def check(candidate):\n    assert sorted(candidate(1)) == [{SECRET}]",
    "set": f"def check(candidate):\n    assert {{candidate(1)}} == {{{SECRET}}}",
    "unpacking": f"def check(candidate):\n    (got,) = candidate(1)\n    assert got == {SECRET}",
    "printing": (
        f"def check(candidate):\n    got = candidate(1)\n    print(got)\n    assert got == {SECRET}"
    ),
}
SEND = "import os, struct\ndef send(body): os.write(4, struct.pack('<Q', len(body)) + body)\n"
HACKS = {
    "wrong": "def f(x): return 0",
    "equal_to_everything": (
        "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\n"
        "def f(x): return E(0)"
    ),
    "end_of_an_iteration": "def f(x): raise StopIteration",
    "end_of_an_iteration_by_name": (
        "class StopIteration(Exception): pass\ndef f(x): raise StopIteration"
    ),
    "end_of_a_generator": "def f(x): raise GeneratorExit",
    "assertion_error": "def f(x): raise AssertionError",
    "system_exit": "def f(x): raise SystemExit(0)",
    "keyboard_interrupt": "def f(x): raise KeyboardInterrupt",
    "exit": "import os\ndef f(x): os._exit(0)",
    "exit_at_once": "import os; os._exit(0)",
    "long_text": "def f(x): return 'x' * (3 << 20)",
    "deep_list": "def f(x):\n    y = []\n    for _ in range(199): y = [y]\n    return y",
    "colliding_set": "def f(x): return frozenset(i * (2**61 - 1) for i in range(3000))",
    "not_a_number": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "huge_integer": "def f(x): return 1 << 3_000_000",
    "unserialisable": "def f(x): return object()",
    "answers_before_the_question": SEND + "for _ in range(9): send(b'=true')\ndef f(x): return 0",
    "nonsense": "import os; os.write(4, b'\\xff' * 999)\ndef f(x): return 0",
    "a_length_without_an_end": "import os; os.write(4, b'\\xff' * 7 + b'\\0')\ndef f(x): return 0",
    "an_empty_answer": SEND + "send(b'')\ndef f(x): return 0",
    "an_answer_of_no_kind": SEND + "send(b'?true')\ndef f(x): return 0",
    "a_malformed_value": SEND + "send(b'={\"set\":[[1]]}')\ndef f(x): return 0",
    "a_malformed_exception": SEND + "send(b'!{}')\ndef f(x): return 0",
    "an_exception_that_is_a_function": SEND + 'send(b\'!["exit", "0"]\')\ndef f(x): return 0',
    "an_exception_that_is_none": SEND + 'send(b\'!["SystemExit", "0"]\')\ndef f(x): return 0',
    "an_exception_with_a_long_name": (
        "E = type('E' * 10**6, (Exception,), {})\ndef f(x): raise E('y' * 10**6)"
    ),
    "brackets": SEND + "send(b'=' + b'[' * 100000)\ndef f(x): return 0",
    "closed_socket": "import os; os.close(4)\ndef f(x): return 0",
    "socket_closed_in_a_call": "import os\ndef f(x):\n    os.close(4)\n    return 0",
    "silence": "import time\ndef f(x): time.sleep(60)",
    "sent_signal": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "patched_values": (
        "import sys\n"
        "def f(x):\n"
        "    g = sys._getframe(1).f_globals\n"
        "    if 'values' in g: g['values'].encode = lambda v: b'true'\n"
        "    return 0"
    ),
    "frames": (
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for v in [*frame.f_locals.values(), *frame.f_code.co_consts]:\n"
        "            if type(v) is int and v > 10**9: return v\n"
        "        frame = frame.f_back"
    ),
}
HONEST = f"def f(x): return {SECRET}"


@pytest.mark.parametrize("source", HACKS.values(), ids=HACKS)
def test_no_hack_passes_a_check_or_evades_its_verdict(sandbox: Sandbox, source: str) -> None:
    """Whichever way the check is written; never a SANDBOX_ERROR, which would drop the episode."""
    slow = "sleep" in source or "closed" in source
    for name, code in list(CHECKS.items())[: 1 if slow else None]:
        limits = Limits(cpu_s=0.3, wall_s=0.6) if slow else LIMITS
        (result,) = sandbox.grade(source, [CheckTest("f", code)], limits)
        assert result.status in FAILED, (name, result)


@pytest.mark.parametrize("name", ["assertion", "message", "map", "loop_over_map", "tolerance"])
def test_an_honest_program_passes_the_check(sandbox: Sandbox, name: str) -> None:
    (result,) = sandbox.grade(HONEST, [CheckTest("f", CHECKS[name])], LIMITS)
    assert result.status is Status.OK, result


CHECKERS = {
    "number": "def check(stdin, expected, actual): return int(actual) == int(expected)",
    "first_line": (
        "def check(stdin, expected, actual):\n"
        "    return actual.decode().splitlines()[0].strip() == expected.decode().strip()"
    ),
}
OUTPUTS = {
    "nothing": "",
    "a_word": "print('x')",
    "bytes_that_are_not_text": "import os; os.write(1, b'\\xff\\xfe')",
    "many_digits": "print('9' * 100000)",
    "many_lines": "print('\\n' * 100000)",
    "brackets": "print('(' * 100000)",
    "an_endless_number": "print('1' * 900000)",
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("checker", CHECKERS.values(), ids=CHECKERS)
def test_no_output_evades_the_verdict_by_breaking_the_checker(
    sandbox: Sandbox, checker: str, output: str
) -> None:
    program = CheckerProgram(checker, limits=Limits(cpu_s=0.5, wall_s=4.0))
    (result,) = sandbox.grade(output, [Test(b"", b"5")], LIMITS, checker=program)
    assert result.status in FAILED, result


@pytest.mark.parametrize("checker", CHECKERS.values(), ids=CHECKERS)
def test_an_honest_output_passes_the_checker(sandbox: Sandbox, checker: str) -> None:
    program = CheckerProgram(checker)
    assert sandbox.grade("print(5)", [Test(b"", b"5")], checker=program)[0].status is Status.OK


def test_a_checker_that_fails_on_the_expected_output_is_a_fault(sandbox: Sandbox) -> None:
    program = CheckerProgram("def check(stdin, expected, actual): raise ValueError")
    (result,) = sandbox.grade("print(5)", [Test(b"", b"5")], checker=program)
    assert result.status is Status.SANDBOX_ERROR
