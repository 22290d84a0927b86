"""The learner: policy, critic and frozen reference on one set of ranks. Batches in; scores, updates
and weights out.

Theory of operation. Every rank holds the whole packed batch on the host and computes its
data-parallel share of it. `score` and `update` are collective, and what they return is the same on
every rank.

Shape suffixes: T packed tokens of the batch, A its response tokens in order, N turns (or, with
token-level values, A).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rlef_mega import ppo
from rlef_mega.config import (
    LearnerConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
)
from rlef_mega.flops import SequenceFlops
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.families import read_config
from rlef_mega.megatron.hf_weights import iter_hf_weights, load_hf
from rlef_mega.megatron.microbatch import Cutting, Microbatch
from rlef_mega.megatron.model import CriticModel, PolicyModel
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.megatron.trained_model import LossFunction, Metrics, TrainedModel, forward
from rlef_mega.types import Batch, Scores, Targets

POLICY_METRICS = (
    "policy_loss",
    "ratio",
    "clip_fraction",
    "behaviour_factor",
    "approx_kl",
    "entropy",
)
CRITIC_METRICS = ("value_loss", "value_clip_fraction")


class Learner:
    """Policy, critic and frozen reference, all started from one Hugging Face folder (RLEF A.1)."""

    def __init__(
        self,
        ranks: Ranks,
        model_folder: Path,
        *,
        parallel: ParallelConfig,
        learner: LearnerConfig,
        ppo: PPOConfig,
        dtype: str,
        temperature: float,
        recompute: str = "none",
    ) -> None:
        self.ranks, self.ppo, self.temperature = ranks, ppo, temperature
        start = StartingPoint(ranks, model_folder, parallel, getattr(torch, dtype), recompute)
        self.cutting = Cutting(
            ranks,
            getattr(torch, dtype),
            learner.microbatch_tokens,
            parallel.sequence_parallel,
            SequenceFlops.of(start.config),
            ppo.token_level_value,
        )
        self.policy_model, self.critic_model = start.policy(), start.critic()
        self.reference = start.policy().requires_grad_(False) if ppo.beta else None
        self.policy = TrainedModel(self.policy_model, ranks, learner.policy)
        self.critic = TrainedModel(self.critic_model, ranks, learner.critic)

    @property
    def trained(self) -> dict[str, TrainedModel]:
        """What a checkpoint holds."""
        return {"policy": self.policy, "critic": self.critic}

    def policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights under their Hugging Face names, whole, on every rank. Collective."""
        return iter_hf_weights(self.policy_model, self.ranks)

    def score(self, batch: Batch) -> Scores:
        """Log-probs of policy and reference, and values, before the updates. Without a KL penalty
        the reference is not run, and its log-probs are zeros.
        """
        actions = int(batch.action_mask_T.sum())
        values = actions if self.ppo.token_level_value else batch.num_turns
        microbatches = self.cutting.cut(batch, range(batch.num_sequences))
        scores = torch.zeros(2 * actions + values, device=self.ranks.device)
        old_A, reference_A, values_N = scores.split([actions, actions, values])
        old = forward(self.policy_model, microbatches, self.read_logprobs(self.policy_model))
        critic = forward(self.critic_model, microbatches, self.read_values)
        reference = []
        if self.reference is not None:
            reference = forward(self.reference, microbatches, self.read_logprobs(self.reference))
        if self.ranks.speaks_for_outputs:
            for index, microbatch in enumerate(microbatches):
                old_A[microbatch.actions_R] = old[index]
                values_N[microbatch.values_M] = critic[index]
                if reference:
                    reference_A[microbatch.actions_R] = reference[index]
        if self.ranks.world_size > 1:
            # world: each entry has one rank that computed it; the others add zeros, which is exact
            dist.all_reduce(scores)
        return Scores(unpack(old_A.cpu(), batch), unpack(reference_A.cpu(), batch), values_N.cpu())

    def read_logprobs(self, model: PolicyModel):
        def read(hidden: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
            rows, ids = microbatch.action_rows_R, microbatch.action_ids_R
            return model.logprobs(hidden, rows, ids, temperature=self.temperature)[0]

        return read

    def read_values(self, hidden: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        return self.critic_model.values(hidden, microbatch.value_rows_M)

    def update(
        self, batch: Batch, targets: Targets, order: torch.Tensor, *, train_policy: bool = True
    ) -> dict[str, float]:
        """One pass over the batch in `updates_per_batch` parts of `order`, a permutation of its
        sequences; parts are equal unless episodes were dropped. Each is one optimizer step of the
        critic and, unless it is only warming up, one of the policy. Means over the updates.

        Raises FloatingPointError before an optimizer step whose loss or gradient is not finite.
        """
        parts = self.ppo.updates_per_batch
        sequences = order.tolist()
        if sorted(sequences) != list(range(batch.num_sequences)) or len(sequences) < parts:
            raise ValueError(
                f"order must permute {batch.num_sequences} sequences, at least {parts} of them"
            )
        bounds = [len(sequences) * part // parts for part in range(parts + 1)]
        rows: list[dict[str, float]] = []
        for start, end in itertools.pairwise(bounds):
            chosen = sequences[start:end]
            microbatches = self.cutting.cut(batch, chosen)
            row = self.update_critic(batch, targets, chosen, microbatches)
            if train_policy:
                row |= self.update_policy(batch, targets, chosen, microbatches)
            rows.append(row)
        return {name: sum(row[name] for row in rows) / parts for name in rows[0]}

    def update_policy(
        self,
        batch: Batch,
        targets: Targets,
        sequences: Sequence[int],
        microbatches: list[Microbatch],
    ) -> dict[str, float]:
        device, action_T = self.ranks.device, batch.action_mask_T
        old_A = targets.old_logprobs_T[action_T].to(device)
        behaviour_A = batch.behaviour_logprobs_T[action_T].to(device)
        # one advantage for all tokens of a response (RLEF A.1), unless each has its own (B.6)
        advantages_A = targets.advantages_N
        if not self.ppo.token_level_value:
            advantages_A = advantages_A[batch.turn_index_T[action_T]]
        advantages_A = advantages_A.to(device)
        tokens = count_actions(batch, sequences)

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            index = microbatch.actions_R
            # `ppo.policy_loss`, with its log-probs and gradients made in one go
            return self.policy_model.policy_loss(
                hidden,
                microbatch.action_rows_R,
                microbatch.action_ids_R,
                old_A[index],
                behaviour_A[index],
                advantages_A[index],
                clip_eps=self.ppo.clip_eps,
                temperature=self.temperature,
                denominator=tokens,
            )

        return train_step(self.policy, microbatches, loss, POLICY_METRICS, "policy")

    def update_critic(
        self,
        batch: Batch,
        targets: Targets,
        sequences: Sequence[int],
        microbatches: list[Microbatch],
    ) -> dict[str, float]:
        old_N = targets.old_values_N.to(self.ranks.device)
        returns_N = targets.returns_N.to(self.ranks.device)
        if self.ppo.token_level_value:
            count = count_actions(batch, sequences)
        else:
            count = int(torch.isin(batch.episode_of_turn_N, torch.tensor(sequences)).sum())

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            index = microbatch.values_M
            return ppo.value_loss(
                self.read_values(hidden, microbatch),
                old_N[index],
                returns_N[index],
                clip_alpha=self.ppo.clip_alpha,
                denominator=count,
            )

        return train_step(self.critic, microbatches, loss, CRITIC_METRICS, "critic")


class SupervisedLearner:
    """A policy alone, trained on given dialogues: the stage that makes a base model."""

    def __init__(
        self,
        ranks: Ranks,
        model_folder: Path,
        *,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        microbatch_tokens: int,
        dtype: str,
        recompute: str = "none",
    ) -> None:
        self.ranks = ranks
        start = StartingPoint(ranks, model_folder, parallel, getattr(torch, dtype), recompute)
        self.cutting = Cutting(
            ranks,
            getattr(torch, dtype),
            microbatch_tokens,
            parallel.sequence_parallel,
            SequenceFlops.of(start.config),
        )
        self.policy_model = start.policy()
        self.policy = TrainedModel(self.policy_model, ranks, optimizer)

    @property
    def trained(self) -> dict[str, TrainedModel]:
        return {"policy": self.policy}

    def policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter_hf_weights(self.policy_model, self.ranks)

    def supervised_update(self, batch: Batch) -> dict[str, float]:
        """L = -mean over action tokens of log pi: one optimizer step on the whole batch."""
        sequences = range(batch.num_sequences)
        tokens = count_actions(batch, sequences)

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            logprobs_R, _ = self.policy_model.logprobs(
                hidden, microbatch.action_rows_R, microbatch.action_ids_R, temperature=1.0
            )
            value = -logprobs_R.sum() / tokens
            return value, {"loss": value.detach()}

        microbatches = self.cutting.cut(batch, sequences)
        return train_step(self.policy, microbatches, loss, ("loss",), "supervised")


class StartingPoint:
    """A Hugging Face folder, and the networks made from it on these ranks."""

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        recompute: str,
    ) -> None:
        self.ranks, self.folder, self.parallel = ranks, folder, parallel
        self.config, self.dtype, self.recompute = read_config(folder), dtype, recompute

    @calls_megatron
    def policy(self) -> PolicyModel:
        model = PolicyModel(
            self.config, self.ranks, self.parallel, dtype=self.dtype, recompute=self.recompute
        )
        model = model.to(self.ranks.device)
        load_hf(model, self.folder, self.ranks)
        return model

    @calls_megatron
    def critic(self) -> CriticModel:
        model = CriticModel(
            self.config, self.ranks, self.parallel, dtype=self.dtype, recompute=self.recompute
        )
        model = model.to(self.ranks.device)
        load_hf(model, self.folder, self.ranks, with_head=False)
        return model


def train_step(
    model: TrainedModel,
    microbatches: list[Microbatch],
    loss: LossFunction,
    names: Sequence[str],
    prefix: str,
) -> dict[str, float]:
    """Forward, backward, one optimizer step; a loss that is not finite stops before the step, on
    every rank.
    """
    metrics = model.forward_backward(microbatches, loss, names)
    if not math.isfinite(metrics[names[0]]):
        raise FloatingPointError(f"{names[0]} is {metrics[names[0]]} at update {model.updates}")
    norm, rate = model.step()
    return metrics | {f"{prefix}_grad_norm": norm, f"{prefix}_lr": rate}


def count_actions(batch: Batch, sequences: Sequence[int]) -> int:
    """Response tokens of these sequences, over all ranks: a loss's denominator."""
    before = torch.nn.functional.pad(batch.action_mask_T.cumsum(0), (1, 0))
    chosen = torch.tensor(list(sequences))
    ends = batch.cu_seqlens.long()
    return int((before[ends[chosen + 1]] - before[ends[chosen]]).sum())


def unpack(values_A: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Response tokens back to their places among all tokens; zero elsewhere."""
    return torch.zeros(batch.num_tokens).masked_scatter(batch.action_mask_T, values_A)
