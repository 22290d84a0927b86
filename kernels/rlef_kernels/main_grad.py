"""Megatron's gradient buffers: fp32 `main_grad` beside a bf16 parameter."""

import torch


def check_main_grad(weight_VD: torch.Tensor) -> None:
    """Raise ValueError if the weight has no fp32 `main_grad`."""
    dtype = getattr(getattr(weight_VD, "main_grad", None), "dtype", None)
    if dtype != torch.float32:
        raise ValueError(
            f"weight.main_grad is {dtype}, but accumulate_main_grad needs torch.float32, which "
            "Megatron's DDP allocates with grad_reduce_in_fp32"
        )


def weight_gradient_sum(
    weight_VD: torch.Tensor, dtype: torch.dtype, *, needed: bool, into_main_grad: bool
) -> torch.Tensor | None:
    """Return the tensor that sums the weight's gradient over chunks: Megatron's main_grad, or zeros
    of `dtype`; None if no gradient is needed."""
    if into_main_grad:
        return weight_VD.main_grad  # type: ignore[attr-defined]  # Megatron's DDP
    return torch.zeros_like(weight_VD, dtype=dtype) if needed else None


def placeholder_gradient(weight_VD: torch.Tensor) -> torch.Tensor | None:
    """Mark main_grad as already containing the gradient, and return a placeholder for autograd.

    Megatron's data-parallel hook asserts that `.grad` is not None. With this flag set it does not
    add `.grad` to main_grad, except for a tied embedding, whose own gradient autograd adds to the
    placeholder: hence zeros. Returns None for a weight that is not Megatron's.
    """
    if not hasattr(weight_VD, "grad_added_to_main_grad"):
        return None
    weight_VD.grad_added_to_main_grad = True
    return torch.zeros_like(weight_VD)


def check_upstream_is_one(grad_loss: torch.Tensor) -> None:
    """Raise ValueError if the upstream gradient is not 1. The forward pass assumed 1 when it added
    the gradient to main_grad. On a GPU the assertion is asynchronous."""
    if grad_loss.device.type == "cpu" and grad_loss != 1:
        raise ValueError(
            f"the loss has the upstream gradient {float(grad_loss)}, but main_grad already holds "
            "the weight's gradient for an upstream gradient of 1; to scale the loss, pass another "
            "denominator, or use linear_logprob"
        )
    torch._assert_async(grad_loss == 1)
