"""Work split over ranks: each drives its own share of the dialogues, then all of them hold all the
results.

Nothing funnels through one process, and what follows (packing, targets, metrics) is computed alike
everywhere.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def my_share(items: Sequence[Item]) -> Sequence[Item]:
    """Every world_size-th item, so that shares have like mixtures of problems."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather(mine: Item) -> list[Item]:
    """What every rank holds, in rank order, on every rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Item | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)  # over all ranks
    return everyone  # type: ignore[return-value]


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """The inverse of `my_share` over all ranks."""
    total = sum(len(share) for share in shares)
    return [shares[place % len(shares)][place // len(shares)] for place in range(total)]


def any_rank(flag: bool) -> bool:
    """Whether it is set on some rank: all ranks stop together or not at all."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    if dist.get_backend() == "nccl":
        flags = flags.cuda()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # over all ranks
    return bool(flags)
