"""How dataclasses travel as JSON: a table of fields, each with its two directions.

Decoding meets untrusted bytes. It answers with a value or with WireError, which names the field.
Bytes travel as a JSON string where they are UTF-8, which its bytes then are, and otherwise as
{"base64": "..."}; so a program is readable in a request, and no byte is ever lost.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..verdict import as_bytes


class WireError(ValueError):
    """A message that is not of this form; says where and why."""


class Field(NamedTuple):
    """How one field travels. `decode` takes the JSON value and its path, for messages."""

    encode: Callable[[Any], object]
    decode: Callable[[object, str], Any]


class Record(NamedTuple):
    """A frozen dataclass that travels as a JSON object."""

    type: Callable[..., Any]
    fields: Mapping[str, Field]

    @property
    def field(self) -> Field:
        """The record within another."""
        return Field(self.encode, self.decode)

    def encode(self, record: object) -> dict[str, object]:
        return {name: field.encode(getattr(record, name)) for name, field in self.fields.items()}

    def decode(self, wire: object, path: str, *, tolerant: bool = False) -> Any:
        """The dataclass. `tolerant` passes over unknown fields, which a newer peer may send."""
        given = dict(of_type(wire, dict, path))
        unknown = given.keys() - self.fields.keys()
        if unknown and not tolerant:
            known = ", ".join(self.fields)
            raise WireError(f"{_join(path, min(unknown))}: unknown field; known: {known}")
        arguments = {
            name: field.decode(given[name], _join(path, name))
            for name, field in self.fields.items()
            if name in given
        }
        missing = _required(self.type) - arguments.keys()
        if missing:
            raise WireError(f"{_join(path, min(missing))}: this field is needed")
        try:
            return self.type(**arguments)
        except (ValueError, OverflowError) as error:
            raise WireError(f"{path}: {error}") from None
        except (RecursionError, MemoryError):  # of Python's parser, on code nested too deep
            raise WireError(f"{path}: nested too deep") from None


def _required(record_type: Callable[..., Any]) -> set[str]:
    absent = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(record_type)  # type: ignore[arg-type]
        if field.default is absent and field.default_factory is absent
    }


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def of_type(wire: object, wanted: type, path: str) -> Any:
    """`wire`, if it is of the type; a boolean is no number."""
    if isinstance(wire, wanted) and (wanted is bool or not isinstance(wire, bool)):
        return wire
    raise WireError(f"{path or 'the body'}: {_named(type(wire))} where {_named(wanted)} is needed")


def _named(kind: type) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}
    return {**names, float: "a number", type(None): "null"}.get(kind, kind.__name__)


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
    except (binascii.Error, ValueError) as error:
        raise WireError(f"{path}.base64: {error}") from None


def _text_from_wire(wire: object, path: str) -> str:
    return of_type(wire, str, path)


def _flag_from_wire(wire: object, path: str) -> bool:
    return of_type(wire, bool, path)


def optional(field: Field) -> Field:
    """The field, or null for None."""
    return Field(
        lambda value: None if value is None else field.encode(value),
        lambda wire, path: None if wire is None else field.decode(wire, path),
    )


def number(kind: type[int] | type[float], most: float, least: float = 0) -> Field:
    """A finite number within bounds; an integer where `kind` is int."""

    def decode(wire: object, path: str) -> float:
        if kind is float and isinstance(wire, int):
            of_type(wire, int, path)  # no boolean
        else:
            of_type(wire, kind, path)
        assert isinstance(wire, int | float)
        if not least <= wire <= most:  # NaN is not
            shown = f"{wire:.6g}" if isinstance(wire, float) else _short(wire)
            raise WireError(f"{path}: {shown}; it must be within {least} and {most:.15g}")
        return kind(wire)

    return Field(kind, decode)


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**30 else f"a number of {number.bit_length()} bits"


def list_of(kinds: Mapping[str, Record]) -> Field:
    """A list of records of these kinds; each names its kind, the first kind may go unnamed."""
    one = any_of(kinds)
    return Field(
        lambda items: [one.encode(item) for item in items],
        lambda wire, path: [
            one.decode(item, f"{path}[{place}]")
            for place, item in enumerate(of_type(wire, list, path))
        ],
    )


def any_of(kinds: Mapping[str, Record]) -> Field:
    by_type = {record.type: kind for kind, record in kinds.items()}

    def encode(item: object) -> object:
        kind = by_type.get(type(item))
        if kind is None:
            known = ", ".join(record.type.__name__ for record in kinds.values())
            raise ValueError(f"a {type(item).__name__} cannot travel; known: {known}")
        return {"kind": kind, **kinds[kind].encode(item)}

    def decode(wire: object, path: str) -> Any:
        given = dict(of_type(wire, dict, path))
        kind = given.pop("kind", next(iter(kinds), None))
        if not isinstance(kind, str) or kind not in kinds:
            known = ", ".join(kinds)
            raise WireError(f"{path}.kind: unknown kind {str(kind)[:40]!r}; known: {known}")
        return kinds[kind].decode(given, path)

    return Field(encode, decode)


def parse(body: bytes) -> object:
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON in UTF-8: {error}") from None


BYTES = Field(bytes_to_wire, bytes_from_wire)
TEXT = Field(str, _text_from_wire)
FLAG = Field(bool, _flag_from_wire)
