"""What client and server exchange, as JSON: requests, tests, checkers, limits, results.

Each is a frozen dataclass, sent as a JSON object with its fields; a field is decoded as its type
says (DECODERS). A new kind of test or checker is a line in TESTS or CHECKERS. Arguments and
expected values of function calls have the form of `values.py`. Bytes are a JSON string if they are
UTF-8, otherwise {"base64": "..."}: programs are readable in a request, and no byte is lost.
Decoding reads untrusted bytes: it returns a value, or raises WireError, which names the field.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import NoneType
from typing import Annotated, Any, ClassVar

from .. import values
from ..checkers import checker_named
from ..verdict import (
    AnyTest,
    CallTest,
    CheckerProgram,
    CheckTest,
    Limits,
    Result,
    Status,
    Test,
    as_bytes,
)

REQUEST_ID = "Idempotency-Key"  # the header that names a request through all its tries
MAX_INTEGER = (1 << 63) - 1
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    NoneType: "null",
}
TESTS = {"stdin": Test, "call": CallTest, "check": CheckTest}
CHECKERS = {"program": CheckerProgram}  # those that are more than a name
KINDS: dict[type, str] = {record: kind for kind, record in {**TESTS, **CHECKERS}.items()}
UNCOMPILED = (CheckTest, CheckerProgram)  # a client's code is compiled where it is confined
Count = Annotated[int, "at least 0"]
Decoder = Callable[[Any], Any]  # returns the value of a JSON value, or raises ValueError


class WireError(ValueError):
    """A malformed message: the path of the field, and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # pickle restores it from these
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path.removeprefix('.') or 'the body'}: {self.reason}"


def decode_part(step: str, decoder: Decoder, wire: object) -> Any:
    """Decode a part of a message. A WireError's path begins with `step`: ".field" or "[index]"."""
    try:
        return decoder(wire)
    except WireError as error:
        raise WireError(step + error.path, error.reason) from None
    except (ValueError, OverflowError) as error:
        raise WireError(step, str(error)) from None


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """The arguments of `Sandbox.run`."""

    path: ClassVar = "/v1/run"

    source: bytes
    stdin: bytes = b""
    limits: Limits | None = None
    language: str = "python"

    def is_answered_by(self, results: Sequence[Result]) -> bool:
        return len(results) == 1


@dataclasses.dataclass(frozen=True)
class GradeRequest:
    """A request to grade a program, with the arguments of `Sandbox.grade`."""

    path: ClassVar = "/v1/grade"

    source: bytes
    tests: Sequence[AnyTest]
    limits: Limits | None = None
    checker: str | CheckerProgram = "tokens"
    stop_at_first_failure: bool = True
    language: str = "python"
    run_at_least: Count = 0

    def is_answered_by(self, results: Sequence[Result]) -> bool:
        """Return whether all tests have results, or at least `run_at_least`, with a failure."""
        if len(results) >= len(self.tests) or not self.stop_at_first_failure:
            return len(results) == len(self.tests)
        failed = any(result.status is not Status.OK for result in results)
        return failed and len(results) >= self.run_at_least


Request = RunRequest | GradeRequest
REQUESTS: dict[str, type[Request]] = {kind.path: kind for kind in (RunRequest, GradeRequest)}


def decode(record: type, wire: object, *, strict: bool = True) -> Any:
    """Return a dataclass from a JSON object with its fields. Raises ValueError if one is missing or
    malformed and, if `strict`, for an unknown one.
    """
    given = of_type(dict, wire)
    decoders, required = _fields_of(record)
    if strict and (unknown := given.keys() - decoders.keys()):
        raise WireError(f".{min(unknown)}", f"unknown field; known: {', '.join(decoders)}")
    arguments = {
        name: decode_part(f".{name}", decoder, given[name])
        for name, decoder in decoders.items()
        if name in given
    }
    if missing := required - given.keys():
        raise WireError(f".{min(missing)}", "this field is needed")
    return record(**arguments, **({"compiled": False} if record in UNCOMPILED else {}))


@cache
def _fields_of(record: type) -> tuple[dict[str, Decoder], set[str]]:
    """Return the decoders of a dataclass's fields, and the fields that have no default."""
    hints, absent = typing.get_type_hints(record, include_extras=True), dataclasses.MISSING
    fields = dataclasses.fields(record)
    required = {f.name for f in fields if f.default is f.default_factory is absent}
    return {field.name: _decoder_of(hints[field.name]) for field in fields}, required


def _decoder_of(hint: Any) -> Decoder:
    if hint in DECODERS:
        return DECODERS[hint]
    if isinstance(hint, type):  # a dataclass
        return partial(decode, hint)
    (kind,) = set(typing.get_args(hint)) - {NoneType}  # an optional field is null in JSON
    decoder = _decoder_of(kind)
    return lambda wire: None if wire is None else decoder(wire)


