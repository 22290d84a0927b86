"""Programs that try to pass a test without solving it.

The answers are numbers and values that no honest program of this kind prints by chance.
`naive_grader.py`, which compares in the process that runs the program, is fooled by those in
BEATS_A_NAIVE_GRADER.
"""

from __future__ import annotations

import hashlib

from rlef_sandbox import CallTest, CheckTest, Limits, Status, Test

from .attack import FILES, KERNEL, LIMITS, SEPARATION, Attack

ANSWER = 7351980246
DIGEST = hashlib.sha256(str(ANSWER).encode()).hexdigest()
QUESTION = Test(b"question", str(ANSWER).encode())
CALL = CallTest("solve", ([3, 1, 2],), ANSWER)
FAILED = (Status.WRONG_ANSWER, Status.RUNTIME_ERROR, Status.MEMORY_LIMIT, Status.OUTPUT_LIMIT)
FAILED = (*FAILED, Status.SECURITY_VIOLATION, Status.TIME_LIMIT)


# Here the answer may be in some file of the machine, or the program has it, so a layer must stop
# these.
OTHERWISE_STOPPED = {
    "files_on_the_disk": (*FILES, KERNEL),
    "right_output_then_a_forbidden_call": ("seccomp",),
}


def hacks(test: Test | CallTest, sources: dict[str, str]) -> tuple[Attack, ...]:
    return tuple(
        Attack(
            name, source, OTHERWISE_STOPPED.get(name, (SEPARATION,)), FAILED, test, limits=LIMITS
        )
        for name, source in sources.items()
    )


# Prints the ten-digit number with the right digest, if it finds it.
FIND = f"""\
import hashlib, re
def find(text):
    for number in re.findall('(?<![0-9])[0-9]{{10}}(?![0-9])', text):
        if hashlib.sha256(number.encode()).hexdigest() == '{DIGEST}':
            print(number); raise SystemExit
"""

# Yields all readable memory near an object, near the top of the heap and near the stack; an
# unreadable page is an error of write(), not a crash.
SCAN = """\
import ctypes, os
c = ctypes.CDLL(None); c.sbrk.restype = ctypes.c_void_p; r, w = os.pipe()
stack = ctypes.c_void_p.in_dll(c, 'environ').value
def pages(near, below, above):
    near &= ~4095
    for page in range(near - below, near + above, 4096):
        if c.write(w, ctypes.c_void_p(page), 4096) == 4096: yield os.read(r, 4096).decode('latin-1')
def memory():
    yield from pages(id(object()), 48 << 20, 48 << 20)
    yield from pages(c.sbrk(0), 16 << 20, 0)
    yield from pages(stack, 8 << 20, 8192)
"""

