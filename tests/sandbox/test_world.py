"""A program finds the world it would find if it were run by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlef_sandbox import Limits, Sandbox, Status

# From 3.12 on Python itself limits calls through native code, whatever the recursion limit is.
DEEP = 30000 if sys.version_info < (3, 12) else 300
WORLD = {
    "input": ("print(input() + input())", "ab"),
    "end_of_input": (
        "input(); input()\ntry: input()\nexcept EOFError: print('end')",
        "end",
    ),
    "iteration": ("import sys; print([*sys.stdin])", "['a\\n', 'b\\n']"),
    "buffer": ("import sys; print(sys.stdin.buffer.read())", "b'a\\nb\\n'"),
    "mode": ("import sys; print(sys.stdin.mode, sys.stdout.mode)", "r w"),
    "open_zero": ("print(open(0).read().split())", "['a', 'b']"),
    "file_size": ("import os; print(os.read(0, os.fstat(0).st_size))", "b'a\\nb\\n'"),
    "seek": ("import sys; input(); sys.stdin.seek(0); print(input())", "a"),
    "exit": ("print(1); exit()", "1"),
    "quit": ("print(1); quit(0)", "1"),
    "main": ("if __name__ == '__main__': print('main')", "main"),
    "main_module": ("x = 5\nimport __main__\nprint(__main__.x)", "5"),
    "argv": ("import sys; print(sys.argv)", "['solution.py']"),
    "file": ("print(__file__)", "solution.py"),
    "unicode": ("print('\u00e9\u4e2d\U0001f600')", "\u00e9\u4e2d\U0001f600"),
    "hash_seed": ("print(hash('a') == hash('a'), hash('seed'))", None),
    "recursion_limit": ("import sys; print(sys.getrecursionlimit())", "1000"),
    "deep_recursion": (
        "import sys; sys.setrecursionlimit(10**6)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "print(f(10**5))",
        "100000",
    ),
    "deep_recursion_in_a_thread": (
        "import sys, threading\n"
        "sys.setrecursionlimit(10**6); threading.stack_size(2**27)\n"
        "def f(n): return 0 if n == 0 else max(1, 1 + f(n - 1))\n"
        "t = threading.Thread(target=lambda: print(f(10**4))); t.start(); t.join()",
        "10000",
    ),
    "deep_recursion_through_native_code": (
        "import sys, functools; sys.setrecursionlimit(10**6)\n"
        "@functools.lru_cache(None)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        f"print(f({DEEP}))",
        str(DEEP),
    ),
    "thread_still_running_at_the_end": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
        "late",
    ),
    "handler_at_exit": ("import atexit; atexit.register(print, 'bye')", "bye"),
    "file_left_open": ("f = open(1, 'w', closefd=False); f.write('kept')", "kept"),
    "writer_with_its_own_buffer": (
        "import io, os\n"
        "class Writer(io.IOBase):\n"
        "    def __init__(self): self.text = ''\n"
        "    def flush(self): os.write(1, self.text.encode()); self.text = ''\n"
        "writer = Writer()\n"
        "writer.text = 'kept'",
        "kept",
    ),
    "replaced_standard_output": (
        "import sys, io, os\n"
        "class Out(io.StringIO):\n"
        "    def flush(self): os.write(1, self.getvalue().encode()); self.truncate(0)\n"
        "sys.stdout = Out(); print('kept')",
        "kept",
    ),
    "detached_standard_output": (
        "import io, sys\n"
        "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8'); print('kept')",
        "kept",
    ),
    "writer_on_detached_standard_output": (
        "import codecs, sys\n"
        "sys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach()); print('kept')",
        "kept",
    ),
    "detached_and_no_more": (
        "import os, sys; print('kept'); sys.stdout.flush(); sys.stdout.detach(); sys.stdout = None",
        "kept",
    ),
    "deleted_standard_output": ("import sys; print('kept'); del sys.stdout", "kept"),
    "deleted_streams": (
        "import sys; print('kept')\ndel sys.stdout, sys.stderr, sys.__stderr__, sys.__stdin__",
        "kept",
    ),
    "opened_anew": ("import os, sys; sys.stdout = os.fdopen(1, 'w'); print('kept')", "kept"),
    "closed_standard_output": ("import sys; print('kept'); sys.stdout.close()", "kept"),
    "errors_into_output": ("import sys; sys.stderr = sys.stdout; print('kept')", "kept"),
    "exit_without_standard_error": ("import sys; print('kept'); del sys.stderr; exit(0)", "kept"),
    "asyncio": (
        "import asyncio\n"
        "async def main(): await asyncio.sleep(0); print(await asyncio.to_thread(lambda: 5))\n"
        "asyncio.run(main())",
        "5",
    ),
    "thread_pool": (
        "from multiprocessing.pool import ThreadPool\n"
        "with ThreadPool(3) as pool: print(pool.map(abs, [-1, 2]))",
        "[1, 2]",
    ),
    "semaphores_of_multiprocessing": (
        "import multiprocessing as m, threading\n"
        "lock, many, again = m.Lock(), m.Semaphore(2), m.RLock()\n"
        "with lock, again, again, many:\n"
        "    print(lock.acquire(False), lock.acquire(timeout=0.01), many, again)\n"
        "    thread = threading.Thread(target=lambda: print(again.acquire(block=False)))\n"
        "    thread.start(); thread.join()\n"
        "for release in (lock.release, again.release):\n"
        "    try: release()\n"
        "    except (ValueError, AssertionError) as error: print(error)\n"
        "queue = m.Queue(); queue.put(7); print(queue.get())",
        "False False <Semaphore(value=1)> <RLock(MainProcess, 2)>\nFalse\n"
        "semaphore or lock released too many times\n"
        "attempt to release recursive lock not owned by thread\n7",
    ),
    "null_device": (
        "import os, sys, pathlib; sys.stderr = open(os.devnull, 'w'); print(9, file=sys.stderr)\n"
        "with open(os.devnull, 'wb') as f: print(f.write(b'abc'), os.fsdecode(f.name))\n"
        "print(repr(open('/dev/null').read()), pathlib.Path('/dev/null').write_text('x'))",
        "3 /dev/null\n'' 1",
    ),
    "redirected_to_the_null_device": (
        "import contextlib, os\n"
        "with contextlib.redirect_stdout(open(os.devnull, 'w+', encoding='utf-8')): print('no')\n"
        "print('yes')",
        "yes",
    ),
    "standard_streams_by_path": (
        "import pathlib; print(open('/dev/stdin').read().split(), flush=True)\n"
        "with open('/dev/stdout', 'w') as out: print('more', file=out)\n"
        "pathlib.Path('/dev/stderr').write_text('no'); print('end')",
        "['a', 'b']\nmore\nend",
    ),
    "all_its_threads": (
        "import threading; end = threading.Event(); count = 0\n"
        "for _ in range(63): threading.Thread(target=end.wait).start(); count += 1\n"
        "end.set(); print(count)",
        "63",
    ),
    "recursion": (
        "def depth(n): return n if n == 995 else depth(n + 1)\nprint(depth(0))",
        "995",
    ),
    "source_of_a_function": (
        "import inspect\ndef f(): pass  # with this\nprint(inspect.getsource(f))",
        "def f(): pass  # with this",
    ),
    "judge": ("import os; print(bool(os.environ.get('ONLINE_JUDGE')))", "True"),
    "locale": (
        "import locale as l\nfirst = l.setlocale(l.LC_ALL, '')\nl.setlocale(l.LC_ALL, 'C')\n"
        "print(l.setlocale(l.LC_ALL, '') == first, l.getpreferredencoding())",
        "True utf-8",
    ),
    "many_digits": ("print(len(str(10**49_999)), int('7' * 9999) % 10)", "50000 7"),
    "pickle_of_its_own_class": (
        "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)",
        "A",
    ),
    "database_in_memory": (
        "import sqlite3; c = sqlite3.connect(':memory:'); c.execute('create table t (n)')\n"
        "c.executemany('insert into t values (?)', zip(range(9))); c.commit()\n"
        "print(c.execute('select sum(n) from t').fetchone())",
        "(36,)",
    ),
    "tls_without_a_network": (
        "import ssl; print(ssl.create_default_context().check_hostname)",
        "True",
    ),
    "module_loaded_on_demand": ("import colorsys; print(colorsys.__name__)", "colorsys"),
    "extension_modules": ("import hashlib, zlib, bz2, decimal; print(decimal.Decimal(1))", "1"),
    "alarm": (
        "import signal, time\n"
        "def handler(*_): print('rang'); raise SystemExit\n"
        "signal.signal(signal.SIGALRM, handler); signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "time.sleep(2)",
        "rang",
    ),
    "time": ("import time; print(time.time() > 1e9, time.perf_counter() > 0)", "True True"),
    "future_import_is_its_own": ("def f(x: nowhere): pass", None),
    "coding_cookie": ("# -*- coding: latin-1 -*-\nprint('x')", "x"),
}


@pytest.mark.parametrize(("source", "printed"), WORLD.values(), ids=WORLD)
def test_the_world_looks_real(sandbox: Sandbox, source: str, printed: str | None) -> None:
    result = sandbox.run(source, "a\nb\n", Limits(memory_bytes=256 << 20))
    if source.startswith("def f(x: nowhere)"):  # our own `annotations` import must not leak in
        assert b"NameError" in result.stderr
        return
    assert result.status is Status.OK, result
    if printed is not None:
        assert result.stdout.decode().strip() == printed


def test_two_runs_see_the_same_hashes_and_the_same_random_numbers(sandbox: Sandbox) -> None:
    source = "import random; print(hash('seed'), random.random(), {'a', 'b', 'c'})"
    assert sandbox.run(source).stdout == sandbox.run(source).stdout


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import sys; sys.stdout.detach()", 120),  # flushing it fails, as in `python solution.py`
        ("import os; print(1); os.close(1)", 120),
        ("import sys; del sys.stderr; sys.exit('words')", 1),
        ("import sys; sys.stderr = 5; sys.exit('words')", 120),
        ("import sys; sys.exit(True)", 1),
        ("import sys; sys.exit(-1)", 255),
        ("import sys; sys.stdout.detach(); 1 / 0", 120),
    ],
)
def test_the_exit_code_is_the_interpreters(sandbox: Sandbox, source: str, code: int) -> None:
    real = subprocess.run([sys.executable, "-c", source], capture_output=True, env={})
    assert sandbox.run(source).exit_code == real.returncode == code


def test_a_traceback_shows_no_path_of_this_machine(sandbox: Sandbox) -> None:
    for source in ("open('input.txt')", "import json; json.loads('{')", "import no_such_module"):
        stderr = sandbox.run(source).stderr.decode()
        assert sys.base_prefix + "/lib" not in stderr and str(Path.cwd()) not in stderr
        assert "rlef_sandbox" not in stderr and 'File "solution.py", line 1' in stderr, stderr


def test_bytes_that_are_not_text_come_through(sandbox: Sandbox) -> None:
    source = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert sandbox.run(source, bytes(range(256))).stdout == bytes(range(256))


def test_a_large_input_and_output_come_through(sandbox: Sandbox) -> None:
    text = b"0123456789\n" * 300_000
    source = "import sys; sys.stdout.write(sys.stdin.read())"
    assert sandbox.run(source, text).stdout == text
