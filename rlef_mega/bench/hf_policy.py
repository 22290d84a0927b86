"""The peer that our learner is measured beside: Hugging Face's LlamaForCausalLM with PyTorch's
AdamW, making the learner's policy update in a plain training loop.

Same weights, sequences, response tokens, loss (`ppo.policy_loss`), gradient clipping and optimizer
arithmetic; micro-batches of its own, padded or packed. What favours the peer: the head runs on
response tokens alone, as ours does; padded sequences go without a mask, since right padding and
causality need none; gradients of bfloat16 weights add up in bfloat16 over micro-batches, where ours
add up in fp32; no entropy is computed. Main weights and moments are fp32 on both sides.

Shape suffixes: B sequences, L tokens of the longest, T packed tokens, R response tokens.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from rlef_mega import ppo
from rlef_mega.config import OptimizerConfig
from rlef_mega.packing import microbatches, spans
from rlef_mega.types import Batch, Targets

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class PeerBatch:
    """One forward pass: ids as [B, L] with zeros at the end, or [1, T] with what tells the
    sequences apart; and the constants of the loss at its response tokens.
    """

    token_ids: torch.Tensor
    packing: dict[str, torch.Tensor | int]  # more arguments of the model
    rows_R: torch.Tensor  # into the flat hidden states, one before each response token
    ids_R: torch.Tensor
    old_R: torch.Tensor
    behaviour_R: torch.Tensor
    advantages_R: torch.Tensor


@dataclass(frozen=True)
class Form:
    """How the peer lays a batch out: padded or packed, at most so many tokens (padding counts)."""

    packed: bool
    token_budget: int

    @property
    def name(self) -> str:
        return f"{'packed' if self.packed else 'padded'}, {self.token_budget:,} tokens"


def peer_batches(
    batch: Batch, targets: Targets, form: Form, device: torch.device
) -> list[PeerBatch]:
    """All sequences of the batch as micro-batches of this form."""
    lengths = batch.cu_seqlens.diff().tolist()
    if form.packed:
        parts = [part for part in microbatches(lengths, form.token_budget, 1)[0] if part]
    else:
        parts = list(similar_lengths(lengths, form.token_budget))
    make = packed_batch if form.packed else padded_batch
    return [make(batch, targets, part, device) for part in parts]


def similar_lengths(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Sorted by length, cut where the next sequence would exceed the budget, padding included."""
    part: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if part and lengths[part[0]] * (len(part) + 1) > token_budget:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def packed_batch(
    batch: Batch, targets: Targets, sequences: list[int], device: torch.device
) -> PeerBatch:
    positions_T = spans(batch.cu_seqlens, sequences)
    lengths = batch.cu_seqlens.diff()[sequences]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    packing: dict[str, torch.Tensor | int] = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        # read by flash attention alone, which would work them out in each layer
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    rows_R = torch.isin(positions_T, batch.action_positions_A).nonzero().squeeze(1) - 1
    ids = batch.token_ids_T[positions_T][None]
    return PeerBatch(
        ids.to(device), packing, rows_R.to(device), *constants(batch, targets, sequences, device)
    )


def padded_batch(
    batch: Batch, targets: Targets, sequences: list[int], device: torch.device
) -> PeerBatch:
    positions_T = spans(batch.cu_seqlens, sequences)
    lengths_B = batch.cu_seqlens.diff()[sequences].long()
    longest = int(lengths_B.max())
    sequence_T = torch.arange(len(sequences)).repeat_interleave(lengths_B)
    places_T = sequence_T * longest + torch.cat([torch.arange(n) for n in lengths_B])
    ids_BL = torch.zeros(len(sequences) * longest, dtype=torch.int64)
    ids_BL[places_T] = batch.token_ids_T[positions_T]
    rows_R = places_T[torch.isin(positions_T, batch.action_positions_A)] - 1
    return PeerBatch(
        ids_BL.view(-1, longest).to(device),
        {},
        rows_R.to(device),
        *constants(batch, targets, sequences, device),
    )


