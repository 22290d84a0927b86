"""Whatever state the calling process is in, programs find the same one and get the same verdict."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_sandbox import Sandbox, worker

PYTHON = """
import os, resource, secrets, signal, sys
def is_open(number):
    try: return bool(os.fstat(number))
    except OSError: return False
def recurse(n): return 0 if n == 0 else max(0, recurse(n - 1))
sys.setrecursionlimit(10**6)
print([str(signal.getsignal(n)) for n in sorted(signal.valid_signals())])
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.getpriority(0, 0), os.getcwd())
print(sorted(os.environ.items()), os.sched_getaffinity(0), list(filter(is_open, range(64))))
kinds = sorted(k for k in dir(resource) if k.startswith("RLIMIT_") and k != "RLIMIT_AS")
print([(kind, resource.getrlimit(getattr(resource, kind))) for kind in kinds])
print(recurse(60000))
"""
CPP = r"""
#include <cstdio>
#include <signal.h>
#include <sys/resource.h>
extern char **environ;
int main() {
    struct sigaction found; sigset_t blocked; sigprocmask(SIG_BLOCK, nullptr, &blocked);
    for (int n = 1; n < 65; n++)
        if (sigaction(n, nullptr, &found) == 0)
            printf("%d%d ", found.sa_handler == SIG_IGN, sigismember(&blocked, n));
    for (int kind = 0; kind < 16; kind++) {
        rlimit bound; getrlimit(__rlimit_resource_t(kind), &bound);
        if (kind != RLIMIT_AS) printf("%lx %lx ", bound.rlim_cur, bound.rlim_max);
    }
    for (char **line = environ; *line; line++) puts(*line);
}
"""
CALLER = """
import json, os, resource, signal, sys
languages, state = json.load(sys.stdin)
exec(state)
from rlef_sandbox import Sandbox
out = []
with Sandbox(workers=1) as sandbox:
    for language, source in languages.items():
        result = sandbox.run(source, language=language)
        out.append([result.status, result.stdout.decode(), result.stderr.decode()])
open(os.open(sys.argv[1], os.O_WRONLY), "w").write(json.dumps(out))
"""
STATES = {
    "umask_of_nothing": "os.umask(0o777 & ~0o700)",
    "umask_of_everything": "os.umask(0)",
    "blocked_signals": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "ignored_signals": (
        "for n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)"
    ),
    "default_broken_pipe": "signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
    "nice": "os.nice(7)" if os.getuid() == 0 else "",
    "batch": "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "one_processor": "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "folder_that_is_gone": "import tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)",
    "environment": (
        "os.environ.update(LC_ALL='xx_XX', LANG='tr_TR', TZ='Asia/Tokyo', PYTHONHASHSEED='7', "
        "PYTHONWARNINGS='error', PYTHONPATH='/', LD_PRELOAD='', LD_LIBRARY_PATH='/nowhere', "
        "CPLUS_INCLUDE_PATH='/nowhere')"
    ),
    "open_descriptors": (
        "for n in range(9): os.set_inheritable(os.open('/etc/passwd', os.O_RDONLY), True)"
    ),
    "closed_streams": "os.close(0); os.close(1); os.close(2)",
    "soft_limits": (
        "for n, v in ('STACK', 1 << 20), ('FSIZE', 1 << 20), ('NOFILE', 64), ('CORE', 0):\n"
        "    kind = getattr(resource, 'RLIMIT_' + n)\n"
        "    resource.setrlimit(kind, (v, resource.getrlimit(kind)[1]))"
    ),
}


def found_in(state: str, languages: dict[str, str], report: str) -> list[list[str]]:
    """Return how the programs end in a sandbox of a process that is in this state."""
    process = subprocess.run(
        [sys.executable, "-c", CALLER, report],
        input=json.dumps([languages, state]),
        text=True,
        stderr=subprocess.PIPE,
    )
    assert process.returncode == 0, process.stderr
    with open(report) as file:
        return json.load(file)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[list[str]]]:
    """Return a program for each of this machine's languages, and how they end in a usual state."""
    with Sandbox(workers=1) as sandbox:
        languages = {"python": PYTHON, "cpp": CPP}
        languages = {
            name: languages[name] for name in ("python", "cpp") if name in sandbox.languages
        }
    report = tmp_path_factory.mktemp("state") / "report"
    report.touch()
    ends = found_in("", languages, str(report))
    assert [status for status, _, _ in ends] == ["OK"] * len(languages), ends
    return languages, ends


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_callers_state_does_not_show_in_a_program(
    ordinary: tuple[dict[str, str], list[list[str]]], state: str, tmp_path: object
) -> None:
    languages, ends = ordinary
    report = f"{tmp_path}/report"
    open(report, "w").close()
    assert found_in(state, languages, report) == ends


@pytest.mark.parametrize("name", ["STACK", "FSIZE", "AS", "DATA", "CPU"])
def test_a_hard_limit_that_is_too_low_is_raised_or_refused_by_its_name(name: str) -> None:
    least = {"AS": 1536 << 20, "DATA": 1536 << 20, "CPU": 9}.get(name, 8 << 20)
    kind = getattr(resource, f"RLIMIT_{name}")
    process = subprocess.run(
        [sys.executable, "-m", "rlef_sandbox", "doctor"],
        preexec_fn=lambda: resource.setrlimit(kind, (least, least)),
        capture_output=True,
        text=True,
    )
    raised = process.returncode == 0
    assert raised or (process.returncode == 2 and f"RLIMIT_{name} is {least}" in process.stderr)


def test_what_the_launcher_sets_for_itself_is_not_in_a_programs_environment() -> None:
    program = (
        "import ctypes, os, posix\n"
        f"names = {[*worker.LOADER]}\n"
        "getenv = ctypes.CDLL(None).getenv\n"
        "print([n for n in names if n in os.environ or n.encode() in posix.environ])\n"
        "print([n for n in names if getenv(n.encode())], sorted(os.environ))"
    )
    expected = sorted(worker.ENVIRONMENT.keys() - worker.LOADER.keys())
    with Sandbox(workers=1) as sandbox:
        found = sandbox.run(program)
    assert found.stdout.decode().splitlines() == ["[]", f"[] {expected}"], found


def test_a_python_that_needs_the_callers_library_path_starts_and_its_programs_do_not_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$LD_LIBRARY_PATH" = /opt/python/lib ] || '
        "{ echo libpython3.so: cannot open shared object file >&2; exit 127; }\n"
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(worker, "COMMAND", [str(python), *worker.COMMAND[1:]])
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    with Sandbox(workers=1) as sandbox:
        found = sandbox.run("import os; print(os.environ.get('LD_LIBRARY_PATH'))")
    assert found.stdout == b"None\n", found
