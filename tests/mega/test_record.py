"""The run directory reads as if the run had never stopped, and belongs to one run at a time."""

import json
import os
import subprocess
import sys
import time

import pytest

from rlef_mega.record import Clock, RunDirectory

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from rlef_mega.record import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
run.lock()
print("locked", flush=True)
time.sleep(60)
"""


def test_resuming_forgets_what_came_after_the_checkpoint_and_a_line_cut_by_a_kill(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "solved": step / 4})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 4, "sol')
    run.resume(2)
    assert [line["step"] for line in run.read_metrics()] == [1, 2]
    run.append_metrics({"step": 3, "solved": 1.0})
    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_run_directory_has_one_owner_and_a_killed_owner_leaves_it_free(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with pytest.raises(RuntimeError, match=f"in use by process {holder.pid}"):
        RunDirectory(tmp_path).lock()
    holder.kill()
    holder.wait()
    RunDirectory(tmp_path).lock()


def test_a_step_is_its_phases_and_what_none_of_them_claims():
    clock = Clock()
    with clock("rollout"):
        time.sleep(0.02)
    time.sleep(0.02)
    with clock("rollout"):
        time.sleep(0.02)
    times = clock.lap()
    assert 0.04 <= times["rollout"] <= times["step"] - 0.015
    assert clock.lap().keys() == {"step"}
