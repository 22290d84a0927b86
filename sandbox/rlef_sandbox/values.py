"""Python values across the process border, for function-call problems.

Arguments travel to the child by `encode` and `decode`; what the program returned travels back by
`encode` and is compared by `matches`, the only one of the three to meet untrusted bytes. It walks
the parsed wire form beside the expected value: an object of the program's own, with its own
`__eq__`, never exists where the expected value is known, and no untrusted value is put into a
set or a dict, where chosen hash collisions would cost quadratic time.

JSON carries None, booleans, numbers, strings and lists. Other values are one-key objects:
{"int": hex}, {"tuple": [...]}, {"set": [...]}, {"dict": [[key, value], ...]}, {"bytes": hex}.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

TOLERANCE = 1e-6  # absolute or relative, where a float is expected
MAX_DEPTH = 200  # nesting; deeper values are refused rather than recursed into
MAX_FROZENSET = 1000  # members, of one within a set or a key
HASHABLE_KINDS = ("int", "bytes", "tuple", "frozenset")
CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}


class Tagged(NamedTuple):
    """A parsed one-key object: a value that JSON has no form for."""

    kind: str
    body: Any


def encode(value: object) -> bytes:
    """The wire form of `value`. TypeError if not plain data, ValueError if nested too deep."""
    return json.dumps(_to_wire(value, 0), separators=(",", ":")).encode()


def _to_wire(value: object, depth: int) -> object:
    if depth > MAX_DEPTH:
        raise ValueError(f"value is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        # JSON readers refuse very long decimal integers.
        return int(value) if -(2**63) < value < 2**63 else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [_to_wire(item, depth + 1) for item in value]
    if isinstance(value, dict):
        pairs = [[_to_wire(k, depth + 1), _to_wire(v, depth + 1)] for k, v in value.items()]
        return {"dict": pairs}
    for kind, container in CONTAINERS.items():
        if isinstance(value, container):
            return {kind: [_to_wire(item, depth + 1) for item in value]}
    raise TypeError(f"a value of type {type(value).__name__} cannot be judged; use plain data")


def decode(wire: bytes) -> object:
    """The value in `wire`, which must come from `encode`."""
    return _from_wire(parse(wire))


def _from_wire(wire: object) -> object:
    if isinstance(wire, list):
        return [_from_wire(item) for item in wire]
    if not isinstance(wire, Tagged):
        return wire
    kind, body = wire
    if kind == "int":
        return int(body, 16)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "dict":
        return {_from_wire(key): _from_wire(value) for key, value in body}
    return CONTAINERS[kind](_from_wire(item) for item in body)


def parse(wire: bytes) -> object:
    """JSON with its objects as `Tagged`. ValueError if malformed."""
    try:
        return json.loads(wire, object_pairs_hook=_tagged)
    except RecursionError:
        raise ValueError("malformed value: nested too deep") from None


def _tagged(pairs: list[tuple[str, object]]) -> Tagged:
    if len(pairs) != 1:
        raise ValueError("malformed value: an object has exactly one key, its type")
    return Tagged(*pairs[0])


def matches(expected: object, wire: bytes) -> bool:
    """Whether the encoded value in `wire`, untrusted, is the expected one.

    Types must be the same, with three allowances: an integer and a float compare as numbers (a
    boolean is neither), a float is expected to within 1e-6 absolute or relative (NaN is NaN),
    and where a list is expected a tuple does, since tests read from JSON cannot say which; an
    expected tuple means a tuple. Keys and members of sets must be equal exactly.
    """
    try:
        return _matches(expected, parse(wire))
    except (ValueError, TypeError, RecursionError, OverflowError):
        return False


def _matches(expected: Any, wire: Any) -> bool:
    kind, body = wire if isinstance(wire, Tagged) else (type(wire).__name__, wire)
    if kind == "int" and isinstance(body, str):
        body = int(body, 16)
    if isinstance(expected, bool) or expected is None or isinstance(body, bool):
        return expected is body
    if isinstance(expected, int | float):
        return kind in ("int", "float") and _numbers_match(expected, body)
    if isinstance(expected, str):
        return kind == "str" and str(expected) == body
    if isinstance(expected, bytes | bytearray):
        return kind == "bytes" and isinstance(body, str) and expected == bytes.fromhex(body)
    if not isinstance(body, list) or len(body) != len(expected):
        return False
    if isinstance(expected, list):
        return kind in ("list", "tuple") and all(map(_matches, expected, body))
    if isinstance(expected, tuple):
        return kind == "tuple" and all(map(_matches, expected, body))
    if isinstance(expected, dict):
        return kind == "dict" and _dicts_match(expected, body)
    return kind == type(expected).__name__ and _sets_match(expected, body)


def _numbers_match(expected: float, actual: float) -> bool:
    if isinstance(expected, int):
        return expected == actual
    if math.isnan(expected):
        return math.isnan(actual)
    return math.isclose(expected, float(actual), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _dicts_match(expected: dict, pairs: list) -> bool:
    values = {_identity(key): value for key, value in expected.items()}
    seen = set()
    for wire_key, wire_value in pairs:
        key = _identity(_hashable(wire_key))
        if key not in values or not _matches(values[key], wire_value):
            return False
        seen.add(key)
    return len(seen) == len(values)


def _sets_match(expected: set | frozenset, items: list) -> bool:
    members = {_identity(item) for item in expected}
    found = set()
    for item in items:
        key = _identity(_hashable(item))
        if key not in members:
            return False
        found.add(key)
    return len(found) == len(members)


def _hashable(wire: object) -> object:
    """An untrusted key or member, to be looked up among expected ones. ValueError if unhashable
    or a frozenset large enough for its members' hashes to be chosen to collide.
    """
    if not isinstance(wire, list | Tagged):
        return wire
    if isinstance(wire, list) or wire.kind not in HASHABLE_KINDS:
        raise ValueError("malformed value: an unhashable key")
    if wire.kind == "tuple":
        return tuple(map(_hashable, wire.body))
    if wire.kind == "frozenset":
        if len(wire.body) > MAX_FROZENSET:
            raise ValueError(f"a frozenset within a set has more than {MAX_FROZENSET} members")
        return frozenset(map(_hashable, wire.body))
    return _from_wire(wire)


def _identity(value: object) -> tuple[str, object]:
    """Tells True, 1 and 1.0 apart, which Python's own sets and dicts do not."""
    return type(value).__name__, value
