"""RLEF's clipped policy loss from hidden states, with its gradients, in three matrix products.

    z = hidden weight^T / temperature        logprob_t = log softmax(z_t)[target_t]
    L = the loss of `rlef_kernels.ppo_policy_loss` for these log-probs             (RLEF A.1)
    dz_tj = dL/dlogprob_t ([j = target_t] - p_tj)

Because dL/dlogprob_t depends on row t alone, the gradient of a row's logits can be written as soon
as the row's sum of exponentials is known, while its logits are still in memory. So the forward pass
computes the gradients, chunk by chunk of rows, and the backward pass only scales them by its
upstream gradient. FLOPs: three products of 2 T V D each, all in the forward pass; one without
gradients. Bytes that must move: a chunk's hidden states are read and their gradient written once;
per chunk, the weight is read twice (for logits and dhidden), and its gradient updated once.

Vocab-parallel: a chunk's rows need the sums of every rank before the gradient, so there is one
small all-gather ([C, 4]) per chunk, and dhidden is summed over the group.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

from functools import partial
from typing import Any

import torch
from torch.distributed import ProcessGroup

from rlef_kernels.dispatch import chunk_maker
from rlef_kernels.logits import LogitsChunk, MakeChunk
from rlef_kernels.main_grad import check_main_grad
from rlef_kernels.ppo_policy_loss import METRICS, LinearPpoLoss, PolicyInputs, policy_loss
from rlef_kernels.rows import check_mask
from rlef_kernels.vocab_parallel import check_head, check_targets, check_temperature, group_size


def compute_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    policy_T: PolicyInputs,
    make_chunk: MakeChunk,
    *,
    clip_eps: float,
    denominator: float | torch.Tensor | None = None,
    accumulate_main_grad: bool = False,
) -> torch.Tensor:
    """Compute METRICS, as a vector, with chunks of logits that `make_chunk` makes."""
    denominator = max(1, hidden_TD.shape[0]) if denominator is None else denominator
    loss = partial(policy_loss, clip_eps=clip_eps, denominator=denominator)
    inputs = (hidden_TD, weight_VD, target_T, policy_T, make_chunk, loss)
    return LinearPpoLoss.apply(*inputs, accumulate_main_grad, torch.is_grad_enabled())


def linear_ppo_loss_reference(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    policy_T: PolicyInputs,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Compute `linear_ppo_loss` in plain PyTorch, on any device, with the options of
    `compute_loss`; returns METRICS as a vector."""
    make_chunk = partial(
        LogitsChunk, temperature=temperature, group=group, chunk_tokens=chunk_tokens
    )
    return compute_loss(hidden_TD, weight_VD, target_T, policy_T, make_chunk, **options)


def linear_ppo_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behaviour_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_eps: float,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    mask_T: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the clipped policy loss of the target tokens' log-probs.

    Masks, `group` and temperature are as in `linear_logprob`. `denominator` is a count over the
    whole update, so that losses and metrics add up over micro-batches and ranks; by default it is
    the number of tokens in `mask_T`, or of all tokens without a mask.

    Returns (loss, metrics), fp32; the loss is differentiable with respect to hidden and weight.
    With `accumulate_main_grad` the weight's gradient is added to `weight.main_grad` in the
    *forward* pass, if gradients are enabled; `loss.backward()` must follow, with an upstream
    gradient of 1.

    Raises ValueError as `linear_logprob` does, and for clip_eps <= 0; with
    `accumulate_main_grad`, `backward` raises it if the upstream gradient is not 1 (on a GPU, a
    device-side assertion fails).
    """
    check_head(hidden_TD, weight_VD)
    check_temperature(temperature)
    policy = {
        "old_logprobs_T": old_logprobs_T,
        "behaviour_logprobs_T": behaviour_logprobs_T,
        "advantages_T": advantages_T,
    }
    for name, tensor_T in policy.items():
        if tensor_T.shape != target_T.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor_T.shape)}, target_T {tuple(target_T.shape)}: "
                "give one number per target"
            )
    if not clip_eps > 0:
        raise ValueError(f"clip_eps is {clip_eps}, must be above 0 (RLEF: 0.2)")
    if accumulate_main_grad:
        check_main_grad(weight_VD)
    tensors = [hidden_TD, target_T, *(tensor.detach() for tensor in policy.values())]
    if mask_T is not None:
        check_mask(mask_T, hidden_TD.shape[0])
        rows_R = mask_T.nonzero()[:, 0]
        tensors = [tensor[rows_R] for tensor in tensors]
    hidden_TD, target_T, old_T, behaviour_T, advantages_T = tensors
    check_targets(target_T, hidden_TD.shape[0], weight_VD.shape[0] * group_size(group))
    values = compute_loss(
        hidden_TD,
        weight_VD,
        target_T,
        (old_T, behaviour_T, advantages_T),
        chunk_maker(hidden_TD, weight_VD, temperature=temperature, group=group),
        clip_eps=clip_eps,
        denominator=denominator,
        accumulate_main_grad=accumulate_main_grad,
    )
    # cloned: Megatron's pipeline frees the loss's memory, and refuses views
    return values[0].clone(), dict(zip(METRICS, values.detach().unbind(), strict=True))
