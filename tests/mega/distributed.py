"""Starts a worker module as several gloo processes, as torchrun would, and waits for them all."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(module: str, *arguments: str, processes: int, timeout_s: float = 240) -> None:
    """Run `python -m module arguments` in so many processes; fail with their output if one does."""
    shared = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "sandbox")])
        + os.pathsep
        + os.environ.get("PYTHONPATH", ""),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(processes)
    ]
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in started):
        failed = any(process.poll() not in (None, 0) for process in started)
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    codes = [process.poll() for process in started]  # None: still running, so it is ended here
    for process in started:
        process.kill()
    outputs = [process.communicate()[0] for process in started]
    assert codes == [0] * processes, f"exit codes {codes}\n" + "\n".join(
        output[-3000:] for output in outputs
    )
