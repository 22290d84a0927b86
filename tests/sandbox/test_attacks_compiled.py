"""The same attacks in C++, with no interpreter in the way, and those that only a compiler allows.

One program contains them all, so that it is compiled once; its input says which one to try.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlef_sandbox import Limits, Sandbox, Status

LIMITS = Limits(cpu_s=0.5, wall_s=10.0, memory_bytes=64 << 20, output_bytes=64 << 10)

# Each is a body that ends by `escaped(condition)` or by itself, with the statuses allowed.
OK, ERROR, VIOLATION = (Status.OK,), (Status.RUNTIME_ERROR,), (Status.SECURITY_VIOLATION,)
ATTACKS: dict[str, tuple[str, tuple[Status, ...]]] = {
    "password_file": ('escaped(open("/etc/passwd", 0));', OK),
    "root_listing": ('escaped(open("/etc", O_DIRECTORY));', OK),
    "own_process_in_proc": ('escaped(open("/proc/self/mem", O_RDWR));', OK),
    "create": ('escaped(open("/tmp/x", O_CREAT | O_WRONLY, 0600));', OK),
    "create_in_the_working_directory": ('escaped(open("x", O_CREAT | O_WRONLY, 0600));', OK),
    "named_shared_memory": ('escaped(shm_open("/x", O_CREAT | O_RDWR, 0600));', OK),
    "memory_file": ('escaped(syscall(SYS_memfd_create, "x", 0));', OK),
    "socket": ("escaped(socket(AF_INET, SOCK_STREAM, 0));", OK),
    "unix_socket": ("escaped(socket(AF_UNIX, SOCK_STREAM, 0));", OK),
    "fork": ("escaped(fork());", OK),
    "vfork": ("escaped(syscall(SYS_vfork));", OK),
    "clone": ("escaped(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));", OK),
    "clone3": (
        "clone_args a{}; a.exit_signal = SIGCHLD; escaped(syscall(SYS_clone3, &a, 64));",
        OK,
    ),
    "namespace_by_clone": ("escaped(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));", OK),
    "exec_of_a_shell": ('execl("/bin/sh", "sh", "-c", "echo ESCAPED", nullptr);', OK),
    "execveat_of_a_shell": (
        'const char *a[] = {"sh", "-c", "echo ESCAPED", nullptr};\n'
        'syscall(SYS_execveat, -100, "/bin/sh", a, a + 3, 0);',
        OK,
    ),
    "execute_its_own_output": (
        'char *none[] = {NULL}; write(1, "#!/bin/sh\\necho ESCAPED", 22);\n'
        'syscall(SYS_execveat, 1, "", none, none, AT_EMPTY_PATH); ftruncate(1, 0);',
        OK,
    ),
    "more_threads_than_allowed": (
        "std::vector<std::thread> t;\n"
        "try { for (int i = 0; i < 500; i++) t.emplace_back([] { pause(); }); escaped(1); }\n"
        "catch (std::system_error &) {} fflush(stdout); _exit(0);",
        OK,
    ),
    "bpf": ("syscall(SYS_bpf, 0, 0, 0); escaped(1);", VIOLATION),
    "userfaultfd": ("syscall(SYS_userfaultfd, 0); escaped(1);", VIOLATION),
    "keyctl": ("syscall(SYS_keyctl, 0, 0); escaped(1);", VIOLATION),
    "spawn": ('escaped(system("echo ESCAPED") == 0 ? 1 : -1);', OK),
    "signal_to_the_parent": ("escaped(kill(getppid(), 0));", OK),
    "signal_to_everyone": ("escaped(kill(-1, 0));", OK),
    "descriptors": (
        "for (int fd = 3; fd < 1024; fd++) if (fcntl(fd, F_GETFD) >= 0) escaped(1);",
        OK,
    ),
    "another_process_there": (
        "for (int p = 1; p < 99; p++) if (p != getpid()) escaped(getpgid(p));",
        OK,
    ),
    "raise_a_limit": (
        "rlimit r{RLIM_INFINITY, RLIM_INFINITY}; escaped(setrlimit(RLIMIT_AS, &r));",
        OK,
    ),
    "become_root": ("escaped(setuid(0));", OK),
    "become_dumpable": ("escaped(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));", OK),
    "live_on": ("escaped(prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0));", OK),
    "own_session": ("escaped(setsid());", OK),
    "trace": ("ptrace(PTRACE_TRACEME, 0, 0, 0); escaped(1);", VIOLATION),
    "another_filter": ("syscall(SYS_seccomp, 1, 0, 0); escaped(1);", VIOLATION),
    "unshare": ("unshare(CLONE_NEWUSER); escaped(1);", VIOLATION),
    "mount": ('mount("none", "/", "tmpfs", 0, 0); escaped(1);', VIOLATION),
    "io_uring": ("syscall(425, 1, 0); escaped(1);", VIOLATION),
    "perf": ("syscall(SYS_perf_event_open, 0, 0, -1, -1, 0); escaped(1);", VIOLATION),
    "personality": ("personality(ADDR_NO_RANDOMIZE); escaped(1);", VIOLATION),
    "kill_itself": ("escaped(kill(getpid(), SIGKILL));", OK),
    "kill_itself_by_its_thread": ("escaped(syscall(SYS_tgkill, getpid(), getpid(), SIGKILL));", OK),
    "hard_limit_of_cpu_time": ("rlimit r{1, 1}; escaped(setrlimit(RLIMIT_CPU, &r));", OK),
    "timer_that_kills": (
        "sigevent e{}; e.sigev_notify = SIGEV_SIGNAL; e.sigev_signo = SIGKILL; timer_t t;\n"
        "escaped(timer_create(CLOCK_MONOTONIC, &e, &t));",
        OK,
    ),
    "endless_loop": ("for (volatile int i = 0;; i++);", (Status.TIME_LIMIT,)),
    "ignored_signals": (
        "for (int n = 1; n < 65; n++) signal(n, SIG_IGN);\nfor (volatile int i = 0;; i++);",
        (Status.TIME_LIMIT,),
    ),
    "spinning_threads": (
        "for (int i = 0; i < 8; i++)\n"
        "std::thread([] { for (volatile int j = 0;; j++); }).detach();\n"
        "for (volatile int i = 0;; i++);",
        (Status.TIME_LIMIT,),
    ),
    "memory": (
        "for (;;) { char *p = new char[1 << 20]; memset(p, 1, 1 << 20); keep = p; }",
        (Status.MEMORY_LIMIT,),
    ),
    "memory_without_exceptions": (
        "for (;;) { void *p = mmap(0, 1 << 20, 3, 34, -1, 0); if (p == MAP_FAILED) abort();\n"
        "memset(p, 1, 1 << 20); }",
        (Status.MEMORY_LIMIT,),
    ),
    "page_tables": (
        "for (long i = 1; i < 64000; i++) {\n"
        "char *p = (char *)mmap((void *)(i * (2L << 30)), 4096,\n"
        "PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);\n"
        "if (p != MAP_FAILED) keep = (void *)(long)*(volatile char *)p; }\n"
        "for (int i = 0; i < 20; i++) usleep(10000);",
        (Status.MEMORY_LIMIT,),
    ),
    "page_tables_where_the_kernel_maps": (
        "for (int i = 0; i < 60000; i++) { long size = 128L << 20;\n"
        "char *p = (char *)mmap(0, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);\n"
        "if (p == MAP_FAILED) break; keep = (void *)(long)*(volatile char *)p;\n"
        "munmap(p + 4096, size - 4096); }\n"
        "for (int i = 0; i < 20; i++) usleep(10000);",
        (Status.MEMORY_LIMIT,),
    ),
    "output": ('for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxx");', (Status.OUTPUT_LIMIT,)),
    "sparse_output": ('pwrite(1, "x", 1, 1 << 30); escaped(1);', (Status.OUTPUT_LIMIT,)),
    "stack": ("recurse(0);", (*ERROR, Status.MEMORY_LIMIT)),
    "own_table_of_descriptors": ("escaped(syscall(436, 1000u, 1001u, 2u));", OK),
    "shared_memory_without_a_file": (
        "void *p = mmap(0, 4096, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);\n"
        "escaped(p == MAP_FAILED ? -1 : 1);",
        OK,
    ),
    "core_dumps_by_the_hosts_handler": ("rlimit r{0, 0}; escaped(setrlimit(RLIMIT_CORE, &r));", OK),
    "address_zero": ("*(volatile int *)0 = 1;", ERROR),
    "abort": ("abort();", ERROR),
    "exception": ("throw 5;", ERROR),
    "bad_frame": ("syscall(SYS_rt_sigreturn); escaped(1);", ERROR),
    "exit": ("_exit(7);", ERROR),
}
INCLUDES = (
    "csignal cstdio cstdlib cstring ctime fcntl.h linux/sched.h sched.h sys/mman.h sys/mount.h "
    "sys/personality.h sys/prctl.h sys/ptrace.h sys/resource.h sys/socket.h sys/syscall.h "
    "system_error thread unistd.h vector"
)
SOURCE = "\n".join(
    [
        *(f"#include <{name}>" for name in INCLUDES.split()),
        "void *volatile keep;",
        "void escaped(long result) {",
        '  if (result >= 0) { printf("ESCAPED %ld\\n", result); exit(0); } }',
        "int recurse(int n) { volatile char large[4096]; large[0] = n;",
        "  return recurse(n + 1) + large[0]; }",
        "int main() {",
        '  int which; if (scanf("%d", &which) != 1) return 9;',
        "  switch (which) {",
        *(f"  case {n}: {{ {body} break; }}" for n, (body, _) in enumerate(ATTACKS.values())),
        "  }",
        "}",
    ]
)
COMPILATIONS = {
    "password_file_included": '#include "/etc/passwd"\nint main() {}',
    "password_file_embedded": (
        'asm(".section .rodata\\n.global d\\nd: .incbin \\"/etc/passwd\\"\\n.text");\n'
        'extern "C" char d[]; int main() { puts(d); }'
    ),
    "own_input_included": '#include "/dev/stdin"\nint main() {}',
    "process_included": "#include </proc/self/environ>\nint main() {}",
    "scratch_included": '#include "program"\nint main() {}',
    "library_of_the_interpreter_included": (
        '#include "/usr/lib/python3/dist-packages/x"\nint main() {}'
    ),
    "endless_include": "#include __FILE__\nint main() {}",
    "no_main": "int f() { return 1; }",
    "large_array": "int a[1 << 28] = {1}; int main() { return a[3]; }",
    "many_macros": (
        "#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(A(A(A(A(x)))))))\nB(B(int;))\n"
        "int main() {}"
    ),
    "users_file_included": '#include "/root/.bashrc"\nint main() {}',
    "file_by_dots_included": '#include "../../../../../../etc/hostname"\nint main() {}',
    "endless_templates": "template<int N> struct A { A<N + 1> a; }; A<0> a; int main() {}",
    "endless_constant": (
        "constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\n"
        "constexpr long x = f(90); int main() {}"
    ),
    "control_characters": "\x01\x02",
    "zero_bytes": "int main() { return 0; }\0",
}


@pytest.fixture(scope="module")
def cpp_sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as sandbox:
        if "cpp" not in sandbox.languages:
            pytest.skip("this machine compiles no C++")
        yield sandbox


@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls x86-64 system-call numbers")
@pytest.mark.parametrize("name", ATTACKS)
def test_a_compiled_attack_is_stopped(cpp_sandbox: Sandbox, name: str) -> None:
    number = [*ATTACKS].index(name)
    allowed = ATTACKS[name][1]
    # page faults are slow on a busy machine, so other limits must come before that of time
    limits = LIMITS if Status.TIME_LIMIT in allowed else replace(LIMITS, cpu_s=2.0)
    result = cpp_sandbox.run(SOURCE, str(number), limits, "cpp")
    assert b"ESCAPED" not in result.stdout, result
    assert result.status in allowed, result
    assert cpp_sandbox.run(SOURCE, "999", LIMITS, "cpp").status is Status.OK


@pytest.fixture(scope="module")
def unconfined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the attacks for runs without a sandbox."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("this machine compiles no C++")
    program = tmp_path_factory.mktemp("attacks") / "attacks"
    subprocess.run([compiler, "-x", "c++", "-", "-o", program], input=SOURCE.encode(), check=True)
    return program


HARMLESS = (
    "password_file root_listing own_process_in_proc socket unix_socket memory_file fork clone "
    "clone3 exec_of_a_shell execveat_of_a_shell spawn signal_to_the_parent descriptors "
    "become_dumpable another_process_there live_on own_session trace hard_limit_of_cpu_time "
    "timer_that_kills own_table_of_descriptors shared_memory_without_a_file "
    "core_dumps_by_the_hosts_handler"
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls x86-64 system-call numbers")
@pytest.mark.parametrize("name", HARMLESS.split())
def test_a_compiled_attack_succeeds_without_a_sandbox(unconfined: Path, name: str) -> None:
    number = f"{[*ATTACKS].index(name)}\n".encode()
    with open("/dev/null") as other:  # a descriptor for the attack that looks for one
        fd = other.fileno()
        ended = subprocess.run(
            [unconfined], input=number, capture_output=True, timeout=30, pass_fds=(fd,)
        )
    assert b"ESCAPED" in ended.stdout, ended


@pytest.mark.parametrize("source", COMPILATIONS.values(), ids=COMPILATIONS)
def test_a_compilation_reads_nothing_and_its_failure_is_the_programs(
    cpp_sandbox: Sandbox, source: str
) -> None:
    result = cpp_sandbox.run(source, language="cpp")
    allowed = (Status.COMPILE_ERROR, Status.OK) if "\0" in source else (Status.COMPILE_ERROR,)
    assert result.status in allowed, result
    assert b"root:" not in result.stdout + result.stderr
