"""Weights under their Hugging Face names: loaded from a folder, gathered for publishing, exported
to a folder.

All three directions read the same name map (`hf_names`).
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.config_and_tokenizer import copy_companions
from rlef_mega.megatron.convert.resumable_folder import put_in_place
from rlef_mega.megatron.convert.safetensors_files import (
    MAX_SHARD_SIZE,
    Stored,
    plan_shards,
    write_index,
    write_tensors,
)
from rlef_mega.megatron.hf_names import EMBEDDING, HEAD, HFTensor, name_map, place_of
from rlef_mega.megatron.network.families import DenseConfig, read_config
from rlef_mega.megatron.network.packed_llama import PackedLlama
from rlef_mega.megatron.network.stages import Place, Stages
from rlef_mega.megatron.parallel import Ranks

BUCKET_BYTES = 256 * 2**20  # of one rank's shards, gathered in one collective


@torch.no_grad()
def load_hf(chunks: Sequence[PackedLlama], folder: Path, ranks: Ranks) -> None:
    """Fill this rank's slice of a network from a Hugging Face folder; each rank reads only its
    slice.

    Raises ConfigError for a missing, unknown or wrongly shaped tensor, and for a file that is
    missing or truncated. A critic leaves out the language-model head, which it does not have.
    """
    files = checkpoint_files(folder)
    config, stages = chunks[0].hf_config, chunks[0].stages
    tensors = name_map(config)
    check_names(tensors, set(files), config, folder)
    for tensor in tensors:
        place = place_of(tensor, stages)
        targets = []
        if place.rank == ranks.pipeline_parallel_rank and (
            chunks[0].has_language_head or tensor.name != HEAD
        ):
            targets.append(tensor.view(chunks[place.chunk]))
        if tensor.name == EMBEDDING and holds_copy_of_embedding(chunks[-1]):
            targets.append(chunks[-1].output_layer.weight)
        if targets:
            shard = read_shard(files[tensor.name], tensor, ranks)
            for target in targets:
                target.copy_(shard.view(target.shape))


def holds_copy_of_embedding(chunk: PackedLlama) -> bool:
    """With tied embeddings and a pipeline, the last stage keeps a copy as its head."""
    tied = chunk.share_embeddings_and_output_weights
    return tied and chunk.post_process and not chunk.pre_process


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        placed = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in placed.items()}
    path = folder / "model.safetensors"
    with open_safetensors(path) as file:
        return dict.fromkeys(file.keys(), path)


def open_safetensors(path: Path):
    if not path.is_file():
        raise ConfigError(f"no file {path}; model.path must be a folder of safetensors")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is truncated or damaged ({error}); download it again") from None


def check_names(
    tensors: list[HFTensor], found: set[str], config: DenseConfig, folder: Path
) -> None:
    expected = {tensor.name for tensor in tensors}
    # a tied head may be stored all the same, and old conversions store the RoPE frequencies
    allowed = expected | {HEAD} if config.tie_word_embeddings else expected
    unknown = {n for n in found - allowed if not n.endswith("rotary_emb.inv_freq")}
    for what, names in (("lacks", expected - found), ("has unknown", unknown)):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise ConfigError(
                f"{folder} {what} {len(names)} tensor(s): {some}; "
                f"it must be a checkpoint that fits its config.json"
            )


def read_shard(path: Path, tensor: HFTensor, ranks: Ranks) -> torch.Tensor:
    """This tensor-parallel rank's part, read without the rest."""
    with open_safetensors(path) as file:
        stored = file.get_slice(tensor.name)
        if tuple(stored.get_shape()) != tensor.shape:
            raise ConfigError(
                f"{path}: {tensor.name} has shape {tuple(stored.get_shape())}, "
                f"config.json says {tensor.shape}"
            )
        if tensor.split_dim is None:
            return stored[:]
        size = tensor.local_shape(ranks.groups.tp.size())[tensor.split_dim]
        part = slice(ranks.tensor_parallel_rank * size, (ranks.tensor_parallel_rank + 1) * size)
        return stored[part] if tensor.split_dim == 0 else stored[:, part]


