"""One rank's share of a checkpoint: copied to host memory at once, then written on a thread.

Theory of operation. Training waits for `take_snapshot`, which is collective: rank 0 learns which
rank saves which boxes of which tensors (`state.py` cuts them; one gather), and each rank copies its
boxes to host memory, which is pinned if there is a GPU, and reused by the next save. `write_share`
then runs on a thread of the process: it serialises the boxes, computes the checksum, writes one
file and flushes it to the disk. It has no collective and touches nothing that training touches.

Why a thread and not a process: writing, hashing and flushing release Python's lock. Training was
measured to be as fast as with a forked process, with pauses a few milliseconds longer
(benchmarks/results/checkpoint.json). A fork may hang on a lock that a thread of gloo, NCCL or CUDA
held; a spawned process imports the main module again and needs a second copy of the snapshot; and
either would outlive a killed trainer and keep writing during the next run.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.planner import WriteItem

from rlef_mega.megatron.checkpoints.files import NETWORKS, Manifest
from rlef_mega.megatron.checkpoints.torch_dist import ChecksummedFile, Locations
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.offload import HostBuffer


@dataclass(frozen=True)
class Snapshot:
    """This rank's boxes, on the host. `metadata` describes all ranks' boxes; only rank 0 has it."""

    items: list[WriteItem]
    copies: list[torch.Tensor]
    metadata: Metadata | None


@dataclass(frozen=True)
class Share:
    """What one rank wrote: where each box is stored, and its file's entry in the manifest."""

    stored: Locations
    files: Manifest


@calls_megatron
def take_snapshot(parts: list[ShardedTensor], buffer: HostBuffer) -> Snapshot:
    """Copy these parts to the host; the originals may be changed afterwards. Collective."""
    by_key = defaultdict(list)
    for part in parts:
        if is_main_replica(part.replica_id):
            by_key[part.key].append(part)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    leads = dist.get_rank() == 0
    planner.set_up_planner(mcore_to_pyt_state_dict(dict(by_key)), is_coordinator=leads)
    plan = planner.create_local_plan()
    plans: list[Any] | None = [None] * dist.get_world_size() if leads else None
    dist.gather_object(plan, plans)  # world, to rank 0: which rank has which boxes
    # checks that the boxes fill every tensor and do not overlap
    metadata = planner.create_global_plan(plans)[1] if plans else None
    copies = buffer.copy([planner.resolve_data(item).detach() for item in plan.items])
    return Snapshot(plan.items, copies, metadata)


def write_share(folder: Path, rank: int, snapshot: Snapshot) -> Share:
    """Write this rank's file into the checkpoint's folder; it is on the disk when this returns.
    Raises OSError.
    """
    networks = folder / NETWORKS
    networks.mkdir(parents=True, exist_ok=True)
    name = f"__{rank}_0.distcp"
    with ChecksummedFile(networks / name) as file:
        stored = {
            # cloned: torch saves the whole storage that a view is part of
            item.index: file.append(copy.clone())
            for item, copy in zip(snapshot.items, snapshot.copies, strict=True)
        }
        return Share(stored, {f"{NETWORKS}/{name}": file.to_disk()})
