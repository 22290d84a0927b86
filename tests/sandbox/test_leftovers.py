"""What a killed controller leaves on the machine: nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlef_sandbox import Sandbox, cgroups
from tests.sandbox.test_lifetime import SANDBOX_PATH, descendants, gone

CONTROLLER = """
import sys, threading, time
from rlef_sandbox import Limits, Sandbox
sandbox = Sandbox(workers=2)
cpp = "cpp" in sandbox.languages
if cpp: assert sandbox.run("int main() {}", language="cpp").status == "OK"
limits = Limits(cpu_s=60)
for _ in range(3):
    threading.Thread(target=sandbox.run, args=("while True: pass", b"", limits)).start()
    threading.Thread(target=sandbox.run, args=("import time; time.sleep(60)",)).start()
time.sleep(0.5)
if cpp:  # and one in the middle of a compilation
    slow = "constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); } int main() {}"
    slow += "constexpr long x = f(90);"
    threading.Thread(target=sandbox.run, args=(slow,), kwargs={"language": "cpp"}).start()
    time.sleep(0.5)
print("running", flush=True)
time.sleep(60)
"""


def left_by(pid: int, scratch: Path) -> set[str]:
    """Return the scratch folders and cgroups of the controller `pid`, whose temporary folder is
    `scratch`."""
    own = cgroups.own_group()
    groups = list(own.glob(f"{cgroups.PREFIX}{pid}-*")) if own is not None else []
    return {str(path) for path in [*groups, *scratch.iterdir()]}


def vanishes(paths: set[str], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(os.path.exists(path) for path in paths):
            return True
        time.sleep(0.05)
    return False


def test_a_controller_killed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": SANDBOX_PATH, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", CONTROLLER], stdout=subprocess.PIPE, env=environment
    ) as controller:
        assert controller.stdout is not None
        assert controller.stdout.readline() == b"running\n"
        below, made = descendants(controller.pid), left_by(controller.pid, tmp_path)
        assert len(below) > 6
        if shutil.which("g++"):
            assert made, "a compiler has a scratch folder"
        os.kill(controller.pid, signal.SIGKILL)
    assert gone(below)
    assert vanishes(made), made


def test_a_sandbox_that_is_closed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Sandbox(workers=1) as sandbox:
        if "cpp" in sandbox.languages:
            sandbox.run("int main() {}", language="cpp")
        made = left_by(os.getpid(), tmp_path)
    assert vanishes(made, within_s=3.0), made


def test_a_cgroup_holds_the_whole_worker() -> None:
    with Sandbox(workers=1) as sandbox:
        if not sandbox.isolation["cgroup"]:
            pytest.skip("no version 2 cgroup is delegated here")
        own = cgroups.own_group()
        assert own is not None
        (group,) = own.glob(f"{cgroups.PREFIX}{os.getpid()}-*")
        held = {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
        below = descendants(os.getpid())
        assert held and held < below, "the zygote, and not its reaper"
        assert sandbox.run("print(1)").stdout == b"1\n"
    assert not group.exists()


def test_a_group_whose_owner_was_killed_with_its_reaper_is_removed_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = cgroups.own_group()
    if own is None or not cgroups.create(None):
        pytest.skip("no version 2 cgroup is delegated here")
    orphan = own / f"{cgroups.PREFIX}4194305-0"  # above the largest process id
    orphan.mkdir()
    for group in own.glob(f"{cgroups.PREFIX}{os.getpid()}-*"):
        cgroups.remove(str(group))
    with Sandbox(workers=1):
        assert not orphan.exists()


def test_a_sandbox_works_without_cgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "own_group", lambda: None)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.isolation["cgroup"] == []
        assert sandbox.run("print(1)").stdout == b"1\n"
