"""Supervised training of a policy, without a critic: the stage that makes the demo's base model,
and the paper's imitation ablation."""

from pathlib import Path
from typing import Any

import torch

from rlef_mega.config import PPOConfig
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.microbatch import Microbatch
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.megatron.trained_model import Metrics, train_step
from rlef_mega.types import Batch


class SupervisedLearner(Learner):
    """Trains a policy on given dialogues; it has no critic and no reference."""

    def __init__(self, ranks: Ranks, model_folder: Path, **options: Any) -> None:
        """Take a `Learner`'s options but `ppo` and `temperature`, which are set here."""
        ppo = PPOConfig(beta=0, advantage="rloo")
        super().__init__(ranks, model_folder, ppo=ppo, temperature=1.0, **options)

    def supervised_update(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step on the whole batch: L = -mean over action tokens of log pi."""
        assert self.policy is not None
        model = self.policy.last_chunk

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            value = -self.read_logprobs(model, hidden, microbatch).sum() / batch.num_actions
            return value, {"loss": value.detach()}

        microbatches = self.cutting.cut(batch, range(batch.num_sequences))
        metrics = train_step(self.policy, microbatches, loss, ("loss",), "supervised")
        self.policy.gather_weights()
        return metrics
