"""Network, other processes, signals, identity, and what comes through inherited descriptors."""

from __future__ import annotations

from rlef_sandbox import Status

from .attack import FILES, KERNEL, SUPERVISION, attacks

NETWORK = (
    *attacks(
        {
            "tcp_socket": "import socket; socket.socket(); print('ESCAPED')",
            "udp_packet": (
                "import socket; s = socket.socket(type=socket.SOCK_DGRAM)\n"
                "s.setsockopt(1, 6, 1); print('ESCAPED')"
            ),
            "unix_socket": "import socket; socket.socket(socket.AF_UNIX); print('ESCAPED')",
            "abstract_unix_socket": (
                "import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0rlef')\n"
                "print('ESCAPED')"
            ),
            "netlink_socket": "import socket; socket.socket(16, 3, 0); print('ESCAPED')",
            "socket_pair_of_datagrams": (
                "import socket; socket.socketpair(1, socket.SOCK_DGRAM); print('ESCAPED')"
            ),
            "socket_pair_of_packets": (
                "import socket; socket.socketpair(1, socket.SOCK_SEQPACKET); print('ESCAPED')"
            ),
            "descriptor_through_a_socket_pair": (
                "import socket; a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0])\n"
                "print('ESCAPED')"
            ),
            "socket_pair_becomes_a_server": (
                "import socket; a, b = socket.socketpair(); c = socket.socket(fileno=a.fileno())\n"
                "print('ESCAPED') if c.getsockopt(1, 3) else None"
            ),
        },
        ("seccomp",),
    ),
    *attacks(
        {
            "server": (
                "import socket; s = socket.create_server(('127.0.0.1', 0)); print('ESCAPED')"
            ),
        },
        ("seccomp", "landlock_network"),
    ),
    *attacks(
        {
            "urgent_byte_through_a_socket_pair": (
                "import socket; a, b = socket.socketpair(); a.send(b'x', socket.MSG_OOB)\n"
                "print('ESCAPED')"
            ),
            "kernel_crypto_socket": "import socket; socket.socket(38, 5, 0); print('ESCAPED')",
            "virtual_machine_socket": "import socket; socket.socket(40, 1, 0); print('ESCAPED')",
        },
        ("seccomp", KERNEL),
    ),
    *attacks(
        {"raw_socket": "import socket; socket.socket(2, 3, 1); print('ESCAPED')"},
        ("seccomp", "unprivileged_user"),
    ),
    *attacks(
        {
            "neighbours_network_interfaces": (
                "import socket; names = socket.if_nameindex()\n"
                "assert len(names) > 1; print('ESCAPED', names)"
            ),
        },
        ("seccomp", "net"),
    ),
    *attacks(
        {
            "inherited_descriptors": (
                "import os\n"
                "for fd in range(3, 1024):\n"
                "    try: print('ESCAPED', fd, os.fstat(fd))\n"
                "    except OSError: pass"
            ),
            "message_on_every_descriptor": (
                "import array, socket\n"
                "for fd in range(64):\n"
                "    try: s = socket.socket(fileno=fd)\n"
                "    except OSError: continue\n"
                "    print('ESCAPED', fd)"
            ),
        },
        (SUPERVISION,),
        Status.OK,
    ),
)

