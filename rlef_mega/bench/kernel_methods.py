"""The ways of getting from hidden states to a loss that `rlef bench kernels` compares: ours, and
what others publish, each called through its own interface.

A method that cannot run here (no GPU, not installed) says why; the report repeats it.

Shape suffixes: T tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from rlef_kernels import linear_logprob_reference, linear_ppo_loss_reference

CHUNK_TOKENS = 1024  # of the chunked PyTorch baseline
IGNORED = -100  # the target of a masked token, for those who know that convention


class UnavailableError(Exception):
    """Why a method cannot run here."""


@dataclass(frozen=True)
class Problem:
    """Hidden states, head, targets; `mask_T` chooses the tokens that count, or is None."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    target_T: torch.Tensor
    mask_T: torch.Tensor | None
    weights_T: torch.Tensor  # upstream gradients: of the log-probs, and with flipped tokens of H
    policy_T: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # old, behaviour, advantages

    def kept(self) -> "Problem":
        """Without the masked tokens."""
        if self.mask_T is None:
            return self
        rows_R = self.mask_T.nonzero()[:, 0]
        return Problem(
            self.hidden_TD[rows_R],
            self.weight_VD,
            self.target_T[rows_R],
            None,
            self.weights_T[rows_R],
            tuple(tensor_T[rows_R] for tensor_T in self.policy_T),  # type: ignore[arg-type]
        )

    def targets_with_ignored(self) -> torch.Tensor:
        if self.mask_T is None:
            return self.target_T
        return self.target_T.masked_fill(~self.mask_T, IGNORED)


@dataclass(frozen=True)
class Method:
    """`prepare` imports what is needed, or raises UnavailableError, and returns problem -> loss.

    `products`: matrix products of 2 T V D FLOPs that the definition needs, forward and in all; None
    where there is no backward pass.
    """

    name: str
    prepare: Callable[[torch.device], Callable[[Problem], torch.Tensor]]
    products: tuple[int, int | None]
    masks: bool = True  # whether masked tokens can be told to it


