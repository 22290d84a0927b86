"""The run directory reads as if the run had never stopped, and belongs to one run at a time."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlef_mega.run.directory import Clock, RunDirectory, explain_error, lock_file, replace_folder
from rlef_mega.run.launch import STOP_SIGNALS, StopRequest
from tests.rlef_mega.megatron.small_disk import small_disk

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from rlef_mega.run.directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
run.lock()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_warned_of_and_other_faults_end_the_run(
    tmp_path, monkeypatch, capsys, code
):
    """As Lustre mounted without `-o flock` answers."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as file:
        if code == errno.ENOSYS:
            lock_file(file)
            assert "Two processes could write it at once; start only one" in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError, match="choose a folder on a file system with locks"):
                lock_file(file)


def test_resuming_removes_lines_after_the_checkpoint_and_a_line_cut_by_a_kill(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "solved": step / 4})
    with open(run.metrics_path, "a", encoding="utf-8") as file:
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
    for enter in (RunDirectory.refuse_if_locked, RunDirectory.lock):
        with pytest.raises(RuntimeError, match=f"in use by process {holder.pid}"):
            enter(RunDirectory(tmp_path))
    holder.kill()
    holder.wait()
    RunDirectory(tmp_path).refuse_if_locked()  # does not keep the lock
    RunDirectory(tmp_path).lock()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_or_a_file_asks_a_rank_to_stop_once(tmp_path, number):
    """srun signals ranks directly, without a launcher. The file is removed once it was obeyed."""
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    try:
        stop = StopRequest(tmp_path / "stop")
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    finally:
        for each, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(each, handler)
    (tmp_path / "stop").touch()
    assert stop.obeyed(writer=True) == 3
    assert not (tmp_path / "stop").exists()


def test_lines_wait_for_space_on_a_full_disk(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "64k") as disk:
        if disk is None:
            pytest.skip("mounting a small tmpfs needs root")
        run = RunDirectory(disk)
        run.append_metrics({"step": 1})
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        run.append_metrics({"step": 2, "long": "x" * 8192})
        run.write_episodes("episodes/step_000002.jsonl.zst", [{"text": os.urandom(9999).hex()}])
        assert capsys.readouterr().err.count("No space left on device") == 2
        assert [line["step"] for line in run.read_metrics()] == [1]
        filler.unlink()
        run.append_metrics({"step": 3})
        assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]


def test_the_time_of_a_step_includes_its_phases_and_the_time_between_them():
    clock = Clock()
    with clock("rollout"):
        time.sleep(0.02)
    time.sleep(0.02)
    with clock("rollout"):
        time.sleep(0.02)
    times = clock.lap()
    assert 0.04 <= times["rollout"] <= times["step"] - 0.015
    assert clock.lap().keys() == {"step"}


def test_an_error_of_the_file_system_names_the_path_and_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    for path, remedy in (
        (tmp_path / "file", "move it"),
        (tmp_path / "file/run", "move it"),
        (Path("/proc/run"), "cannot be created there"),
    ):
        with pytest.raises(OSError) as raised:
            RunDirectory(path).lock()
        told = explain_error(raised.value)
        assert str(path) in told and remedy in told and "Errno" not in told


def test_a_file_system_without_locks_is_named(tmp_path):
    file = open(tmp_path / "lock", "w", encoding="utf-8")  # noqa: SIM115
    folder = os.open(tmp_path, os.O_PATH)
    os.dup2(folder, file.fileno())  # a descriptor that flock refuses, as some file systems do
    os.close(folder)
    with pytest.raises(RuntimeError, match=r"lock cannot be locked: .*; choose a folder"):
        lock_file(file)


def test_the_folder_that_a_kill_left_moved_away_stays_until_a_new_one_is_there(tmp_path):
    (before := tmp_path / ".out.before").mkdir()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "unfinished", tmp_path / "out")
    assert before.exists()
    (finished := tmp_path / "finished").mkdir()
    replace_folder(finished, tmp_path / "out")
    assert (tmp_path / "out").exists() and not before.exists() and not finished.exists()
