"""The learner: policy, critic and frozen reference. Batches in; scores, updates and weights out.

Theory of operation. Every rank holds the whole packed batch on the host and computes its
data-parallel share of it. `score` and `update` are collective, and what they return is the same on
every rank. Placement is colocated, all three networks on one set of ranks, one phase after the
other; or split, the critic on ranks of its own, which work at the same time as the policy's. Either
way a network sees the same micro-batches in the same order, so the numbers are the same. Between
its phases a network may wait in host memory (`offload`).

Shape suffixes: T packed tokens of the batch, A its response tokens in order, N turns (or, with
token-level values, A).
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from rlef_mega import ppo
from rlef_mega.config import (
    LearnerConfig,
    PPOConfig,
)
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.hf_weights import iter_hf_weights, relay
from rlef_mega.megatron.microbatch import Cutting, Microbatch
from rlef_mega.megatron.network.accelerations import Layers
from rlef_mega.megatron.network.packed_llama import CriticModel, PackedLlama, PolicyModel
from rlef_mega.megatron.parallel import CRITIC, POLICY, Ranks
from rlef_mega.megatron.starting_point import StartingPoint
from rlef_mega.megatron.trained_model import (
    FrozenModel,
    Metrics,
    Residence,
    TrainedModel,
    count_actions,
    forward,
    train_step,
)
from rlef_mega.run.ranks import gather
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
ReadFunction = Callable[..., torch.Tensor]


class Learner:
    """Policy, critic and frozen reference, all started from one Hugging Face folder (RLEF A.1), or
    from its config and a checkpoint's `weights`.

    A rank holds policy and reference, or the critic, or all three; of what it does not hold,
    `policy`, `reference` or `critic` is None.
    """

    def __init__(
        self,
        ranks: Ranks,
        model_folder: Path,
        *,
        learner: LearnerConfig,
        ppo: PPOConfig,
        dtype: str,
        temperature: float,
        recompute: str = "none",
        layers: Layers = "auto",
        weights: Path | None = None,
    ) -> None:
        self.ranks, self.ppo, self.temperature = ranks, ppo, temperature
        start = StartingPoint(
            ranks, model_folder, getattr(torch, dtype), recompute, layers, weights
        )
        self.config, self.dtype = start.config, getattr(torch, dtype)
        self.cutting = Cutting(
            ranks,
            self.dtype,
            learner.microbatch_tokens,
            LlamaShape.of(self.config).flops,
            ppo.token_level_value,
            ranks.microbatch_multiple,
        )
        self.offloads = learner.offload == "idle"
        self.seconds: dict[str, float] = {}
        self.policy = self.critic = self.reference = None
        # In Megatron, reading weights and making an optimizer are collective over the world: so all
        # ranks do first the one, then the other, whatever they hold.
        if ppo.beta and (chunks := start.policy()):
            self.reference = FrozenModel(chunks, ranks)
            self.settle()  # before the next one is made
        policy, critic = start.policy(), start.critic()
        if policy:
            self.policy = TrainedModel(policy, ranks, learner.policy)
            self.settle()
        if critic:
            self.critic = TrainedModel(critic, ranks, learner.critic)
            self.settle()

    @property
    def trained(self) -> dict[str, TrainedModel]:
        """What this rank has to checkpoint."""
        models = {POLICY: self.policy, CRITIC: self.critic}
        return {name: model for name, model in models.items() if model is not None}

    # ------------------------------------------------------------------ phases

    @contextmanager
    def phase(self, name: str, **residences: Residence) -> Iterator[None]:
        """A part of the work that is timed, with these networks on the device. Where idle state is
        offloaded, all others wait on the host."""
        begun = time.perf_counter()
        if self.offloads:
            self.settle(**residences)
            self.count("move", begun)
            begun = time.perf_counter()
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self.count(name, begun)

    def settle(self, **residences: Residence) -> None:
        """Park what is not named, then bring what is: memory is free before it is asked for."""
        if not self.offloads:
            return
        models = {"reference": self.reference, **self.trained}
        wanted = {
            model: residences.get(name, Residence.NOTHING)
            for name, model in models.items()
            if model is not None
        }
        for model, residence in sorted(wanted.items(), key=lambda item: item[1]):
            model.reside(residence)

    def make_room(self) -> None:
        """For servers on these devices: only the policy's weights stay, and what the allocator
        keeps for later goes back. Collective: afterwards all ranks' devices have room."""
        self.settle(policy=Residence.WEIGHTS)
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        dist.barrier()

    def count(self, name: str, begun: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call, on this rank."""
        seconds, self.seconds = self.seconds, {}
        return {name: round(value, 4) for name, value in seconds.items()}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Weights and optimizer states on the device: what a checkpoint saves or loads."""
        with self.phase("checkpoint", policy=Residence.STATE, critic=Residence.STATE):
            yield

    # ------------------------------------------------------------------ weights

    def policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights under their Hugging Face names, whole, on every rank. Collective:
        every rank exhausts it.
        """
        with self.phase("gather", policy=Residence.WEIGHTS):
            own = iter_hf_weights(self.policy.chunks, self.ranks) if self.policy else None
            if self.ranks.receivers is None:
                assert own is not None, "a rank without the policy receives it"
                yield from own
            else:
                yield from relay(own, self.config, self.dtype, self.ranks)

    # ------------------------------------------------------------------ scores

    def score(self, batch: Batch) -> Scores:
        """Log-probs of policy and reference, and values, before the updates. Without a KL penalty
        the reference is not run, and its log-probs are zeros.
        """
        actions = int(batch.action_mask_T.sum())
        values = actions if self.ppo.token_level_value else batch.num_turns
        microbatches = self.cutting.cut(batch, range(batch.num_sequences))
        scores = torch.zeros(2 * actions + values, device=self.ranks.device)
        old_A, reference_A, values_N = scores.split([actions, actions, values])
        if self.policy is not None:
            with self.phase("score_policy", policy=Residence.WEIGHTS):
                outputs = self.outputs(self.policy.chunks, microbatches, self.read_logprobs)
                self.scatter(outputs, (m.actions_R for m in microbatches), old_A)
        if self.reference is not None:
            with self.phase("score_reference", reference=Residence.WEIGHTS):
                outputs = self.outputs(self.reference.chunks, microbatches, self.read_logprobs)
                self.scatter(outputs, (m.actions_R for m in microbatches), reference_A)
        if self.critic is not None:
            with self.phase("score_critic", critic=Residence.WEIGHTS):
                outputs = self.outputs(self.critic.chunks, microbatches, self.read_values)
                self.scatter(outputs, (m.values_M for m in microbatches), values_N)
        if self.ranks.world_size > 1:
            # world: each entry has one rank that computed it; the others add zeros, which is exact
            dist.all_reduce(scores)
        return Scores(unpack(old_A.cpu(), batch), unpack(reference_A.cpu(), batch), values_N.cpu())

    def outputs(
        self, chunks: Sequence[PackedLlama], microbatches: Sequence[Microbatch], read: ReadFunction
    ) -> list[torch.Tensor]:
        """What the last stage reads of each micro-batch."""
        return forward(chunks, self.ranks, microbatches, functools.partial(read, chunks[-1]))

    def scatter(
        self, outputs: Iterable[torch.Tensor], places: Iterable[torch.Tensor], into: torch.Tensor
    ) -> None:
        """Each micro-batch's outputs to their places, on the one rank that speaks for them."""
        if self.ranks.speaks_for_outputs:
            for place, output in zip(places, outputs, strict=True):
                into[place] = output

    def read_logprobs(
        self, model: PolicyModel, hidden: torch.Tensor, microbatch: Microbatch
    ) -> torch.Tensor:
        rows, ids = microbatch.action_rows_R, microbatch.action_ids_R
        return model.logprobs(hidden, rows, ids, temperature=self.temperature)[0]

    def read_values(
        self, model: CriticModel, hidden: torch.Tensor, microbatch: Microbatch
    ) -> torch.Tensor:
        return model.values(hidden, microbatch.value_rows_M)

    # ------------------------------------------------------------------ updates

    def update(
        self, batch: Batch, targets: Targets, order: torch.Tensor, *, train_policy: bool = True
    ) -> dict[str, float]:
        """One pass over the batch in `updates_per_batch` parts of `order`, a permutation of its
        sequences; parts are equal unless episodes were dropped. Each is one optimizer step of the
        critic and, unless it is only warming up, one of the policy: at the same time where the
        critic has ranks of its own, else one network after the other. Means over the updates.

        Raises FloatingPointError before an optimizer step whose loss or gradient is not finite, on
        every rank.
        """
        parts = self.ppo.updates_per_batch
        sequences = order.tolist()
        if sorted(sequences) != list(range(batch.num_sequences)) or len(sequences) < parts:
            raise ValueError(
                f"order must permute {batch.num_sequences} sequences, at least {parts} of them"
            )
        bounds = [len(sequences) * part // parts for part in range(parts + 1)]
        chosen = [sequences[start:end] for start, end in itertools.pairwise(bounds)]
        metrics: dict[str, float] = {}
        fault = None
        try:
            if self.critic is not None:
                with self.phase("update_critic", critic=Residence.TRAINING):
                    rows = [self.update_critic(batch, targets, part) for part in chosen]
                    self.critic.gather_weights()
                metrics |= mean_of(rows)
            if self.policy is not None and train_policy:
                with self.phase("update_policy", policy=Residence.TRAINING):
                    rows = [self.update_policy(batch, targets, part) for part in chosen]
                    self.policy.gather_weights()
                metrics |= mean_of(rows)
        except FloatingPointError as error:  # on all ranks of the layout alike
            fault = str(error)
        colocated = self.ranks.group is None  # then all ranks know all of it
        for found, theirs in [(fault, metrics)] if colocated else gather((fault, metrics)):
            if found:
                raise FloatingPointError(found)
            metrics |= theirs
        return metrics

    def update_policy(
        self,
        batch: Batch,
        targets: Targets,
        sequences: Sequence[int],
    ) -> dict[str, float]:
        assert self.policy is not None
        model = self.policy.last_chunk
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
            return model.policy_loss(
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

        microbatches = self.cutting.cut(batch, sequences)
        return train_step(self.policy, microbatches, loss, POLICY_METRICS, "policy")

    def update_critic(
        self,
        batch: Batch,
        targets: Targets,
        sequences: Sequence[int],
    ) -> dict[str, float]:
        assert self.critic is not None
        model = self.critic.last_chunk
        old_N = targets.old_values_N.to(self.ranks.device)
        returns_N = targets.returns_N.to(self.ranks.device)
        if self.ppo.token_level_value:
            count = count_actions(batch, sequences)
        else:
            count = int(torch.isin(batch.episode_of_turn_N, torch.tensor(sequences)).sum())

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            index = microbatch.values_M
            return ppo.value_loss(
                self.read_values(model, hidden, microbatch),
                old_N[index],
                returns_N[index],
                clip_alpha=self.ppo.clip_alpha,
                denominator=count,
            )

        microbatches = self.cutting.cut(batch, sequences)
        return train_step(self.critic, microbatches, loss, CRITIC_METRICS, "critic")


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def unpack(values_A: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Response tokens back to their places among all tokens; zero elsewhere."""
    return torch.zeros(batch.num_tokens).masked_scatter(batch.action_mask_T, values_A)
