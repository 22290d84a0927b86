"""cuBLAS: products of bf16 matrices with fp32 or bf16 results, without atomics.

fp32 matrices are multiplied with TF32 if `torch.backends.cuda.matmul.allow_tf32` is set.
"""

import functools

import torch


def write_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Write left @ right to `out`, which is fp32 or of the factors' dtype."""
    if out.device.type == "cpu":
        # For tests in Triton's interpreter: rounds once, as cuBLAS does. (PyTorch 2.13's bf16
        # product on CPUs keeps NaN that `out` contained before.)
        out.copy_(left.float() @ right.float())
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to `out`, accumulating in fp32 and rounding at most once."""
    if out.device.type == "cpu":
        out += left.float() @ right.float()
    elif out.dtype == left.dtype:
        out.addmm_(left, right)
    elif adds_to_fp32(out.device):
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        rows = max(1, 2**23 // out.shape[1])  # 32 MiB at a time
        for first in range(0, out.shape[0], rows):
            part = slice(first, first + rows)
            out[part] += torch.mm(left[part], right, out_dtype=out.dtype)


@functools.cache
def adds_to_fp32(device: torch.device) -> bool:
    """Return whether this PyTorch's addmm takes bf16 factors and an fp32 summand.

    The first versions with `out_dtype` refuse the latter.
    """
    if device.type != "cuda":
        return True
    factor = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    summand = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(summand, factor, factor, out_dtype=torch.float32, out=summand)
    except RuntimeError:
        return False
    return True
