"""What 256 ranks ask of what they share: the store of a launch, and the file system.

The ranks are processes without a model, which this module forks after its imports. They run what a
launch runs before a model is built (rank, meeting, placement, the layout's process groups) and what
a step does with its episodes (a share for each rank, the gather, packing, metrics). The store is
real, and a proxy in each rank counts its operations. The groups are PyTorch's fake ones, and the
gather hands each rank what the others would send, so that no rank needs a connection to each other.
The counts are operations of a rank, not seconds, so they hold on any machine. What this cannot show
is time.
"""

import gc
import json
import os
import sys
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from rlef_mega import metrics
from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.megatron import parallel
from rlef_mega.packing import pack
from rlef_mega.run import launch, ranks
from rlef_mega.types import Episode
from tests.rlef_mega.episodes import episode

PER_NODE, EPISODES = 8, 256
DATA = 8
LAYOUT = ParallelConfig(
    tensor_model_parallel_size=8, pipeline_model_parallel_size=4, data_parallel_size=DATA
)
RANKS = LAYOUT.world_size


class CountedStore(dist.Store):
    """A store that counts what is asked of it."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store, self.counts = store, Counter[str]()

    def set(self, key: str, value: Any) -> None:
        self.counts["set"] += 1
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        self.counts["get"] += 1
        return self.store.get(key)

    def add(self, key: str, amount: int) -> int:
        self.counts["add"] += 1
        return self.store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        self.counts["check"] += 1
        return self.store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(minutes=5)) -> None:
        self.counts["wait"] += 1
        self.store.wait(keys, timeout)


def all_episodes() -> list[Episode]:
    return [
        episode([(20, 30), (10, 20)], solved=number % 3 == 0, first_id=number)
        for number in range(EPISODES)
    ]


def work(folder: str, rank: int, port: int, node: str) -> None:
    """Be a rank, and write down what it has asked for."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURMD_NODENAME"):
        os.environ.pop(name, None)
    os.environ |= {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(RANKS),
        "SLURM_LOCALID": str(rank % PER_NODE),
        "SLURMD_NODENAME": node,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    stores: list[CountedStore] = []
    connect, join = dist.TCPStore, dist.init_process_group

    def counted(*arguments: Any, **options: Any) -> CountedStore:
        stores.append(CountedStore(connect(*arguments, **options)))
        return stores[-1]

    dist.TCPStore = counted  # type: ignore[misc, assignment]
    dist.init_process_group = lambda backend, **options: join("fake", **options)
    launch.take_rank_from_slurm()
    try:
        joined = parallel.initialize(LAYOUT, seed=1)
    except ConfigError as error:
        Path(folder, f"{rank}.json").write_text(json.dumps({"refused": str(error)}))
        os._exit(0)
    gathers = 0

    def gather(everyone: list[Any], mine: Any) -> None:
        nonlocal gathers
        gathers += 1
        every = all_episodes()
        everyone[:] = [every[number::RANKS] for number in range(RANKS)]
        assert everyone[rank] == mine

    dist.all_gather_object = gather  # type: ignore[assignment]
    episodes = ranks.interleave(ranks.gather(ranks.my_share(all_episodes())))
    members = [len(ranks_of) for ranks_of in _world.pg_group_ranks.values()]
    found = {
        "operations": dict(stores[0].counts),
        "groups": sorted(members),
        "tensor": dist.get_process_group_ranks(joined.groups.tp),
        "pipeline": dist.get_process_group_ranks(joined.groups.pp),
        "ends": joined.groups.embd is not None,
        "gathers": gathers,
        "opened": opened,
        "metrics": metrics.episode_metrics(episodes),
        "sequences": pack(episodes).num_sequences,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # as a rank ends


def main() -> None:
    """Fork the ranks, on nodes in blocks or dealt out one after another, and wait for them."""
    folder, port, placement = sys.argv[1:]
    nodes = RANKS // PER_NODE
    gc.collect()
    gc.freeze()  # a collection in a rank would copy every page that it shares with the others
    gc.disable()
    for rank in range(RANKS):
        node = rank // PER_NODE if placement == "block" else rank % nodes
        if os.fork() == 0:
            try:
                work(folder, rank, int(port), f"n{node}")
            finally:
                traceback.print_exc()
                os._exit(1)
    for _ in range(RANKS):
        os.wait()


if __name__ == "__main__":
    main()
