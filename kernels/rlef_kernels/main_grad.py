"""Megatron's gradient buffers: fp32 `main_grad` beside a bf16 parameter."""

import torch


def check_main_grad(weight_VD: torch.Tensor) -> None:
    dtype = getattr(getattr(weight_VD, "main_grad", None), "dtype", None)
    if dtype != torch.float32:
        raise ValueError(
            "accumulate_main_grad needs an fp32 weight.main_grad, which Megatron's DDP makes with "
            f"grad_reduce_in_fp32; found {dtype}"
        )


def weight_gradient_sum(
    weight_VD: torch.Tensor, dtype: torch.dtype, *, needed: bool, into_main_grad: bool
) -> torch.Tensor | None:
    """What the chunks' gradients of the weight are added to."""
    if into_main_grad:
        return weight_VD.main_grad  # type: ignore[attr-defined]  # Megatron's DDP
    return torch.zeros_like(weight_VD, dtype=dtype) if needed else None


def stand_in_gradient(weight_VD: torch.Tensor) -> torch.Tensor | None:
    """Tells Megatron's data-parallel hook that main_grad already holds the gradient.

    The hook asserts that `.grad` is not None and, with this flag set, drops it unread; with tied
    embeddings it adds what the embedding left there. Hence zeros.
    """
    if not hasattr(weight_VD, "grad_added_to_main_grad"):
        return None
    weight_VD.grad_added_to_main_grad = True
    return torch.zeros_like(weight_VD)


def check_upstream_is_one(grad_loss: torch.Tensor) -> None:
    """The forward pass has already added the weight's gradient, for an upstream gradient of 1."""
    if grad_loss.device.type == "cpu" and grad_loss != 1:
        raise ValueError(
            f"the loss has the upstream gradient {float(grad_loss)}, but main_grad already holds "
            "its gradient for 1; scale by the denominator instead, or use linear_logprob"
        )
    torch._assert_async(grad_loss == 1)  # on a GPU: without waiting for it
