"""The implementations of the head and its loss that `rlef bench kernels` compares: ours and
published ones, each called through its own interface.

Shape suffixes: T tokens, R tokens that count, D hidden size, V vocabulary, C tokens of a chunk.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import rlef_kernels

CHUNK_TOKENS = 1024  # of the chunked PyTorch baseline
IGNORED = -100  # the target of a masked token, by the convention of the peers


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states, head and targets; `mask_T` selects the tokens that count, None all."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    target_T: torch.Tensor
    mask_T: torch.Tensor | None
    weights_T: torch.Tensor  # upstream gradients of log-probs and, reversed, of entropies
    policy_T: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # old, behaviour, advantages

    def unmasked(self) -> "HeadInputs":
        """Return the inputs without the masked tokens."""
        if self.mask_T is None:
            return self
        rows_R = self.mask_T.nonzero()[:, 0]
        old_T, behaviour_T, advantages_T = self.policy_T
        return HeadInputs(
            self.hidden_TD[rows_R],
            self.weight_VD,
            self.target_T[rows_R],
            None,
            self.weights_T[rows_R],
            (old_T[rows_R], behaviour_T[rows_R], advantages_T[rows_R]),
        )

    def with_ignored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden states, head and targets, with masked targets marked as peers expect."""
        target_T = self.target_T
        if self.mask_T is not None:
            target_T = target_T.masked_fill(~self.mask_T, IGNORED)
        return self.hidden_TD, self.weight_VD, target_T

    def forget_gradients(self) -> None:
        self.hidden_TD.grad = self.weight_VD.grad = None


@dataclass(frozen=True)
class Method:
    """One implementation of the loss, ours or a peer's, and its requirements.

    `products` counts the matrix products of 2 T V D FLOPs each: those of the forward pass, and of
    forward and backward together (None without a backward pass).
    """

    name: str
    loss: Callable[[HeadInputs], torch.Tensor]
    products: tuple[int, int | None]
    masks: bool = True  # whether it can skip masked tokens
    capability: tuple[int, int] | None = None  # the least that it needs; None: no GPU
    module: str = ""  # the peer's, to import

    def unavailable(self, device: torch.device) -> str:
        """Return the reason why the method cannot run on this device, "" if it can."""
        if self.module:
            import_without_parents("verl", "verl.utils")
            try:
                importlib.import_module(self.module)
            except Exception as error:  # importing a package may raise anything
                return f"cannot import {self.module}: {error}"
        if self.capability is None:
            return ""
        if device.type != "cuda":
            return "needs a GPU"
        if torch.cuda.get_device_capability(device) < self.capability:
            return f"needs compute capability {self.capability[0]}.{self.capability[1]}"
        return ""