def both(problem: Problem, logprob_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
    """A loss with an arbitrary upstream gradient for each token of both outputs."""
    weights_T = problem.weights_T
    return (logprob_T * weights_T).sum() + (entropy_T * weights_T.flip(0)).sum()


def ours(way: str, *, into_main_grad: bool):
    def prepare(device: torch.device):
        compute: Callable[..., tuple[torch.Tensor, ...]] = linear_logprob_reference
        options = {}
        if way != "PyTorch":
            from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels

            compute, options = linear_logprob_kernels, {"plan": plan(way, device)}

        def run(problem: Problem) -> torch.Tensor:
            kept = problem.kept()
            logprob_T, entropy_T = compute(
                kept.hidden_TD,
                kept.weight_VD,
                kept.target_T,
                accumulate_main_grad=into_main_grad and torch.is_grad_enabled(),
                **options,
            )
            return both(kept, logprob_T, entropy_T)

        return run

    return prepare


def ours_in_head(way: str):
    def prepare(device: torch.device):
        compute: Callable[..., torch.Tensor] = linear_ppo_loss_reference
        options = {}
        if way != "PyTorch":
            from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels

            compute, options = linear_ppo_loss_kernels, {"plan": plan(way, device)}

        def run(problem: Problem) -> torch.Tensor:
            kept = problem.kept()
            return compute(
                kept.hidden_TD,
                kept.weight_VD,
                kept.target_T,
                kept.policy_T,
                clip_eps=0.2,
                accumulate_main_grad=torch.is_grad_enabled(),
                **options,
            )[0]

        return run

    return prepare


def plan(way: str, device: torch.device):
    need_gpu(device)
    from rlef_kernels.gpu.plan import CUBLAS, FUSED

    if way == "fused" and torch.cuda.get_device_capability(device) < (9, 0):
        raise UnavailableError("needs compute capability 9.0")
    return {"fused": FUSED, "cublas": CUBLAS}[way]


def stored_logits(device: torch.device):
    """What one writes first: all logits, in the inputs' type, then fp32."""

    def run(problem: Problem) -> torch.Tensor:
        kept = problem.kept()
        logprob_T, entropy_T = logprob_and_entropy(kept.hidden_TD, kept.weight_VD, kept.target_T)
        return both(kept, logprob_T, entropy_T)

    return run


def logprob_and_entropy(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_CV = torch.log_softmax((hidden_CD @ weight_VD.t()).float(), dim=-1)
    entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return logprobs_CV.gather(1, target_C[:, None])[:, 0], entropy_C


def compiled_chunks(device: torch.device):
    """The same by chunks of tokens, computed again in the backward pass; on a GPU through
    torch.compile.
    """
    function = logprob_and_entropy
    if device.type == "cuda":
        function = torch.compile(logprob_and_entropy)

    def run(problem: Problem) -> torch.Tensor:
        kept = problem.kept()
        parts = [
            checkpoint(function, hidden_CD, kept.weight_VD, target_C, use_reentrant=False)
            for hidden_CD, target_C in zip(
                kept.hidden_TD.split(CHUNK_TOKENS), kept.target_T.split(CHUNK_TOKENS), strict=True
            )
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return both(kept, torch.cat(logprobs), torch.cat(entropies))

    return run


def product_alone(device: torch.device):
    """The logits, and nothing done with them."""
    return lambda problem: problem.hidden_TD @ problem.weight_VD.t()


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise UnavailableError("needs a GPU")


def liger_cross_entropy(device: torch.device):
    """The mean log-prob: upstream gradients are fixed, so that it makes its gradients forward."""
    name = "liger_kernel.transformers.functional"
    compute = imported(name).liger_fused_linear_cross_entropy
    need_gpu(device)
    return lambda problem: compute(
        problem.hidden_TD, problem.weight_VD, problem.targets_with_ignored(), ignore_index=IGNORED
    )


def liger_scaled_cross_entropy(device: torch.device):
    """Log-prob and entropy of each token, on a tensor-parallel group of one."""
    name = "liger_kernel.transformers.functional"
    compute = imported(name).liger_fused_linear_scaled_cross_entropy_tp
    need_gpu(device)
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)

    def run(problem: Problem) -> torch.Tensor:
        nll_T, entropy_T = compute(
            problem.hidden_TD,
            problem.weight_VD,
            problem.targets_with_ignored(),
            dist.group.WORLD,
            ignore_index=IGNORED,
            return_entropy=True,
        )
        return both(problem, -nll_T.float(), entropy_T.float())

    return run


def cut_cross_entropy(filter_eps: str | None):
    """Log-prob of each token, no entropy; `filter_eps` leaves small gradients out."""

    def prepare(device: torch.device):
        compute = imported("cut_cross_entropy").linear_cross_entropy
        need_gpu(device)

        def run(problem: Problem) -> torch.Tensor:
            nll_T = compute(
                problem.hidden_TD,
                problem.weight_VD,
                problem.targets_with_ignored(),
                ignore_index=IGNORED,
                reduction="none",
                filter_eps=filter_eps,
            )
            return -(nll_T.float() * problem.weights_T).sum()

        return run

    return prepare


def verl_cross_entropy(device: torch.device):
    """Log-prob and entropy of each token; knows no masks."""
    import_without_parents("verl", "verl.utils")
    compute = imported("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    need_gpu(device)

    def run(problem: Problem) -> torch.Tensor:
        outputs = compute(problem.hidden_TD, problem.weight_VD, problem.target_T, 1.0, "none")
        return both(problem, *outputs)

    return run


def imported(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    # a package may fail to import in any way that its authors did not foresee
    except Exception as error:
        raise UnavailableError(f"cannot import {name}: {error}") from error


def import_without_parents(*packages: str) -> None:
    """Make these packages importable from without running their own `__init__`, which needs Ray,
    vLLM and more: the kernels inside need none of it.
    """
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


METHODS = (
    Method("product alone (cuBLAS)", product_alone, (1, None), masks=False),
    Method("rlef in PyTorch", ours("PyTorch", into_main_grad=True), (1, 4)),
    Method("rlef loss in head, in PyTorch", ours_in_head("PyTorch"), (1, 3)),
    Method("rlef fused", ours("fused", into_main_grad=True), (1, 4)),
    Method("rlef cuBLAS", ours("cublas", into_main_grad=True), (1, 4)),
    Method("rlef loss in head, fused", ours_in_head("fused"), (1, 3)),
    Method("rlef loss in head, cuBLAS", ours_in_head("cublas"), (1, 3)),
    Method("rlef fused, gradient returned", ours("fused", into_main_grad=False), (1, 4)),
    Method("verl linear cross entropy", verl_cross_entropy, (1, 4), masks=False),
    Method("Liger scaled cross entropy", liger_scaled_cross_entropy, (1, 4)),
    Method("Liger linear cross entropy (mean only)", liger_cross_entropy, (1, 3)),
    Method("cut-cross-entropy, exact (no entropy)", cut_cross_entropy(None), (1, 4)),
    Method("cut-cross-entropy, filtered (no entropy)", cut_cross_entropy("high"), (1, 4)),
    Method("PyTorch, chunks of tokens", compiled_chunks, (1, 4)),
    Method("PyTorch, logits stored", stored_logits, (1, 3)),
)
