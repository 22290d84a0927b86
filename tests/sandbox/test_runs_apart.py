"""No run sees, disturbs or outlives another, however many there are at once."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlef_sandbox import Limits, Result, Sandbox, Status, Test
from rlef_sandbox.page_tables import children_of as children
from tests.sandbox.attacks.hacking import SCAN

Attempt = Callable[[str], Result]

SECRET = "5190264837"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
# Sixty threads that spin in machine code, without the GIL.
SPINNERS = """\
import ctypes, mmap, threading
m = mmap.mmap(-1, 4096, prot=7)
m.write(b'\\xeb\\xfe')
spin = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
threading.stack_size(65536)
for _ in range(60): threading.Thread(target=spin).start()
"""
# Looks for the secret of another run in its own memory, for foreign descriptors and for other
# processes, and prints what it finds.
SPY = f"""\
{SCAN}
import hashlib, re, time
def find(text):
    for number in re.findall(r'(?<![0-9])[0-9]{{10}}(?![0-9])', text):
        if hashlib.sha256(number.encode()).hexdigest() == '{DIGEST}': print('FOUND', number)
end = time.monotonic() + 0.2
while time.monotonic() < end:
    for fd in range(5, 64):
        try: print('FOUND descriptor', os.fstat(fd))
        except OSError: pass
    for text in memory(): find(text)
for pid in range(1, 200):
    if pid not in (os.getpid(), os.getppid()):
        for call in (os.getpgid, os.getsid):
            try: print('FOUND process', pid, call(pid))
            except OSError: pass
        header = (ctypes.c_uint32 * 2)(0x20080522, pid)
        if c.capget(header, (ctypes.c_uint32 * 6)()) == 0: print('FOUND process', pid)
        try: print('FOUND work of', pid, time.clock_gettime(~pid << 3 | 2))
        except OSError: pass
"""
# Writes its memory in RANGES, with zeros for pages that it does not have.
DUMP = """\
import ctypes, os, sys
write, (r, w) = ctypes.CDLL(None).write, os.pipe()
for start, end in RANGES:
    for page in range(start, end, 4096):
        has_page = write(w, ctypes.c_void_p(page), 4096) == 4096
        sys.stdout.buffer.write(os.read(r, 4096) if has_page else bytes(4096))
"""
LEAVE = """\
import builtins, os, sys
builtins.left = sys.left = 1; os.environ['LEFT'] = '1'; sys.modules['left'] = sys
sys.path.append('/left'); sys.setrecursionlimit(99)
"""
LOOK = """\
import builtins, os, sys
print(hasattr(builtins, 'left'), hasattr(sys, 'left'), 'LEFT' in os.environ,
      'left' in sys.modules, '/left' in sys.path, sys.getrecursionlimit())
