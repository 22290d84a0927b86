"""Starts a worker module as several gloo processes, as torchrun would, and waits for them all.

Theory of operation. The workers are forked from a server process that has imported torch and
Megatron and done nothing else, because importing them takes seconds in each process. The processes
of a world meet at a TCPStore that the test's process hosts, on a port that the kernel chose, so
that no other process can take it. A store serves one world; a worker that makes a world for each of
its arguments calls `next_world` before each.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]


def keep_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def address(store: TCPStore) -> dict[str, str]:
    """Return the environment by which ranks find the store; as with torchrun, none hosts it."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def next_world() -> None:
    """Point this worker at a store of its own for its next world."""
    first, *others = os.environ["WORLD_PORTS"].split()
    os.environ |= {"MASTER_PORT": first, "WORLD_PORTS": " ".join(others)}


FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["rlef_mega.megatron.learner", "rlef_mega.megatron.supervised", "rlef_mega.engines.local"]
)


def start_process(work: Callable[..., object], *arguments: object) -> Any:
    """Start a function of a module in a process forked from the server."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "sandbox"), *sys.path]
    with pytest.MonkeyPatch.context() as patch:  # the server's, and so its children's
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("PYTHONWARNINGS", "ignore")
        forkserver.ensure_running()
    process = FORK_SERVER.Process(target=work, args=arguments)
    process.start()
    return process


def run_module(
    module: str, arguments: tuple[str, ...], environment: dict[str, str], output: str
) -> None:
    """Run `python -m module arguments` in this process, with its output in a file."""
    os.environ |= environment
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def launch(module: str, *arguments: str, processes: int, timeout_s: float = 240) -> list[str]:
    """Run `python -m module arguments` in `processes` processes. Returns the output of each; fails
    with it if one fails."""
    stores = [keep_store() for _ in range(max(1, len(arguments)))]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        **address(stores[0]),
        "WORLD_PORTS": " ".join(str(store.port) for store in stores),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(processes)]
        started = []
        for rank, file in enumerate(files):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(start_process(run_module, module, arguments, own, str(file)))
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in started):
            failed = any(process.exitcode not in (None, 0) for process in started)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.exitcode for process in started]  # None: still running, so it is killed
        for process in started:
            process.kill()
            process.join()
        outputs = [file.read_text() if file.exists() else "" for file in files]
    assert codes == [0] * processes, f"exit codes {codes}\n" + "\n".join(
        output[-3000:] for output in outputs
    )
    return outputs