def of_type(wanted: type, wire: object) -> Any:
    """Return `wire` if it is of the type. A boolean is not a number."""
    if isinstance(wire, wanted) and (wanted is bool or not isinstance(wire, bool)):
        return wire
    raise ValueError(f"{JSON_TYPES[type(wire)]} where {JSON_TYPES[wanted]} is needed")


def number(kind: type, least: float, most: float, wire: object) -> Any:
    """Return a finite number within bounds; an integer if `kind` is int."""
    found = of_type(int if isinstance(wire, int) else kind, wire)
    if not least <= found <= most:  # NaN is not
        shown = "the number" if abs(found) > 1e30 else found
        raise ValueError(f"{shown} must be between {least} and {most:.15g}")
    return kind(found)


def decode_any(kinds: Mapping[str, type], wire: object) -> Any:
    """Return one of several dataclasses: that of the object's "kind", by default the first."""
    given = dict(of_type(dict, wire))
    kind = given.pop("kind", next(iter(kinds)))
    if not isinstance(kind, str) or kind not in kinds:
        known = ", ".join(kinds)
        raise WireError(".kind", f"unknown kind {str(kind)[:40]!r}; known: {known}")
    return decode(kinds[kind], given)


def list_of(decoder: Decoder, wire: object) -> list[Any]:
    items = enumerate(of_type(list, wire))
    return [decode_part(f"[{index}]", decoder, item) for index, item in items]


def bytes_to_wire(content: bytes) -> object:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def bytes_from_wire(wire: object) -> bytes:
    if isinstance(wire, str):
        return as_bytes(wire)
    if not (isinstance(wire, dict) and wire.keys() == {"base64"}):
        raise ValueError('write bytes as a string, or as {"base64": "..."}')
    return decode_part(".base64", _from_base64, wire["base64"])


def _from_base64(wire: object) -> bytes:
    return base64.b64decode(of_type(str, wire), validate=True)


def value_to_wire(value: object) -> object:
    """Return the JSON form of a value. Raises ValueError if it is not plain data."""
    try:
        return json.loads(values.encode(value))
    except TypeError as error:
        raise ValueError(f"a test cannot be sent: {error}") from None


def value_from_wire(wire: object) -> Any:
    try:
        value = values.decode(json.dumps(wire).encode())
        values.encode(value)  # refuses what is nested deeper than the sandbox allows
        return value
    except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"not a value: {error}") from None


def _checker_from_wire(wire: object) -> str | CheckerProgram:
    if not isinstance(wire, str):
        return decode_any(CHECKERS, wire)
    checker_named(wire)
    return wire


DECODERS: dict[object, Decoder] = {
    str: partial(of_type, str),
    bool: partial(of_type, bool),
    int: partial(number, int, -MAX_INTEGER, MAX_INTEGER),
    Count: partial(number, int, 0, MAX_INTEGER),
    float: partial(number, float, 0, sys.float_info.max),
    bytes: bytes_from_wire,
    tuple: lambda wire: tuple(value_from_wire(of_type(list, wire))),
    object: value_from_wire,
    Status: lambda wire: Status(of_type(str, wire)),
    Sequence[AnyTest]: partial(list_of, partial(decode_any, TESTS)),
    str | CheckerProgram: _checker_from_wire,
}


def _to_wire(item: object) -> object:
    """Return the JSON form of what `json` cannot encode. Raises ValueError if there is none."""
    if isinstance(item, bytes):
        return bytes_to_wire(item)
    if isinstance(item, CallTest):
        args, expected = value_to_wire(list(item.args)), value_to_wire(item.expected)
        return {"kind": "call", **vars(item), "args": args, "expected": expected}
    if type(item) in KINDS:
        return {"kind": KINDS[type(item)], **vars(item)}
    if isinstance(item, Limits | Result | Request):
        return vars(item)
    known = ", ".join(record.__name__ for record in KINDS)
    raise ValueError(f"a {type(item).__name__} cannot be sent; known: {known}")


ENCODER = json.JSONEncoder(separators=(",", ":"), default=_to_wire)


def parse(body: bytes | bytearray) -> object:
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8: {error}") from None


def encode_request(request: Request) -> bytes:
    """Return the body of a request. Raises ValueError if a test is not plain data."""
    return ENCODER.encode(request).encode()


def decode_request(path: str, body: bytes | bytearray) -> Request:
    """Return the request in a body sent to `path`. Raises WireError if it is malformed."""
    return decode_part("", lambda body: decode(REQUESTS[path], parse(body)), body)


def encode_results(results: Sequence[Result]) -> bytes:
    """Return the body of an answer: {"results": [...]}, one for each test, or one for a run."""
    # one by one: encoding stops all other threads of the process, and outputs may be large
    return ('{"results":[' + ",".join(map(ENCODER.encode, results)) + "]}").encode()


def decode_results(body: bytes) -> list[Result]:
    """Return the results in an answer, without fields that only a newer server knows. Raises
    WireError if the answer is malformed.
    """
    of_one = partial(decode, Result, strict=False)
    wire = decode_part("", lambda body: of_type(dict, parse(body)), body)
    return decode_part(".results", partial(list_of, of_one), wire.get("results"))
