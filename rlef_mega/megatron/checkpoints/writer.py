"""One rank's share of a checkpoint: copied to the host at once, written afterwards on a thread.

Theory of operation. `take_snapshot` is collective and is what training waits for: the ranks agree
on who holds which boxes of which tensors (one gather to rank 0), and each copies its own to host
memory, which is pinned beside a GPU and kept for the next time. `write_share` then runs on a thread
of the process, alone: it serialises, checksums and writes one file and flushes it to the disk. It
has no collective and touches nothing that training touches.

A thread, not a process. Writing, hashing and flushing all release Python's lock: training beside
the thread was measured to run as fast as beside a forked process, with pauses a few milliseconds
longer (benchmarks/results/checkpoint.json), so a process would buy next to nothing. It would cost:
a fork with gloo's, NCCL's and CUDA's threads may hang on a lock that one of them held, a spawn
imports the main module again and needs a second copy of the snapshot, and either outlives a killed
trainer and goes on writing where the next run begins. A thread dies with its process.

The file is what torch's distributed checkpoint reads (Megatron's "torch_dist"): tensors as torch
saves them, one after the other, and `.metadata` says where each box is.
"""

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from rlef_mega.megatron.checkpoints.files import NETWORKS, Manifest
from rlef_mega.megatron.cpu_shim import calls_megatron

ALIGNMENT = 64  # bytes; of tensors in the host buffer
FILE_BUFFER = 1 << 20  # bytes; torch writes headers in small pieces


class HostBuffer:
    """Host memory for one snapshot, made at the first and used again: fresh pages cost more than
    the copy.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Host copies, valid until the next call."""
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
        if self.memory.numel() < starts[-1]:
            pinned = torch.cuda.is_available()
            self.memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
        copies = []
        for tensor, start in zip(tensors, starts[:-1], strict=True):
            room = self.memory[start : start + tensor.nbytes]
            copies.append(room.view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies


@dataclass(frozen=True)
class Snapshot:
    """This rank's boxes, on the host; `metadata`, of all ranks' boxes, is rank 0's alone."""

    items: list[WriteItem]
    copies: list[torch.Tensor]
    metadata: Metadata | None


@dataclass(frozen=True)
class Share:
    """What one rank wrote, and what else rank 0 must know of it."""

    places: list[WriteResult] = field(default_factory=list)
    files: Manifest = field(default_factory=dict)


@calls_megatron
def take_snapshot(parts: list[ShardedTensor], buffer: HostBuffer) -> Snapshot:
    """Collective. `parts` may be changed afterwards."""
    by_key = defaultdict(list)
    for part in parts:
        if is_main_replica(part.replica_id):
            by_key[part.key].append(part)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    leads = dist.get_rank() == 0
    planner.set_up_planner(mcore_to_pyt_state_dict(dict(by_key)), is_coordinator=leads)
    plan = planner.create_local_plan()
    plans: list[Any] | None = [None] * dist.get_world_size() if leads else None
    dist.gather_object(plan, plans)  # world, to rank 0: who holds what
    # checks that the boxes fill every tensor and do not overlap
    metadata = planner.create_global_plan(plans)[1] if plans else None
    copies = buffer.copy([planner.resolve_data(item).detach() for item in plan.items])
    return Snapshot(plan.items, copies, metadata)


def write_share(folder: Path, rank: int, snapshot: Snapshot) -> Share:
    """This rank's file in the checkpoint's folder, on the disk when this returns. Raises OSError,
    with nothing else changed."""
    networks = folder / NETWORKS
    networks.mkdir(parents=True, exist_ok=True)
    name = f"__{rank}_0.distcp"
    places = []
    with (networks / name).open("wb", buffering=FILE_BUFFER) as file:
        stream = ChecksummedStream(file)
        for item, copy in zip(snapshot.items, snapshot.copies, strict=True):
            start = stream.bytes
            torch.save(copy.clone(), stream)  # type: ignore[arg-type] # a view drags its storage along
            stream.raise_fault()
            place = _StorageInfo(name, start, stream.bytes - start)
            places.append(WriteResult(item.index, place.length, place))
        file.flush()
        os.fsync(file.fileno())
    entry = {"bytes": stream.bytes, "sha256": stream.checksum.hexdigest()}
    return Share(places, {f"{NETWORKS}/{name}": entry})


class ChecksummedStream:
    """Hashes what is meant to be written, so that a fault on the way to the disk shows too. A
    failed write is kept for `raise_fault`: torch's archive writer would end the process over it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.checksum = hashlib.sha256()
        self.bytes = 0
        self.fault: OSError | None = None

    def write(self, content: bytes) -> int:
        length = len(content)
        if self.fault is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.fault = error
            self.checksum.update(content)
        self.bytes += length
        return length

    def flush(self) -> None:
        """Once, at the end."""

    def raise_fault(self) -> None:
        if self.fault is not None:
            raise self.fault


def write_index(folder: Path, metadata: Metadata, shares: list[Share]) -> list[str]:
    """The files that make a folder of shares a checkpoint of Megatron's; their names."""
    networks = folder / NETWORKS
    FileSystemWriter(networks).finish(metadata, [share.places for share in shares])
    torch.save({}, networks / "common.pt")  # nothing is common: all is in boxes
    save_config(CheckpointingConfig("torch_dist"), str(networks))
    return [f"{NETWORKS}/{name}" for name in (".metadata", "common.pt", "metadata.json")]
