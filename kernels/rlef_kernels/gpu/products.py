"""cuBLAS: products of bf16 matrices with fp32 results, which PyTorch has on GPUs only.

fp32 matrices are multiplied as PyTorch is set to (`torch.backends.cuda.matmul.allow_tf32`).
"""

import functools

import torch


def write_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out = left right, fp32 or in the type of the factors."""
    if out.device.type == "cpu":
        # The interpreter's tests; rounded once, as cuBLAS does. And PyTorch 2.13's bf16 product on
        # CPUs, given `out`, lets NaN that stood there through.
        out.copy_(left.float() @ right.float())
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out += left right, in fp32; not rounded in between."""
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
    """Whether this PyTorch's addmm takes bf16 factors and an fp32 summand. Its first versions with
    `out_dtype` refuse the latter.
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
