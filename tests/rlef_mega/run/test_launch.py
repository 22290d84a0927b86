"""What becomes of ranks that fail or are asked to stop, and what the user is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.run.launch import gpu_settings, launch

WORKER = """
import os, sys, time
from rlef_mega.run.launch import worker_main

def work(folder):
    if os.environ["RANK"] in folder.name:
        raise RuntimeError(f"rank {os.environ['RANK']} has no memory left")
    time.sleep(3)
    return 0

worker_main(work)
"""


LAUNCH = """
import sys
from pathlib import Path
from rlef_mega.config import ParallelConfig
from rlef_mega.run.launch import launch
sys.exit(launch("worker", Path(sys.argv[1]), ParallelConfig(data_parallel_size=2)))
"""


def start_two_ranks(
    folder: Path, worker: str, argument: str, *wrapper: str
) -> subprocess.Popen[str]:
    (folder / "modules").mkdir()
    (folder / "modules" / "worker.py").write_text(worker)
    (folder / "random.py").write_text("raise SystemExit('imported from the working directory')")
    return subprocess.Popen(
        [*wrapper, sys.executable, "-P", "-c", LAUNCH, argument],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ":".join([str(folder / "modules"), *sys.path[1:]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two_ranks(
    folder: Path, worker: str, argument: str, *wrapper: str
) -> subprocess.CompletedProcess[str]:
    command = start_two_ranks(folder, worker, argument, *wrapper)
    stdout, stderr = command.communicate(timeout=100)
    return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)


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


def test_a_signal_to_every_process_stops_the_ranks_and_no_other(tmp_path: Path) -> None:
    """As Slurm sends SIGUSR1 before a job's time is up. The ranks finish what they do."""
    worker = """
import os, time
from rlef_mega.run.launch import STOPPED, StopRequest, worker_main

def work(folder):
    stop = StopRequest(folder / "stop")
    (folder / f"started_{os.environ['RANK']}").touch()
    while not stop.requested():
        time.sleep(0.05)
    time.sleep(0.5)
    (folder / f"saved_{os.environ['RANK']}").touch()
    return STOPPED

worker_main(work)
"""
    command = start_two_ranks(tmp_path, worker, str(tmp_path))
    deadline = time.monotonic() + 60
    while len([*tmp_path.glob("started_*")]) < 2:
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    lines = {entry: (entry / "cmdline") for entry in Path("/proc").glob("[0-9]*")}
    everyone = [int(p.name) for p, line in lines.items() if str(tmp_path).encode() in read(line)]
    assert len(everyone) == 4  # the command, the agent, the ranks
    for process in everyone:
        os.kill(process, signal.SIGUSR1)
    _, said = command.communicate(timeout=100)
    assert command.returncode == 3, said
    assert len([*tmp_path.glob("saved_*")]) == 2


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""  # the process has ended


@pytest.mark.parametrize("output", ["| true", "> /dev/full 2>&1"])  # no reader; no room
def test_ranks_outlive_their_output(tmp_path: Path, output: str) -> None:
    worker = "from rlef_mega.run.launch import *; worker_main(lambda folder: print('step 1') or 0)"
    wrapper = ("bash", "-o", "pipefail", "-c", f'"$@" {output}', "bash")
    done = run_two_ranks(tmp_path, worker, ".", *wrapper)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another host name")
def test_ranks_of_one_machine_meet_whatever_its_name_resolves_to(tmp_path: Path) -> None:
    worker = "from rlef_mega.run.ranks import *; meet(timedelta(seconds=20))"
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.99.88.77 weird-host\n")
    script = f'mount --bind {tmp_path}/hosts /etc/hosts && hostname weird-host && exec "$@"'
    wrapper = ("unshare", "--uts", "--mount", "sh", "-c", script, "sh")
    done = run_two_ranks(tmp_path, worker, "", *wrapper)
    assert done.returncode == 0, done.stderr


def test_a_launch_leaves_neither_its_signal_handlers_nor_a_stop_file(tmp_path: Path) -> None:
    """A later SIGTERM would create the file, and the next run would stop at its first step."""
    before = signal.getsignal(signal.SIGTERM)
    assert (
        launch("this", tmp_path, ParallelConfig()) == 0
    )  # a module of the standard library that only prints
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "stop").exists()


def test_more_ranks_than_gpus_are_refused_before_any_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    demo = ParallelConfig(tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"2 ranks.*finds 1 .*tensor_model_parallel_size=1, or"):
        launch("this", tmp_path, demo)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    wide = ParallelConfig(tensor_model_parallel_size=4, data_parallel_size=4)
    message = r"20 ranks.*--set parallel.data_parallel_size=1 and remove \[critic_parallel\], or"
    with pytest.raises(ConfigError, match=message):
        launch("this", tmp_path, wide, wide.model_copy(update={"data_parallel_size": 1}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch("this", tmp_path, demo) == 0


def test_ranks_have_the_settings_of_a_gpu_before_they_import_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    found = "{n: v for n, v in os.environ.items() if n[:3] in ('CUD', 'PYT')}"
    worker = f"import os, sys; print({found}, file=sys.stderr)"
    said = run_two_ranks(tmp_path, worker, ".").stderr
    assert said.count("'CUDA_DEVICE_MAX_CONNECTIONS': '1'") == 2, said
    assert said.count("'PYTORCH_ALLOC_CONF': 'expandable_segments:True'") == 2
    # CUDA IPC cannot map such segments everywhere, and the user's own settings count
    assert "PYTORCH_ALLOC_CONF" not in gpu_settings(uses_ipc=True)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert "PYTORCH_ALLOC_CONF" not in gpu_settings(uses_ipc=False)
