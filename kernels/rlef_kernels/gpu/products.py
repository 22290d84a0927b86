"""cuBLAS: products of bf16 matrices with fp32 results, and a head's backward pass made of them.

Two products read each block of gradients of logits, [T, columns]:

    dhidden += dz weight        dweight[columns] = dz^T hidden

Both accumulate in fp32, in a fixed order, without atomics. The blocks are of columns, not of
tokens, so that each entry of the weight's gradient (fp32, in Megatron's main_grad) is read and
written once.

FLOPs: 2 P, P = 2 T V D. Bytes: 4 T V for dz, 8 V D for main_grad, 8 T D per block for dhidden. fp32
matrices are multiplied with TF32 if `torch.backends.cuda.matmul.allow_tf32` is set.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C columns of a block.
"""

import functools
from collections.abc import Callable

import torch
import triton
from torch.distributed import ProcessGroup

from rlef_kernels.gpu.plan import HeadPlan
from rlef_kernels.vocab_parallel import sum_over_shards_

# Writes the gradient of the logits of these rows and columns.
WriteGradient = Callable[[slice, slice, torch.Tensor], None]


def write_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Write left @ right to `out`, which is fp32 or of the factors' dtype."""
    if out.device.type == "cpu":
        # For the interpreter's tests: rounds once, as cuBLAS does. (PyTorch 2.13's bf16 product on
        # CPUs keeps NaN that `out` contained before.)
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


def block_shape(num_tokens: int, vocabulary: int, itemsize: int, plan: HeadPlan) -> tuple[int, int]:
    """Return (tokens, columns) of a block of gradients: whole tiles, in `plan.gradient_bytes`."""
    tokens = max(1, min(num_tokens, plan.gradient_tokens))
    tile = plan.tile_columns
    columns = max(1, plan.gradient_bytes // (itemsize * tokens * tile)) * tile
    return tokens, min(columns, triton.cdiv(vocabulary, tile) * tile)


def multiply_blocks(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    write_gradient: WriteGradient,
    plan: HeadPlan,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    main_grad_VD: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of hidden and weight from blocks that `write_gradient` fills.

    Returns dhidden, summed over the group, and dweight; each is None if it is not needed. With
    `main_grad_VD` (fp32), dweight is added to it, and None is returned in its place.
    """
    (num_tokens, width), vocabulary = hidden_TD.shape, weight_VD.shape[0]
    tokens, columns = block_shape(num_tokens, vocabulary, hidden_TD.element_size(), plan)
    block = hidden_TD.new_empty(tokens, columns)
    grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
    in_parts = num_tokens > tokens  # then dweight is a sum, which needs fp32
    weight_sum_VD = main_grad_VD
    if needs_weight and main_grad_VD is None:
        weight_sum_VD = torch.empty_like(weight_VD)
        if in_parts:
            weight_sum_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    for start in range(0, max(1, num_tokens), tokens):
        rows = slice(start, min(start + tokens, num_tokens))
        hidden_part_TD = hidden_TD[rows]
        hidden_sum_TD = hidden_TD.new_empty(len(hidden_part_TD), width, dtype=torch.float32)
        for first in range(0, vocabulary, columns):
            part = slice(first, min(first + columns, vocabulary))
            gradient_TC = block[: len(hidden_part_TD), : part.stop - part.start]
            write_gradient(rows, part, gradient_TC)
            if needs_hidden:
                add = add_product_ if first else write_product_
                add(hidden_sum_TD, gradient_TC, weight_VD[part])
            if weight_sum_VD is not None:
                add = add_product_ if in_parts or main_grad_VD is not None else write_product_
                add(weight_sum_VD[part], gradient_TC.t(), hidden_part_TD)
        if grad_hidden_TD is not None:
            grad_hidden_TD[rows] = sum_over_shards_(hidden_sum_TD, group)
    if main_grad_VD is not None or weight_sum_VD is None:
        return grad_hidden_TD, None
    return grad_hidden_TD, weight_sum_VD.to(weight_VD.dtype)
