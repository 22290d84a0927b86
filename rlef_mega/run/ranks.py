"""Work split over ranks: each rank drives its share of the dialogues, then every rank gets all
results.

No process is a bottleneck, and all ranks compute packing, targets and metrics alike.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def my_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return every world_size-th item, so that all shares have a similar mixture of problems."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather(mine: Item) -> list[Item]:
    """Gather one object from each rank. Returns them in rank order, on every rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Item | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)  # over all ranks
    return everyone  # type: ignore[return-value]


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """Invert `my_share`: merge the shares of all ranks into the original order."""
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank, so that all ranks decide alike."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    if dist.get_backend() == "nccl":
        flags = flags.cuda()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # over all ranks
    return bool(flags)
