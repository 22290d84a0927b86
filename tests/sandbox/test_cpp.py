"""C++ programs: compiled in confinement, run under the same limits, with the same verdicts."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlef_sandbox import CallTest, CheckerProgram, Limits, Sandbox, Status, Test, native, worker
from rlef_sandbox.cpp import COMPILE, Cpp, compile_error
from rlef_sandbox.languages import LANGUAGES
from rlef_sandbox.protocol import Ending, Outcome, Phase
from rlef_sandbox.worker import ZygoteLostError
from tests.sandbox.test_attacks_compiled import COMPILATIONS
from tests.sandbox.test_lifetime import descendants, kill_all

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")

LIMITS = Limits(cpu_s=1.0, wall_s=20.0, memory_bytes=128 << 20, output_bytes=64 << 10)
HEADER = """\
#include <bits/stdc++.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
using namespace std;
"""

ENDS = {
    "prints": ('int main() { puts("hi"); }', Status.OK),
    "static_variables_past_the_limit": (
        'char t[600 << 20];\nint main() { memset(t, 1, sizeof t); printf("%d", t[7]); }',
        Status.MEMORY_LIMIT,
    ),
    "untouched_variables_past_the_limit": (
        'int t[175 << 20];\nint main() { t[7] = 5; int *volatile p = t; printf("%d", p[7]); }',
        Status.MEMORY_LIMIT,
    ),
    "initialised_variables_past_the_limit": (
        "struct S { int a; S() : a(1) {} } s[100 << 20];\nint main() { return s[9].a - 1; }",
        Status.MEMORY_LIMIT,
    ),
    "variables_of_a_thread_past_the_limit": (
        'thread_local char t[600 << 20];\nint main() { t[rand() % 9] = 1; puts("hi"); }',
        Status.MEMORY_LIMIT,
    ),
    "untouched_variables_near_the_limit": (
        'int t[40 << 20];\nint main() { t[7] = 5; puts("hi"); }',
        Status.OK,
    ),
    "a_crash_with_large_variables": (
        "int t[20 << 20];\nint main() { t[7] = 5; abort(); }",
        Status.RUNTIME_ERROR,
    ),
    "reads": ("int main() { int a, b; cin >> a >> b; cout << a + b; }", Status.OK),
    "exits_with_3": ("int main() { return 3; }", Status.RUNTIME_ERROR),
    "crashes": ("int main() { *(volatile int *)0 = 1; }", Status.RUNTIME_ERROR),
    "throws": ('int main() { throw runtime_error("x"); }', Status.RUNTIME_ERROR),
    "loops": ("int main() { for (volatile long i = 0;; i++); }", Status.TIME_LIMIT),
    "grows": (
        "int main() { vector<char> v; for (;;) v.resize(v.size() + (1 << 20), 1); }",
        Status.MEMORY_LIMIT,
    ),
    "recurses_endlessly": (
        "int f(int x) { volatile char b[1000]; b[0] = x; return f(x + 1) + b[0]; }\n"
        "int main() { return f(0); }",
        Status.MEMORY_LIMIT,
    ),
    "recurses_deep": (
        "int f(int x) { volatile char b[100]; b[0] = x; return x ? 1 + f(x - 1) : 0; }\n"
        "int main() { return f(300000) != 300000; }",
        Status.OK,
    ),
    "floods": ('int main() { for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxx"); }', Status.OUTPUT_LIMIT),
    "has_threads": (
        "int main() { vector<thread> t; for (int i = 0; i < 8; i++) t.emplace_back([] {});\n"
        "for (auto &x : t) x.join(); }",
        Status.OK,
    ),
    "does_not_compile": ("int main() { return x; }", Status.COMPILE_ERROR),
    "does_not_link": ("int f(); int main() { return f(); }", Status.COMPILE_ERROR),
}


@pytest.fixture(scope="module")
def cpp() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        assert sandbox.languages == LANGUAGES
        yield sandbox


@pytest.mark.parametrize(("source", "status"), ENDS.values(), ids=ENDS)
def test_each_way_to_end_has_the_same_status_as_in_python(
    cpp: Sandbox, source: str, status: Status
) -> None:
    assert cpp.run(HEADER + source, b"1 2", LIMITS, language="cpp").status is status


def test_the_compiler_works_after_an_attack_at_compile_time(
    cpp: Sandbox,
) -> None:
    for source in ("int main() {", 'asm(".incbin \\"/dev/zero\\""); int main() {}'):
        assert cpp.run(source, language="cpp").status is Status.COMPILE_ERROR
    assert cpp.run("int main() {}", language="cpp").status is Status.OK


def test_a_source_that_takes_the_compiler_too_long_is_the_programs_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlef_sandbox.cpp.COMPILE", COMPILE._replace(cpu_s=1.0))
    source = "int main() { return " + "(" * 200_000 + "1" + ")" * 200_000 + "; }"
    with Sandbox(workers=1) as sandbox:
        result = sandbox.run(source, language="cpp")
    assert result.status is Status.COMPILE_ERROR
    assert b"took too long" in result.stderr


@pytest.mark.parametrize("ending", [Ending.WALL_LIMIT, Ending.ITSELF])
def test_only_a_compiler_that_we_did_not_end_was_killed_by_the_machine(ending: Ending) -> None:
    """At its time limit we kill it, and that is the program's failure."""
    outcome = Outcome(Phase.COMPILING, ending, signal.SIGKILL, 1.0, 60.0, 1 << 20)
    if ending is Ending.WALL_LIMIT:
        result = compile_error(outcome, b"", b"", starved=True)
        assert result.status is Status.COMPILE_ERROR and b"took too long" in result.stderr
    else:
        with pytest.raises(ZygoteLostError, match="killed from outside"):
            compile_error(outcome, b"", b"", starved=False)