def both(inputs: HeadInputs, logprob_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
    """Return a loss with an arbitrary upstream gradient for each token of both outputs."""
    weights_T = inputs.weights_T
    return (logprob_T * weights_T).sum() + (entropy_T * weights_T.flip(0)).sum()


# ------------------------------------------------------------------------------------------ ours


def with_plan(operation: str, plan: str) -> Callable[..., Any]:
    """Return an operation's GPU kernels with the named plan; without a plan, its reference."""
    if not plan:
        return getattr(rlef_kernels, f"{operation}_reference")
    kernels = importlib.import_module(f"rlef_kernels.gpu.{operation}")
    plans = importlib.import_module("rlef_kernels.gpu.plan")
    return partial(getattr(kernels, f"{operation}_kernels"), plan=getattr(plans, plan))


def ours(inputs: HeadInputs, plan: str = "") -> torch.Tensor:
    """Return the loss of our log-prob and entropy."""
    chosen = inputs.unmasked()
    outputs = with_plan("linear_logprob", plan)(
        chosen.hidden_TD,
        chosen.weight_VD,
        chosen.target_T,
        accumulate_main_grad=torch.is_grad_enabled(),
    )
    return both(chosen, *outputs)


def ours_in_head(inputs: HeadInputs, plan: str = "") -> torch.Tensor:
    """Return our policy loss, computed in the head."""
    chosen = inputs.unmasked()
    loss, *_ = with_plan("linear_ppo_loss", plan)(
        chosen.hidden_TD,
        chosen.weight_VD,
        chosen.target_T,
        chosen.policy_T,
        clip_eps=0.2,
        accumulate_main_grad=torch.is_grad_enabled(),
    )
    return loss


def score(inputs: HeadInputs, plan: str = "") -> torch.Tensor:
    """Return the sum of our scores, where the reference has the policy's head and another token's
    hidden state."""
    chosen = inputs.unmasked()
    hidden_TD, weight_VD = chosen.hidden_TD, chosen.weight_VD
    compute = with_plan("linear_score", plan)
    outputs = compute(hidden_TD, weight_VD, hidden_TD.flip(0), weight_VD, chosen.target_T)
    return torch.stack(outputs).sum()


# --------------------------------------------------------------------------------- plain PyTorch


def product_alone(inputs: HeadInputs) -> torch.Tensor:
    """Compute the logits only."""
    return inputs.hidden_TD @ inputs.weight_VD.t()


def stored_logits(inputs: HeadInputs) -> torch.Tensor:
    """Store all logits, in the inputs' dtype and then in fp32: the obvious implementation."""
    chosen = inputs.unmasked()
    return both(chosen, *logprob_and_entropy(chosen.hidden_TD, chosen.weight_VD, chosen.target_T))


def logprob_and_entropy(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_CV = torch.log_softmax((hidden_CD @ weight_VD.t()).float(), dim=-1)
    entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return logprobs_CV.gather(1, target_C[:, None])[:, 0], entropy_C


compiled = cache(torch.compile)


def chunked_logits(inputs: HeadInputs) -> torch.Tensor:
    """Compute logits by chunks of tokens, twice (for backward); on a GPU with torch.compile."""
    chosen = inputs.unmasked()
    on_gpu = chosen.hidden_TD.is_cuda
    function = compiled(logprob_and_entropy) if on_gpu else logprob_and_entropy
    chunks = zip(
        chosen.hidden_TD.split(CHUNK_TOKENS), chosen.target_T.split(CHUNK_TOKENS), strict=True
    )
    parts = [
        checkpoint(function, hidden_CD, chosen.weight_VD, target_C, use_reentrant=False)
        for hidden_CD, target_C in chunks
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return both(chosen, torch.cat(logprobs), torch.cat(entropies))


# ----------------------------------------------------------------------------------------- peers


def liger_scaled_cross_entropy(inputs: HeadInputs) -> torch.Tensor:
    """Compute log-prob and entropy of each token with Liger's CuTe kernels for Hopper."""
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as liger

    compute = liger.LigerFusedScaledCrossEntropySM90Function.apply
    nll_T, entropy_T = compute(*inputs.with_ignored(), 1.0, IGNORED, 1, True)
    return both(inputs, -nll_T.float(), entropy_T.float())


def liger_tensor_parallel(inputs: HeadInputs) -> torch.Tensor:
    """Compute log-prob and entropy of each token with Liger, on a tensor-parallel group of one: in
    native kernels with liger-cute-kernels, else in chunks of 512 tokens in PyTorch."""
    from liger_kernel.transformers import functional

    if not dist.is_initialized():
        device, store = inputs.hidden_TD.device, dist.HashStore()
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    nll_T, entropy_T = functional.liger_fused_linear_scaled_cross_entropy_tp(
        *inputs.with_ignored(), dist.group.WORLD, ignore_index=IGNORED, return_entropy=True
    )
    return both(inputs, -nll_T.float(), entropy_T.float())


def liger_loss(inputs: HeadInputs, *, in_cute: bool) -> torch.Tensor:
    """Sum Liger's cross entropy over tokens, with the gradients in the forward pass; no entropy and
    no weights of tokens."""
    if in_cute:
        from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as liger

        compute = liger.liger_fused_linear_cross_entropy_sm90
        return compute(*inputs.with_ignored(), IGNORED, "sum")
    from liger_kernel.transformers import functional

    return functional.liger_fused_linear_cross_entropy(
        *inputs.with_ignored(), ignore_index=IGNORED, reduction="sum"
    )


def cut_cross_entropy(inputs: HeadInputs, filter_eps: str | None) -> torch.Tensor:
    """Compute log-probs, without entropy; `filter_eps` skips small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    nll_T = linear_cross_entropy(
        *inputs.with_ignored(), ignore_index=IGNORED, reduction="none", filter_eps=filter_eps
    )
    return -(nll_T.float() * inputs.weights_T).sum()


def verl_cross_entropy(inputs: HeadInputs) -> torch.Tensor:
    """Compute log-prob and entropy with verl, which supports no mask."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    outputs = linear_cross_entropy(inputs.hidden_TD, inputs.weight_VD, inputs.target_T, 1.0, "none")
    return both(inputs, *outputs)


def import_without_parents(*packages: str) -> None:
    """Make modules inside these packages importable without running the packages' `__init__`:
    verl's needs Ray and vLLM, its kernels do not."""
    spec = importlib.util.find_spec(packages[0]) if packages[0] not in sys.modules else None
    if spec is None or spec.submodule_search_locations is None:
        return
    root = Path(spec.submodule_search_locations[0]).parent
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


ANY_GPU, HOPPER = (0, 0), (9, 0)
VERL, CUT = "verl.utils.kernel.linear_cross_entropy", "cut_cross_entropy"
LIGER = "liger_kernel.transformers.functional"
LIGER_CUTE = "liger_kernel.ops.cutedsl.ops"
exact, filtered = (partial(cut_cross_entropy, filter_eps=eps) for eps in (None, "high"))
cute_loss, triton_loss = (partial(liger_loss, in_cute=cute) for cute in (True, False))


def each_way(
    name: str, loss: Callable[..., torch.Tensor], products: tuple[int, int | None]
) -> list[Method]:
    """Return our loss in PyTorch and with each plan of the kernels."""
    fused, cublas = (partial(loss, plan=plan) for plan in ("FUSED", "CUBLAS"))
    return [
        Method(f"{name} in PyTorch", loss, products),
        Method(f"{name} fused", fused, products, True, HOPPER),
        Method(f"{name} cuBLAS", cublas, products, True, ANY_GPU),
    ]


METHODS = (
    Method("product alone (cuBLAS)", product_alone, (1, None), masks=False),
    *each_way("rlef", ours, (1, 4)),
    *each_way("rlef loss in head,", ours_in_head, (1, 3)),
    Method("verl linear cross entropy", verl_cross_entropy, (1, 4), False, ANY_GPU, VERL),
    Method("Liger, CuTe", liger_scaled_cross_entropy, (1, 4), True, HOPPER, LIGER_CUTE),
    Method("Liger, tensor parallel", liger_tensor_parallel, (1, 4), True, ANY_GPU, LIGER),
    Method("Liger loss in head, CuTe (no entropy)", cute_loss, (1, 3), True, HOPPER, LIGER_CUTE),
    Method("Liger loss in head (no entropy)", triton_loss, (1, 3), True, ANY_GPU, LIGER),
    Method("cut-cross-entropy, exact (no entropy)", exact, (1, 4), True, ANY_GPU, CUT),
    Method("cut-cross-entropy, filtered (no entropy)", filtered, (1, 4), True, ANY_GPU, CUT),
    Method("PyTorch, chunks of tokens", chunked_logits, (1, 4)),
    Method("PyTorch, logits stored", stored_logits, (1, 3)),
    *each_way("rlef scores and KL,", score, (2, None)),
)
