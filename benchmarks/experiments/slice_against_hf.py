"""Our policy update against Hugging Face's, on a slice of the recipe's model (`rlef bench slice`):

    python -m pip install --no-deps --requirement benchmarks/requirements-kernels.txt
    python benchmarks/experiments/slice_against_hf.py llama31_8b --json FILE.json

The peer is LlamaForCausalLM with PyTorch's AdamW in a plain training loop, with Liger's kernels and
head if they can run, and with a head that stores logits. Same weights, sequences, response tokens,
loss, gradient clipping and optimizer arithmetic; micro-batches of its own, of
sequences of similar lengths, padded. The peer does no more than it must: its head runs only on
response tokens, as ours does; there is no mask, since right padding and causality need none;
gradients of bfloat16 weights add up in bfloat16 over micro-batches, ours in fp32; no entropy is
computed. Main weights and moments are fp32 on both sides.

One process. The peer must begin with our loss and gradient norm, or it is left out with the reason;
this ensures that the same work is compared. The sides are measured as the slice's own phases are:
each round updates every side once, and a ratio is taken within a round, so that other work on the
machine affects both.

Shape suffixes: B sequences, L tokens of the longest, T tokens of a batch, R response tokens.
"""

import argparse
import gc
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from rlef_mega.bench.kernel_methods import LIGER_CUTE
from rlef_mega.bench.results import Figure, Results
from rlef_mega.bench.slice import (
    Phases,
    measure_phases,
    on_policy_targets,
    slice_batch,
    slice_workload,
)
from rlef_mega.bench.workload import describe_batch
from rlef_mega.config import TrainConfig
from rlef_mega.megatron import parallel
from rlef_mega.packing import spans
from rlef_mega.parts import make_learner
from rlef_mega.types import Batch, Targets

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

MINUTES = 3.0  # after which no round is started
# The peer's bytes per parameter: weight and gradient in bfloat16, and main copy, its gradient and
# two moments in fp32.
PEER_BYTES = 20
OURS = "ours"
# For rounding and another attention kernel: absolute for the first loss, whose terms are about 1,
# and relative for the gradient norm.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
NORM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


# --------------------------------------------------------------------------------- the peer's batch


@dataclass(frozen=True)
class PeerBatch:
    """One forward pass: ids padded with zeros, and its response tokens, by their index in the
    flat ids and among the batch's actions."""

    token_ids_BL: torch.Tensor
    responses_R: torch.Tensor
    actions_R: torch.Tensor


def peer_batches(batch: Batch, token_budget: int, device: torch.device) -> Iterator[PeerBatch]:
    """Cut the batch into micro-batches of at most `token_budget` tokens, padding included."""
    is_response_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
    is_response_T[batch.action_positions_A] = True
    for sequences in similar_lengths(batch.cu_seqlens.diff().tolist(), token_budget):
        places = [spans(batch.cu_seqlens, [index]) for index in sequences]
        ids_BL, is_response_BL = (
            pad_sequence([values_T[place_L] for place_L in places], batch_first=True)
            for values_T in (batch.token_ids_T, is_response_T)
        )
        responses_R = is_response_BL.flatten().nonzero()[:, 0]
        actions_R = spans(batch.action_bounds, sequences)
        yield PeerBatch(ids_BL.to(device), responses_R.to(device), actions_R.to(device))


def similar_lengths(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Sort by length and cut where the next sequence would exceed the budget, padding included."""
    part: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if part and lengths[part[0]] * (len(part) + 1) > token_budget:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


# --------------------------------------------------------------------------------- the peer's heads


def logits_head(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, ids_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log-probs from stored logits, in fp32."""
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD).float()
    if temperature != 1.0:  # avoids a needless copy of the logits
        logits_RV = logits_RV / temperature
    return -torch.nn.functional.cross_entropy(logits_RV, ids_R, reduction="none")


