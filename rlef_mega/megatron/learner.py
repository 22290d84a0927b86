"""The learner: policy, critic and frozen reference. It scores batches, updates on them, and yields
the policy's weights.

Theory of operation. Every rank has the whole packed batch in host memory and computes its
data-parallel share of it. `score` and `update` are collective and return the same on every rank.
The three networks share one set of ranks, and run one phase after the other; or the critic has
ranks of its own, which work at the same time as the policy's. Either way a network gets the same
micro-batches in the same order, so the numbers are the same. Between its phases a network may wait
in host memory (`offload`).

Shape suffixes as in types.py: A action tokens, M values; and K kinds of an action's scores.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from rlef_kernels import linear_ppo_loss
from rlef_kernels.ppo_policy_loss import METRICS as POLICY_METRICS
from rlef_mega import ppo
from rlef_mega.config import LearnerConfig, PPOConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.checkpoints.state import load_weights
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.hf_weights import iter_hf_weights, load_hf, relay
from rlef_mega.megatron.microbatch import Cutting, Microbatch
from rlef_mega.megatron.network.attention import to_device
from rlef_mega.megatron.network.families import read_config
from rlef_mega.megatron.network.packed_llama import (
    CriticModel,
    PackedLlama,
    PolicyAndReference,
    PolicyModel,
)
from rlef_mega.megatron.parallel import CRITIC, POLICY, Ranks
from rlef_mega.megatron.trained_model import (
    FrozenModel,
    Metrics,
    ReadFunction,
    Residence,
    TrainedModel,
    forward,
    train_step,
)
from rlef_mega.run.directory import Clock
from rlef_mega.run.ranks import gather
from rlef_mega.types import Batch, Scores, Targets

CRITIC_METRICS = ("value_loss", "value_clip_fraction")


class Learner:
    """Policy, critic and frozen reference, all started from one Hugging Face folder (RLEF A.1), or
    from the folder's config and the `weights` of a checkpoint.

    A rank has policy and reference, or the critic, or all three. `policy`, `reference` or `critic`
    is None if this rank does not have that network: all ranks lack a critic unless
    `ppo.advantage` is "critic", and a reference if `ppo.beta` is 0.
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
        weights: Path | None = None,
    ) -> None:
        self.ranks, self.ppo, self.temperature = ranks, ppo, temperature
        self.read_logprobs = functools.partial(PolicyModel.logprobs, temperature=temperature)
        self.config, self.dtype = read_config(model_folder), getattr(torch, dtype)
        self.folder, self.weights, self.recompute = model_folder, weights, recompute
        shape = LlamaShape.of(self.config)
        self.cutting = Cutting(ranks, learner.microbatch_tokens, shape, ppo.token_level_value)
        self.offloads = learner.offload == "idle"
        self.clock = Clock()
        self.policy = self.critic = self.reference = None
        # In Megatron, reading weights and making an optimizer are collective over the world, so all
        # ranks do them in the same order, whichever networks they have.
        if ppo.beta and (chunks := self.build(POLICY)):
            self.reference = FrozenModel(chunks)
            self.settle()  # before the next one is made
        policy = self.build(POLICY)
        critic = self.build(CRITIC) if ppo.advantage == "critic" else []
        if policy:
            self.policy = TrainedModel(policy, ranks, learner.policy)
            self.settle()
        if critic:
            self.critic = TrainedModel(critic, ranks, learner.critic)
            self.settle()

    @calls_megatron
    def build(self, name: str) -> list[PackedLlama]:
        """Build and load this rank's chunks of policy or critic; returns [] if the rank has no part
        of it. Every rank calls this: reading a checkpoint is collective over the world."""
        ranks, weights = self.ranks, self.weights
        kind = CriticModel if name == CRITIC else PolicyModel
        count = ranks.layout.virtual_pipeline_model_parallel_size if name in ranks.networks else 0
        chunks: list[PackedLlama] = [
            kind(self.config, ranks, chunk=n, dtype=self.dtype, recompute=self.recompute)
            for n in range(count)
        ]
        for chunk in chunks:
            chunk.to(ranks.device)
        if weights is not None:
            load_weights(weights, name, chunks, ranks)
        elif chunks:
            load_hf(chunks, self.folder, ranks)
        return chunks

    @property
    def networks(self) -> dict[str, FrozenModel | TrainedModel]:
        """Return this rank's networks by name."""
        models = {"reference": self.reference, POLICY: self.policy, CRITIC: self.critic}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def trained(self) -> dict[str, TrainedModel]:
        """Return this rank's trained networks by name; checkpoints hold these."""
        models = self.networks.items()
        return {name: model for name, model in models if isinstance(model, TrainedModel)}

    # ------------------------------------------------------------------ phases

    @contextmanager
    def phase(self, name: str, **residences: Residence) -> Iterator[None]:
        """Time a part of the work, with these networks on the device. If idle state is offloaded,
        all other networks wait in host memory."""
        if self.offloads:
            with self.clock("move"):
                self.settle(**residences)
        with self.clock(name):
            yield
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize()

    def settle(self, **residences: Residence) -> None:
        """Move networks that are not named to the host, then those that are named to the device."""
        if not self.offloads:
            return
        wanted = {name: residences.get(name, Residence.NOTHING) for name in self.networks}
        for name in sorted(wanted, key=wanted.__getitem__):
            self.networks[name].reside(wanted[name])

    def make_room(self) -> None:
        """Free device memory for servers on the same devices: empty the allocator's cache and, if
        idle state is offloaded, keep only the policy's weights. Collective: waits for all ranks."""
        self.settle(policy=Residence.WEIGHTS)
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        dist.barrier()

    def whole(self) -> AbstractContextManager[None]:
        """Bring weights and optimizer states to the device, to save or load a checkpoint."""
        return self.phase("checkpoint", policy=Residence.STATE, critic=Residence.STATE)

    # ------------------------------------------------------------------ weights

    def policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the policy's weights, whole and under their Hugging Face names, on every rank.
        Collective: every rank must exhaust the iterator."""
        with self.phase("gather", policy=Residence.WEIGHTS):
            own = iter_hf_weights(self.policy.chunks, self.ranks) if self.policy else None
            if self.ranks.receivers is None:
                assert own is not None, "a rank without the policy receives it"
                yield from own
            else:
                yield from relay(own, self.config, self.dtype, self.ranks)

    # ------------------------------------------------------------------ scores

    def score(self, batch: Batch) -> Scores:
        """Return log-probs of policy and reference, and values, before the updates. Without a KL
        penalty the reference is not run. For the exact KL (`ppo.kl`) policy and reference are run
        together, one micro-batch after the other, so that no hidden state is kept."""
        actions, turns = batch.num_actions, batch.num_turns
        has_critic, exact = self.ppo.advantage == "critic", self.ppo.kl == "exact"
        values = has_critic * (actions if self.ppo.token_level_value else turns)
        kinds = 3 if exact else 2  # numbers of each action
        scores = torch.zeros(kinds * actions + values, device=self.ranks.device)
        of_actions_KA = scores[: kinds * actions].view(kinds, actions)
        values_M = scores[kinds * actions :]
        microbatches = self.cutting.cut(batch, range(batch.num_sequences))
        fill = functools.partial(self.fill, microbatches=microbatches)
        if exact:
            read = functools.partial(PolicyAndReference.scores, temperature=self.temperature)
            fill(of_actions_KA, ("policy", "reference"), read=read)
        else:
            for result_A, name in zip(of_actions_KA, ("policy", "reference"), strict=True):
                fill(result_A, (name,), read=self.read_logprobs)
        fill(values_M, (CRITIC,), read=CriticModel.values)
        if self.ranks.world_size > 1:
            # world: each entry has one rank that computed it; the others add zeros, which is exact
            dist.all_reduce(scores)
        old_A, ref_A, *kl = of_actions_KA.cpu()
        reference_A = ref_A if self.ppo.beta else None
        return Scores(old_A, reference_A, values_M.cpu() if has_critic else None, *kl)

    def fill(
        self,
        results: torch.Tensor,
        names: tuple[str, ...],
        microbatches: Sequence[Microbatch],
        read: ReadFunction,
    ) -> None:
        """Run the named network, or policy and reference together, if on this rank. `read` returns
        the outputs of a micro-batch, which are written to its indices of the results on one rank
        of each data-parallel part (`Ranks.reports_outputs`)."""
        chosen = [self.networks[name].chunks for name in names if name in self.networks]
        if not chosen:
            return
        with self.phase(f"score_{'_and_'.join(names)}", **dict.fromkeys(names, Residence.WEIGHTS)):
            chunks = chosen[0] if len(names) == 1 else list(map(PolicyAndReference, *chosen))
            outputs = forward(chunks, self.ranks, microbatches, read)
            if self.ranks.reports_outputs:
                for microbatch, values in zip(microbatches, outputs, strict=True):
                    index = microbatch.values_V if CRITIC in names else microbatch.actions_R
                    results[..., index] = values

    # ------------------------------------------------------------------ updates

    def update(
        self, batch: Batch, targets: Targets, order: torch.Tensor, *, train_policy: bool = True
    ) -> dict[str, float]:
        """Make one pass over the batch, in `updates_per_batch` updates. `order` is a permutation of
        the batch's sequences; the updates take equal parts of it (unless episodes were dropped).
        Each update is one optimizer step of the critic and, if `train_policy`, one of the policy.
        The two networks are updated at the same time if the critic has ranks of its own, else one
        after the other.

        Returns the metrics' means over the updates. Raises FloatingPointError on every rank before
        an optimizer step whose loss or gradient is not finite.
        """
        parts = self.ppo.updates_per_batch
        sequences = order.tolist()
        if sorted(sequences) != list(range(batch.num_sequences)) or len(sequences) < parts:
            raise ValueError(
                f"order must be a permutation of the {batch.num_sequences} sequences, of which "
                f"there must be at least ppo.updates_per_batch = {parts}"
            )
        bounds = [len(sequences) * part // parts for part in range(parts + 1)]
        chosen = [sequences[start:end] for start, end in itertools.pairwise(bounds)]
        updates = {CRITIC: self.update_critic, POLICY: self.update_policy}
        metrics: dict[str, float] = {}
        fault = None
        try:
            for name, update in updates.items():
                model = self.trained.get(name)
                if model is None or (name == POLICY and not train_policy):
                    continue
                with self.phase(f"update_{name}", **{name: Residence.TRAINING}):
                    rows = [update(batch, targets, part) for part in chosen]
                    model.gather_weights()
                metrics |= {key: sum(row[key] for row in rows) / parts for key in rows[0]}
        except FloatingPointError as error:  # on every rank of this network's layout
            fault = str(error)
        colocated = self.ranks.group is None  # then every rank has all metrics
        for found, theirs in [(fault, metrics)] if colocated else gather((fault, metrics)):
            if found:
                raise FloatingPointError(found)
            metrics |= theirs
        return metrics

    def update_policy(
        self, batch: Batch, targets: Targets, sequences: Sequence[int]
    ) -> dict[str, float]:
        """Take one optimizer step on the clipped policy loss, a mean over the action tokens."""
        assert self.policy is not None
        model, device = self.policy.last_chunk, self.ranks.device
        old_A = to_device(targets.old_logprobs_A, device)
        behaviour_A = to_device(batch.behaviour_logprobs_A, device)
        advantages_A = to_device(targets.advantages_A, device)
        count = int(batch.action_bounds.diff()[list(sequences)].sum())

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            index = microbatch.actions_R
            # computed inside the head, which saves a quarter of its products
            return linear_ppo_loss(
                model.rows(hidden, microbatch.action_rows_R),
                model.output_weight,
                microbatch.action_ids_R,
                old_A[index],
                behaviour_A[index],
                advantages_A[index],
                clip_eps=self.ppo.clip_eps,
                temperature=self.temperature,
                group=self.ranks.groups.tp,
                denominator=count,
                accumulate_main_grad=model.has_main_grad,
            )

        microbatches = self.cutting.cut(batch, sequences)
        return train_step(self.policy, microbatches, loss, POLICY_METRICS, "policy")

    def update_critic(
        self, batch: Batch, targets: Targets, sequences: Sequence[int]
    ) -> dict[str, float]:
        """Take one optimizer step on `ppo.value_loss`, a mean over the values."""
        assert self.critic is not None and targets.old_values_M is not None
        model, device = self.critic.last_chunk, self.ranks.device
        old_M = to_device(targets.old_values_M, device)
        returns_M = to_device(targets.returns_M, device)
        bounds = batch.action_bounds if self.ppo.token_level_value else batch.turn_bounds
        count = int(bounds.diff()[list(sequences)].sum())

        def loss(hidden: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, Metrics]:
            index = microbatch.values_V
            return ppo.value_loss(
                model.values(hidden, microbatch),
                old_M[index],
                returns_M[index],
                clip_alpha=self.ppo.clip_alpha,
                denominator=count,
            )

        microbatches = self.cutting.cut(batch, sequences)
        return train_step(self.critic, microbatches, loss, CRITIC_METRICS, "critic")