@pytest.mark.parametrize("victim", ["g++", "cc1plus"])
def test_a_compiler_killed_by_the_machine_is_not_a_compile_error(victim: str) -> None:
    """It is tried again, and here the second try succeeds."""
    slow = HEADER + "constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\n"
    slow += "constexpr long x = f(27); int main() { cout << x; }"
    with Sandbox(workers=1) as sandbox, ThreadPoolExecutor(1) as pool:
        assert sandbox.run("int main() {}", language="cpp").status is Status.OK
        job = pool.submit(sandbox.run, slow, b"", LIMITS, "cpp")
        deadline = time.monotonic() + 10
        while not (pids := descendants_named(victim)) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert pids and not job.done()
        kill_all(set(pids))
        assert job.result().stdout == b"196418"


@pytest.mark.parametrize(
    "source",
    [
        "#error Killed signal terminated program\nint main() {}",
        '# 1 "x"\nstatic_assert(false, "\\ng++: fatal error: Killed signal terminated program '
        'cc1plus\\ncompilation terminated.");\nint main() {}',
    ],
)
def test_a_source_cannot_say_that_its_compiler_was_killed(cpp: Sandbox, source: str) -> None:
    assert cpp.run(source, language="cpp").status is Status.COMPILE_ERROR


def test_an_executable_that_the_kernel_refuses_is_the_programs_failure(cpp: Sandbox) -> None:
    source = HEADER + (
        'extern const char interp[] __attribute__((section(".interp"), used)) = "/nonexistent";\n'
        'int main() { puts("no"); }'
    )
    result = cpp.run(source, b"", LIMITS, language="cpp")
    assert result.status is Status.RUNTIME_ERROR and not result.stdout, result


def test_the_compiler_sees_no_packages_of_others(cpp: Sandbox) -> None:
    """Packages of the system's Pythons may contain the tests of data sets."""
    places = ("/usr/lib/python3*", "/usr/local/lib/python3*")
    found = [
        file
        for place in places
        for kind in ("dist-packages", "site-packages")
        for file in glob.glob(f"{place}/{kind}/*.py")
    ]
    if not found:
        pytest.skip("no packages below /usr")
    source = f'asm(".incbin \\"{found[0]}\\""); int main() {{}}'
    assert cpp.run(source, language="cpp").status is Status.COMPILE_ERROR


def descendants_named(name: str) -> list[int]:
    found = []
    for pid in descendants(os.getpid()):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("int f(); int main() { return f(); }", b"/ld: program.o: in function"),
        (
            "#include <bits/stdc++.h>\n#include_next <bits/stdc++.h>\n",
            b"error: /usr/include/bits/stdc++.h: No such file",
        ),
    ],
    ids=["linker", "precompiled_headers"],
)
def test_messages_show_no_path_of_this_machine(cpp: Sandbox, source: str, shown: bytes) -> None:
    stderr = cpp.run(source, language="cpp").stderr
    assert shown in stderr and b"rlef" not in stderr, stderr


