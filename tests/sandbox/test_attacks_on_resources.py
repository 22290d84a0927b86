"""Using more than is given: time, memory, output, stack, threads, descriptors."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from rlef_sandbox import Limits, Result, Sandbox, Status

Attempt = Callable[[str], Result]

MEMORY = {
    "one_large_list": "x = [0] * 10**9",
    "many_small_objects": "x = []\nwhile True: x.append(bytes(10**6))",
    "anonymous_mapping": (
        "import mmap; m = mmap.mmap(-1, 1 << 29)\nfor i in range(0, 1 << 29, 4096): m[i] = 1"
    ),
    "swallowed_memory_error": (
        "x = []\n"
        "try:\n"
        "    while True: x.append(bytearray(10**6))\n"
        "except MemoryError: pass\n"
        "print('done')"
    ),
}

OUTPUT = {
    "endless_prints": "while True: print('x' * 1000)",
    "one_large_write": "import os; os.write(1, b'x' * 10**6); os.write(1, b'x')",
    "endless_errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "sparse_output": "import os; os.lseek(1, 10**9, 0); os.write(1, b'x')",
    "ignored_signal": (
        "import signal, os; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n"
        "    while True: os.write(1, b'x' * 1000)\n"
        "except OSError: pass"
    ),
}


@pytest.mark.parametrize("source", MEMORY.values(), ids=MEMORY)
def test_memory_is_bounded(attempt: Attempt, source: str) -> None:
    assert attempt(source).status is Status.MEMORY_LIMIT


@pytest.mark.parametrize("source", OUTPUT.values(), ids=OUTPUT)
def test_output_is_bounded(attempt: Attempt, source: str) -> None:
    result = attempt(source)
    assert result.status is Status.OUTPUT_LIMIT
    assert len(result.stdout) <= 64 << 10


def test_cpu_time_is_bounded(sandbox: Sandbox) -> None:
    result = sandbox.run("while True: pass", limits=Limits(cpu_s=0.2))
    assert result.status is Status.TIME_LIMIT
    assert result.cpu_s < 2


def test_a_program_that_ignores_signals_is_stopped(sandbox: Sandbox) -> None:
    source = (
        "import signal\n"
        "for n in (15, 24): signal.signal(n, signal.SIG_IGN)\n"
        "while True:\n"
        "    try:\n"
        "        while True: pass\n"
        "    except BaseException: pass"
    )
    assert sandbox.run(source, limits=Limits(cpu_s=0.2)).status is Status.TIME_LIMIT


def test_time_spent_by_threads_in_native_code_counts(sandbox: Sandbox) -> None:
    source = (
        "import hashlib, threading\n"
        "def burn():\n"
        "    while True: hashlib.sha256(bytes(10**7))\n"
        "for _ in range(3): threading.Thread(target=burn).start()"
    )
    assert sandbox.run(source, limits=Limits(cpu_s=0.3)).status is Status.TIME_LIMIT


def test_a_handler_at_exit_cannot_outstay_the_limit(sandbox: Sandbox) -> None:
    source = "import atexit\n@atexit.register\ndef stay():\n    while True: pass"
    assert sandbox.run(source, limits=Limits(cpu_s=0.2)).status is Status.TIME_LIMIT


def test_a_stopped_program_is_idle(sandbox: Sandbox) -> None:
    source = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    limits = Limits(cpu_s=0.2, wall_s=0.3)
    assert sandbox.run(source, limits=limits).status is Status.IDLE_LIMIT


def test_a_compiler_bomb_is_the_programs_failure(attempt: Attempt) -> None:
    result = attempt("x = " + "-" * 50_000 + "1")
    assert result.status in (Status.COMPILE_ERROR, Status.MEMORY_LIMIT, Status.TIME_LIMIT)


def test_native_stack_overflow_is_a_crash_of_the_program(attempt: Attempt) -> None:
    result = attempt("import ctypes; ctypes.string_at(0)")
    assert (result.status, result.signal) == (Status.RUNTIME_ERROR, 11)


def test_endless_recursion_is_a_runtime_error(attempt: Attempt) -> None:
    result = attempt("def f(): f()\nf()")
    assert result.status is Status.RUNTIME_ERROR
    assert b"RecursionError" in result.stderr


def test_threads_are_bounded(sandbox: Sandbox) -> None:
    if "user" not in sandbox.isolation["namespaces"]:
        pytest.skip("counting threads takes a user namespace")
    source = (
        "import threading, time\n"
        "threading.stack_size(65536)\n"
        "try:\n"
        "    while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "except RuntimeError: print('bounded')"
    )
    result = sandbox.run(source, limits=Limits(processes=16))
    assert result.stdout == b"bounded\n"


def test_descriptors_are_bounded(attempt: Attempt) -> None:
    attempt("import os\nfor i in range(100): os.dup(0)\nprint('ESCAPED')")


def test_a_sleeper_holds_a_worker_no_longer_than_its_wall_clock_limit(sandbox: Sandbox) -> None:
    started = time.monotonic()
    sandbox.run("import time; time.sleep(60)", limits=Limits(cpu_s=0.1, wall_s=0.2))
    assert time.monotonic() - started < 10
