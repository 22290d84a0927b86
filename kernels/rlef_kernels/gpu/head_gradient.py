"""The gradient of the logits, one block at a time.

A block [T, columns] is written once, in the inputs' dtype, from logits that are recomputed or still
in memory. `products.multiply_blocks` computes the gradients of hidden and weight from it.

FLOPs: 2 T V D to recompute the logits. Bytes: 2 T V written.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C columns of a block; 5: the five
numbers of a row that `pack_rows` stacks; of a tile, R rows and C columns.
"""

import torch
import triton
import triton.language as tl

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.head import ROW_KERNEL_ELEMENTS
from rlef_kernels.gpu.plan import HeadPlan, scratch_columns
from rlef_kernels.gpu.products import write_product_
from rlef_kernels.gpu.tiles import descriptor, product_tile, tile_position


@triton.jit
def logit_gradient(
    logits_RC,
    offset_R,
    row_R,
    column_C,
    target_ptr,
    rows_ptr,
    num_tokens,
    inverse_temperature,
    HAS_ENTROPY: tl.constexpr,
):
    """Return dz = (g [target] - p (g + h (log p + H))) / temperature, log p = (z - max) - log sum.

    z is `logits` / temperature + `offset`. The rows' g and h are divided by the temperature rather
    than each gradient: less work, and ptxas spills registers otherwise.
    """
    inside_R = row_R < num_tokens
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
    return at_target_RC - tl.exp(logprob_RC) * slope_RC