def liger_head(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, ids_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log-probs by Liger's CuTe kernels for Hopper or, if they cannot run, by its function
    for tensor parallelism in a group of one. In both, each token's log-prob has a gradient."""
    if torch.cuda.get_device_capability(hidden_RD.device) == (9, 0) and has_module(LIGER_CUTE):
        from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as liger

        compute = liger.LigerFusedScaledCrossEntropySM90Function.apply
        return -compute(hidden_RD, weight_VD, ids_R, temperature).float()
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    group = torch.distributed.group.WORLD
    compute = liger_fused_linear_scaled_cross_entropy_tp
    return -compute(hidden_RD, weight_VD, ids_R, group, temperature).float()


@cache
def has_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


HEADS: dict[str, Head] = {"Liger": liger_head, "logits": logits_head}


def has_liger(device: torch.device) -> bool:
    """Return whether Liger can run: it needs its package and, for Triton kernels, an NVIDIA GPU."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


# --------------------------------------------------------------------------------- the peer's model


class HuggingFacePolicy:
    """A recipe's model and its optimizer; `update` makes the step that `Learner.update_policy`
    makes."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype, optimizer = getattr(torch, config.model.dtype), config.learner.policy
        model = LlamaForCausalLM.from_pretrained(
            config.model.path, dtype=self.dtype, attn_implementation="sdpa"
        )
        if has_liger(device):
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
        torch.nn.Module.to(model, device)
        self.model = model.train()
        if config.model.recompute == "full":
            self.model.gradient_checkpointing_enable()
        self.weights = list(self.model.parameters())
        self.main = self.weights
        if self.dtype == torch.bfloat16:
            self.main = [weight.detach().float() for weight in self.weights]
        groups: list[dict[str, Any]] = [
            {"params": [weight for weight in self.main if weight.dim() > 1]},
            {"params": [weight for weight in self.main if weight.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optimizer.lr / max(optimizer.warmup_updates, 1),  # as our schedule begins
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def update(self, batch: Batch, targets: Targets, head: str) -> dict[str, float]:
        """Make one optimizer step. Returns loss and gradient norm."""
        found = self.gradients(batch, targets, head)
        self.optimizer.step()
        if self.main is not self.weights:
            torch._foreach_copy_([weight.data for weight in self.weights], self.main)
        self.optimizer.zero_grad()
        return found

    def gradients(self, batch: Batch, targets: Targets, head: str) -> dict[str, float]:
        """Compute the clipped gradients of all micro-batches. Returns loss and gradient norm."""
        self.model.zero_grad()
        of_all = (targets.old_logprobs_A, batch.behaviour_logprobs_A, targets.advantages_A)
        constants = [values_A.to(self.device) for values_A in of_all]
        total = torch.zeros((), device=self.device)
        for part in peer_batches(batch, self.config.learner.microbatch_tokens, self.device):
            loss = self.loss(part, constants, HEADS[head])
            loss.backward()
            total += loss.detach()
        if self.main is not self.weights:
            for main, weight in zip(self.main, self.weights, strict=True):
                main.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        clip_grad = self.config.learner.policy.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.main, clip_grad)
        return {"policy_loss": float(total), "policy_grad_norm": float(norm)}

    def loss(self, part: PeerBatch, constants: Sequence[torch.Tensor], head: Head) -> torch.Tensor:
        """Return a micro-batch's part of the loss. `constants` are all actions' old log-probs,
        behaviour log-probs and advantages."""
        outputs = self.model.model(part.token_ids_BL, use_cache=False)
        hidden_RD = outputs.last_hidden_state.flatten(0, 1)[part.responses_R - 1]
        ids_R = part.token_ids_BL.flatten()[part.responses_R]
        temperature = self.config.rollout.temperature
        logprobs_R = head(hidden_RD, self.model.lm_head.weight, ids_R, temperature)
        old_R, behaviour_R, advantages_R = (values_A[part.actions_R] for values_A in constants)
        factor_R = (logprobs_R.detach() - behaviour_R).exp().clamp(max=1)
        ratio_R = (logprobs_R - old_R).exp() * factor_R
        eps = self.config.ppo.clip_eps
        terms_R = torch.minimum(
            ratio_R * advantages_R, ratio_R.clamp(1 - eps, 1 + eps) * advantages_R
        )
        return -terms_R.sum() / len(constants[0])


# ------------------------------------------------------------------------------------- comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    asked = parser.parse_args()
    with slice_workload(asked.recipe, asked.layers, asked.recompute, beside=PEER_BYTES) as work:
        ranks = parallel.initialize(work.config.parallel, seed=work.config.run.seed)
        found = measure(work.config, ranks, asked.minutes)
        about = work.about(
            recompute=asked.recompute,
            **{name: found[name] for name in ("batch", "peer", "first", "memory")},
        )
        parallel.shutdown(ranks)
    notes = tuple(f"not measured: {what}" for what in found["unmeasured"])
    title = f"our policy update against Hugging Face's: {asked.recipe}"
    about["command"] = " ".join(sys.argv)
    results = Results(title, about, tuple(figures(found)), notes)
    results.write(asked.json)
    results.show()


def figures(found: dict[str, Any]) -> Iterator[Figure]:
    """Return tokens per second of each side, and ours over each peer's, one sample per round."""
    seconds = {name: samples for name, samples in found["seconds"].items() if samples}
    for name, samples in seconds.items():
        speeds = tuple(found["batch"]["tokens"] / s for s in samples)
        yield Figure(f"policy update, {name}", "tokens/s", speeds)
    for name, samples in seconds.items():
        if name != OURS:
            ratios = tuple(t / o for o, t in zip(seconds[OURS], samples, strict=True))
            yield Figure(f"policy update, ours / {name}", "ratio", ratios)


def measure(config: TrainConfig, ranks: parallel.Ranks, minutes: float = MINUTES) -> dict[str, Any]:
    # a policy update does not use the reference: make none
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"beta": 0.0})})
    learner = make_learner(config, Path(config.model.path), ranks)
    batch, targets = on_policy_targets(learner, config, slice_batch(config))
    learner.critic = None  # its memory is for the peer
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    peer = HuggingFacePolicy(config, ranks.device)
    heads, with_liger = ["logits"], "without Liger"
    if has_liger(ranks.device):
        heads, with_liger = list(HEADS), f"with Liger {version('liger-kernel')}"
    deadline = time.monotonic() + 60 * minutes
    update = partial(learner.update_policy, batch, targets, range(batch.num_sequences))
    return {
        "batch": describe_batch(batch),
        "peer": f"Hugging Face {with_liger}",
        **compare_updates(update, peer, batch, targets, heads, deadline),
    }


