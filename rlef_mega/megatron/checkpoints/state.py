"""The state of a network in a checkpoint, in a form that does not depend on the layout.

A tensor of the network is split by tensor and pipeline parallelism, and the flat values of each
rank's part are split again by the distributed optimizer: a data-parallel rank owns a range of them,
with their fp32 main copy and moments. This module describes such a range as at most three boxes of
the global tensor: the end of a row, whole rows, the start of a row. So every rank saves what it
owns, nothing is saved twice and nothing is gathered; any layout loads the boxes that it needs
directly into its own memory. (Megatron's layout-free form, "fully_reshardable", gathers the
optimizer of all data-parallel ranks on each of them, on host and device.) Weights are saved by
their owners too, which is right even if an overlapped parameter gather has not reached the other
ranks yet. Keys and global shapes are Megatron's own, after the network's name:

    policy.decoder.layers.mlp.linear_fc1.weight
    policy.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight

The rest of an optimizer, its step and groups, follows from the recipe and `updates`. No generator's
state is saved, because training draws from none that outlives a step: there is no dropout, and
whatever is drawn has a seed of its own. Shape suffix: F flat values.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from rlef_mega.megatron.checkpoints.files import NETWORKS, networks_in
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.network.families import DenseConfig
from rlef_mega.megatron.network.packed_llama import PackedLlama
from rlef_mega.megatron.parallel import POLICY, Ranks
from rlef_mega.megatron.trained_model import TrainedModel

Ranges = dict[torch.Tensor, tuple[int, int]]  # of a weight's flat values
# the keys of Hugging Face's config that decide whether weights fit
SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "rms_norm_eps",
    "rope_parameters",
)


def fingerprint(config: DenseConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings that a checkpoint's networks must share with the run's."""
    settings = config.to_dict()
    found = {key: settings[key] for key in SHAPE_KEYS if settings.get(key) is not None}
    return found | {"dtype": str(dtype).removeprefix("torch.")}


@calls_megatron
def parts_of(trained: Mapping[str, TrainedModel], *, owned: bool) -> list[ShardedTensor]:
    """Return views of all that this rank holds of these networks, to load into, or only of what it
    owns, to save."""
    parts: list[ShardedTensor] = []
    for name, model in trained.items():
        ranges = owned_ranges(spread_optimizer(model)) if owned else None
        parts += weights(name, model.chunks, model.ranks, ranges)
        parts += optimizer_state(name, model)
    return parts


def weights(
    name: str, chunks: Sequence[PackedLlama], ranks: Ranks, ranges: Ranges | None = None
) -> Iterator[ShardedTensor]:
    """Yield views of the weights that this rank holds, or of these ranges of them."""
    for weight, first, piece in pieces(chunks, ranks):
        start, end = (0, weight.numel()) if ranges is None else ranges.get(weight, (0, 0))
        flat_F = weight.detach().view(-1)[start:end]
        yield from boxes(piece, f"{name}.{piece.key}", flat_F, start - first)


def optimizer_state(name: str, model: TrainedModel) -> Iterator[ShardedTensor]:
    """Yield views of this rank's moments and main copies. An fp32 weight is its own main copy."""
    optimizer = spread_optimizer(model)
    ranges = owned_ranges(optimizer)
    for weight, first, piece in pieces(model.chunks, model.ranks):
        if weight not in ranges:
            continue
        state = optimizer._get_main_param_and_optimizer_states(weight)
        found = {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}
        if state["param"].untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            found["param"] = state["param"]
        for kind, values in found.items():
            key = f"{name}.optimizer.state.{kind}.{piece.key}"
            yield from boxes(piece, key, values.detach().view(-1), ranges[weight][0] - first)


def pieces(
    chunks: Sequence[PackedLlama], ranks: Ranks
) -> Iterator[tuple[torch.Tensor, int, ShardedTensor]]:
    """Yield (weight, first, piece): Megatron's description of each weight on this rank. A weight
    that is several ranges of the global tensor (gate and up) has several pieces; `first` is where a
    piece starts in the weight's flat values.
    """
    metadata = {"dp_cp_group": ranks.groups.dp_cp}
    for chunk in chunks:
        for described in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            if isinstance(described, ShardedTensor | ShardedTensorFactory):
                weight = described.data
                whole = isinstance(described, ShardedTensor)
                for piece in [described] if whole else described.build():
                    yield weight, piece.data.storage_offset() - weight.storage_offset(), piece