@triton.jit(do_not_specialize=["num_tokens", "first_column"])
def product_gradient_kernel(
    hidden_TD,
    weight_CD,
    gradient_TC,
    target_ptr,
    rows_ptr,
    num_tokens,
    columns,
    first_column,
    width: tl.constexpr,
    inverse_temperature,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Recompute the logits of one tile, and store their gradient."""
    row_tiles, column_tiles = tl.cdiv(num_tokens, R), tl.cdiv(columns, C)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row, column = row_tile * R, column_tile * C
    logits_RC = product_tile(hidden_TD, weight_CD, row, column, width, R, C, D)
    gradient_RC = logit_gradient(
        logits_RC,
        tl.zeros((R,), tl.float32),
        row + tl.arange(0, R),
        first_column + column + tl.arange(0, C),
        target_ptr,
        rows_ptr,
        num_tokens,
        inverse_temperature,
        HAS_ENTROPY,
    )
    gradient_TC.store([row, column], gradient_RC.to(gradient_TC.dtype))


@triton.jit(do_not_specialize=["num_tokens", "first_column"])
def logits_gradient_kernel(
    logits_ptr,
    logits_stride,
    gradient_ptr,
    gradient_stride,
    tile_max_ptr,
    target_ptr,
    rows_ptr,
    num_tokens,
    columns,
    first_column,
    inverse_temperature,
    R: tl.constexpr,
    C: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ARE_SHIFTED: tl.constexpr,
):
    """Compute the gradient from logits in memory, in place if both pointers are equal.

    ARE_SHIFTED: each logit is stored minus its tile's maximum.
    """
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    within_C = tl.program_id(1) * C + tl.arange(0, C)
    inside_R = row_R < num_tokens
    inside_RC = inside_R[:, None] & (within_C < columns)[None, :]
    row64_R = row_R.to(tl.int64)
    at_RC = row64_R[:, None] * logits_stride + within_C[None, :]
    logits_RC = tl.load(logits_ptr + at_RC, mask=inside_RC, other=0.0).to(tl.float32)
    offset_R = tl.zeros((R,), tl.float32)
    if ARE_SHIFTED:
        tile_max_R = tile_max_ptr + tl.cast(tl.program_id(1), tl.int64) * num_tokens + row_R
        offset_R = tl.load(tile_max_R, mask=inside_R, other=0.0)
    gradient_RC = logit_gradient(
        logits_RC,
        offset_R,
        row_R,
        first_column + within_C,
        target_ptr,
        rows_ptr,
        num_tokens,
        inverse_temperature,
        HAS_ENTROPY,
    )
    at_RC = row64_R[:, None] * gradient_stride + within_C[None, :]
    gradient_RC = gradient_RC.to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + at_RC, gradient_RC, mask=inside_RC)


def pack_rows(
    row_max_T: torch.Tensor,
    log_sum_T: torch.Tensor,
    entropy_T: torch.Tensor,
    grad_logprob_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
) -> torch.Tensor:
    """Stack what `logit_gradient` reads of each row: max, log sum, g, h, entropy, as [5, T]."""
    zeros_T = torch.zeros_like(row_max_T)
    g_T = zeros_T if grad_logprob_T is None else grad_logprob_T
    h_T = zeros_T if grad_entropy_T is None else grad_entropy_T
    return torch.stack([row_max_T, log_sum_T, g_T, h_T, entropy_T])


def write_gradient_from_logits(
    logits_TC: torch.Tensor,
    gradient_TC: torch.Tensor,
    column_T: torch.Tensor,
    rows_5T: torch.Tensor,
    inverse_temperature: float,
    *,
    tile_columns: int,
    first_column: int = 0,
    has_entropy: bool = True,
    tile_max: torch.Tensor | None = None,
) -> None:
    """Write the gradient of these logits to `gradient_TC`, which may be `logits_TC`.

    With `tile_max` [tiles, T], each logit is stored minus its tile's maximum, which is given
    divided by the temperature.
    """
    num_tokens, columns = logits_TC.shape
    if not num_tokens:
        return
    rows = max(1, ROW_KERNEL_ELEMENTS // tile_columns)
    logits_gradient_kernel[(triton.cdiv(num_tokens, rows), triton.cdiv(columns, tile_columns))](
        logits_TC,
        logits_TC.stride(0),
        gradient_TC,
        gradient_TC.stride(0),
        tile_max,
        column_T,
        rows_5T,
        num_tokens,
        columns,
        first_column,
        inverse_temperature,
        R=rows,
        C=tile_columns,
        HAS_ENTROPY=has_entropy,
        ARE_SHIFTED=tile_max is not None,
        **tiles.ROW_WISE,
    )


class RecomputedGradient:
    """The gradient of the logits of any block, from recomputed logits."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        column_T: torch.Tensor,
        rows_5T: torch.Tensor,
        inverse_temperature: float,
        plan: HeadPlan,
        *,
        has_entropy: bool,
    ) -> None:
        self.hidden_TD, self.weight_VD, self.plan = hidden_TD, weight_VD, plan
        self.column_T, self.rows_5T = column_T, rows_5T
        self.inverse_temperature, self.has_entropy = inverse_temperature, has_entropy

    def write(self, rows: slice, columns: slice, gradient_TC: torch.Tensor) -> None:
        """Write the gradient of the logits of these rows and columns to `gradient_TC`."""
        hidden_TD, weight_CD = self.hidden_TD[rows], self.weight_VD[columns]
        column_T, rows_5T = self.column_T[rows], self.rows_5T[:, rows].contiguous()
        if not hidden_TD.shape[0]:
            return
        if self.plan.fused:
            self.write_fused(hidden_TD, weight_CD, columns.start, column_T, rows_5T, gradient_TC)
            return
        step = scratch_columns(hidden_TD.shape[0], weight_CD.shape[0], self.plan)
        logits = torch.empty(hidden_TD.shape[0], step, device=hidden_TD.device)
        for first in range(0, weight_CD.shape[0], step):
            part = slice(first, first + step)
            logits_TC = logits[:, : weight_CD[part].shape[0]]
            write_product_(logits_TC, hidden_TD, weight_CD[part].t())
            write_gradient_from_logits(
                logits_TC,
                gradient_TC[:, part],
                column_T,
                rows_5T,
                self.inverse_temperature,
                tile_columns=self.plan.tile_columns,
                first_column=columns.start + first,
                has_entropy=self.has_entropy,
            )

    def write_fused(
        self,
        hidden_TD: torch.Tensor,
        weight_CD: torch.Tensor,
        first_column: int,
        column_T: torch.Tensor,
        rows_5T: torch.Tensor,
        gradient_TC: torch.Tensor,
    ) -> None:
        (num_tokens, width), columns = hidden_TD.shape, weight_CD.shape[0]
        R, C = tiles.ROWS, self.plan.tile_columns
        product_gradient_kernel[(triton.cdiv(num_tokens, R) * triton.cdiv(columns, C),)](
            descriptor(hidden_TD, R, tiles.DEPTH),
            descriptor(weight_CD, C, tiles.DEPTH),
            descriptor(gradient_TC, R, C),
            column_T,
            rows_5T,
            num_tokens,
            columns,
            first_column,
            width,
            self.inverse_temperature,
            C=C,
            HAS_ENTROPY=self.has_entropy,
            **tiles.PRODUCT,
        )