def test_tests_are_graded_by_any_checker(cpp: Sandbox) -> None:
    source = HEADER + 'int main() { double x; cin >> x; printf("%.9f\\n", x / 3); }'
    tests = [Test("1", "0.333333333"), Test("2", "0.66666667"), Test("3", "2")]
    results = cpp.grade(source, tests, language="cpp", stop_at_first_failure=False)
    assert [r.status for r in results] == [Status.OK, Status.OK, Status.WRONG_ANSWER]
    judge = CheckerProgram(
        "def check(stdin, expected, actual): return abs(3 * float(actual) - float(stdin)) < 1e-6"
    )
    results = cpp.grade(source, tests, language="cpp", checker=judge)
    assert [r.status for r in results] == [Status.OK] * 3


def test_a_compile_error_is_the_result_of_every_test(cpp: Sandbox) -> None:
    results = cpp.grade("int", [Test("", "")] * 3, language="cpp", stop_at_first_failure=False)
    assert [r.status for r in results] == [Status.COMPILE_ERROR] * 3
    assert b"error" in results[0].stderr
    assert len(cpp.grade("int", [Test("", "")] * 3, language="cpp")) == 1


def test_function_calls_are_for_python(cpp: Sandbox) -> None:
    with pytest.raises(ValueError, match="CallTest calls a Python function"):
        cpp.grade("int main() {}", [CallTest("f", (), 1)], language="cpp")


@pytest.mark.timing
def test_a_source_is_compiled_once(cpp: Sandbox) -> None:
    source = HEADER + "int main() { string s; cin >> s; cout << s << s; }"
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(cpp.grade, source, [Test(str(n), f"{n}{n}")], language="cpp")
            for n in range(32)
        ]
        assert all(job.result()[0].status is Status.OK for job in jobs)
    started = time.perf_counter()
    cpp.run(source, language="cpp")
    again_s = time.perf_counter() - started
    started = time.perf_counter()
    cpp.run(source + "// another source", language="cpp")
    assert again_s < (time.perf_counter() - started) / 3


def test_the_program_sees_a_world_of_its_own(cpp: Sandbox) -> None:
    source = HEADER + (
        "int main(int, char **v) { for (char **e = environ; *e; e++) puts(*e);\n"
        "puts(v[0]); cout << (getuid() == 0) << isatty(0) << lseek(0, 0, SEEK_END) << endl; }"
    )
    result = cpp.run(source, b"12345", language="cpp")
    assert result.stdout.decode().split() == [
        "LANG=C",
        "PATH=/usr/bin:/bin",
        "ONLINE_JUDGE=true",
        "solution",
        "005",
    ]


def test_a_program_that_overwrites_its_input_changes_no_other_test(cpp: Sandbox) -> None:
    source = HEADER + (
        'int main() { string s; cin >> s; cout << s; ftruncate(0, 0); write(0, "spoilt", 6); }'
    )
    results = cpp.grade(source, [Test("abc", "abc")] * 3, language="cpp")
    assert [r.status for r in results] == [Status.OK] * 3


def running_solutions() -> list[Path]:
    found = []
    for folder in [Path(f"/proc/{pid}") for pid in descendants(os.getpid())]:
        with contextlib.suppress(OSError):
            found += [folder] * ((folder / "cmdline").read_bytes() == b"solution\0")
    return found


def test_a_compiled_program_cannot_be_dumped(cpp: Sandbox) -> None:
    """An exec may make a process dumpable; if it does not, /proc/PID/environ belongs to root."""
    with ThreadPoolExecutor(1) as pool:
        source = "#include <unistd.h>\nint main() { sleep(2); }"
        pool.submit(cpp.run, source, limits=Limits(cpu_s=3), language="cpp")
        deadline = time.monotonic() + 30
        while not (found := running_solutions()) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        assert os.stat(found[0] / "environ").st_uid == 0
        limits = (found[0] / "limits").read_text()
        (core,) = [line.split()[4:6] for line in limits.splitlines() if "core" in line]
        assert core == ["1", "1"]


def test_the_compilers_layers_are_proved_like_a_zygotes(cpp: Sandbox) -> None:
    assert cpp.run("int main() {}", language="cpp").status is Status.OK
    compilers = cpp._languages._cpp["cpp"]._all
    compiler_layers = compilers[0].layers or compilers[1].layers
    for layer in ("no_new_privs", "rlimits", "seccomp", "unprivileged_user", "files"):
        assert compiler_layers[layer] == cpp.isolation[layer], layer


NO_NAMESPACES = """
def refuse(flags): raise OSError(1, "no namespaces here")
rlef_sandbox.kernel.unshare = refuse
"""


