"""The command around the steps; tests/null_gpu/test_check_gpu.py runs the steps."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# -S: nothing but the standard library, as on an image without our dependencies
COMMAND = [sys.executable, "-S", "-m", "rlef_mega.check_gpu.command"]


def check(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    environment = {"PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_packages_it_names_them_and_a_failed_step_stops_no_other(tmp_path):
    done = check(tmp_path, "--only", "ipc", "memcheck", "--set", "run.dir='of mine'")
    assert done.returncode == 2
    assert "not installed: " in done.stdout and "megatron-core" in done.stdout
    for name in ("ipc", "memcheck"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert not found["passed"] and found["failures"] and found["ended"] == "exit code 1"
        again = ["rlef", "check-gpu", "OUT", "--only", name, "--set", "run.dir='of mine'"]
        assert shlex.split(found["command"]) == again
        assert f"| {name} | exit code 1 |" in (tmp_path / "summary.md").read_text()


def test_without_time_no_step_is_started(tmp_path):
    done = check(tmp_path, "--minutes", "0.1")
    assert done.returncode == 2 and "machine: not run, the time was up" in done.stdout
    assert not list(tmp_path.glob("*.json"))


def test_steps_that_passed_are_not_repeated(tmp_path):
    (tmp_path / "ipc.json").write_text('{"passed": true}')
    done = check(tmp_path, "--minutes", "0.1")
    assert "ipc: passed before" in done.stdout and "head: not run" in done.stdout


def test_bad_arguments_are_refused(tmp_path):
    assert "invalid choice: 'speed'" in check(tmp_path, "--only", "speed").stderr
    assert "pip could not install" in check(tmp_path, "--wheels", tmp_path / "none").stderr
