"""Divide work over the ranks of a launch: wait until all have connected, choose a rank's share, and
gather all shares on every rank.

No process is a bottleneck, and every rank computes the same packing, targets and metrics.
"""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
SILENT_WAIT = timedelta(seconds=15)
MEETING_TIMEOUT = timedelta(minutes=10)  # long enough for imports from a busy file system


def meet(timeout: timedelta = MEETING_TIMEOUT) -> dist.Store:
    """Wait until all ranks of the launch have connected to rank 0. Returns the store they share.

    Without this, a launch with a missing rank would wait silently for a collective's timeout.
    Raises RuntimeError with the address and the missing ranks after the timeout.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size, address, port = (os.environ.get(name, "(unset)") for name in names)
    launch = f"rank {rank} of WORLD_SIZE = {world_size} at {address}:{port}"
    try:
        host = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        connection = dist.TCPStore(
            address, int(port), is_master=host, timeout=timeout, wait_for_workers=False
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", connection)
        store.set(f"rank {rank}", os.environ.get("SLURMD_NODENAME") or platform.node())
        if rank != "0":  # only rank 0 looks for each other rank, or n ranks would ask n^2 times
            store.wait(["all"], timeout)
        else:
            missing = not_connected(store, int(world_size), min(SILENT_WAIT, timeout))
            if missing:
                print(f"{launch} waits for ranks {missing}", file=sys.stderr, flush=True)
                missing = not_connected(store, int(world_size), timeout)
            if missing:
                raise RuntimeError(f"ranks {missing} did not connect")
            store.set("all", "connected")
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"{launch}: {error}, within {timeout.total_seconds():.0f} s. MASTER_ADDR must be an "
            "address of rank 0's machine that all ranks reach; to run one process, unset WORLD_SIZE"
        ) from None
    return store


def node_of(store: dist.Store, rank: int) -> str:
    """Return the node of a rank that has connected to the store of `meet`."""
    return str(store.get(f"rank {rank}").decode())


def not_connected(store: dist.Store, count: int, timeout: timedelta) -> list[int]:
    """Wait for all ranks of a launch. Returns those that have not connected in time."""
    keys = {rank: f"rank {rank}" for rank in range(count)}
    try:
        store.wait(list(keys.values()), timeout)
    except dist.DistStoreError:
        return [rank for rank, key in keys.items() if not store.check([key])]
    return []


def my_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return every world_size-th item, so that all shares have a similar mixture of problems."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather(mine: Item) -> list[Item]:
    """Gather one object from each rank. Returns them in rank order, on every rank. Collective."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Item | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)  # over all ranks
    return everyone  # type: ignore[return-value]


def from_rank_0(mine: Item) -> Item:
    """Return rank 0's object on every rank. Collective."""
    if not dist.is_initialized():
        return mine
    sent = [mine]
    dist.broadcast_object_list(sent, src=0)  # over all ranks
    return sent[0]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Run the block on rank 0, then on the other ranks. Collective."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        from_rank_0(None)
    yield
    if first:
        from_rank_0(None)


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """Invert `my_share`: merge the shares of all ranks into the original order."""
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank, so that all ranks decide the same. Collective."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    if dist.get_backend() == "nccl":
        flags = flags.cuda()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # over all ranks
    return bool(flags)