@torch.no_grad()
def iter_hf_weights(
    chunks: Sequence[PackedLlama], ranks: Ranks
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, whole, in Hugging Face's order, on every rank of the layout. Collective: all of
    them must exhaust it.

    Tensors travel in buckets, so that one collective carries many small ones and a 70B model never
    needs more than one bucket's worth of extra memory (a tensor larger than a bucket is a bucket of
    its own).
    """
    config, stages, dtype = chunks[0].hf_config, chunks[0].stages, chunks[0].config.params_dtype
    for bucket in buckets(config, stages, ranks.groups.tp.size(), dtype):
        yield from gather_bucket(bucket, place_of(bucket[0], stages), chunks, ranks)


def buckets(
    config: DenseConfig, stages: Stages, tensor_parallel_size: int, dtype: torch.dtype
) -> Iterator[list[HFTensor]]:
    """Neighbouring tensors of one place, of at most BUCKET_BYTES a rank."""
    bucket: list[HFTensor] = []
    bucket_bytes = 0
    for tensor in name_map(config):
        shard = torch.Size(tensor.local_shape(tensor_parallel_size))
        shard_bytes = shard.numel() * dtype.itemsize
        full = bucket_bytes + shard_bytes > BUCKET_BYTES
        if bucket and (full or place_of(tensor, stages) != place_of(bucket[0], stages)):
            yield bucket
            bucket, bucket_bytes = [], 0
        bucket.append(tensor)
        bucket_bytes += shard_bytes
    yield bucket


def gather_bucket(
    tensors: list[HFTensor], place: Place, chunks: Sequence[PackedLlama], ranks: Ranks
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of one place: gathered over its tensor-parallel ranks, then handed to the other
    stages.
    """
    tensor_group, pipeline_group = ranks.groups.tp, ranks.groups.pp
    size = tensor_group.size()
    shapes = [torch.Size(tensor.local_shape(size)) for tensor in tensors]
    sizes = [shape.numel() for shape in shapes]
    options = {"dtype": chunks[0].config.params_dtype, "device": ranks.device}
    owned = place.rank == ranks.pipeline_parallel_rank
    if owned:
        chunk = chunks[place.chunk]
        shards = torch.cat([tensor.view(chunk).reshape(-1) for tensor in tensors])
    else:
        shards = torch.empty(sum(sizes), **options)
    gathered = torch.empty(size * sum(sizes), **options)
    if size > 1 and owned:
        # tensor-parallel group of the owning stage: concatenates the shards
        dist.all_gather_into_tensor(gathered, shards, group=tensor_group)
    elif size == 1:
        gathered = shards
    if ranks.pipeline_parallel_size > 1:
        # pipeline group: the owning stage hands its tensors to the others
        owner = dist.get_global_rank(pipeline_group, place.rank)
        dist.broadcast(gathered, src=owner, group=pipeline_group)
    parts = [part.split(sizes) for part in gathered.view(size, -1)]
    for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        pieces = [part[index].view(shape) for part in parts]
        if tensor.split_dim is None or size == 1:
            yield tensor.name, pieces[0]
        else:
            yield tensor.name, torch.cat(pieces, dim=tensor.split_dim)


def relay(
    named_tensors: Iterable[tuple[str, torch.Tensor]] | None,
    config: DenseConfig,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hand whole tensors on to ranks that hold none of the network (the critic's, when it has ranks
    of its own). The policy's first rank gives what it iterates over; the others give None.
    """
    assert ranks.receivers is not None, "only the policy's first rank and the critic's take part"
    source = iter(named_tensors) if named_tensors is not None else None
    for tensor in name_map(config):
        if source is not None:
            name, whole = next(source)
            assert name == tensor.name, (name, tensor.name)
        else:
            whole = torch.empty(tensor.shape, dtype=dtype, device=ranks.device)
        # receivers: the policy's first rank to the critic's ranks
        dist.broadcast(whole, src=0, group=ranks.receivers)
        yield tensor.name, whole


def export_hf(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    source_folder: Path,
    out_folder: Path,
    dtype: torch.dtype,
    *,
    is_writer: bool = True,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
    """Write a folder that transformers loads: a policy's weights from the tensors, everything else
    from the source.

    Collective where the tensors are (`iter_hf_weights`): every rank calls it, one of them with
    `is_writer`. The folder appears complete or not at all; an existing one is replaced.
    """
    if not is_writer:
        for _ in named_tensors:
            pass
        return
    partial = out_folder.with_name(f".{out_folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = name_map(read_config(source_folder))
    shards = plan_shards([Stored(t.name, t.shape, dtype) for t in tensors], max_shard_size)
    write_tensors(partial, shards, named_tensors)
    write_index(partial, shards)
    copy_companions(source_folder, partial, role="policy", dtype=dtype)
    put_in_place(partial, out_folder)