PROGRAMS = hacks(
    QUESTION,
    {
        "early_exit": "import os; os._exit(0)",
        "exit_zero": "raise SystemExit(0)",
        "exit_from_a_thread": (
            "import os, threading; threading.Thread(target=os._exit, args=(0,)).start()\n"
            "while True: pass"
        ),
        "exit_by_system_call": "import ctypes; ctypes.CDLL(None).syscall(231, 0)",
        "exit_at_exit": "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
        "heap": FIND + "import gc\nfor o in gc.get_objects(): find(repr(o)[:10**5])",
        "frozen_heap": (
            FIND + "import gc; gc.unfreeze()\nfor o in gc.get_objects(): find(repr(o)[:10**5])"
        ),
        "raw_memory": FIND + SCAN + "for text in memory(): find(text)",
        "frames": (
            FIND + "import sys\n"
            "f = sys._getframe()\n"
            "while f:\n"
            "    for v in [*f.f_locals.values(), *f.f_globals.values(), f.f_code.co_consts]:\n"
            "        find(repr(v)[:10**5])\n"
            "    f = f.f_back"
        ),
        "frames_of_a_traceback": (
            FIND + "import sys\n"
            "try: 1 / 0\n"
            "except ZeroDivisionError: f = sys.exc_info()[2].tb_frame\n"
            "while f: find(repr(f.f_locals)[:10**5]); f = f.f_back"
        ),
        "frames_of_all_threads": (
            FIND + "import sys\n"
            "for f in sys._current_frames().values():\n"
            "    while f: find(repr(f.f_locals)[:10**5]); f = f.f_back"
        ),
        "modules": (
            FIND + "import sys\n"
            "for m in list(sys.modules.values()):\n"
            "    for v in list(vars(m).values()):\n"
            "        find(repr(v)[:10**5]); find(repr(getattr(v, '__dict__', ''))[:10**5])"
        ),
        "arguments_and_environment": (
            FIND + "import os, sys; find(repr((sys.argv, sys.orig_argv, os.environ, sys.flags)))"
        ),
        "files_on_the_disk": (
            FIND + "import os\n"
            "for d, _, names in os.walk('/'):\n"
            "    if d.count('/') > 3 or d.startswith(('/proc', '/sys')): continue\n"
            "    for n in names:\n"
            "        if n.endswith(('.out', '.json', '.txt')):\n"
            "            try: find(open(os.path.join(d, n)).read(10**5))\n"
            "            except (OSError, ValueError): pass"
        ),
        "descriptors": (
            FIND + "import os\n"
            "for fd in range(1024):\n"
            "    try: find(os.pread(fd, 10**5, 0).decode('latin-1'))\n"
            "    except OSError: pass"
        ),
        "a_page_shared_with_others": (
            # Only a shared mapping can be mapped once more by moving nothing of it.
            FIND + "import ctypes\n"
            "c = ctypes.CDLL(None, use_errno=True); c.mremap.restype = ctypes.c_void_p\n"
            "size = ctypes.c_size_t\n"
            "base = ctypes.cast(c.getpid, ctypes.c_void_p).value & ~0xfff\n"
            "for page in range(base - (64 << 20), base + (32 << 20), 4096):\n"
            "    if c.msync(ctypes.c_void_p(page), size(4096), 1): continue\n"
            "    again = c.mremap(ctypes.c_void_p(page), size(0), size(4096), 1)\n"
            "    if again not in (None, 2**64 - 1):\n"
            "        ctypes.memset(again, 0, 4096); print('7351' '980246')"
        ),
        "import_of_the_sandbox": "import rlef_sandbox.sandbox as s; print(s)",
        "patched_comparison": (
            "import builtins, operator\n"
            "class E(bytes):\n"
            "    def __eq__(s, o): return True\n"
            "    def __ne__(s, o): return False\n"
            "    __hash__ = bytes.__hash__\n"
            "builtins.bytes = builtins.str = E; operator.eq = lambda a, b: True\n"
            "builtins.all = builtins.any = builtins.len = lambda *a: True"
        ),
        "patched_output": (
            "import io, sys\n"
            "class Out(io.StringIO):\n"
            "    def getvalue(s): return E()\n"
            "class E(str):\n"
            "    def __eq__(s, o): return True\n"
            "    def strip(s, *a): return s\n"
            "    __hash__ = str.__hash__\n"
            "sys.stdout = Out()"
        ),
        "forged_outcome_on_every_descriptor": (
            "import os, struct\n"
            "message = struct.pack('<BBiddQ', 2, 0, 0, 0.0, 0.0, 0)\n"
            "for fd in range(64):\n"
            "    try: os.write(fd, message)\n"
            "    except OSError: pass"
        ),
        "forged_verdict": "print('OK'); print('Status.OK'); print('{\"status\": \"OK\"}')",
        "closed_descriptors": "import os; os.closerange(0, 64)",
        "output_onto_the_input": "import os; os.dup2(0, 1); os.dup2(0, 2); print('x')",
        "input_onto_the_output": "import os; os.dup2(1, 0); print(open(0).read())",
        "errors_as_output": "import os; os.dup2(2, 1); print('7351' '980246')",
        "rewritten_input": "import os; os.ftruncate(0, 0); os.pwrite(0, b'7351' b'980246', 0)",
        "moved_offsets": "import os; print('7351' '980246x'); os.lseek(1, 0, 0); os.lseek(0, 9, 0)",
        "right_output_past_a_hole": "import os; os.pwrite(1, b'7351' b'980246', 4096)",
        "right_output_then_a_failure": "print('7351' '980246', flush=True); raise SystemExit(3)",
        "right_output_then_a_crash": (
            "import ctypes; print('7351' '980246', flush=True); ctypes.string_at(0)"
        ),
        "right_output_then_a_forbidden_call": (
            "import ctypes; print('7351' '980246', flush=True)\n"
            "ctypes.CDLL(None).ptrace(9, 0, 0, 0)"
        ),
        "right_output_among_all": "for i in range(735, 736): print(i, '7351' '980246')",
        "zero_bytes_around": "print('\\0' '7351' '980246' '\\0')",
        "wide_digits": "print(''.join(chr(ord(d) + 0xfee0) for d in '7351' '980246'))",
        "invisible_characters": "print('73519\\u200b80246')",
        "no_break_space": "print('735198\\u00a00246')",
        "underscores": "print('7_351_980_246')",
        "leading_zeros": "print('0000007351' '980246')",
        "as_a_float": "print('7351' '980246.0')",
        "in_exponents": "print('7.351' '980246e9')",
        "in_hexadecimal": "print(hex(7351_980_246))",
        "signed": "print('+7351' '980246')",
        "not_a_number": "print('nan')",
        "endless_number": "print('7351' '980246' * 5000)",
        "backspaces": "print('x\\b7351' '980246')",
        "terminal_colours": "print('\\x1b[0m7351' '980246')",
        "byte_order_mark": "import os; os.write(1, b'\\xef\\xbb\\xbf7351' b'980246')",
        "in_utf_16": "import os; os.write(1, ('7351' '980246').encode('utf-16'))",
    },
)

