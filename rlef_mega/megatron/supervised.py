"""Supervised training of a policy, without a critic: the stage that makes the demo's base model,
and the paper's imitation ablation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from rlef_mega.config import OptimizerConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.hf_weights import iter_hf_weights
from rlef_mega.megatron.microbatch import Cutting, Microbatch
from rlef_mega.megatron.network.families import read_config
from rlef_mega.megatron.parallel import POLICY, Ranks
from rlef_mega.megatron.starting_point import build_network
from rlef_mega.megatron.trained_model import Metrics, TrainedModel, train_step
from rlef_mega.types import Batch


class SupervisedLearner:
    """A policy, without a critic, trained on given dialogues."""

    def __init__(
        self,
        ranks: Ranks,
        model_folder: Path,
        *,
        optimizer: OptimizerConfig,
        microbatch_tokens: int,
        dtype: str,
        recompute: str = "none",
        weights: Path | None = None,
    ) -> None:
        """Start from the folder's weights, or from those of the checkpoint `weights`."""
        self.ranks = ranks
        config = read_config(model_folder)
        chunks = build_network(
            POLICY,
            config,
            ranks,
            model_folder,
            dtype=getattr(torch, dtype),
            recompute=recompute,
            weights=weights,
        )
        self.cutting = Cutting(ranks, microbatch_tokens, LlamaShape.of(config).flops)
        self.policy = TrainedModel(chunks, ranks, optimizer)

    @property
    def trained(self) -> dict[str, TrainedModel]:
        return {POLICY: self.policy}

    def whole(self) -> AbstractContextManager[None]:
        """Do nothing: this learner never offloads."""
        return nullcontext()

    def policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter_hf_weights(self.policy.chunks, self.ranks)

    def supervised_update(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step on the whole batch: L = -mean over action tokens of log pi."""
        model = self.policy.last_chunk

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            logprobs_R, _ = model.logprobs(
                hidden, microbatch.action_rows_R, microbatch.action_ids_R, temperature=1.0
            )
            value = -logprobs_R.sum() / batch.num_actions
            return value, {"loss": value.detach()}

        microbatches = self.cutting.cut(batch, range(batch.num_sequences))
        metrics = train_step(self.policy, microbatches, loss, ("loss",), "supervised")
        self.policy.gather_weights()
        return metrics
