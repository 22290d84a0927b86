"""The requests of the soak test (`soak.py`): their verdicts are known, and each one's output
contains its own token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlef_sandbox import CallTest, Limits, Sandbox, Status, Test

QUICK = Limits(cpu_s=2.0, wall_s=30.0, memory_bytes=96 << 20, output_bytes=64 << 10)
Judge = Callable[[Sandbox, str], str]  # what is wrong with the answer; empty if nothing


def grades(
    source: str, expected: list[Status], tests: Callable[[str], list], **options: Any
) -> Judge:
    """Return a judge that grades a program and compares the verdicts with `expected`."""

    def judge(sandbox: Sandbox, token: str) -> str:
        results = sandbox.grade(
            source, tests(token), stop_at_first_failure=False, **{"limits": QUICK, **options}
        )
        _raise_fault(results)
        right = [result.status for result in results] == expected
        return "" if right else str(results)[:400]

    return judge


def runs(source: str, expected: Status, says: str = "", **options: Any) -> Judge:
    """Return a judge that runs a program and compares its status and output with `expected` and
    `says`, in which TOKEN stands for the run's own token."""

    def judge(sandbox: Sandbox, token: str) -> str:
        limits = options.get("limits", QUICK)
        language = options.get("language", "python")
        result = sandbox.run(source.replace("TOKEN", token), token, limits, language)
        _raise_fault([result])
        wanted = says.replace("TOKEN", token).encode()
        right = result.status is expected and result.stdout.strip() == wanted
        return "" if right else str(result)[:400]

    return judge


class FaultError(Exception):
    """A SANDBOX_ERROR, which is not a verdict: the request is repeated."""


def _raise_fault(results: list) -> None:
    if any(result.status is Status.SANDBOX_ERROR for result in results):
        raise FaultError(results[-1].stderr[-200:].decode(errors="replace"))


OK, WRONG = Status.OK, Status.WRONG_ANSWER
ECHO = "print(input())"
CPP = (
    "#include <iostream>\n#include <string>\n"
    "int main() { std::string s; std::cin >> s; std::cout << s; } // VARIANT"
)
# Kinds of requests, with their weights.
KINDS: dict[str, tuple[int, Judge]] = {
    "echo": (40, runs(ECHO, OK, "TOKEN")),
    "source": (20, runs("print('TOKEN')", OK, "TOKEN")),
    "passes": (20, grades(ECHO, [OK], lambda token: [Test(token, token)])),
    "fails": (10, grades(ECHO, [WRONG], lambda token: [Test(token, token + "x")])),
    "several": (
        10,
        grades(
            ECHO,
            [OK, WRONG, OK, OK],
            lambda token: [Test(t, t + "y" * (t == "1")) for t in (token, "1", token * 2, "3")],
        ),
    ),
    "call": (10, grades("def f(x): return x", [OK], lambda t: [CallTest("f", ([t],), [t])])),
    "wrong_call": (5, grades("def f(x): return 0", [WRONG], lambda t: [CallTest("f", (t,), t)])),
    "raises": (5, runs("1 / 0", Status.RUNTIME_ERROR)),
    "exits": (5, runs("import os; os._exit(3)", Status.RUNTIME_ERROR)),
    "no_code": (3, runs("def f(:", Status.COMPILE_ERROR)),
    "attacks": (
        3,
        runs("import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)", Status.SECURITY_VIOLATION),
    ),
    "overflows": (
        2,
        runs("import os; os.lseek(1, 10**8, 0); os.write(1, b'x')", Status.OUTPUT_LIMIT),
    ),
    "eats": (2, runs("x = bytearray(10**9)", Status.MEMORY_LIMIT)),
    "burns": (
        1,
        runs("while True: pass", Status.TIME_LIMIT, limits=Limits(cpu_s=0.05, wall_s=30.0)),
    ),
    "sleeps": (
        1,
        runs("import time; time.sleep(9)", Status.IDLE_LIMIT, limits=Limits(cpu_s=1, wall_s=0.1)),
    ),
    "threads": (
        2,
        runs(
            "import threading\n"
            "for _ in range(8): threading.Thread(target=sum, args=([1],)).start()\n"
            "print('TOKEN')",
            OK,
            "TOKEN",
        ),
    ),
}
CPP_KINDS = {
    "cpp": (4, runs(CPP, OK, "TOKEN", language="cpp")),
    "cpp_new": (1, runs(CPP.replace("VARIANT", "TOKEN"), OK, "TOKEN", language="cpp")),
}
