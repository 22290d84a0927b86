"""Python values passed between processes, for function-call problems.

Arguments travel to the child by `encode` and `decode`. The returned value travels back by `encode`
and is compared by `matches`, or decoded in the confined process of a CheckTest. `matches` walks the
parsed wire form alongside the expected value, so an object with an `__eq__` of the program's own
never exists where the expected value is known. It puts no untrusted value into a set or a dict,
where chosen hash collisions would take quadratic time. A wire form that is much longer than that of
the expected value, or nested deeper than MAX_DEPTH, is refused before it is parsed.

JSON carries None, booleans, numbers, strings and lists. Other values are one-key objects:
{"int": hex}, {"tuple": [...]}, {"set": [...]}, {"frozenset": [...]}, {"dict": [[key, value], ...]},
{"bytes": hex}, {"fraction": [numerator, denominator]}, {"decimal": text}.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import numbers
import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

TOLERANCE = 1e-6  # absolute or relative, where a float is expected
MAX_DEPTH = 200  # deeper values are refused
MAX_BRACKETS = 3 * MAX_DEPTH + 4  # open at once in a wire form; a dict opens three at each level
# A right value's wire form is at most this many times as long as the expected one's: an integer
# of 256 hexadecimal digits may be within tolerance of an expected 1e308.
MAX_LENGTH_RATIO = 64
CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}
BODIES = {"int": str, "bytes": str, "decimal": str, "fraction": list, "dict": list}
BODIES |= dict.fromkeys(CONTAINERS, list)
NUMBERS = ("bool", "int", "float", "fraction", "decimal")  # kinds that may equal one another
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # possessive: never reads a byte twice
NO_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")
STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
MOST_EQUAL_HASHES = 1000
# A Decimal is written as an integer for comparison if that has at most this many digits.
MOST_DECIMAL_DIGITS = 1000
MAX_INTEGER_CHARACTERS = 20  # of one that JSON carries as a number, by `_to_wire`


class Tagged(NamedTuple):
    """A parsed one-key object: a value that JSON cannot represent."""

    kind: str
    body: Any


def encode(value: object) -> bytes:
    """Return the wire form. Raises TypeError if not plain data, ValueError if nested too deep."""
    return json.dumps(_to_wire(value, 0), separators=(",", ":")).encode()


def _to_wire(value: object, depth: int) -> object:
    if depth > MAX_DEPTH:
        raise ValueError(f"value is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an Enum, `str` would return its name
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
    if isinstance(value, Fraction):
        return {"fraction": [_to_wire(n, depth) for n in (value.numerator, value.denominator)]}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return _to_wire(value.item(), depth)
    if isinstance(value, numbers.Integral):
        return _to_wire(int(value), depth)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be judged; use plain data")


def decode(wire: bytes) -> object:
    """Return the value in `wire`. Raises any exception if `wire` is not from `encode`."""
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
    if kind == "decimal":
        return Decimal(body)
    if kind == "fraction":
        numerator, denominator = map(_from_wire, body)
        return Fraction(numerator, denominator)  # type: ignore[call-overload]
    if kind == "dict":
        items = [(_from_wire(key), _from_wire(value)) for key, value in body]
        refuse_collisions([key for key, _ in items])
        return dict(items)
    members = [_from_wire(item) for item in body]
    if kind != "tuple":
        refuse_collisions(members)
    return CONTAINERS[kind](members)


def refuse_collisions(members: Sequence[object]) -> None:
    """Raise ValueError if so many members have equal hashes, like multiples of 2**61 - 1, that a
    set or dict of them would take quadratic time. Raises TypeError if one has no hash.
    """
    if len(members) - len(set(map(hash, members))) > MOST_EQUAL_HASHES:
        raise ValueError(f"more than {MOST_EQUAL_HASHES} members of a set or dict hash like others")


def parse(wire: bytes) -> object:
    """Parse JSON, with its objects as `Tagged`. Raises ValueError if it is malformed."""
    # only a value with so many brackets can be nested too deep
    if wire.count(b"[") + wire.count(b"{") > MAX_BRACKETS:
        brackets = STRING.sub(b"", wire).translate(None, NO_BRACKET)
        if max(itertools.accumulate(map(STEP.__getitem__, brackets)), default=0) > MAX_BRACKETS:
            raise ValueError(f"malformed value: nested more than {MAX_DEPTH} deep")
    return DECODER.decode(wire.decode())


def _tagged(pairs: list[tuple[str, object]]) -> Tagged:
    if len(pairs) != 1:
        raise ValueError("malformed value: an object has exactly one key, its type")
    ((kind, body),) = pairs
    if kind not in BODIES or not isinstance(body, BODIES[kind]):
        raise ValueError(f"malformed value: {kind[:20]!r} with a {type(body).__name__}")
    return Tagged(kind, body)


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_CHARACTERS:  # converting a long one takes quadratic time
        raise ValueError("malformed value: an integer too long for JSON")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_tagged, parse_int=_integer)


def matches(expected: object, wire: bytes) -> bool:
    """Return whether the untrusted encoded value in `wire` is the expected one.

    They are compared as by `==`: True equals 1 and 1.0, a set equals a frozenset. Three rules
    differ. Where a float is expected, a number may differ by 1e-6, absolute or relative. NaN equals
    NaN. A tuple is accepted for an expected list, since tests read from JSON cannot distinguish
    them, but an expected tuple needs a tuple. Keys and members of sets must be exactly equal.
    """
    try:
        if len(wire) > MAX_LENGTH_RATIO * len(encode(expected)):
            return False
        return _matches(expected, parse(wire))
    except (ValueError, TypeError, RecursionError, ArithmeticError):
        return False


def _matches(expected: Any, wire: Any) -> bool:
    kind, body = _kind_and_body(wire)
    if expected is None:
        return body is None
    if isinstance(expected, int | float | Fraction | Decimal):
        return kind in NUMBERS and _numbers_match(expected, kind, body)
    if isinstance(expected, str):
        return kind == "str" and str(expected) == body
    if isinstance(expected, bytes | bytearray):
        return kind == "bytes" and expected == body
    if not isinstance(body, list) or len(body) != len(expected):
        return False
    if isinstance(expected, list):
        return kind in ("list", "tuple") and all(map(_matches, expected, body))
    if isinstance(expected, tuple):
        return kind == "tuple" and all(map(_matches, expected, body))
    if isinstance(expected, dict):
        return kind == "dict" and _dicts_match(expected, body)
    return kind in ("set", "frozenset") and _sets_match(expected, body)


def _kind_and_body(wire: Any) -> tuple[str, Any]:
    """Return the name of the type of a parsed wire form, and its value or members."""
    if isinstance(wire, dict):  # from `_to_wire`, unparsed
        ((kind, body),) = wire.items()
        wire = Tagged(kind, body)
    if not isinstance(wire, Tagged):
        return type(wire).__name__, wire
    if wire.kind == "int":
        return "int", int(wire.body, 16)
    if wire.kind in ("bytes", "decimal"):
        return wire.kind, _from_wire(wire)
    if wire.kind == "fraction":  # a pair, since a Fraction would look for a common divisor
        (_, numerator), (kind, denominator) = map(_kind_and_body, wire.body)
        if (type(numerator), kind) != (int, "int") or denominator < 1:
            raise ValueError("malformed value: a fraction is two integers")
        return "fraction", (numerator, denominator)
    return wire


def _numbers_match(expected: Any, kind: str, actual: Any) -> bool:
    if not isinstance(expected, float):
        unequal = {"fraction": Decimal, "decimal": Fraction}.get(kind, ())  # in Python
        return not isinstance(expected, unequal) and _exactly(expected) == _exactly(actual)
    if kind == "fraction":
        actual = actual[0] / actual[1]
    if math.isnan(expected):
        return math.isnan(actual)
    return math.isclose(expected, float(actual), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _exactly(number: Any) -> tuple[int, int] | str:
    """Return a number's numerator and denominator, or a text if it is not finite or is a Decimal
    whose ratio would be long.
    """
    if isinstance(number, tuple):
        return number
    if isinstance(number, Decimal) and number.is_finite():
        sign, digits, exponent = number.as_tuple()
        assert isinstance(exponent, int)
        if max(number.adjusted(), -exponent) > MOST_DECIMAL_DIGITS:
            zeros = len(digits) - len(bytes(digits).rstrip(b"\0"))
            return f"{sign} {digits[: len(digits) - zeros]} {exponent + zeros}"
    if isinstance(number, float | Decimal) and not math.isfinite(number):
        return str(float(number))
    return number.as_integer_ratio()


def _dicts_match(expected: dict, pairs: list) -> bool:
    left = {_fingerprint(_to_wire(key, 0)): value for key, value in expected.items()}
    for wire_key, wire_value in pairs:
        key = _fingerprint(wire_key)
        if key not in left or not _matches(left.pop(key), wire_value):
            return False
    return not left


def _sets_match(expected: set | frozenset, items: list) -> bool:
    return {_fingerprint(_to_wire(item, 0)) for item in expected} == set(map(_fingerprint, items))


def _fingerprint(wire: Any) -> bytes:
    """Return a digest that is equal for two keys or members if Python calls them equal, and for two
    NaN. Raises ValueError if it is not hashable in Python.
    """
    kind, body = _kind_and_body(wire)
    if kind == "tuple":
        content = b"".join(map(_fingerprint, body))
    elif kind == "frozenset":
        content = b"".join(sorted(set(map(_fingerprint, body))))
    elif kind in ("list", "set", "dict"):
        raise ValueError("malformed value: an unhashable key")
    elif kind == "str":
        content = body.encode("utf-8", "surrogatepass")
    elif kind in NUMBERS:
        exact = _exactly(body)
        kind, content = "number", exact.encode() if isinstance(exact, str) else b"%x/%x" % exact
    else:
        content = repr(body).encode()
    return hashlib.blake2b(kind.encode() + b":" + content, digest_size=32).digest()
