"""Using more than is given: memory, time, output, stack, threads, descriptors; and crashing."""

from __future__ import annotations

from rlef_sandbox import Limits, Status

from .attack import SUPERVISION, Attack, attacks

SHORT = Limits(cpu_s=0.3, wall_s=20.0, memory_bytes=128 << 20, output_bytes=64 << 10)
IDLE = Limits(cpu_s=0.2, wall_s=0.4, memory_bytes=128 << 20, output_bytes=64 << 10)
SPIN = """\
import ctypes, mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(b'\\xeb\\xfe')
spin = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
"""


def bounded(
    sources: dict[str, str], *statuses: Status, limits: Limits | None = None
) -> tuple[Attack, ...]:
    extra = {} if limits is None else {"limits": limits}
    return attacks(sources, (SUPERVISION,), *statuses, **extra)


MEMORY = bounded(
    {
        "one_large_list": "x = [0] * 10**9",
        "many_small_objects": "x = []\nwhile True: x.append(bytes(10**6))",
        "anonymous_mapping": (
            "import mmap; m = mmap.mmap(-1, 1 << 29)\nfor i in range(0, 1 << 29, 4096): m[i] = 1"
        ),
        "private_mappings_of_the_input": (
            "import ctypes, os; os.ftruncate(0, 65536); c = ctypes.CDLL(None)\n"
            "c.mmap.restype = ctypes.c_void_p; size = ctypes.c_size_t\n"
            "for _ in range(10000):\n"
            "    address = c.mmap(None, size(65536), 3, 2, 0, size(0))\n"
            "    if address == 2**64 - 1: raise MemoryError\n"
            "    ctypes.memset(address, 1, 65536)"
        ),
        "swallowed_memory_error": (
            "x = []\n"
            "try:\n"
            "    while True: x.append(bytearray(10**6))\n"
            "except MemoryError: pass\n"
            "print('done')"
        ),
        "memory_of_threads": (
            "import threading\n"
            "def eat(x=None):\n"
            "    x = []\n"
            "    while True: x.append(bytearray(10**6))\n"
            "for _ in range(8): threading.Thread(target=eat).start()"
        ),
        "page_tables": (
            "import ctypes, time; c = ctypes.CDLL(None); c.mmap.restype = ctypes.c_void_p\n"
            "L = ctypes.c_long\n"
            "for i in range(1, 20000):\n"
            "    p = c.mmap(L(i * (2 << 30)), L(4096), 1, 0x100022, -1, L(0))\n"
            "    if p != 2**64 - 1: ctypes.string_at(p, 1)\n"
            "time.sleep(0.2)"
        ),
        "page_tables_after_the_first_thread": (
            "import ctypes, threading, time\n"
            "c = ctypes.CDLL(None); c.mmap.restype = ctypes.c_void_p\n"
            "L = ctypes.c_long\n"
            "def fill():\n"
            "    time.sleep(0.1)\n"
            "    for i in range(1, 20000):\n"
            "        p = c.mmap(L(i * (2 << 30)), L(4096), 1, 0x100022, -1, L(0))\n"
            "        if p != 2**64 - 1: ctypes.string_at(p, 1)\n"
            "    time.sleep(0.2)\n"
            "threading.Thread(target=fill).start()\n"
            "c.syscall(60, 0)  # exit of this thread alone"
        ),
        "large_integer": "x = 1 << 10**10",
        "a_string_that_doubles": "x = 'x'\nwhile True: x += x",
        "decompression_bomb": (
            "import zlib; bomb = zlib.compress(bytes(10**7))\n"
            "x = [zlib.decompress(bomb) for _ in range(100)]"
        ),
    },
    Status.MEMORY_LIMIT,
)

TIME = (
    *bounded(
        {
            "endless_loop": "while True: pass",
            "ignored_signals": (
                "import signal\n"
                "for n in range(1, 65):\n"
                "    try: signal.signal(n, signal.SIG_IGN)\n"
                "    except (OSError, ValueError): pass\n"
                "while True:\n"
                "    try:\n"
                "        while True: pass\n"
                "    except BaseException: pass"
            ),
            "threads_in_native_code": (
                "import hashlib, threading\n"
                "def burn():\n"
                "    while True: hashlib.sha256(bytes(10**7))\n"
                "for _ in range(3): threading.Thread(target=burn).start()"
            ),
            "spinning_machine_code": SPIN + "spin()",
            "a_pattern_that_backtracks": "import re; re.match('(a|a)*b', 'a' * 99)",
            "a_power_in_one_instruction": "x = 7 ** (7 ** 9)",
            "handler_at_exit": "import atexit\n@atexit.register\ndef stay():\n    while True: pass",
            "destructor_at_exit": "class A:\n    def __del__(s):\n        while 1: pass\na = A()",
            "a_hook_for_its_own_error": (
                "import sys\ndef hook(*a):\n    while True: pass\nsys.excepthook = hook; 1 / 0"
            ),
            "an_output_that_never_flushes": (
                "import sys\n"
                "class O:\n"
                "    closed = False\n"
                "    def write(s, t): pass\n"
                "    def flush(s):\n"
                "        while True: pass\n"
                "sys.stdout = O()"
            ),
        },
        Status.TIME_LIMIT,
        limits=SHORT,
    ),
    *bounded(
        {
            "sleep": "import time; time.sleep(60)",
            "stop_itself": "import os; os.kill(os.getpid(), 19)",
            "wait_for_a_lock": "import threading as t; a = t.Lock(); a.acquire(); a.acquire()",
            "read_from_an_empty_pipe": "import os; os.read(os.pipe()[0], 1)",
            "wait_for_a_signal": "import signal; signal.pause()",
            "a_thread_that_stays": (
                "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
            ),
        },
        Status.IDLE_LIMIT,
        limits=IDLE,
    ),
)

