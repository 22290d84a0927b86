"""Weights under their Hugging Face names: loaded from a folder, gathered for publication, written
to a folder. All three read the same name map (`hf_names`).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict

from rlef_mega.megatron.convert.config_and_tokenizer import copy_companions
from rlef_mega.megatron.hf_names import HFTensor, name_map, shapes_of, stage_of
from rlef_mega.megatron.network.families import DenseConfig
from rlef_mega.megatron.network.packed_llama import PackedLlama
from rlef_mega.megatron.network.stages import BUCKET_BYTES, Stages
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.run.directory import folder_written_whole
from rlef_mega.run.model_folder import EMBEDDING, HEAD, SafetensorsFolder, open_safetensors


@torch.no_grad()
def load_hf(chunks: Sequence[PackedLlama], folder: Path, ranks: Ranks) -> None:
    """Load this rank's slice of a network from a Hugging Face folder, and read no more than that.
    A critic leaves out the language-model head, which it does not have.

    Raises ConfigError for a missing, unknown or wrongly shaped tensor, and for a file that is
    missing or truncated.
    """
    config, stages = chunks[0].hf_config, chunks[0].stages
    found, tensors = SafetensorsFolder(folder), name_map(config)
    found.check(shapes_of(tensors))
    for tensor in tensors:
        rank, chunk = stages.place(stage_of(tensor, stages))
        target = None
        if rank == ranks.groups.pp.rank() and (chunks[0].has_language_head or tensor.name != HEAD):
            target = tensor.view(chunks[chunk])
        elif tensor.name == EMBEDDING and holds_copy_of_embedding(chunks[-1]):
            target = chunks[-1].output_layer.weight
        if target is not None:
            shard = read_shard(folder / found.tensors[tensor.name].file, tensor, ranks)
            target.copy_(shard.view(target.shape))


def holds_copy_of_embedding(chunk: PackedLlama) -> bool:
    """Return whether this chunk has a second copy of a tied embedding: on the last of several
    pipeline stages it is the head."""
    tied = chunk.share_embeddings_and_output_weights
    return tied and chunk.post_process and not chunk.pre_process


def read_shard(path: Path, tensor: HFTensor, ranks: Ranks) -> torch.Tensor:
    """Read this tensor-parallel rank's part of a tensor, without the rest of it."""
    with open_safetensors(path) as file:
        stored = file.get_slice(tensor.name)
        if tensor.split_dim is None:
            return stored[:]
        group = ranks.groups.tp
        size = tensor.local_shape(group.size())[tensor.split_dim]
        part = slice(group.rank() * size, (group.rank() + 1) * size)
        return stored[part] if tensor.split_dim == 0 else stored[:, part]


def iter_hf_weights(
    chunks: Sequence[PackedLlama], ranks: Ranks
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather every tensor in Hugging Face's order; yields (name, whole tensor) on every rank of the
    layout. Collective: every rank must exhaust it.

    The memory of a yielded tensor is not written to again, so no receiver needs to clone it. It may
    be a view of its bucket, which is freed when all tensors of the bucket are dropped. A receiver
    that drops each tensor before it asks for the next one needs one bucket of extra memory; one
    that keeps all of them holds a copy of the whole model. (torch.no_grad as a decorator would hold
    each tensor until the next one is there.)

    One collective carries a bucket of many small tensors; a tensor that is larger than a bucket is
    a bucket of its own.
    """
    config, stages, dtype = chunks[0].hf_config, chunks[0].stages, chunks[0].config.params_dtype
    for bucket in buckets(config, stages, ranks.groups.tp.size(), dtype):
        yield from gather_bucket(bucket, chunks, ranks)


def buckets(
    config: DenseConfig, stages: Stages, tensor_parallel_size: int, dtype: torch.dtype
) -> Iterator[list[HFTensor]]:
    """Group consecutive tensors of one stage into buckets of at most BUCKET_BYTES per rank."""
    bucket: list[HFTensor] = []
    bucket_bytes = 0
    for tensor in name_map(config):
        shard_bytes = tensor.local_shape(tensor_parallel_size).numel() * dtype.itemsize
        full = bucket_bytes + shard_bytes > BUCKET_BYTES
        if bucket and (full or stage_of(tensor, stages) != stage_of(bucket[0], stages)):
            yield bucket
            bucket, bucket_bytes = [], 0
        bucket.append(tensor)
        bucket_bytes += shard_bytes
    yield bucket


def gather_bucket(
    tensors: list[HFTensor], chunks: Sequence[PackedLlama], ranks: Ranks
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather tensors of one stage over its tensor-parallel ranks, then broadcast them to the other
    stages. Each bucket has new buffers (`iter_hf_weights` states the contract).
    """
    tensor_group, pipeline_group = ranks.groups.tp, ranks.groups.pp
    size = tensor_group.size()
    shapes = [tensor.local_shape(size) for tensor in tensors]
    sizes = [shape.numel() for shape in shapes]
    stages = chunks[0].stages
    owner, chunk = stages.place(stage_of(tensors[0], stages))
    gathered = None
    if owner == pipeline_group.rank():
        views = [tensor.view(chunks[chunk]) for tensor in tensors]
        gathered = torch.cat([view.detach().reshape(-1) for view in views])
    if size > 1 or gathered is None:
        shards, dtype = gathered, chunks[0].config.params_dtype
        gathered = torch.empty(size * sum(sizes), dtype=dtype, device=ranks.device)
        if shards is not None:
            # tensor-parallel group of the owning stage: concatenates the shards
            dist.all_gather_into_tensor(gathered, shards, group=tensor_group)
            del shards
    if pipeline_group.size() > 1:
        # pipeline group: the owning stage hands its tensors to the others
        dist.broadcast(gathered, group_src=owner, group=pipeline_group)
    parts = [part.split(sizes) for part in gathered.view(size, -1)]
    for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        pieces = [part[index].view(shape) for part in parts]
        if tensor.split_dim is None or size == 1:
            yield tensor.name, pieces[0]
        else:
            yield tensor.name, torch.cat(pieces, dim=tensor.split_dim)


def relay(
    named_tensors: Iterator[tuple[str, torch.Tensor]] | None,
    config: DenseConfig,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Broadcast whole tensors to the ranks that hold no part of the network: the critic's, when it
    has ranks of its own. The policy's first rank passes the tensors, the other ranks None. Yields
    as `iter_hf_weights` does, under the same contract.
    """
    assert ranks.receivers is not None, "only the policy's first rank and the critic's take part"
    for tensor in name_map(config):
        if named_tensors is not None:
            name, whole = next(named_tensors)
            assert name == tensor.name, (name, tensor.name)
        else:
            whole = torch.empty(tensor.shape, dtype=dtype, device=ranks.device)
        # receivers: the policy's first rank to the critic's ranks
        dist.broadcast(whole, src=0, group=ranks.receivers)
        yield tensor.name, whole
        del whole  # before the next one is gathered


def export_hf(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    source_folder: Path,
    out_folder: Path,
    dtype: torch.dtype,
    *,
    is_writer: bool = True,
) -> None:
    """Write a folder that transformers loads: a policy's weights from the tensors, everything else
    from the source. The writer copies the whole network to host memory.

    If `named_tensors` comes from a collective (`iter_hf_weights`), every rank calls this, one of
    them with `is_writer`. The folder appears complete or not at all; an existing one is replaced.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        if is_writer:
            # a copy: the tensor may be a view of a bucket
            state[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if is_writer:
        with folder_written_whole(out_folder) as folder:
            save_torch_state_dict(state, folder)
            copy_companions(source_folder, folder, role="policy", dtype=dtype)