FUNCTIONS = hacks(
    CALL,
    {
        "equal_to_everything": (
            "class E(int):\n"
            "    def __eq__(self, other): return True\n"
            "    def __ne__(self, other): return False\n"
            "    __hash__ = int.__hash__\n"
            "def solve(n): return E(0)"
        ),
        "text_that_equals_everything": (
            "class E(str):\n"
            "    def __eq__(self, other): return True\n"
            "    def __repr__(self): return '7351' + '980246'\n"
            "    __hash__ = str.__hash__\n"
            "def solve(n): return E()"
        ),
        "a_list_that_equals_everything": (
            "class E(list):\n"
            "    def __eq__(self, other): return True\n"
            "    def __iter__(self): return iter([7351 * 10**6 + 980246])\n"
            "def solve(n): return E()"
        ),
        "an_integer_with_another_value": (
            "class E(int):\n"
            "    def __int__(self): return 7351 * 10**6 + 980246\n"
            "    __index__ = __trunc__ = __int__\n"
            "    def __str__(self): return '7351' '980246'\n"
            "    __repr__ = __str__\n"
            "def solve(n): return [E(0)]"
        ),
        "a_type_that_lies": (
            "class E:\n"
            "    __class__ = int\n"
            "    def __eq__(self, other): return True\n"
            "def solve(n): return E()"
        ),
        "true": "def solve(n): return True",
        "none": "def solve(n): return None",
        "not_a_number": "def solve(n): return float('nan')",
        "infinity": "def solve(n): return float('inf')",
        "not_implemented": "def solve(n): return NotImplemented",
        "a_generator_of_all": "def solve(n):\n    yield from range(10**9)",
        "a_range_of_all": "def solve(n): return range(10**10)",
        "a_set_of_many": "def solve(n): return set(range(10**4))",
        "a_coroutine": "async def solve(n): return 7351 * 10**6 + 980246",
        "a_function_that_returns_the_answer": "def solve(n): return lambda: 7351 * 10**6 + 980246",
        "a_type": "def solve(n): return int",
        "as_text": "def solve(n): return '7351' '980246'",
        "as_bytes": "def solve(n): return b'7351' b'980246'",
        "in_a_list": "def solve(n): return [7351 * 10**6 + 980246]",
        "a_complex_number": "def solve(n): return complex(7351 * 10**6 + 980246)",
        "a_decimal": "import decimal\ndef solve(n): return decimal.Decimal(10**10)",
        "a_fraction": "import fractions\ndef solve(n): return fractions.Fraction(10**10)",
        "own_result_written_early": (
            "import os\ndef solve(n):\n    os.pwrite(3, b'true\\ntrue', 0); os._exit(0)"
        ),
        "several_results": (
            "import os\n"
            "def solve(n):\n"
            "    os.pwrite(3, b'1 7351' b'980246\\n7351' b'980246', 0); os._exit(0)"
        ),
        "a_result_of_unknown_kind": (
            "import os\ndef solve(n):\n    os.pwrite(3, b'{\"any\":[]}\\n', 0); os._exit(0)"
        ),
        "a_result_with_two_keys": (
            "import os\n"
            "def solve(n):\n"
            '    os.pwrite(3, b\'{"int":"0x0","int":"0x1b636a916"}\\n\', 0); os._exit(0)'
        ),
        "a_result_that_never_ends": (
            "import os\ndef solve(n):\n    os.pwrite(3, b'[' * 60000, 0); os._exit(0)"
        ),
        "caller_frames": (
            "import sys\n"
            "def solve(n):\n"
            "    f = sys._getframe()\n"
            "    while f:\n"
            "        if 'expected' in f.f_locals: return f.f_locals['expected']\n"
            "        f = f.f_back"
        ),
        "expected_put_in_the_callers_frame": (
            "import ctypes, sys\n"
            "def solve(n):\n"
            "    f = sys._getframe().f_back\n"
            "    f.f_locals['expected'] = 0\n"
            "    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(f), ctypes.c_int(0))\n"
            "    return 0"
        ),
        "patched_encoder": (
            "import json\njson.dumps = lambda *a, **k: '7351' '980246 0'\ndef solve(n): return 0"
        ),
        "patched_values": (
            "import sys\n"
            "for m in list(sys.modules.values()):\n"
            "    for n in ('encode', 'matches', '_to_wire'):\n"
            "        if hasattr(m, n) and 'rlef' in m.__name__: setattr(m, n, lambda *a: True)\n"
            "def solve(n): return 0"
        ),
        "patched_values_of_the_caller": (
            "import sys\n"
            "def solve(n):\n"
            "    values = sys._getframe(1).f_globals.get('values')\n"
            "    if values: values.matches = lambda *a: True\n"
            "    return 0"
        ),
        "exit_before_the_call": "import os; os._exit(0)",
        "exit_in_the_call": "import os\ndef solve(n): os._exit(0)",
        "exit_by_exception": "def solve(n): raise SystemExit",
        "an_exception_of_its_own": (
            "class E(BaseException):\n    def __str__(s): return '7351' '980246'\n"
            "def solve(n): raise E"
        ),
        "printed_not_returned": "def solve(n): print('7351' '980246')",
        "mutated_arguments": "def solve(n): n[:] = [7351 * 10**6 + 980246]",
        "unserialisable": "def solve(n): return object()",
        "colliding_members": "def solve(n): return {i * (2**61 - 1) for i in range(2000)}",
        "deep_value": "def solve(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
        "a_value_within_itself": "def solve(n):\n    x = []; x.append(x); return x",
        "a_huge_integer": "def solve(n): return 10 ** 20000",
        "a_repr_that_fails": "class E(int):\n    def __repr__(s): 1 / 0\ndef solve(n): return E(5)",
        "replaced_solution_module": (
            "import sys\nclass M: \n    def __getattr__(s, n): return lambda *a: True\n"
            "sys.modules['solution'] = sys.modules['__main__'] = M()\n"
            "def solve(n): return 0"
        ),
    },
)

