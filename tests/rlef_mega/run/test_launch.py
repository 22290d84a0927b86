"""What a rank that fails tells the user."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_mega.run.launch import fails_first, launch

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


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("1", "error on rank 1: rank 1 has no memory left"),  # nobody else would say it
        ("01", "has no memory left"),  # the first of them, once
    ],
)
def test_the_rank_that_fails_says_why(tmp_path: Path, failing: str, message: str) -> None:
    (tmp_path / "failing_worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "rlef_mega.run.launch", "2", "failing_worker", failing],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("no memory") == 1


def test_the_mark_of_an_earlier_launch_silences_nobody(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    os.utime(mark, (1000, 1000))
    assert fails_first(mark, since=2000.0)
    assert not fails_first(mark, since=2000.0)


def test_a_launch_leaves_neither_its_signal_handlers_nor_a_stop_file(tmp_path: Path) -> None:
    """Else a later SIGTERM would create the file, and the next run would stop at its first step."""
    before = signal.getsignal(signal.SIGTERM)
    assert launch("this", tmp_path, 1) == 0  # a module of the standard library that only prints
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "stop").exists()
