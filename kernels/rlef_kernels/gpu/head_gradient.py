"""The gradient of a chunk's logits, in place.

Bytes: 2 T V read and written, in bf16.

Shape suffixes: T tokens, V vocabulary shard; 5: the numbers that the kernel reads of a row;
of a tile, R rows and C columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.plan import ROW_KERNEL_ELEMENTS


@triton.jit(do_not_specialize=["num_tokens"])
def logits_gradient_kernel(
    logits_ptr,
    row_stride,
    tile_max_ptr,
    target_ptr,
    rows_ptr,
    num_tokens,
    columns,
    inverse_temperature,
    R: tl.constexpr,
    C: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Replace the logits of one tile, each stored minus the tile's maximum, by their gradient
    dz = (g [target] - p (g + h (log p + H))) / temperature, log p = (z - max) - log sum.

    The rows' g and h are divided by the temperature rather than each gradient, which is less work.
    """
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_C = tl.program_id(1) * C + tl.arange(0, C)
    inside_R = row_R < num_tokens
    inside_RC = inside_R[:, None] & (column_C < columns)[None, :]
    logits_RC_ptr = logits_ptr + row_R.to(tl.int64)[:, None] * row_stride + column_C[None, :]
    logits_RC = tl.load(logits_RC_ptr, mask=inside_RC, other=0.0).to(tl.float32)
    tile_max_R = tile_max_ptr + tl.cast(tl.program_id(1), tl.int64) * num_tokens + row_R
    offset_R = tl.load(tile_max_R, mask=inside_R, other=0.0)
    at_R = rows_ptr + row_R
    max_R = tl.load(at_R, mask=inside_R, other=0.0)
    log_sum_R = tl.load(at_R + num_tokens, mask=inside_R, other=0.0)
    g_R = tl.load(at_R + 2 * num_tokens, mask=inside_R, other=0.0) * inverse_temperature
    target_R = tl.load(target_ptr + row_R, mask=inside_R, other=-1).to(tl.int32)
    shifted_RC = logits_RC * inverse_temperature + (offset_R - max_R)[:, None]
    logprob_RC = shifted_RC - log_sum_R[:, None]
    slope_RC = g_R[:, None]
    if HAS_ENTROPY:
        h_R = tl.load(at_R + 3 * num_tokens, mask=inside_R, other=0.0) * inverse_temperature
        entropy_R = tl.load(at_R + 4 * num_tokens, mask=inside_R, other=0.0)
        slope_RC = (g_R + h_R * entropy_R)[:, None] + h_R[:, None] * logprob_RC
    at_target_RC = tl.where(target_R[:, None] == column_C[None, :], g_R[:, None], 0.0)
    gradient_RC = at_target_RC - tl.exp(logprob_RC) * slope_RC
    tl.store(logits_RC_ptr, gradient_RC.to(logits_ptr.dtype.element_ty), mask=inside_RC)


def write_gradient_(
    logits_TV: torch.Tensor,
    tile_max: torch.Tensor,
    column_T: torch.Tensor,
    statistics: Sequence[torch.Tensor],
    grad_logprob_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
    inverse_temperature: float,
    *,
    tile_columns: int,
) -> None:
    """Replace logits by their gradient. Each is stored minus its tile's maximum; `tile_max`
    [tiles, T] has these maxima divided by the temperature. `statistics`: max, sum of exp and
    entropy of each whole row."""
    num_tokens, columns = logits_TV.shape
    if not num_tokens:
        return
    row_max_T, sum_exp_T, entropy_T = statistics
    zeros_T = torch.zeros_like(row_max_T)
    g_T = zeros_T if grad_logprob_T is None else grad_logprob_T
    h_T = zeros_T if grad_entropy_T is None else grad_entropy_T
    rows_5T = torch.stack([row_max_T, sum_exp_T.log(), g_T, h_T, entropy_T])  # as the kernel reads
    rows = max(1, ROW_KERNEL_ELEMENTS // tile_columns)
    logits_gradient_kernel[(triton.cdiv(num_tokens, rows), triton.cdiv(columns, tile_columns))](
        logits_TV,
        logits_TV.stride(0),
        tile_max,
        column_T,
        rows_5T,
        num_tokens,
        columns,
        inverse_temperature,
        R=rows,
        C=tile_columns,
        HAS_ENTROPY=grad_entropy_T is not None,
        **tiles.ROW_WISE,
    )