def boxes(
    piece: ShardedTensor, key: str, flat_F: torch.Tensor, start: int
) -> Iterator[ShardedTensor]:
    """Cut the part of a piece that `flat_F` holds into boxes, and yield each as a view of `flat_F`.

    `flat_F` begins at value `start` of the flat piece; a negative `start` is before the piece."""
    end = min(start + flat_F.numel(), prod(piece.local_shape))
    if max(0, start) >= end:
        return
    flat_F = flat_F[max(0, -start) : end - start]
    start = max(0, start)
    layers = piece.prepend_axis_num  # a leading axis of the global tensor that the piece lacks
    *replica, _ = piece.replica_id  # Megatron's last entry is the data-parallel rank: we cut by it
    for offset, size in box_corners(piece.local_shape, start, end):
        values_F, flat_F = flat_F.split([prod(size), flat_F.numel() - prod(size)])
        data = values_F.view((1,) * layers + size)
        within = zip(piece.global_offset[layers:], offset, strict=True)
        yield ShardedTensor(
            key,
            data,
            data.dtype,
            tuple(data.shape),
            piece.global_shape,
            piece.global_offset[:layers] + tuple(a + b for a, b in within),
            None,  # no regular grid
            replica_id=(*replica, 0),
            allow_shape_mismatch=piece.allow_shape_mismatch,
        )


def box_corners(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of the boxes that hold the row-major values [start, end) of a vector or
    matrix, in order; at most three.
    """
    *rows, columns = shape
    assert len(rows) <= 1, shape
    if not rows:
        yield (start,), (end - start,)
        return
    while start < end:
        row, column = divmod(start, columns)
        if column or end - start < columns:
            size = (1, min(end - start, columns - column))
        else:
            size = ((end - start) // columns, columns)
        yield (row, column), size
        start += prod(size)


# ------------------------------------------------------------------------------------ optimizer


def spread_optimizer(model: TrainedModel) -> DistributedOptimizer:
    (optimizer,) = model.optimizer.chained_optimizers  # a dense model has one
    make_adam_state(optimizer.optimizer)
    return optimizer


def owned_ranges(optimizer: DistributedOptimizer) -> Ranges:
    """Map each weight to the range of its flat values that this data-parallel rank owns."""
    return {
        weight: (ranges["param"].start, ranges["param"].end)
        for buffer in optimizer.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for weight, ranges in bucket["param_map"].items()
    }


def make_adam_state(inner: torch.optim.Optimizer) -> None:
    """Make Adam's state, which it makes itself only at its first step. A policy that waits for the
    critic's warm-up has made no step yet.
    """
    for group in inner.param_groups:
        for parameter in group["params"]:
            if inner.state[parameter]:
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                inner.state[parameter][moment] = torch.zeros_like(parameter)
            device = parameter.device if group["fused"] else "cpu"
            inner.state[parameter]["step"] = torch.zeros((), device=device)


def set_updates(model: TrainedModel, updates: int) -> None:
    """Set the number of updates in schedule and optimizer; one optimizer step is one update."""
    model.updates = updates
    for state in spread_optimizer(model).optimizer.state.values():
        state["step"].fill_(updates)


# ------------------------------------------------------------------------------------ loading


@calls_megatron
def load_weights(path: Path, name: str, chunks: list[PackedLlama], ranks: Ranks) -> None:
    """Load only one network's weights, saved in any layout or imported, into chunks of this layout,
    which may have another dtype. A critic that the checkpoint lacks gets the policy's, without the
    head. Collective.
    """
    stored = name if name in networks_in(path) else POLICY
    parts = list(weights(stored, chunks, ranks))
    if stored != name:
        parts = [part for part in parts if not part.key.startswith(f"{stored}.output_layer.")]
    fill(path, parts)


@calls_megatron
def fill(path: Path, parts: list[ShardedTensor]) -> None:
    """Read boxes of the checkpoint into the memory that they view. Collective."""
    wanted = {str(number): part for number, part in enumerate(parts)}
    folder = str(path / NETWORKS)
    dist_checkpointing.load(
        wanted, folder, TorchDistLoadShardedStrategy(), validate_access_integrity=False
    )
