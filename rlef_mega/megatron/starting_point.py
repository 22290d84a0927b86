"""Building a network from a Hugging Face folder: each rank builds its own chunks."""

from pathlib import Path

import torch

from rlef_mega.megatron.checkpoints.checkpoints import load_weights
from rlef_mega.megatron.checkpoints.files import networks_in
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.hf_weights import load_hf
from rlef_mega.megatron.network.families import DenseConfig
from rlef_mega.megatron.network.packed_llama import CriticModel, PackedLlama, PolicyModel
from rlef_mega.megatron.parallel import CRITIC, POLICY, Ranks


@calls_megatron
def build_network(
    name: str,
    config: DenseConfig,
    ranks: Ranks,
    folder: Path,
    *,
    dtype: torch.dtype,
    recompute: str,
    weights: Path | None,
) -> list[PackedLlama]:
    """Build and load this rank's chunks of policy or critic; none if it has no part of it. With
    `weights`, load them from that checkpoint (imported, or another run's); if it has no critic, the
    critic starts from its policy. Every rank calls this: reading a checkpoint is collective over
    the world.
    """
    if name not in ranks.networks:
        if weights is not None:
            load_weights(weights, name, [], ranks)
        return []
    kind = CriticModel if name == CRITIC else PolicyModel
    chunks: list[PackedLlama] = [
        kind(config, ranks, chunk=chunk, dtype=dtype, recompute=recompute).to(ranks.device)
        for chunk in range(ranks.layout.virtual_pipeline_model_parallel_size)
    ]
    if weights is None:
        load_hf(chunks, folder, ranks)
    elif name == CRITIC and CRITIC not in networks_in(weights):
        load_weights(weights, POLICY, chunks, ranks, trunk_only=True)
    else:
        load_weights(weights, name, chunks, ranks)
    return chunks