def test_landlock_alone_confines_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    start = "import rlef_sandbox.kernel\n" + NO_NAMESPACES + "main()\n"
    bootstrap = worker.BOOTSTRAP.replace("main()\n", start)
    monkeypatch.setattr(worker, "COMMAND", [*worker.COMMAND[:-1], bootstrap])
    with Sandbox(workers=1) as sandbox:
        if not any(layer.startswith("landlock") for layer in sandbox.isolation["files"]):
            pytest.skip("this machine has no Landlock")
        assert sandbox.run(HEADER + "int main() {}", language="cpp").status is Status.OK
        for name in ("password_file_included", "password_file_embedded"):
            result = sandbox.run(COMPILATIONS[name], language="cpp")
            assert result.status is Status.COMPILE_ERROR
            assert b"root:" not in result.stderr


def test_without_a_precompiled_header_it_is_only_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlef_sandbox.cpp.precompiled_headers", lambda flags: None)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run(HEADER + "int main() {}", language="cpp").status is Status.OK


def test_where_there_is_no_compiler_the_language_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cpp, "compiler", staticmethod(lambda: None))
    with Sandbox(workers=1) as sandbox:
        assert sandbox.languages == ("python",)
        with pytest.raises(ValueError, match=r"needs g\+\+"):
            sandbox.run("int main() {}", language="cpp")


def test_without_the_c_launcher_python_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "spawn_library", lambda: None)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.isolation["launcher"] == "python"
        assert sandbox.languages == ("python",)
        assert sandbox.run("print(1)").stdout == b"1\n"


# Accepts two numbers whose sum is the input. Like testlib's, it opens its files by their paths,
# each of them twice. It cannot open another file.
SUM_CHECKER = """\
#include <bits/stdc++.h>
using namespace std;
int main(int argc, char **argv) {
    if (argc != 4 || fopen("/etc/passwd", "r") || ifstream("solution.py")) return 3;
    for (int n = 1; n < 4; n++) if (!ifstream(argv[n])) return 3;
    FILE *input = fopen(argv[1], "rb"), *output = fopen(argv[2], "rb");
    ifstream answer(argv[3]);
    long n, a, b, x;
    if (fscanf(input, "%ld", &n) != 1 || !(answer >> x)) return 3;
    if (fscanf(output, "%ld%ld", &a, &b) != 2) return 2;
    return a + b == n ? 0 : 1;
}
"""


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("print(1, int(input()) - 1)", Status.OK),
        ("print(0, 5)", Status.OK),
        ("print(1, 5)", Status.WRONG_ANSWER),
        ("print('x')", Status.WRONG_ANSWER),
        ("pass", Status.WRONG_ANSWER),
    ],
)
def test_a_checker_in_cpp_decides_by_its_exit_code(
    sandbox: Sandbox, program: str, status: Status
) -> None:
    checker = CheckerProgram(SUM_CHECKER, language="cpp")
    (result,) = sandbox.grade(program, [Test("5", "2 3")], checker=checker)
    assert result.status is status


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("int main() { return 3; }", b"the checker program is broken: RUNTIME_ERROR"),
        ("int main() { for (;;); }", b"the checker program is broken: TIME_LIMIT"),
        ("int main() {", b"the checker program does not compile"),
    ],
)
def test_a_broken_checker_in_cpp_is_not_a_verdict(
    sandbox: Sandbox, source: str, words: bytes
) -> None:
    checker = CheckerProgram(source, Limits(cpu_s=0.3, wall_s=15), "cpp")
    (result,) = sandbox.grade("print(1)", [Test("", "1")], checker=checker)
    assert result.status is Status.SANDBOX_ERROR and result.stderr.startswith(words)


def test_a_checker_in_another_language_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="unknown language 'java'"):
        sandbox.grade("print(1)", [Test("", "1")], checker=CheckerProgram("", language="java"))


@pytest.mark.parametrize(
    ("language", "year"),
    [("cpp", 2017), ("cpp11", 2011), ("cpp14", 2014), ("cpp17", 2017), ("cpp20", 2020)],
)
def test_the_language_names_the_standard(sandbox: Sandbox, language: str, year: int) -> None:
    source = HEADER + 'int main() { typeof(1) gnu = 1; printf("%ld", __cplusplus / 100 * gnu); }'
    (result,) = sandbox.grade(source, [Test("", str(year))], language=language)
    assert result.status is Status.OK, result
