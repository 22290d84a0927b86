"""Building networks from a Hugging Face folder: each rank builds its own chunks."""

from pathlib import Path
from typing import Any

import torch

from rlef_mega.megatron.checkpoints.checkpoints import load_weights
from rlef_mega.megatron.checkpoints.files import networks_in
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.hf_weights import load_hf
from rlef_mega.megatron.network.accelerations import Layers
from rlef_mega.megatron.network.families import read_config
from rlef_mega.megatron.network.packed_llama import CriticModel, PackedLlama, PolicyModel
from rlef_mega.megatron.parallel import CRITIC, POLICY, Ranks


class StartingPoint:
    """A Hugging Face folder from which networks are built on these ranks. With `weights`, their
    weights are those of a checkpoint, imported or of another run; a critic that it does not hold
    starts from its policy.
    """

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        dtype: torch.dtype,
        recompute: str,
        layers: Layers,
        weights: Path | None = None,
    ) -> None:
        self.ranks, self.folder, self.weights = ranks, folder, weights
        self.config = read_config(folder)
        self.options: dict[str, Any] = {"dtype": dtype, "recompute": recompute, "layers": layers}

    def policy(self) -> list[PackedLlama]:
        return self.chunks(PolicyModel)

    def critic(self) -> list[PackedLlama]:
        return self.chunks(CriticModel)

    @calls_megatron
    def chunks(self, kind: type[PackedLlama]) -> list[PackedLlama]:
        """Build and load this rank's chunks of the network; none if it has no part of it. Every
        rank calls this: reading a checkpoint is collective over the world.
        """
        name = CRITIC if kind is CriticModel else POLICY
        if name not in self.ranks.networks:
            if self.weights is not None:
                load_weights(self.weights, name, [], self.ranks)
            return []
        count = self.ranks.layout.virtual_pipeline_model_parallel_size
        chunks = [
            kind(self.config, self.ranks, chunk=chunk, **self.options).to(self.ranks.device)
            for chunk in range(count)
        ]
        if self.weights is None:
            load_hf(chunks, self.folder, self.ranks)
        elif name == CRITIC and CRITIC not in networks_in(self.weights):
            load_weights(self.weights, POLICY, chunks, self.ranks, trunk_only=True)
        else:
            load_weights(self.weights, name, chunks, self.ranks)
        return chunks
