"""What client and server exchange, as JSON: requests, tests, checkers, limits, results.

Everything is a `Record`: a frozen dataclass, and how each of its fields is encoded and decoded. A
new kind of test or checker is a line in TESTS or CHECKERS. Arguments and expected values of
function calls have the form of `values.py`. Bytes are a JSON string if they are UTF-8, otherwise
{"base64": "..."}: programs are readable in a request, and no byte is lost. Decoding reads untrusted
bytes: it returns a value, or raises WireError, which names the field.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import values
from ..checkers import checker_named
from ..verdict import CallTest, CheckerProgram, CheckTest, Limits, Result, Status, Test, as_bytes

REQUEST_ID = "Idempotency-Key"  # the header that names a request through all its tries
MAX_INTEGER = (1 << 63) - 1
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class WireError(ValueError):
    """A malformed message; it names the field and the reason."""


class Field(NamedTuple):
    """How one field is encoded, and decoded, given its JSON and its path for error messages."""

    encode: Callable[[Any], object]
    decode: Callable[[object, str], Any]


class Record(NamedTuple):
    """How a frozen dataclass is sent: as a JSON object with these fields."""

    type: Callable[..., Any]
    fields: Mapping[str, Field]
    options: Mapping[str, Any] = {}  # further arguments of the type

    def encode(self, record: object) -> dict[str, object]:
        return {name: field.encode(getattr(record, name)) for name, field in self.fields.items()}

    def decode(self, wire: object, path: str) -> Any:
        """Return the dataclass. Raises WireError, also for an unknown field."""
        given = of_type(wire, dict, path)
        prefix = f"{path}." if path else ""
        if unknown := given.keys() - self.fields.keys():
            known = ", ".join(self.fields)
            raise WireError(f"{prefix}{min(unknown)}: unknown field; known: {known}")
        arguments = {
            name: field.decode(given[name], prefix + name)
            for name, field in self.fields.items()
            if name in given
        }
        if missing := _required(self.type) - arguments.keys():
            raise WireError(f"{prefix}{min(missing)}: this field is needed")
        try:
            return self.type(**arguments, **self.options)
        except (ValueError, OverflowError) as error:
            raise WireError(f"{path}: {error}") from None


def _required(record_type: Callable[..., Any]) -> set[str]:
    absent = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(record_type)  # type: ignore[arg-type]
        if field.default is absent and field.default_factory is absent
    }


def of_type(wire: object, wanted: type, path: str) -> Any:
    """Return `wire` if it is of the type. A boolean is not a number."""
    if isinstance(wire, wanted) and (wanted is bool or not isinstance(wire, bool)):
        return wire
    found, needed = JSON_TYPES[type(wire)], JSON_TYPES[wanted]
    raise WireError(f"{path or 'the body'}: {found} where {needed} is needed")


def typed(kind: type) -> Field:
    return Field(kind, lambda wire, path: of_type(wire, kind, path))


def optional(field: Field) -> Field:
    """Return a field that may also be None, which is null in JSON."""
    return Field(
        lambda value: None if value is None else field.encode(value),
        lambda wire, path: None if wire is None else field.decode(wire, path),
    )


def number(kind: type[int] | type[float], most: float, least: float = 0) -> Field:
    """Return a field for a finite number within bounds; an integer if `kind` is int."""

    def decode(wire: object, path: str) -> float:
        found = of_type(wire, int if isinstance(wire, int) else kind, path)
        if not least <= found <= most:  # NaN is not
            shown = "the number" if abs(found) > 1e30 else found
            raise WireError(f"{path}: {shown} must be within {least} and {most:.15g}")
        return kind(found)

    return Field(kind, decode)


def any_of(kinds: Mapping[str, Record]) -> Field:
    """Return a field for records of several kinds. Each names its kind, the first kind need not."""
    by_type = {record.type: kind for kind, record in kinds.items()}

    def encode(item: object) -> object:
        kind = by_type.get(type(item))
        if kind is None:
            known = ", ".join(record.type.__name__ for record in kinds.values())
            raise ValueError(f"a {type(item).__name__} cannot be sent; known: {known}")
        return {"kind": kind, **kinds[kind].encode(item)}

    def decode(wire: object, path: str) -> Any:
        given = dict(of_type(wire, dict, path))
        kind = given.pop("kind", next(iter(kinds)))
        if not isinstance(kind, str) or kind not in kinds:
            known = ", ".join(kinds)
            raise WireError(f"{path}.kind: unknown kind {str(kind)[:40]!r}; known: {known}")
        return kinds[kind].decode(given, path)

    return Field(encode, decode)


def bytes_to_wire(content: str | bytes) -> object:
    content = as_bytes(content)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def bytes_from_wire(wire: object, path: str) -> bytes:
    if isinstance(wire, str):
        return as_bytes(wire)
    if not (isinstance(wire, dict) and wire.keys() == {"base64"}):
        raise WireError(f'{path}: write bytes as a string, or as {{"base64": "..."}}')
    try:
        return base64.b64decode(of_type(wire["base64"], str, f"{path}.base64"), validate=True)
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"{path}.base64: {error}") from None


def value_to_wire(value: object) -> object:
    """Return the JSON form of a value. Raises ValueError if it is not plain data."""
    try:
        return json.loads(values.encode(value))
    except TypeError as error:
        raise ValueError(f"a test cannot be sent: {error}") from None


def value_from_wire(wire: object, path: str) -> Any:
    try:
        value = values.decode(json.dumps(wire).encode())
        values.encode(value)  # refuses what is nested deeper than the sandbox allows
        return value
    except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
        raise WireError(f"{path}: not a value: {error}") from None


def _arguments_from_wire(wire: object, path: str) -> tuple[object, ...]:
    return tuple(value_from_wire(of_type(wire, list, path), path))


def _status_from_wire(wire: object, path: str) -> Status:
    try:
        return Status(of_type(wire, str, path))
    except ValueError:
        raise WireError(f"{path}: unknown status {wire!r}") from None


BYTES = Field(bytes_to_wire, bytes_from_wire)
TEXT, FLAG = typed(str), typed(bool)
UNCOMPILED = {"compiled": False}  # a client's code is compiled where it is confined
VALUE = Field(value_to_wire, value_from_wire)
ARGUMENTS = Field(lambda arguments: value_to_wire(list(arguments)), _arguments_from_wire)
MEASURED_SECONDS = number(float, float("inf"))
INTEGER = number(int, MAX_INTEGER, -MAX_INTEGER)

TESTS = {
    "stdin": Record(Test, {"stdin": BYTES, "expected": BYTES}),
    "call": Record(CallTest, {"entry_point": TEXT, "args": ARGUMENTS, "expected": VALUE}),
    "check": Record(CheckTest, {"entry_point": TEXT, "code": TEXT, "check": TEXT}, UNCOMPILED),
}
LIMITS = Record(
    Limits,
    {
        "cpu_s": MEASURED_SECONDS,  # bounded by Limits itself
        "wall_s": optional(MEASURED_SECONDS),
        "memory_bytes": INTEGER,
        "output_bytes": INTEGER,
        "processes": INTEGER,
    },
)
LIMITS_FIELD = Field(LIMITS.encode, LIMITS.decode)
CHECKERS = {  # those that are more than a name
    "program": Record(
        CheckerProgram, {"source": TEXT, "limits": LIMITS_FIELD, "language": TEXT}, UNCOMPILED
    ),
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


def _tests_from_wire(wire: object, path: str) -> list[Any]:
    tests = enumerate(of_type(wire, list, path))
    return [any_of(TESTS).decode(test, f"{path}[{index}]") for index, test in tests]


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """The arguments of `Sandbox.run`."""

    source: bytes
    stdin: bytes = b""
    limits: Limits | None = None
    language: str = "python"

    def is_answered_by(self, results: Sequence[Result]) -> bool:
        return len(results) == 1


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

    def is_answered_by(self, results: Sequence[Result]) -> bool:
        """Return whether there is a result for each test, or for fewer that end with a failure."""
        if len(results) >= len(self.tests) or not self.stop_at_first_failure:
            return len(results) == len(self.tests)
        failed = any(result.status is not Status.OK for result in results)
        return failed and len(results) >= self.run_at_least


COMMON = {"source": BYTES, "limits": optional(LIMITS_FIELD), "language": TEXT}
RUN = Record(RunRequest, {**COMMON, "stdin": BYTES})
GRADE = Record(
    GradeRequest,
    {
        **COMMON,
        "tests": Field(lambda tests: list(map(any_of(TESTS).encode, tests)), _tests_from_wire),
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
        "cpu_s": MEASURED_SECONDS,
        "wall_s": MEASURED_SECONDS,
        "max_rss_bytes": INTEGER,
        "returned": optional(TEXT),
    },
)


def parse(body: bytes | bytearray) -> object:
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON in UTF-8: {error}") from None


def encode_request(record: Record, request: RunRequest | GradeRequest) -> bytes:
    """Return the body of a request. Raises ValueError if a test is not plain data."""
    return json.dumps(record.encode(request), separators=(",", ":")).encode()


def decode_request(record: Record, body: bytes | bytearray) -> Any:
    """Return the request in a body. Raises WireError if it is malformed."""
    return record.decode(parse(body), "")


def encode_results(results: Sequence[Result]) -> bytes:
    """Return the body of an answer: {"results": [...]}, one for each test, or one for a run."""
    # one by one: encoding stops all other threads of the process, and outputs may be large
    items = [json.dumps(RESULT.encode(result), separators=(",", ":")) for result in results]
    return ('{"results":[' + ",".join(items) + "]}").encode()


def decode_results(body: bytes) -> list[Result]:
    """Return the results in an answer, without fields that only a newer server knows. Raises
    WireError if the answer is malformed.
    """
    wire = of_type(parse(body), dict, "")
    results = []
    for index, result in enumerate(of_type(wire.get("results"), list, "results")):
        path = f"results[{index}]"
        fields = of_type(result, dict, path)
        known = {name: value for name, value in fields.items() if name in RESULT.fields}
        results.append(RESULT.decode(known, path))
    return results
