"""The two halves of a CheckTest, in two confined processes with a socket between them.

The program's side serves calls of its function. The other side runs the test's code, for which
`candidate` is a stand-in that sends each call across and waits. Only plain data crosses (`values`),
each message after its length. So neither side has an object, a frame or a source line of the other.
An exception of the program arrives as one of its nearest built-in class, with its name, its message
and, if they are plain data, its arguments. A result that is not plain data arrives as an object
that can only be compared with None.

A check that exceeds a limit may do so by its own fault, or because of what the program returned.
It marks in its exchange file that it has called the program: before that, the fault is its own.
After that, `rehearse` tells which: it runs the check without the program. At its end the check
marks that it returned, since one that exits with code 0 before has judged nothing.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import values

LENGTH = struct.Struct("<Q")
MAX_MESSAGE_BYTES = 64 << 20
NAME_CHARACTERS, WORDS_CHARACTERS = 200, 4000  # of an exception
RETURNED, OPAQUE, RAISED = b"=", b"?", b"!"
# Exit codes of the checking side, besides 0 and 1 (program_runner.py).
CANDIDATE_RAISED, CANDIDATE_GONE, CHECK_BROKEN, OUT_OF_MEMORY = 5, 6, 7, 8

HAS_CALLED, HAS_RETURNED = 0, 1  # marks of the checking side in its exchange file, a byte each


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
            send(descriptor, reply)
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


def check(check_function: Callable[..., object], descriptor: int, marks: int) -> None:
    """Run the test's code on a stand-in for the program's function, with marks in the file `marks`.
    Exits for faults that have an exit code above; raises the test's other errors (AssertionError).
    """
    raised: list[BaseException] = []
    calls = 0
    one_at_a_time = threading.Lock()  # a check may call from several threads

    def candidate(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        try:
            call = values.encode([list(arguments), keywords])
        except (TypeError, ValueError) as error:
            # it may contain what the program returned before
            leave(CANDIDATE_RAISED if calls else CHECK_BROKEN, error)
        try:
            with one_at_a_time:
                if not calls:
                    os.pwrite(marks, b"1", HAS_CALLED)
                calls += 1
                send(descriptor, call)
                reply = _receive(descriptor)
            kind, body = reply[:1], reply[1:]
            if kind == RETURNED:
                return values.decode(body)
            if kind == OPAQUE:
                return Opaque(str(json.loads(body)), raised)
            raised.append(_exception(*json.loads(body)))
        except (GoneError, OSError) as error:
            leave(CANDIDATE_GONE, error)
        except Exception as error:  # any error from hostile bytes: the program sent them
            leave(CANDIDATE_RAISED, error)
        raise raised[-1]

    try:
        returned = check_function(candidate)
    except BaseException as error:
        if any(error is one for one in raised):
            leave(CANDIDATE_RAISED, error)
        if not calls:
            leave(CHECK_BROKEN, error)  # the program had no part in it
        if isinstance(error, MemoryError):
            leave(OUT_OF_MEMORY, error)
        for one in raised:
            one.__traceback__ = None  # hides the frames of this file
        if isinstance(error, SystemExit) and error.code not in (None, 0):
            leave(1, error)  # its code may be what the program returned
        raise
    if returned is not None:  # a verdict, or calls not yet made; either would be ignored
        kind = type(returned).__name__
        leave(CHECK_BROKEN, TypeError(f"check returned a {kind}; raise AssertionError instead"))
    if not calls:
        leave(CHECK_BROKEN, TypeError("check returned without a call of the program"))
    os.pwrite(marks, b"1", HAS_RETURNED)


class StandIn:
    """A value in place of one of the program's: it equals every other, and is empty."""

    def _answer(self, *_: object, **__: object) -> StandIn:
        return self

    def _hold(self, *_: object) -> bool:
        return True

    def _is_zero(self) -> int:
        return 0

    __bool__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _hold
    __hash__ = __len__ = __index__ = __int__ = _is_zero
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _answer
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = _answer
    __neg__ = __abs__ = __round__ = __getitem__ = __getattr__ = __call__ = _answer

    def __float__(self) -> float:
        return 0.0

    def __iter__(self) -> Iterator[object]:
        return iter(())


STAND_INS = {"equal": StandIn(), "none": None}


class _Unasserted(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        ignored = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
        return ast.Try([ast.Expr(node.test)], [ignored], [], [])


def unasserted(source: bytes) -> types.CodeType:
    """Compile a test's code with assertions that are computed but never fail."""
    tree = _Unasserted().visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), "<check>", "exec", dont_inherit=True)


def rehearse(check_function: Callable[..., object], stand_in: str) -> None:
    """Run the test's code with one of STAND_INS for all that the program returns. Code that exceeds
    a limit here too, where nothing comes from the program, does so by its own fault.
    """
    try:
        check_function(lambda *_, **__: STAND_INS[stand_in])
    except MemoryError as error:
        leave(OUT_OF_MEMORY, error)


def _description(error: Exception) -> list[object]:
    """Return an exception's name, those of its built-in classes, nearest first, its message, and
    the wire form of its arguments if they are plain data."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    words = arguments = ""
    with contextlib.suppress(Exception):
        words = str(error)[:WORDS_CHARACTERS]
        arguments = values.encode(error.args).decode()
    long = len(arguments) > WORDS_CHARACTERS
    return [type(error).__name__[:NAME_CHARACTERS], kinds, words, "" if long else arguments]


def _exception(name: str, kinds: list[str], words: str, arguments: str) -> Exception:
    """Return an exception of the first of the built-in `kinds` that can be made."""
    given: Any = values.decode(arguments.encode()) if arguments else (words,)
    for kind in [getattr(builtins, kind, None) for kind in kinds]:
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            continue
        if issubclass(kind, StopIteration | StopAsyncIteration):
            # `all(map(...))` in the check would end silently; PEP 479 converts it likewise
            return RuntimeError(f"the program raised {name}")
        own = type(name, (kind,), {"__str__": lambda _: words, "__module__": "builtins"})
        for parameters in (given, (words,)):
            with contextlib.suppress(TypeError):
                made = kind(*parameters)
                return made if (kind.__name__, str(made)) == (name, words) else own(*parameters)
    raise GoneError("a malformed exception")


def leave(code: int, error: BaseException) -> NoReturn:
    words = "".join(traceback.format_exception_only(error))
    print(words, end="", file=sys.__stderr__, flush=True)
    os._exit(code)


def send(descriptor: int, message: bytes) -> None:
    write_all(descriptor, LENGTH.pack(len(message)) + message)


def write_all(descriptor: int, content: bytes) -> None:
    written = os.write(descriptor, content)
    while written < len(content):
        written += os.write(descriptor, memoryview(content)[written:])


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