def constants(
    batch: Batch, targets: Targets, sequences: list[int], device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Ids, old and behaviour log-probs and advantages of the response tokens."""
    actions_R = spans(batch.action_bounds, sequences)
    found = (
        batch.token_ids_T[batch.action_positions_A[actions_R]],
        targets.old_logprobs_A[actions_R],
        batch.behaviour_logprobs_A[actions_R],
        targets.advantages_A[actions_R],
    )
    return tuple(tensor.to(device) for tensor in found)


def logits_head(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, ids_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probs from logits that are stored, in fp32."""
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD).float()
    if temperature != 1.0:  # not another copy of the logits for nothing
        logits_RV = logits_RV / temperature
    return -torch.nn.functional.cross_entropy(logits_RV, ids_R, reduction="none")


def liger_head(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, ids_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probs by Liger's fused head in the form that is differentiable token by token; on Hopper
    it wants the package nvidia-cutlass-dsl.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll_R = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden_RD, weight_VD, ids_R, temperature
    )
    return -nll_R.float()


def liger_tensor_parallel_head(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, ids_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The same on a tensor-parallel group of one, where without NVSHMEM Liger goes by chunks of
    512 tokens.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    nll_R = liger_fused_linear_scaled_cross_entropy_tp(
        hidden_RD, weight_VD, ids_R, torch.distributed.group.WORLD, temperature
    )
    return -nll_R.float()


def has_liger(device: torch.device) -> bool:
    """Its kernels are Triton's: an NVIDIA GPU is needed besides the package."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


class HuggingFacePolicy:
    """A model and its optimizer. `update` is one step, as `Learner.update_policy` makes one."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        optimizer: OptimizerConfig,
        *,
        temperature: float,
        clip_eps: float,
        recompute: bool = False,
    ) -> None:
        self.temperature, self.clip_eps = temperature, clip_eps
        self.clip_grad = optimizer.clip_grad or float("inf")
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        if has_liger(device):
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
        torch.nn.Module.to(model, device)
        self.model = model.train()
        if recompute:
            self.model.gradient_checkpointing_enable()
        self.weights = list(self.model.parameters())
        self.main = self.weights
        if dtype == torch.bfloat16:
            self.main = [weight.detach().float() for weight in self.weights]
        decayed = [weight for weight in self.main if weight.dim() > 1]
        others = [weight for weight in self.main if weight.dim() == 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optimizer.lr / max(optimizer.warmup_updates, 1),  # as our schedule begins
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def use_attention(self, implementation: str) -> None:
        self.model.set_attn_implementation(implementation)

    def update(self, batches: Sequence[PeerBatch], head: Head) -> dict[str, float]:
        """Forward and backward of each micro-batch, clipped optimizer step: loss and gradient
        norm.
        """
        tokens = sum(batch.ids_R.numel() for batch in batches)
        for weight in self.weights:
            weight.grad = None
        total = torch.zeros((), device=self.weights[0].device)
        for batch in batches:
            loss = self.loss(batch, head, tokens)
            loss.backward()
            total += loss.detach()
        norm = self.step()
        return {"policy_loss": float(total), "policy_grad_norm": norm}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PeerBatch], head: Head) -> float:
        """The loss of an update that is not made."""
        tokens = sum(batch.ids_R.numel() for batch in batches)
        return sum(float(self.loss(batch, head, tokens)) for batch in batches)

    def loss(self, batch: PeerBatch, head: Head, tokens: int) -> torch.Tensor:
        outputs = self.model.model(batch.token_ids, use_cache=False, **batch.packing)
        hidden_RD = outputs.last_hidden_state.flatten(0, 1)[batch.rows_R]
        logprobs_R = head(hidden_RD, self.model.lm_head.weight, batch.ids_R, self.temperature)
        loss, _ = ppo.policy_loss(
            logprobs_R,
            batch.old_R,
            batch.behaviour_R,
            batch.advantages_R,
            clip_eps=self.clip_eps,
            denominator=tokens,
        )
        return loss

    def step(self) -> float:
        if self.main is not self.weights:
            for main, weight in zip(self.main, self.weights, strict=True):
                main.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.main, self.clip_grad)
        self.optimizer.step()
        if self.main is not self.weights:
            torch._foreach_copy_([w.data for w in self.weights], self.main)
            for main in self.main:
                main.grad = None
        return float(norm)
