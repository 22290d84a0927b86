"""Find what is wrong with the code of a check, without running it.

Compiling untrusted code may take hours: each `finally` doubles what it contains, and long code can
take time that grows with its square. Code for which this cannot be ruled out is compiled in a child
with limits. That child runs this file, which therefore imports nothing of the package.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import re
import resource
import subprocess
import sys
import threading
import warnings
from types import CodeType

SHORT_BYTES = 16 << 10  # takes at most 0.05 s
SLOW = re.compile(rb"finally|coding")  # a declared encoding could hide `finally`
CPU_S, MEMORY_BYTES = 10, 1 << 30
LAZY = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_compiling = threading.Lock()  # the filters of warnings belong to the whole process


def fault_of(source: bytes, function: str = "", *, returns: bool = False) -> str:
    """Return why the source cannot be a check, or an empty string if it can.

    The source must compile. `function`, a path like `Class.check`, must be neither async nor a
    generator, because calling one does not run its code. Only a check that `returns` its verdict
    may return a value: from any other, which raises in order to fail, the value would be ignored.
    """
    if len(source) <= SHORT_BYTES and not SLOW.search(source):
        return _fault_of(source, function, returns)
    command = [sys.executable, "-I", "-S", __file__, function, "returns" * returns, str(CPU_S)]
    child = subprocess.run(command, input=source, capture_output=True, check=False)
    if child.returncode:
        return f"takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB to compile; make it simpler"
    return child.stdout.decode()


def _fault_of(source: bytes, function: str, returns: bool) -> str:
    try:
        with _compiling, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # from bytes, as in the sandbox, so that a declared encoding is obeyed
            code = compile(source, "<check>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return f"is not Python: {str(error) or 'nested too deep'}"
    for name in function.split("."):
        inner = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
        if not inner:
            return ""
        code = inner[-1]
    if code.co_flags & LAZY:
        return f"has a {function} that is async or a generator; make it a plain function"
    if not returns and _returns_value(code):
        return f"has a {function} that returns a value, which is ignored; raise AssertionError"
    return ""


def _returns_value(code: CodeType) -> bool:
    """Return whether a function may return anything but None."""
    nothing = ("LOAD_CONST", None)
    return any(
        (step.opname == "RETURN_CONST" and step.argval is not None)  # of Python 3.12 and 3.13
        or (
            step.opname == "RETURN_VALUE"
            and (step.is_jump_target or (before.opname, before.argval) != nothing)
        )
        for before, step in itertools.pairwise(dis.get_instructions(code))
    )


if __name__ == "__main__":
    core = int(resource.getrlimit(resource.RLIMIT_CORE)[1] != 0)  # 1 if allowed (seccomp.py)
    resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]),) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(_fault_of(sys.stdin.buffer.read(), sys.argv[1], bool(sys.argv[2])), end="")