PROCESSES = (
    *attacks(
        {
            "fork": "import os\nif os.fork() == 0: os._exit(0)\nprint('ESCAPED')",
            "fork_server": (
                "import multiprocessing as m\n"
                "c = m.get_context('fork'); p = c.Process(target=print, args=('ESCAPED',))\n"
                "p.start(); p.join()"
            ),
        },
        ("seccomp",),
    ),
    *attacks(
        {
            "pseudo_terminal_fork": (
                "import os, pty\nif pty.fork()[0] == 0: os._exit(0)\nprint('ESCAPED')"
            ),
            "exec": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
            "subprocess": "import subprocess; subprocess.run(['echo', 'ESCAPED'], check=True)",
            "posix_spawn": (
                "import os; p = os.posix_spawn('/bin/echo', ['echo', 'ESCAPED'], {})\n"
                "raise SystemExit(os.waitpid(p, 0)[1] != 0)"
            ),
            "shell": "import os; raise SystemExit(os.system('echo ESCAPED') != 0)",
            "shell_pipe": "import os; t = os.popen('echo ESCAPED').read(); assert t; print(t)",
        },
        ("seccomp", *FILES),
    ),
    *attacks(
        {
            "signal_the_parent": "import os; os.kill(os.getppid(), 0); print('ESCAPED')",
            "signal_everyone": "import os; os.kill(-1, 0); print('ESCAPED')",
            "signal_its_group": "import os; os.killpg(0, 0); print('ESCAPED')",
            "queue_a_signal_to_the_parent": (
                "import ctypes, os\n"
                "info = (ctypes.c_int * 32)(0, 0, -1)\n"
                "if ctypes.CDLL(None).syscall(129, os.getppid(), 0, info): raise OSError\n"
                "print('ESCAPED')"
            ),
            "limits_of_the_parent": (
                "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_NOFILE, (9, 9))\n"
                "print('ESCAPED')"
            ),
        },
        ("seccomp", KERNEL),
    ),
    *attacks(
        {
            "number_of_its_process": "import os\nif os.getpid() != 2: print('ESCAPED')",
            "number_of_its_thread": (
                "import threading as t; n = []\n"
                "a = t.Thread(target=lambda: n.append(t.get_native_id())); a.start(); a.join()\n"
                "if n != [3]: print('ESCAPED')"
            ),
            "number_of_its_session": "import os\nif os.getsid(0) != 2: print('ESCAPED')",
        },
        ("process_ids",),
        Status.OK,
    ),
    *attacks(
        {
            "own_session": "import os; os.setsid(); print('ESCAPED')",
            "own_process_group": "import os; os.setpgid(0, 0); print('ESCAPED')",
        },
        ("seccomp", KERNEL),
    ),
    *attacks(
        {
            "lower_its_priority": "import os; os.nice(5); print('ESCAPED')",
            "another_cpu": (
                "import os; os.sched_setaffinity(0, os.sched_getaffinity(0)); print('ESCAPED')"
            ),
            "another_scheduling_class": (
                "import os; os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))\n"
                "print('ESCAPED')"
            ),
            "asynchronous_signal_from_a_file": (
                "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid()); print('ESCAPED')"
            ),
            "kill_when_a_file_is_ready": "import fcntl; fcntl.fcntl(0, 10, 9); print('ESCAPED')",
        },
        ("seccomp",),
    ),
    *attacks(
        {
            "become_root": "import os; os.setuid(0); print('ESCAPED')",
            "become_the_group_root": "import os; os.setgid(0); print('ESCAPED')",
            "raise_its_priority": "import os; os.nice(-5); print('ESCAPED')",
            "real_time_schedule": (
                "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(9))\n"
                "print('ESCAPED')"
            ),
        },
        ("seccomp", "unprivileged_user"),
    ),
    *attacks(
        {
            "raise_a_hard_limit": (
                "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)\n"
                "print('ESCAPED')"
            ),
            "terminal_injection": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); print('ESCAPED')",
            "wait_for_the_siblings": "import os; print('ESCAPED', os.wait())",
        },
        (SUPERVISION,),
    ),
    *attacks(
        {
            "pending_signals_of_all_runs": (
                "import os, signal\n"
                "signal.pthread_sigmask(signal.SIG_BLOCK, {40})\n"
                "for _ in range(5000): os.kill(os.getpid(), 40)\n"
                "count = 0\n"
                "while signal.sigtimedwait({40}, 0): count += 1\n"
                "if count > 100: print('ESCAPED', count)"
            ),
        },
        ("rlimits",),
        Status.OK,
    ),
)

# Each tries to end by SIGKILL, which looks like a fault of the machine: it would be run three times
# and end as a SANDBOX_ERROR.
SANDBOX_FAULTS = attacks(
    {
        "kill_itself": "import os; os.kill(os.getpid(), 9)",
        "kill_its_thread": (
            "import ctypes, os, threading\n"
            "ctypes.CDLL(None).syscall(234, os.getpid(), threading.get_native_id(), 9)"
        ),
        "kill_its_thread_the_old_way": (
            "import ctypes, threading; ctypes.CDLL(None).syscall(200, threading.get_native_id(), 9)"
        ),
        "kill_itself_by_a_queued_signal": (
            "import ctypes, os; info = (ctypes.c_int * 32)(9, 0, -1)\n"
            "ctypes.CDLL(None).syscall(129, os.getpid(), 9, info)"
        ),
        "hard_limit_of_cpu_time": (
            "import resource as r\n"
            "try: r.setrlimit(r.RLIMIT_CPU, (1, 1))\n"
            "except (OSError, ValueError): raise SystemExit(1)\n"
            "while True: pass"
        ),
        "hard_limit_of_cpu_time_by_number": (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
            "if c.syscall(160, 0, (ctypes.c_uint64 * 2)(1, 1)): raise SystemExit(1)\n"
            "while True: pass"
        ),
        "hard_limit_of_cpu_time_by_prlimit": (
            "import ctypes, os; c = ctypes.CDLL(None, use_errno=True)\n"
            "one = (ctypes.c_uint64 * 2)(1, 1)\n"
            "if c.syscall(302, 0, 0, one, 0): raise SystemExit(1)\n"
            "while True: pass"
        ),
        "timer_that_kills": (
            "import ctypes, time; c = ctypes.CDLL(None, use_errno=True)\n"
            "event = (ctypes.c_int * 16)(0, 0, 9, 0); timer = ctypes.c_int()\n"
            "if c.syscall(222, 1, event, ctypes.byref(timer)): raise SystemExit(1)\n"
            "c.syscall(223, timer, 0, (ctypes.c_long * 4)(0, 0, 0, 1), 0); time.sleep(9)"
        ),
        "kill_at_the_death_of_its_parent": (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
            "if c.prctl(1, 9, 0, 0, 0): raise SystemExit(1)\n"
            "print('ESCAPED')"
        ),
    },
    ("seccomp",),
    Status.RUNTIME_ERROR,
    Status.OK,
)
