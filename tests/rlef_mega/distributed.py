"""Starts a worker module as several gloo processes, as torchrun would, and waits for them all.

The processes meet at stores that this one keeps, on ports that the kernel chose and that nobody
else can take in between. A store serves one world; a worker that makes a world for each of its
arguments calls `next_world` before each.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]


def keep_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def address(store: TCPStore) -> dict[str, str]:
    """Environment variables by which processes meet there: as under torchrun, no rank keeps it."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def next_world() -> None:
    """Point this worker at a store of its own for its next world."""
    first, *others = os.environ["WORLD_PORTS"].split()
    os.environ |= {"MASTER_PORT": first, "WORLD_PORTS": " ".join(others)}


def launch(module: str, *arguments: str, processes: int, timeout_s: float = 240) -> list[str]:
    """Run `python -m module arguments` in so many processes; fail with their output if one does.
    Returns what each said."""
    stores = [keep_store() for _ in range(max(1, len(arguments)))]
    shared = {
        "WORLD_SIZE": str(processes),
        **address(stores[0]),
        "WORLD_PORTS": " ".join(str(store.port) for store in stores),
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
    return outputs
