"""The peer of `rlef bench slice`: Hugging Face's LlamaForCausalLM with PyTorch's AdamW, making the
learner's policy update in a plain training loop.

Same weights, sequences, response tokens, loss (`ppo.policy_loss`), gradient clipping and optimizer
arithmetic; micro-batches of its own, of sequences of similar lengths, padded. What favours the
peer: the head runs on response tokens alone, as ours does; there is no mask, since right padding
and causality need none; gradients of bfloat16 weights add up in bfloat16 over micro-batches, ours
in fp32; no entropy is computed. Main weights and moments are fp32 on both sides.

Shape suffixes: B sequences, L tokens of the longest, T tokens of a batch, R response tokens.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from rlef_mega import ppo
from rlef_mega.config import OptimizerConfig
from rlef_mega.packing import spans
from rlef_mega.types import Batch, Targets

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


# -------------------------------------------------------------------------------------- its batch


@dataclass(frozen=True)
class PeerBatch:
    """One forward pass: ids padded with zeros, and the constants of the loss at its response
    tokens."""

    token_ids_BL: torch.Tensor
    rows_R: torch.Tensor  # into the flat hidden states, one before each response token
    ids_R: torch.Tensor
    old_R: torch.Tensor
    behaviour_R: torch.Tensor
    advantages_R: torch.Tensor


def peer_batches(
    batch: Batch, targets: Targets, token_budget: int, device: torch.device
) -> Iterator[PeerBatch]:
    """Cut the batch into micro-batches of at most `token_budget` tokens, padding included."""
    is_response_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
    is_response_T[batch.action_positions_A] = True
    for sequences in similar_lengths(batch.cu_seqlens.diff().tolist(), token_budget):

        def padded(values_T: torch.Tensor, sequences: list[int] = sequences) -> torch.Tensor:
            pieces = [values_T[spans(batch.cu_seqlens, [index])] for index in sequences]
            return pad_sequence(pieces, batch_first=True)

        ids_BL = padded(batch.token_ids_T)
        responses_R = padded(is_response_T).flatten().nonzero()[:, 0]
        actions_R = spans(batch.action_bounds, sequences)
        constants = (
            ids_BL.flatten()[responses_R],
            targets.old_logprobs_A[actions_R],
            batch.behaviour_logprobs_A[actions_R],
            targets.advantages_A[actions_R],
        )
        yield PeerBatch(
            ids_BL.to(device),
            (responses_R - 1).to(device),
            *(tensor_R.to(device) for tensor_R in constants),
        )


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


# -------------------------------------------------------------------------------------- its heads


def logits_head(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, ids_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log-probs from stored logits, in fp32."""
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD).float()
    if temperature != 1.0:  # not another copy of the logits for nothing
        logits_RV = logits_RV / temperature
    return -torch.nn.functional.cross_entropy(logits_RV, ids_R, reduction="none")


def liger_head(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, ids_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log-probs by Liger's fused head on a tensor-parallel group of one, the form that is
    differentiable token by token and needs no further package on Hopper."""
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    group = torch.distributed.group.WORLD
    compute = liger_fused_linear_scaled_cross_entropy_tp
    return -compute(hidden_RD, weight_VD, ids_R, group, temperature).float()


HEADS: dict[str, Head] = {"Liger": liger_head, "logits": logits_head}


def has_liger(device: torch.device) -> bool:
    """Return whether Liger can run: it needs its package and, for Triton kernels, an NVIDIA GPU."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


# -------------------------------------------------------------------------------------- its model


class HuggingFacePolicy:
    """A model and its optimizer; `update` makes the step that `Learner.update_policy` makes."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        optimizer: OptimizerConfig,
        *,
        token_budget: int,
        temperature: float,
        clip_eps: float,
        recompute: bool = False,
    ) -> None:
        self.device, self.dtype, self.token_budget = device, dtype, token_budget
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
        for weight in self.weights:
            weight.grad = None
        tokens = batch.num_actions
        total = torch.zeros((), device=self.device)
        for part in peer_batches(batch, targets, self.token_budget, self.device):
            loss = self.loss(part, HEADS[head], tokens)
            loss.backward()
            total += loss.detach()
        if self.main is not self.weights:
            for main, weight in zip(self.main, self.weights, strict=True):
                main.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.main, self.clip_grad)
        return {"policy_loss": float(total), "policy_grad_norm": float(norm)}

    def loss(self, part: PeerBatch, head: Head, tokens: int) -> torch.Tensor:
        outputs = self.model.model(part.token_ids_BL, use_cache=False)
        hidden_RD = outputs.last_hidden_state.flatten(0, 1)[part.rows_R]
        logprobs_R = head(hidden_RD, self.model.lm_head.weight, part.ids_R, self.temperature)
        loss, _ = ppo.policy_loss(
            logprobs_R,
            part.old_R,
            part.behaviour_R,
            part.advantages_R,
            clip_eps=self.clip_eps,
            denominator=tokens,
        )
        return loss
