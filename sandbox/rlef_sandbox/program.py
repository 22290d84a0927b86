"""Compile a source in a child, and run it as an ordinary interpreter would.

The zygote is an ordinary interpreter whose standard streams are descriptors 0, 1 and 2. A child has
the run's files there, so `sys.stdin`, `input()`, buffering and encodings are the real ones. This
module does what `python solution.py` does around a program: a fresh `__main__`, tracebacks of the
program's own frames, exit codes, threads joined, exit handlers run, files flushed. Nothing here is
trusted once the program's first line has run.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import linecache
import marshal
import os
import resource
import signal
import site
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from importlib.util import find_spec, spec_from_file_location
from typing import Any, NoReturn

from . import exchange, library_substitutes, values

FILE_NAME = "solution.py"
EXCHANGE_DESCRIPTOR = 3  # the call on the way in, its result on the way out
PEER_DESCRIPTOR = 4  # a socket to the other process of a CheckTest
THREAD_STACK_BYTES = 8 << 20
MAX_INTEGER_DIGITS = 50_000  # as LiveCodeBench's grader sets it; Python's own bound is 4,300
REPR_CHARACTERS = 4096  # of a returned value, for feedback
COMPILE_ERROR_CHARACTERS = 4096  # it quotes a source line, which may be the whole program

# What contest programs import most, loaded once in the zygote. Each module here makes every fork
# slower. Other modules of the standard library load on demand if the file layer lets the child read
# them; those that need a shared library of their own must be here or in EXTENSIONS.
PRELOAD = (
    "abc array bisect bz2 calendar cmath collections collections.abc copy dataclasses datetime "
    "decimal enum fractions functools hashlib heapq io itertools json lzma math numbers operator "
    "os queue random re statistics string struct sys threading time traceback types typing zlib"
)
# The zygote loads their libraries, which a child cannot read; importing them would cost memory.
EXTENSIONS = ("_sqlite3", "_ssl")


def preload() -> None:
    """Import and warm up, in the zygote, what nearly every program uses."""
    for name in PRELOAD.split():
        with contextlib.suppress(ImportError):  # an interpreter built without an optional module
            __import__(name)
    for spec in filter(None, map(find_spec, EXTENSIONS)):
        ctypes.PyDLL(spec.origin)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends a run; the interpreter ignores it
    sys.set_int_max_str_digits(MAX_INTEGER_DIGITS)
    library_substitutes.install()
    threading.stack_size(THREAD_STACK_BYTES)  # pthreads would use the main thread's 256 MiB
    site.setquit()
    site.setcopyright()
    site.sethelper()
    sys.argv[:] = sys.orig_argv[:] = [FILE_NAME]
    compile_source(b"print(sum(map(int, input().split())))")  # builds the compiler's types once


def load_packages(named: Sequence[str], modules: dict[str, str]) -> None:
    """Import packages, in the zygote; `modules` has the file of each top-level module that may be
    imported. Raises SystemExit if an import fails or starts a thread.
    """
    finder = types.SimpleNamespace(  # without a file there is no spec
        find_spec=lambda name, *_: spec_from_file_location(name, modules.get(name))
    )
    sys.meta_path.append(finder)
    for name in named:
        try:
            __import__(name)
        except Exception as error:
            raise SystemExit(f"package {name!r}: {type(error).__name__}: {error}") from None
        if len(os.listdir("/proc/self/task")) > 1:
            raise SystemExit(f"package {name!r} starts threads when imported: it cannot be forked")


def kept_code(file: int, kept: bytes, source: bytes) -> types.CodeType | None:
    """Return the program's code, loaded from `kept`, the content of `file`. If that is empty,
    compile the source, and write all of the code to the file, or nothing if it does not fit.
    """
    if kept:
        return marshal.loads(kept)
    code = compile_source(source)
    if code is None:
        return None
    try:
        content = marshal.dumps(code)
        if len(content) <= resource.getrlimit(resource.RLIMIT_FSIZE)[0]:
            exchange.write_all(file, content)
    except (ValueError, MemoryError, OSError):  # nested too deep, or no memory for a copy
        os.ftruncate(file, 0)
    return code


def compile_source(source: bytes) -> types.CodeType | None:
    """Return the program's code. Returns None, with the error on stderr, if it does not compile."""
    try:
        return compile(source, FILE_NAME, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        words = "".join(traceback.format_exception_only(error))
        print(words[-COMPILE_ERROR_CHARACTERS:], end="", file=sys.stderr, flush=True)
        return None


class Child:
    """A child that runs a program, and then the `call`, if given. `worker.BOOTSTRAP` executes its
    `code` in its `namespace` and calls `finish`. So only one frame of ours is below the program's,
    which can recurse nearly as deep as if it ran alone.
    """

    def __init__(self, code: types.CodeType, source: bytes, call: bytes | None) -> None:
        gc.enable()
        # for tracebacks and `inspect`; read when asked
        linecache.cache[FILE_NAME] = (lambda: source.decode("utf-8", "replace"),)
        self.error: BaseException | None = None  # of the program
        self.kept: object = None  # objects of the zygote: freeing them would copy many pages
        self._request = {} if call is None else json.loads(call)
        self._name = "__main__" if call is None else "solution"
        self._module = sys.modules[self._name] = types.ModuleType(self._name)
        self.namespace = self._module.__dict__
        self.namespace |= {"__file__": FILE_NAME, "__builtins__": sys.modules["builtins"]}
        self.code = exchange.unasserted(source) if "stand_in" in self._request else code

    def finish(self) -> NoReturn:
        """Make the call, if the program has not failed, and exit as the interpreter would."""
        exit_code = self.call()
        atexit._run_exitfuncs()
        os._exit(self.end() or exit_code)

    def call(self) -> int:
        """Make the call, and wait for the program's threads. Returns the exit code."""
        exit_code = _exit_code_of(self._call)
        if threading.active_count() > 1:
            exit_code = exit_code or _exit_code_of(threading._shutdown)  # type: ignore[attr-defined]
        return exit_code

    def end(self) -> int:
        """Flush and close the program's files. Returns an exit code if that fails, else 0."""
        # as in the interpreter: sys.stdout and sys.stderr, which the program may have replaced
        exit_code = _flush("stdout", "stderr")
        # Drop the program's module, so that files left open are closed, and so flushed, while the
        # functions that this needs still exist.
        del self.namespace, self._module
        for stream in ("stdin", "stdout", "stderr"):
            setattr(sys, stream, getattr(sys, f"__{stream}__", None))
        sys.modules.pop(self._name, None)
        gc.collect()
        _flush("__stdout__", "__stderr__")
        return exit_code

    def _call(self) -> None:
        error, self.error = self.error, None
        request, module = self._request, self._module
        if "check" in request:
            try:
                if error is not None:
                    raise error
                check = _callable_of(module, request["check"])
            except BaseException as fault:  # of the test's code, which has called nothing yet
                exchange.leave(exchange.CHECK_BROKEN, fault)
            if "stand_in" in request:
                exchange.rehearse(check, request["stand_in"])
            else:
                exchange.check(check, PEER_DESCRIPTOR, EXCHANGE_DESCRIPTOR)
        elif error is not None:
            raise error
        elif "serve" in request:
            exchange.serve(_callable_of(module, request["serve"]), PEER_DESCRIPTOR)
        elif request:
            arguments: Any = values.decode(request["args"].encode())
            _write_result(_callable_of(module, request["entry_point"])(*arguments))


def _callable_of(module: types.ModuleType, path: str) -> Callable[..., object]:
    """Return `function`, or `Class.method` of a new object of the class."""
    target: Any = module
    for name in path.split("."):
        if isinstance(target, type):
            target = target()
        target = getattr(target, name)
    return target


def _write_result(returned: object) -> None:
    """Write the value's wire form and its repr, each on a line."""
    try:
        shown = repr(returned)[:REPR_CHARACTERS].encode(errors="backslashreplace")
    except Exception:  # the program's own `__repr__` fails, or an integer is too long
        shown = f"<{type(returned).__name__}>".encode(errors="backslashreplace")
    exchange.write_all(EXCHANGE_DESCRIPTOR, values.encode(returned) + b"\n" + shown)


def _exit_code_of(step: Callable[[], None]) -> int:
    """Run `step`. Returns its exit code, as the interpreter would, with a traceback on stderr."""
    try:
        step()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        with contextlib.suppress(Exception):
            print(error.code, file=getattr(sys, "stderr", None) or sys.__stderr__)
        return 1
    except BaseException as error:
        _report(error)
        return 1
    return 0


def _report(error: BaseException) -> None:
    """Print the traceback as the interpreter would, beginning with the program's first frame."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != FILE_NAME:
        frames = frames.tb_next
    frame = frames
    while frame is not None and frame.tb_next is not None:
        if frame.tb_next.tb_frame.f_code is library_substitutes.open_file.__code__:
            frame.tb_next = frame.tb_next.tb_next  # a built-in function has no frame
        frame = frame.tb_next
    try:
        if sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(error), error, frames)
            return
        traceback.print_exception(type(error), error, frames, file=sys.__stderr__)
    except BaseException:  # no memory left, or the program broke what printing needs
        os.write(2, f"{type(error).__name__}\n".encode())


def _flush(*names: str) -> int:
    """Flush these streams of `sys`. Returns 120, as the interpreter does, if that fails."""
    failed = 0
    for name in names:
        stream = getattr(sys, name, None)
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            failed = 120
    return failed
