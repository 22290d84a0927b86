"""The two halves of a CheckTest, in two confined processes with a socket between them.

The program's side serves calls of its function. The other side runs the test's code, for which
`candidate` is a stand-in that sends each call across and waits. Only plain data crosses (`values`),
preceded by its length, so neither side has an object, a frame or a line of the other. An exception
of the program arrives as the built-in exception of that name, if there is one. A result that is not
plain data arrives as an object that can only be compared with None.

A check that exceeds a limit may do so by its own fault, or because of what the program returned. So
it marks in its exchange file whether a call is under way and whether a large value has arrived; and
at the end that it returned, since a check that exits with code 0 has judged nothing.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import re
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import values

LENGTH = struct.Struct("<Q")
MAX_MESSAGE_BYTES = 64 << 20
NAME_CHARACTERS, WORDS_CHARACTERS = 200, 4000  # of an exception
RETURNED, OPAQUE, RAISED = b"=", b"?", b"!"
# Exit codes of the checking side, besides 0 and 1 (program_runner.py).
CANDIDATE_RAISED, CANDIDATE_GONE, CHECK_BROKEN = 5, 6, 7

# Marks of the checking side in its exchange file, a byte each.
IN_A_CALL, HAS_LARGE_REPLY, HAS_RETURNED = 0, 1, 2
# What may make a check slow: a reply of more bytes, or with a number of 6 digits or more before the
# point. Loops and tables over smaller values stay within seconds and megabytes.
LARGE_REPLY_BYTES = 4096
LARGE_NUMBER = re.compile(rb'(?<![.\d])\d{6}|e\+|"int"')


class GoneError(Exception):
    """The other side ended, or its message is malformed."""


def serve(function: Callable[..., object], descriptor: int) -> None:
    """Answer calls of `function` until the other side ends."""
    while True:
        try:
            call: Any = values.decode(_receive(descriptor))
        except (GoneError, ConnectionResetError):  # the check has ended, or was stopped at a limit
            return
        arguments, keywords = call
        try:
            reply = _reply(function(*arguments, **keywords))
        except Exception as error:
            reply = RAISED + json.dumps(_description(error)).encode()
        try:
            _send(descriptor, reply)
        except (BrokenPipeError, ConnectionResetError):
            return


def _reply(returned: object) -> bytes:
    try:
        return RETURNED + values.encode(returned)
    except TypeError:
        return OPAQUE + json.dumps(type(returned).__name__[:NAME_CHARACTERS]).encode()


class Opaque:
    """A result that is not plain data. Any use of it but `is None` is the program's error."""

    def __init__(self, kind: str, raised: list[BaseException]) -> None:
        self._kind, self._raised = kind, raised

    def __repr__(self) -> str:
        return f"<{self._kind}>"

    def _refuse(self, *_: object) -> NoReturn:
        error = TypeError(f"a value of type {self._kind} cannot be judged; use plain data")
        self._raised.append(error)
        raise error

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __getattr__ = _refuse


@contextlib.contextmanager
def breaking_the_check() -> Iterator[None]:
    """Report any failure inside as a fault of the test's code, which has called nothing yet."""
    try:
        yield
    except BaseException as error:
        _leave(CHECK_BROKEN, error)


def check(check_function: Callable[..., object], descriptor: int, marks: int) -> None:
    """Run the test's code on a stand-in for the program's function, with marks in the file `marks`.
    Exits if it fails.
    """
    raised: list[BaseException] = []
    replies = 0
    one_at_a_time = threading.Lock()  # a check may call from several threads

    def candidate(*arguments: object, **keywords: object) -> object:
        nonlocal replies
        try:
            call = values.encode([list(arguments), keywords])
        except (TypeError, ValueError) as error:
            # it may contain what the program returned before
            _leave(CANDIDATE_RAISED if replies else CHECK_BROKEN, error)
        replies += 1
        try:
            with one_at_a_time:
                os.pwrite(marks, b"1", IN_A_CALL)
                _send(descriptor, call)
                reply = _receive(descriptor)
                if len(reply) > LARGE_REPLY_BYTES or LARGE_NUMBER.search(reply):
                    os.pwrite(marks, b"1", HAS_LARGE_REPLY)
                os.pwrite(marks, b"0", IN_A_CALL)
            kind, body = reply[:1], reply[1:]
            if kind == RETURNED:
                return values.decode(body)
            if kind == OPAQUE:
                return Opaque(str(json.loads(body)), raised)
            name, words = json.loads(body)
        except (GoneError, OSError) as error:
            _leave(CANDIDATE_GONE, error)
        except Exception as error:  # any error from hostile bytes: the program sent them
            _leave(CANDIDATE_RAISED, error)
        raised.append(_exception(str(name), str(words)))
        raise raised[-1]

    try:
        returned = check_function(candidate)
    except BaseException as error:
        if any(error is one for one in raised):
            _leave(CANDIDATE_RAISED, error)
        if not replies:
            _leave(CHECK_BROKEN, error)  # the program had no part in it
        for one in raised:
            one.__traceback__ = None  # hides the frames of this file
        raise
    if returned is not None:  # a verdict, or calls not yet made; either would be ignored
        kind = type(returned).__name__
        _leave(CHECK_BROKEN, TypeError(f"check returned a {kind}; raise AssertionError instead"))
    if not replies:
        _leave(CHECK_BROKEN, TypeError("check returned without a call of the program"))
    os.pwrite(marks, b"1", HAS_RETURNED)


def _description(error: Exception) -> list[str]:
    try:
        words = str(error)
    except Exception:
        words = ""
    return [type(error).__name__[:NAME_CHARACTERS], words[:WORDS_CHARACTERS]]


def _exception(name: str, words: str) -> Exception:
    name, words = name[:NAME_CHARACTERS], words[:WORDS_CHARACTERS]
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        if issubclass(kind, StopIteration | StopAsyncIteration):
            # `all(map(...))` in the check would end silently; PEP 479 converts it likewise
            return RuntimeError(f"the program raised {name}")
        try:
            return kind(words)
        except TypeError:  # UnicodeDecodeError and others take more arguments
            pass
    return RuntimeError(f"{name}: {words}")


def _leave(code: int, error: BaseException) -> NoReturn:
    words = "".join(traceback.format_exception_only(error))
    print(words, end="", file=sys.__stderr__, flush=True)
    os._exit(code)


def _send(descriptor: int, message: bytes) -> None:
    data = memoryview(LENGTH.pack(len(message)) + message)
    while data:
        data = data[os.write(descriptor, data) :]


def _receive(descriptor: int) -> bytes:
    (length,) = LENGTH.unpack(_receive_exactly(descriptor, LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise GoneError(f"a value of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return _receive_exactly(descriptor, length)


def _receive_exactly(descriptor: int, length: int) -> bytes:
    parts, missing = [], length
    while missing:
        part = os.read(descriptor, min(missing, 1 << 20))
        if not part:
            raise GoneError("the program ended before the check did")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