OUTPUT = bounded(
    {
        "endless_prints": "while True: print('x' * 1000)",
        "one_large_write": "import os; os.write(1, b'x' * 10**6); os.write(1, b'x')",
        "endless_errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        "sparse_output": "import os; os.lseek(1, 10**9, 0); os.write(1, b'x')",
        "output_made_long": "import os; os.ftruncate(1, 10**9)",
        "output_at_an_offset": "import os; os.pwrite(1, b'x', 2**62)",
        "input_made_long": "import os; os.ftruncate(0, 10**9)",
        "ignored_signal": (
            "import signal, os; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "try:\n"
            "    while True: os.write(1, b'x' * 1000)\n"
            "except OSError: pass"
        ),
    },
    Status.OUTPUT_LIMIT,
)

CRASHES = (
    *bounded(
        {
            "read_of_address_zero": "import ctypes; ctypes.string_at(0)",
            "jump_to_address_zero": "import ctypes; ctypes.CFUNCTYPE(None)(1)()",
            "illegal_instruction": SPIN.replace("\\xeb\\xfe", "\\x0f\\x0b") + "spin()",
            "privileged_instruction": SPIN.replace("\\xeb\\xfe", "\\xf4\\xf4") + "spin()",
            "abort": "import os; os.abort()",
            "endless_recursion": "def f(): f()\nf()",
            "endless_recursion_without_a_limit": (
                "import sys; sys.setrecursionlimit(10**9); sys.tracebacklimit = 5\n"
                "def f(): return [*map(f2, [1])]\n"
                "def f2(x): return f()\nf()"
            ),
            "a_broken_interpreter": (
                "import ctypes\n"
                "ctypes.memset(id(None), 0, 64); ctypes.memset(id(int), 0xff, 512); print(5)"
            ),
            "freed_memory": "import ctypes; f = ctypes.CDLL(None).free; f(ctypes.c_void_p(12345))",
            "a_signal_to_itself": "import os; os.kill(os.getpid(), 11)",
            "a_fatal_error_of_the_interpreter": (
                "import ctypes; ctypes.pythonapi.Py_FatalError(b'rlef')"
            ),
            "unmapped_libraries": (
                "import ctypes, math; c = ctypes.CDLL(None)\n"
                "base = ctypes.cast(c.getpid, ctypes.c_void_p).value & ~0xfff\n"
                "c.munmap(ctypes.c_void_p(base - 65536), 1 << 20); c.getpid()"
            ),
        },
        Status.RUNTIME_ERROR,
        Status.MEMORY_LIMIT,
    ),
    *bounded(
        {
            "a_deep_expression": "x = " + "-" * 50_000 + "1",
            "deep_brackets": "(" * 100_000,
            "a_constant_folded_at_length": "x = " + "+".join(["'a' * 4000"] * 2000) + "; 1/0",
            "an_unknown_encoding": "# coding: hex\nprint(1)",
            "an_encoding_that_fails": "# coding: undefined\nprint(1)",
            "a_zero_byte": "x = 1\0",
            "a_lone_surrogate": "x = '\ud800'",
        },
        Status.COMPILE_ERROR,
        Status.MEMORY_LIMIT,
        Status.TIME_LIMIT,
        Status.RUNTIME_ERROR,
    ),
    *bounded(
        {
            "descriptors": "import os\nfor i in range(100): os.dup(0)\nprint('ESCAPED')",
            "pipes": "import os\nfor i in range(100): os.pipe()\nprint('ESCAPED')",
            "pollers": "import select\nx = [select.epoll() for i in range(100)]\nprint('ESCAPED')",
        },
        Status.RUNTIME_ERROR,
    ),
)

RESOURCES = MEMORY + TIME + OUTPUT + CRASHES
