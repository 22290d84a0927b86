"""Network, other processes, and calls that only an attack makes."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest

from rlef_sandbox import Result, Status

Attempt = Callable[[str], Result]

REFUSED = {
    "tcp_socket": "import socket; socket.socket(); print('ESCAPED')",
    "unix_socket": "import socket; socket.socket(socket.AF_UNIX); print('ESCAPED')",
    "netlink_socket": "import socket; socket.socket(16, 3, 0); print('ESCAPED')",
    "socket_pair": "import socket; socket.socketpair(); print('ESCAPED')",
    "connect": "import socket; socket.create_connection(('127.0.0.1', 22)); print('ESCAPED')",
    "fork": "import os; os.fork(); print('ESCAPED')",
    "exec": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "subprocess": "import subprocess; subprocess.run(['echo', 'ESCAPED'], check=True)",
    "posix_spawn": "import os; os.posix_spawn('/bin/echo', ['echo', 'ESCAPED'], {})",
    "shell": "import os; raise SystemExit(os.system('echo ESCAPED') != 0)",
    "multiprocessing": (
        "import multiprocessing as m; p = m.Process(target=print, args=('ESCAPED',)); p.start()"
    ),
    "kill_the_parent": "import os; os.kill(os.getppid() or 1, 9); print('ESCAPED')",
    "kill_everyone": "import os; os.kill(-1, 9); print('ESCAPED')",
    "kill_its_group": "import os; os.killpg(0, 9); print('ESCAPED')",
    "kill_itself_like_the_machine_would": "import os; os.kill(os.getpid(), 9); print('ESCAPED')",
    "own_session": "import os; os.setsid(); print('ESCAPED')",
    "become_root": "import os; os.setuid(0); print('ESCAPED')",
    "raise_a_hard_limit": (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2); print('ESCAPED')"
    ),
    "limits_of_the_zygote": (
        "import os, resource as r; r.prlimit(os.getppid() or 1, r.RLIMIT_NOFILE, (0, 0))\n"
        "print('ESCAPED')"
    ),
    "another_cpu": "import os; os.sched_setaffinity(0, {0}); print('ESCAPED')",
    "asynchronous_signal": "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, 1); print('ESCAPED')",
    "terminal_injection": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); print('ESCAPED')",
}

# Calls without a wrapper in Python, by x86-64 number: (call, expected status).
NATIVE = {
    "ptrace": ("101, 0, 0, 0, 0", Status.SECURITY_VIOLATION),
    "process_vm_readv": ("310, 1, 0, 0, 0, 0, 0", Status.SECURITY_VIOLATION),
    "bpf": ("321, 0, 0, 0", Status.SECURITY_VIOLATION),
    "io_uring": ("425, 1, 0", Status.SECURITY_VIOLATION),
    "userfaultfd": ("323, 0", Status.SECURITY_VIOLATION),
    "perf_event": ("298, 0, 0, 0, 0, 0", Status.SECURITY_VIOLATION),
    "keyctl": ("250, 0, 0", Status.SECURITY_VIOLATION),
    "mount": ("165, 0, 0, 0, 0, 0", Status.SECURITY_VIOLATION),
    "unshare": ("272, 0x10000000", Status.SECURITY_VIOLATION),
    "setns": ("308, 0, 0", Status.SECURITY_VIOLATION),
    "pidfd_open": ("434, 1, 0", Status.SECURITY_VIOLATION),
    "kernel_module": ("313, 0, b'', 0", Status.SECURITY_VIOLATION),
    "another_filter": ("317, 1, 0, 0", Status.SECURITY_VIOLATION),
    "personality": ("135, 0x0040000", Status.SECURITY_VIOLATION),
    "x32_numbers": ("0x40000000 + 39", Status.SECURITY_VIOLATION),
    "clone_without_thread": ("56, 17, 0, 0, 0, 0", Status.OK),
    "clone3": ("435, 0, 88", Status.OK),
    "user_namespace_by_clone": ("56, 0x10000000 | 17, 0, 0, 0, 0", Status.OK),
    "vfork": ("58,", Status.OK),
    "execveat": ("322, 0, b'', 0, 0, 0x1000", Status.OK),
    "message_queue": ("240, b'x', 0o102, 0o600, 0", Status.OK),
    "system_v_memory": ("29, 0, 4096, 0o1600", Status.OK),
    "send_a_descriptor": ("46, 1, 0, 0", Status.OK),
    "queue_a_signal": ("129, 1, 9, 0", Status.OK),
    "lock_memory": ("151, 1", Status.OK),
    "become_dumpable": ("157, 4, 1, 0, 0, 0", Status.OK),
    "a_call_yet_unknown": ("999, 0, 0", Status.OK),
}


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_an_error_in_the_program(attempt: Attempt, source: str) -> None:
    assert attempt(source).status is Status.RUNTIME_ERROR


@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls by x86-64 number")
@pytest.mark.parametrize(("call", "status"), NATIVE.values(), ids=NATIVE)
def test_a_native_call_gets_nowhere(attempt: Attempt, call: str, status: Status) -> None:
    source = (
        "import ctypes; c = ctypes.CDLL(None); c.syscall.restype = ctypes.c_long\n"
        f"if c.syscall({call}) >= 0: print('ESCAPED')"
    )
    assert attempt(source).status is status


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 machine code")
def test_the_32_bit_entry_to_the_kernel_is_closed(attempt: Attempt) -> None:
    machine_code = bytes.fromhex("b814000000cd80c3")  # mov eax, 20 (getpid); int 0x80; ret
    result = attempt(
        "import ctypes, mmap; m = mmap.mmap(-1, 4096, prot=7)\n"
        f"m.write({machine_code!r})\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "if f() > 0: print('ESCAPED')"
    )
    assert result.status in (Status.SECURITY_VIOLATION, Status.RUNTIME_ERROR)
