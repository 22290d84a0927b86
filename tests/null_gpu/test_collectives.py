"""NCCL of the null GPU, between two processes with a device each."""

import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore

from tests.null_gpu.conftest import ROOT
from tests.null_gpu.processes import environment

pytestmark = pytest.mark.null_gpu


def start(what: str, **settings: object) -> list[subprocess.Popen[str]]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    command = [sys.executable, "-m", "tests.null_gpu.collectives_worker", what]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**settings) | world | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    started[0].store = store  # type: ignore[attr-defined]  # lives as long as the processes
    return started


def test_collectives_match_their_definitions():
    ranks = start("check")
    printed = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(printed)


def test_a_peer_that_is_gone_is_an_error():
    ranks = start("repeat", fail_collective=4, fail_rank=1)
    begun = time.monotonic()
    printed = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert ranks[1].returncode == -9 and "done 1" in printed[1]
    assert ranks[0].returncode != 0 and "remote process exited" in printed[0], printed[0]
    assert time.monotonic() - begun < 120
