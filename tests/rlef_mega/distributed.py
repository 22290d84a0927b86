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

from rlef_mega.config import ParallelConfig

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


class Ranks:
    """Processes that run `python -m module arguments` as the ranks of a world."""

    def __init__(self, module: str, *arguments: str, processes: int) -> None:
        self.stores = [keep_store() for _ in range(max(1, len(arguments)))]
        environment = {
            **os.environ,
            "WORLD_SIZE": str(processes),
            **address(self.stores[0]),
            "WORLD_PORTS": " ".join(str(store.port) for store in self.stores),
        }
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / str(rank) for rank in range(processes)]
        self.started = []
        for rank, file in enumerate(self.files):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.started.append(start_process(run_module, module, arguments, own, str(file)))

    def poll(self) -> list[int | None] | None:
        """Return the exit codes once all have ended or one has failed."""
        codes = [process.exitcode for process in self.started]
        return None if None in codes and not any(codes) else codes

    def kill(self) -> None:
        for process in self.started:
            process.kill()
            process.join()

    def wait(self, timeout_s: float = 240) -> tuple[list[int | None], list[str]]:
        """Return the exit code of each, None if it still ran once another had failed or after the
        timeout, and its output."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [process.exitcode for process in self.started]
        self.kill()
        outputs = [file.read_text() if file.exists() else "" for file in self.files]
        self.folder.cleanup()
        return codes, outputs


def launch(module: str, *arguments: str, processes: int, timeout_s: float = 240) -> list[str]:
    """Run `python -m module arguments` in `processes` processes. Returns the output of each; fails
    with it if one fails."""
    codes, outputs = Ranks(module, *arguments, processes=processes).wait(timeout_s)
    assert codes == [0] * processes, f"exit codes {codes}\n" + "\n".join(
        output[-3000:] for output in outputs
    )
    return outputs


def run_command(
    command: Callable[[], object], meanwhile: Callable[[Ranks], object] = lambda ranks: None
) -> tuple[list[int | None], list[str]]:
    """Call a function of rlef_mega.cli that launches ranks, here without torchrun's agent, and do
    something while they run. Returns their exit codes and outputs."""
    ended: list[tuple[list[int | None], list[str]]] = []

    def launch(module: str, run_dir: Path, *layouts: ParallelConfig, **options: object) -> int:
        processes = sum(layout.world_size for layout in layouts)
        ranks = Ranks(module, str(run_dir), processes=processes)
        try:
            meanwhile(ranks)
        finally:
            ended.append(ranks.wait())
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlef_mega.cli.launch", launch)
        command()
    return ended[0]
