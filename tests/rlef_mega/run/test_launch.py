"""How a failed rank is reported to the user."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_mega.run.launch import launch

WORKER = """
import os, sys, time
from rlef_mega.run.launch import worker_main

def work(folder):
    if os.environ["RANK"] in folder.name:
        raise RuntimeError(f"rank {os.environ['RANK']} has no memory left")
    time.sleep(20)
    return 0

worker_main(work)
"""


LAUNCH = """
import sys
from pathlib import Path
from rlef_mega.run.launch import launch
sys.exit(launch("worker", Path(sys.argv[1]), 2))
"""


def run_two_ranks(
    folder: Path, worker: str, argument: str, *wrapper: str
) -> subprocess.CompletedProcess[str]:
    (folder / "modules").mkdir()
    (folder / "modules" / "worker.py").write_text(worker)
    (folder / "random.py").write_text("raise SystemExit('imported from the working directory')")
    return subprocess.run(
        [*wrapper, sys.executable, "-P", "-c", LAUNCH, argument],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ":".join([str(folder / "modules"), *sys.path[1:]])},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("1", "error on rank 1: rank 1 has no memory left"),  # no other rank reports it
        ("01", "has no memory left"),  # the first of them, once
    ],
)
def test_the_rank_that_fails_says_why(tmp_path: Path, failing: str, message: str) -> None:
    (tmp_path / failing).mkdir()
    (tmp_path / failing / ".failed").touch()  # from an earlier launch: has no effect
    done = run_two_ranks(tmp_path, WORKER, failing)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("no memory") == 1


@pytest.mark.parametrize("output", ["| true", "> /dev/full 2>&1"])  # no reader; no room
def test_ranks_outlive_their_output(tmp_path: Path, output: str) -> None:
    worker = "from rlef_mega.run.launch import *; worker_main(lambda folder: print('step 1') or 0)"
    wrapper = ("bash", "-o", "pipefail", "-c", f'"$@" {output}', "bash")
    done = run_two_ranks(tmp_path, worker, ".", *wrapper)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another host name")
@pytest.mark.parametrize("hosts", ["", "10.99.88.77 weird-host"])  # of no machine; of another one
def test_ranks_of_one_machine_meet_whatever_its_name_resolves_to(
    tmp_path: Path, hosts: str
) -> None:
    worker = "from rlef_mega.run.ranks import *; meet(timedelta(seconds=20))"
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}\n")
    script = f'mount --bind {tmp_path}/hosts /etc/hosts && hostname weird-host && exec "$@"'
    wrapper = ("unshare", "--uts", "--mount", "sh", "-c", script, "sh")
    done = run_two_ranks(tmp_path, worker, "", *wrapper)
    assert done.returncode == 0, done.stderr


def test_a_launch_leaves_neither_its_signal_handlers_nor_a_stop_file(tmp_path: Path) -> None:
    """A later SIGTERM would create the file, and the next run would stop at its first step."""
    before = signal.getsignal(signal.SIGTERM)
    assert launch("this", tmp_path, 1) == 0  # a module of the standard library that only prints
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "stop").exists()