def compare_updates(
    our_update: Callable[[], dict[str, float]],
    peer: HuggingFacePolicy,
    batch: Batch,
    targets: Targets,
    heads: Sequence[str],
    deadline: float,
) -> dict[str, Any]:
    """Return each side's seconds per update, one sample per round, and memory; the first losses and
    gradient norms; and what was not measured, with the reason."""
    first = {OURS: our_update()}
    unmeasured = []
    sides: Phases = {OURS: our_update}
    # all gradients before the first update of the peer's weights
    for head in heads:
        name = f"Hugging Face, head: {head}"
        if time.monotonic() > deadline:
            unmeasured.append(f"{name}: the time was up")
            continue
        try:
            first[name] = peer.gradients(batch, targets, head)
        # a peer may fail in its own ways, running out of memory among them
        except Exception as error:
            unmeasured.append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        if difference := differs(first[name], first[OURS], peer.dtype):
            unmeasured.append(f"{name}: {difference}")
        else:
            sides[name] = partial(peer.update, batch, targets, head)
    measured = measure_phases(sides, peer.device, deadline)
    return {"first": first, "unmeasured": unmeasured, **measured}


def differs(theirs: dict[str, float], ours: dict[str, float], dtype: torch.dtype) -> str:
    """Return how the first update differs from ours, "" if it does not."""
    limits = {
        "policy_loss": LOSS_TOLERANCE[dtype],
        "policy_grad_norm": NORM_TOLERANCE[dtype] * ours["policy_grad_norm"],
    }
    for name, limit in limits.items():
        if abs(theirs[name] - ours[name]) > limit:
            return f"computes a {name} of {theirs[name]}, not {ours[name]}"
    return ""


if __name__ == "__main__":
    main()