"""


@pytest.fixture
def crowd(sandbox: Sandbox) -> Callable[[list[str], Limits], list[Result]]:
    """Return a function that runs programs at the same time, in one zygote if they sleep first."""

    def run(sources: list[str], limits: Limits) -> list[Result]:
        with ThreadPoolExecutor(len(sources)) as pool:
            return list(pool.map(lambda source: sandbox.run(source, b"", limits), sources))

    return run


def test_nothing_is_left_for_the_next_run(sandbox: Sandbox) -> None:
    assert sandbox.run(LEAVE).status is Status.OK
    assert sandbox.run(LOOK).stdout == b"False False False False False 1000\n"


def test_one_test_leaves_nothing_for_the_next(sandbox: Sandbox) -> None:
    source = (
        "import builtins\n"
        "seen = getattr(builtins, 'seen', 0); builtins.seen = seen + 1\n"
        "print(seen)"
    )
    results = sandbox.grade(source, [Test(b"", b"0")] * 3)
    assert [result.status for result in results] == [Status.OK] * 3


def test_no_test_can_reach_the_files_with_the_source_and_the_code_of_the_next(
    sandbox: Sandbox,
) -> None:
    source = (
        "import os\n"
        "def is_open(number):\n"
        "    try: return bool(os.fstat(number))\n"
        "    except OSError: return False\n"
        "print(*filter(is_open, range(64)))"
    )
    results = sandbox.grade(source, [Test(b"", b"0 1 2")] * 3)
    assert [result.status for result in results] == [Status.OK] * 3


def test_a_run_sees_nothing_of_those_beside_it(crowd: Callable) -> None:
    victim = f"secret = '{SECRET}'; import time; time.sleep(1.5); print(secret)"
    results = crowd([victim, victim, "import time; time.sleep(0.3)\n" + SPY], Limits(cpu_s=9))
    assert [result.status for result in results] == [Status.OK] * 3
    assert results[2].stdout == b""


def test_a_spy_would_find_a_secret_that_was_there(sandbox: Sandbox) -> None:
    result = sandbox.run(f"secret = '{SECRET}' * 1\n" + SPY, limits=Limits(cpu_s=9))
    assert b"FOUND " + SECRET.encode() in result.stdout


def test_the_ids_of_processes_and_threads_carry_nothing_to_the_next_run(sandbox: Sandbox) -> None:
    if not sandbox.isolation.get("process_ids"):
        pytest.skip("ids of its own take a pid namespace and the C library")
    source = (
        "import os, threading; ids = [os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0)]\n"
        "for _ in range(int(input())):\n"
        "    t = threading.Thread(target=lambda: ids.append(threading.get_native_id()))\n"
        "    t.start(); t.join()\n"
        "print(*ids)"
    )
    of_three = b"2 1 2 2 3 4 5\n"
    assert sandbox.run(source, "3").stdout == sandbox.run(source, "3").stdout == of_three
    results = sandbox.grade(source, [Test("3", of_three), Test("1", b"2 1 2 2 3")] * 2)
    assert [result.status for result in results] == [Status.OK] * 4


def test_the_threads_of_one_run_are_not_counted_against_another(
    sandbox: Sandbox, crowd: Callable
) -> None:
    if not sandbox.isolation.get("threads"):
        pytest.skip("counting threads needs a user namespace")
    source = (
        "import threading, time; time.sleep(0.4)\n"
        "for _ in range(50): threading.Thread(target=time.sleep, args=(0.8,)).start()\n"
        "print('started')"
    )
    results = crowd([source] * 4, Limits(cpu_s=9, processes=64))
    assert [result.stdout for result in results] == [b"started\n"] * 4


@pytest.mark.timing
def test_a_program_of_many_threads_starves_no_other() -> None:
    """The starved program works as fast as it can, so an IDLE_LIMIT would be false."""
    if Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() != "1":
        pytest.skip("this kernel shares the machine among threads, not among programs")
    honest = "import time\nwhile time.process_time() < 0.7: pass\nprint(1)"
    stop = threading.Event()
    with Sandbox(workers=3) as sandbox, ThreadPoolExecutor(2) as pool:

        def spin() -> None:
            while not stop.is_set():
                sandbox.run(SPINNERS, limits=Limits(cpu_s=2))

        spinning = [pool.submit(spin) for _ in range(2)]
        time.sleep(0.5)
        result = sandbox.run(honest, limits=Limits(cpu_s=1.0))
        stop.set()
        assert result.status is Status.OK, result
        for spinner in spinning:
            spinner.result()


def test_a_world_readable_file_of_the_host_is_not_there(attempt: Attempt, tmp_path: Path) -> None:
    secret = tmp_path / "expected.out"
    secret.write_text("42")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(0o755)
    result = attempt(f"print('ESCAPED', open({str(secret)!r}).read())")
    assert result.status is Status.RUNTIME_ERROR


def test_threads_are_bounded(sandbox: Sandbox) -> None:
    if not sandbox.isolation.get("threads"):
        pytest.skip("counting threads needs a user namespace")
    source = (
        "import threading, time\n"
        "threading.stack_size(65536)\n"
        "try:\n"
        "    while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "except RuntimeError: print('bounded')"
    )
    assert sandbox.run(source, limits=Limits(processes=16)).stdout == b"bounded\n"


@pytest.mark.timing
def test_a_sleeper_holds_a_worker_no_longer_than_its_wall_clock_limit(sandbox: Sandbox) -> None:
    started = time.monotonic()
    sandbox.run("import time; time.sleep(60)", limits=Limits(cpu_s=0.1, wall_s=0.2))
    assert time.monotonic() - started < 10


def test_a_program_cannot_claim_a_sandbox_fault(attempt: Attempt) -> None:
    result = attempt("import os, sys\nprint('child set-up: failed', file=sys.stderr)\nos._exit(1)")
    assert result.status is Status.RUNTIME_ERROR


def test_a_failure_beats_the_right_output(sandbox: Sandbox) -> None:
    (result,) = sandbox.grade("print(input()); exit(1)", [Test(b"1", b"1")])
    assert result.status is Status.RUNTIME_ERROR


def test_the_pipes_of_one_run_do_not_shrink_those_of_another(sandbox: Sandbox) -> None:
    hoard = "import os, time\ntry:\n    while True: os.pipe()\nexcept OSError: time.sleep(1.5)"
    honest = "import os; r, w = os.pipe(); os.write(w, bytes(65536)); print(len(os.read(r, 65536)))"
    with ThreadPoolExecutor(12) as pool:
        hoarders = [pool.submit(sandbox.run, hoard) for _ in range(12)]
        time.sleep(0.8)
        assert sandbox.run(honest, limits=Limits(cpu_s=1, wall_s=2)).stdout == b"65536\n"
        assert {hoarder.result().status for hoarder in hoarders} == {Status.OK}


def test_memory_beyond_the_machine_is_the_programs_own_failure(sandbox: Sandbox) -> None:
    """A page of its mapping that does not exist is a SIGBUS, not a fault of the machine."""
    source = (
        "import mmap, os; os.ftruncate(1, 8192); m = mmap.mmap(1, 8192); os.ftruncate(1, 0)\n"
        "m[5000] = 1"
    )
    result = sandbox.run(source)
    assert (result.status, result.signal) == (Status.RUNTIME_ERROR, 7)


def test_no_trace_of_how_a_run_ended_is_in_the_memory_of_the_next() -> None:
    """Each child has a copy of its zygote's memory, and of what earlier runs left there."""
    if os.geteuid():
        pytest.skip("only root sees where the memory of a zygote is")
    codes, dumps = (77, 33, 5, 201), []
    limits = Limits(output_bytes=64 << 20)
    with Sandbox(workers=1) as sandbox:
        sandbox.run("", limits=limits)
        reaper = sandbox._workers[0]._process
        assert reaper is not None
        (zygote,) = children(reaper.pid)
        lines = [line.split() for line in Path(f"/proc/{zygote}/maps").read_text().splitlines()]
        ranges = [[int(end, 16) for end in f[0].split("-")] for f in lines if f[1] == "rw-p"]
        for code in codes:
            assert sandbox.run(f"import os; os._exit({code})", limits=limits).exit_code == code
            dumps.append(sandbox.run(f"RANGES = {ranges}\n{DUMP}", limits=limits).stdout)
    assert len(dumps[0]) == sum(end - start for start, end in ranges)
    places = [found.start() for found in re.finditer(bytes(codes[:1]), dumps[0])]
    assert not [at for at in places if tuple(dump[at] for dump in dumps) == codes]
