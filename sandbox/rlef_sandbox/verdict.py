"""Limits, tests, results and verdicts: the plain frozen types that other modules share."""

from __future__ import annotations

import enum
from dataclasses import InitVar, dataclass, field

from .code_check import fault_of


class Status(enum.StrEnum):
    """How a run ended. OK on a graded test means passed. SANDBOX_ERROR is not a verdict."""

    OK = "OK"
    WRONG_ANSWER = "WRONG_ANSWER"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    TIME_LIMIT = "TIME_LIMIT"
    IDLE_LIMIT = "IDLE_LIMIT"
    MEMORY_LIMIT = "MEMORY_LIMIT"
    OUTPUT_LIMIT = "OUTPUT_LIMIT"
    SECURITY_VIOLATION = "SECURITY_VIOLATION"
    COMPILE_ERROR = "COMPILE_ERROR"
    SANDBOX_ERROR = "SANDBOX_ERROR"


# Bounds of the Limits: what the kernel and the sandbox's own messages can represent.
LIMITS_WITHIN = {
    "cpu_s": (0.001, 24 * 3600),
    "wall_s": (0.001, 6 * 24 * 3600),  # more than the default for the longest cpu_s
    "memory_bytes": (32 << 20, 1 << 40),
    "output_bytes": (1, 1 << 30),
    "processes": (1, 1 << 16),
}


@dataclass(frozen=True)
class Limits:
    """Bounds of one run.

    `cpu_s` decides TIME_LIMIT. `wall_s` is a backstop against programs that wait instead of working
    (IDLE_LIMIT). By default it is 5 * cpu_s + 2, so that five busy processes per core cause no
    false verdict. `memory_bytes` bounds resident memory, `output_bytes` each of stdout and stderr,
    `processes` the program's threads, if this machine has user namespaces.
    """

    cpu_s: float = 10.0
    wall_s: float | None = None
    memory_bytes: int = 1 << 30
    output_bytes: int = 16 << 20
    processes: int = 64

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS_WITHIN.items():
            value = getattr(self, name)
            if name == "wall_s" and value is None:
                continue
            if not least <= value <= most:  # also if it is NaN
                shown = "huge" if abs(value) > 1e30 else value
                raise ValueError(f"Limits.{name} is {shown}; it must be between {least} and {most}")

    @property
    def effective_wall_s(self) -> float:
        """Return the wall clock bound in force."""
        return 5 * self.cpu_s + 2 if self.wall_s is None else self.wall_s


@dataclass(frozen=True)
class Result:
    """One run. Times in seconds, memory in bytes.

    `signal` is the number of the signal that ended the program, if one did; `exit_code` is None
    then. `stdout` has at most `output_bytes`, `stderr` its last 64 KiB. `returned` is the `repr` of
    what a function call (`CallTest`) returned, as the program reports it, for feedback.
    """

    status: Status
    stdout: bytes = b""
    stderr: bytes = b""
    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0
    max_rss_bytes: int = 0
    returned: str | None = None


def as_bytes(text: str | bytes) -> bytes:
    """Encode as UTF-8. A lone surrogate passes, for the program's own decoder to refuse."""
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


@dataclass(frozen=True)
class Test:
    """A program given `stdin` must print `expected`, according to the checker."""

    __test__ = False  # pytest: not a test class

    stdin: bytes
    expected: bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "stdin", as_bytes(self.stdin))
        object.__setattr__(self, "expected", as_bytes(self.expected))


@dataclass(frozen=True)
class CallTest:
    """`entry_point(*args)` must return `expected`, according to `values.matches`."""

    __test__ = False

    entry_point: str
    args: tuple = field(default=())
    expected: object = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", tuple(self.args))


@dataclass(frozen=True)
class CheckTest:
    """`check(candidate)` must return without raising. `code` defines `check`, and `candidate` calls
    the program's `entry_point` (the form of HumanEval's tests).

    The code runs confined, in a process of its own. Arguments and results of its calls cross by
    value, as plain data, and an exception of a call is raised in it as the built-in type. Raises
    ValueError for code that does not compile within 10 s, and for a `check` that is async, a
    generator, or returns a value, since it would pass any program. Code that is not `compiled` here
    is accepted, and a run reports its faults as a SANDBOX_ERROR.
    """

    __test__ = False

    entry_point: str
    code: str
    check: str = "check"
    compiled: InitVar[bool] = True

    def __post_init__(self, compiled: bool) -> None:
        if compiled and (fault := fault_of(as_bytes(self.code), self.check)):
            raise ValueError(f"CheckTest.code of {self.entry_point} {fault}")


AnyTest = Test | CallTest | CheckTest


@dataclass(frozen=True)
class CheckerProgram:
    """A checker of the problem's own, for problems with many right outputs: Python that defines
    `check(stdin, expected, actual)`, which takes three `bytes` and returns True or False, or a C++
    program in the style of testlib, which gets the paths of the input, the output and the expected
    output, and exits with 0 to accept, or 3 if it is broken.

    It runs confined, with `limits`. If it raises, exceeds them or returns anything else, the output
    is a WRONG_ANSWER, provided that it accepts the expected output. Otherwise it is broken: a
    SANDBOX_ERROR, which is not a verdict on the program. Raises ValueError like `CheckTest`.
    """

    source: str
    limits: Limits = field(default_factory=Limits)
    language: str = "python"
    compiled: InitVar[bool] = True

    def __post_init__(self, compiled: bool) -> None:
        is_checked = compiled and self.language == "python"
        if is_checked and (fault := fault_of(as_bytes(self.source), "check", returns=True)):
            raise ValueError(f"CheckerProgram.source {fault}")
