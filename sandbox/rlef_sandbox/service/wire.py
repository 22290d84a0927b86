"""What client and server say to each other, in tables: requests, tests, checkers, limits, results.

Everything is a `Record`: a frozen dataclass and how each of its fields travels (`record.py`).
Arguments and expected values of function calls travel in the form of `values.py`, in place. A new
kind of test or of checker is a line in TESTS or CHECKERS. Decoding meets untrusted bytes and
answers with a value or with WireError, which names the field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from .. import values
from ..checkers import checker_named
from ..verdict import CallTest, CheckerProgram, CheckTest, Limits, Result, Status, Test
from .record import (
    BYTES,
    FLAG,
    TEXT,
    Field,
    Record,
    WireError,
    any_of,
    list_of,
    number,
    of_type,
    optional,
    parse,
)

REQUEST_ID = "Idempotency-Key"  # the header that names a request through all its tries
# Upper bounds that keep a number within what the sandbox's own messages hold; nobody needs more.
MAX_SECONDS = 24 * 3600.0
MAX_MEMORY_BYTES = 1 << 40
MAX_OUTPUT_BYTES = 1 << 30
MAX_PROCESSES = 1 << 16
MAX_INTEGER = (1 << 63) - 1


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """The arguments of `Sandbox.run`."""

    source: bytes
    stdin: bytes = b""
    limits: Limits | None = None
    language: str = "python"


@dataclasses.dataclass(frozen=True)
class GradeRequest:
    """The arguments of `Sandbox.grade`."""

    source: bytes
    tests: Sequence[Any]
    limits: Limits | None = None
    checker: Any = "tokens"
    stop_at_first_failure: bool = True
    language: str = "python"
    run_at_least: int = 0


def value_to_wire(value: object) -> object:
    """ValueError where the value is not plain data."""
    try:
        return json.loads(values.encode(value))
    except TypeError as error:
        raise ValueError(f"a test cannot travel: {error}") from None


def value_from_wire(wire: object, path: str) -> object:
    try:
        value = values.decode(json.dumps(wire).encode())
        values.encode(value)  # refuses what is nested deeper than the sandbox takes
        return value
    except KeyError as error:
        raise WireError(f"{path}: unknown type of value {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise WireError(f"{path}: not a value: {error}") from None


def _arguments_from_wire(wire: object, path: str) -> tuple[object, ...]:
    value = value_from_wire(of_type(wire, list, path), path)
    assert isinstance(value, list)
    return tuple(value)


def _status_from_wire(wire: object, path: str) -> Status:
    try:
        return Status(of_type(wire, str, path))
    except ValueError:
        raise WireError(f"{path}: unknown status {wire!r}") from None


VALUE = Field(value_to_wire, value_from_wire)
ARGUMENTS = Field(lambda arguments: value_to_wire(list(arguments)), _arguments_from_wire)
SECONDS = number(float, MAX_SECONDS)
INTEGER = number(int, MAX_INTEGER, -MAX_INTEGER)

TESTS = {
    "stdin": Record(Test, {"stdin": BYTES, "expected": BYTES}),
    "call": Record(CallTest, {"entry_point": TEXT, "args": ARGUMENTS, "expected": VALUE}),
    "check": Record(CheckTest, {"entry_point": TEXT, "code": TEXT, "check": TEXT}),
}
LIMITS = Record(
    Limits,
    {
        "cpu_s": SECONDS,
        "wall_s": optional(SECONDS),
        "memory_bytes": number(int, MAX_MEMORY_BYTES),
        "output_bytes": number(int, MAX_OUTPUT_BYTES),
        "processes": number(int, MAX_PROCESSES),
    },
)


CHECKERS = {  # those that are more than a name
    "program": Record(CheckerProgram, {"source": TEXT, "limits": LIMITS.field}),
}


def _checker_to_wire(checker: object) -> object:
    return checker if isinstance(checker, str) else any_of(CHECKERS).encode(checker)


def _checker_from_wire(wire: object, path: str) -> Any:
    if not isinstance(wire, str):
        return any_of(CHECKERS).decode(wire, path)
    try:
        checker_named(wire)
    except ValueError as error:
        raise WireError(f"{path}: {error}") from None
    return wire


COMMON = {
    "source": BYTES,
    "limits": optional(LIMITS.field),
    "language": TEXT,
}
RUN = Record(RunRequest, {**COMMON, "stdin": BYTES})
GRADE = Record(
    GradeRequest,
    {
        **COMMON,
        "tests": list_of(TESTS),
        "checker": Field(_checker_to_wire, _checker_from_wire),
        "stop_at_first_failure": FLAG,
        "run_at_least": number(int, MAX_INTEGER),
    },
)
RESULT = Record(
    Result,
    {
        "status": Field(str, _status_from_wire),
        "stdout": BYTES,
        "stderr": BYTES,
        "exit_code": optional(INTEGER),
        "signal": optional(INTEGER),
        "cpu_s": number(float, float("inf")),
        "wall_s": number(float, float("inf")),
        "max_rss_bytes": INTEGER,
        "returned": optional(TEXT),
    },
)


def encode_request(record: Record, request: RunRequest | GradeRequest) -> bytes:
    """The body of a request. ValueError where a test is not plain data."""
    return json.dumps(record.encode(request), separators=(",", ":")).encode()


def decode_request(record: Record, body: bytes) -> Any:
    """The request in a body. WireError, naming the field, if malformed."""
    return record.decode(parse(body), "")


def encode_results(results: Sequence[Result]) -> bytes:
    """The body of an answer: {"results": [...]}, one a test, or one alone for a run."""
    # one by one: encoding holds all other threads of the process up, and outputs may be large
    items = [json.dumps(RESULT.encode(result), separators=(",", ":")) for result in results]
    return ('{"results":[' + ",".join(items) + "]}").encode()


def decode_results(body: bytes) -> list[Result]:
    """The results in an answer. WireError if malformed."""
    wire = of_type(parse(body), dict, "")
    results = of_type(wire.get("results"), list, "results")
    return [
        RESULT.decode(result, f"results[{place}]", tolerant=True)
        for place, result in enumerate(results)
    ]