HACKS = PROGRAMS + FUNCTIONS

BRIEF = Limits(cpu_s=0.3, wall_s=0.6, memory_bytes=256 << 20)
BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'"
SHOWN = "assert got == 9, f'got {got}'"


def blames(name: str, returned: str, use: str) -> Attack:
    """Return an attempt to make a test's own code look broken, which would be no verdict: a
    function that returns what the code, where it uses it, does not expect.
    """
    code = f"import itertools, re, time\ndef check(solve):\n    got = solve(3)\n    {use}"
    source = f"def solve(n): return {returned}"
    statuses = (*FAILED, Status.IDLE_LIMIT)
    return Attack(name, source, (SEPARATION,), statuses, CheckTest("solve", code), limits=BRIEF)


CHECKS = (
    blames("words_of_a_memory_error", "'x\\nMemoryError'", SHOWN),
    blames("words_of_bad_alloc", f'"\\n{BAD_ALLOC}"', SHOWN),
    blames("a_class_named_like_a_memory_error", "type('\\nMemoryError', (), {})()", SHOWN),
    blames(
        "a_number_for_loops", "99999", "assert 3 == sum(1 for i in range(got) for _ in range(i))"
    ),
    blames("factors", "[99991, 99989]", "n, i = got[0] * got[1], 2\n    while i < n: i += 1"),
    blames("members_to_permute", "list(range(24))", "sorted(itertools.permutations(got))"),
    blames("text_for_a_pattern", "'a' * 40 + '!'", "assert re.fullmatch('(a+)+', got)"),
    blames("a_number_of_seconds", "50", "time.sleep(got); assert False"),
    blames("a_number_of_bits", "38", "assert 1 << (1 << got) == 2"),
    blames("a_number_of_items", "10**9", "assert [0] * got == [1]"),
    blames("text_to_print", "'x' * (1 << 20)", "for _ in range(99): print(got)\n    assert False"),
    blames("the_same_for_ever", "True", "while got: got = solve(3)"),
    blames("never_the_last", "0", "while got != 5: got = solve(3)"),
    blames("never_none", "0", "while got is not None: got = solve(3)"),
    blames("an_exit_code", "7", "raise SystemExit(got)"),
)

# The hacks that fool a grader which runs and compares in one process.
BEATS_A_NAIVE_GRADER = (
    "heap",
    "frames",
    "frames_of_a_traceback",
    "patched_output",
    "equal_to_everything",
    "text_that_equals_everything",
    "a_list_that_equals_everything",
    "a_type_that_lies",
    "caller_frames",
)
