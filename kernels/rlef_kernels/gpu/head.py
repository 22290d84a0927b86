"""The forward pass over a head: it reduces each row of logits to four numbers (`vocab_parallel`).

A program stores (max, sum exp, weighted sum) of the rows of one tile of logits, and a small kernel
combines the tiles of a row in a fixed order. A tile's max and weighted sum are stored before the
division by the temperature, which the small kernel does.

FLOPs: P = 2 T V D, and about 8 T V for the statistics. Bytes: hidden and head, read from memory
about T / 1024 times and from the L2 cache otherwise; 12 T V / tile_columns of partial sums, written
and read once.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, P the four partial sums; of a tile, R
rows and C columns; N tiles.
"""

import math

import torch
import triton
import triton.language as tl

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.plan import HeadPlan, scratch_columns
from rlef_kernels.gpu.products import write_product_
from rlef_kernels.gpu.tiles import (
    LOWEST_LOGIT,
    descriptor,
    product_tile,
    store_statistics,
    tile_position,
)
from rlef_kernels.vocab_parallel import NUM_PARTIALS

LOG2_E = math.log2(math.e)
ROW_KERNEL_ELEMENTS = 4096  # per program: 32 per thread
COMBINE_ROWS, COMBINE_TILES = 32, 32


@triton.jit(do_not_specialize=["num_tokens"])  # it varies from call to call
def product_statistics_kernel(
    hidden_TD,
    weight_VD,
    target_ptr,
    partials_ptr,
    target_logit_ptr,
    shifted_TV,
    num_tokens,
    vocabulary,
    width: tl.constexpr,
    exponent_scale,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    KEEPS_LOGITS: tl.constexpr,
):
    """Multiply and reduce one tile; with KEEPS_LOGITS store z - max in the buffer's dtype."""
    row_tiles, column_tiles = tl.cdiv(num_tokens, R), tl.cdiv(vocabulary, C)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row, column = row_tile * R, column_tile * C
    product_RC = product_tile(hidden_TD, weight_VD, row, column, width, R, C, D)
    row_R, column_C = row + tl.arange(0, R), column + tl.arange(0, C)
    logits_RC = tl.where((column_C < vocabulary)[None, :], product_RC, LOWEST_LOGIT)
    max_R = store_statistics(
        logits_RC,
        row_R,
        column_C,
        column,
        target_ptr,
        partials_ptr,
        target_logit_ptr,
        column_tile,
        column_tiles,
        num_tokens,
        exponent_scale,
        C,
    )
    if KEEPS_LOGITS:
        shifted_RC = logits_RC - max_R[:, None]
        shifted_TV.store([row, column], shifted_RC.to(shifted_TV.dtype))


@triton.jit(do_not_specialize=["num_tokens"])
def logits_statistics_kernel(
    logits_ptr,
    row_stride,
    target_ptr,
    partials_ptr,
    target_logit_ptr,
    shifted_ptr,
    shifted_stride,
    num_tokens,
    columns,
    first_column,
    num_tiles,
    exponent_scale,
    R: tl.constexpr,
    C: tl.constexpr,
    KEEPS_LOGITS: tl.constexpr,
):
    """Reduce one tile of fp32 logits in memory, whose columns start at `first_column`."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    within_C = tl.program_id(1) * C + tl.arange(0, C)
    inside_RC = (row_R < num_tokens)[:, None] & (within_C < columns)[None, :]
    at_RC = row_R.to(tl.int64)[:, None] * row_stride + within_C[None, :]
    logits_RC = tl.load(logits_ptr + at_RC, mask=inside_RC, other=LOWEST_LOGIT)
    max_R = store_statistics(
        logits_RC,
        row_R,
        first_column + within_C,
        first_column + tl.program_id(1) * C,
        target_ptr,
        partials_ptr,
        target_logit_ptr,
        first_column // C + tl.program_id(1),
        num_tiles,
        num_tokens,
        exponent_scale,
        C,
    )
    if KEEPS_LOGITS:
        at_RC = row_R.to(tl.int64)[:, None] * shifted_stride + (first_column + within_C)[None, :]
        shifted_RC = (logits_RC - max_R[:, None]).to(shifted_ptr.dtype.element_ty)
        tl.store(shifted_ptr + at_RC, shifted_RC, mask=inside_RC)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_tiles_kernel(
    partials_ptr,
    target_ptr,
    target_logit_ptr,
    out_ptr,
    num_tokens,
    vocabulary,
    num_tiles,
    inverse_temperature,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """Combine the tiles of each row, N at a time in ascending order, into its four numbers."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = row_R < num_tokens
    stride = tl.cast(num_tiles, tl.int64) * num_tokens
    max_R = tl.full((R,), LOWEST_LOGIT, tl.float32)
    sum_R, weighted_R = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for first in range(0, num_tiles, N):
        tile_N = first + tl.arange(0, N)
        at_NR = partials_ptr + tile_N.to(tl.int64)[:, None] * num_tokens + row_R[None, :]
        inside_NR = (tile_N < num_tiles)[:, None] & inside_R[None, :]
        max_NR = tl.load(at_NR, mask=inside_NR, other=LOWEST_LOGIT)
        sum_NR = tl.load(at_NR + stride, mask=inside_NR, other=0.0)
        weighted_NR = tl.load(at_NR + 2 * stride, mask=inside_NR, other=0.0)
        new_max_R = tl.maximum(max_R, tl.max(max_NR, 0))
        shift_NR, shift_R = max_NR - new_max_R[None, :], max_R - new_max_R
        scale_NR = tl.exp(shift_NR * inverse_temperature)
        scale_R = tl.exp(shift_R * inverse_temperature)
        weighted_R = scale_R * (weighted_R + sum_R * shift_R)
        weighted_R += tl.sum(scale_NR * (weighted_NR + sum_NR * shift_NR), 0)
        sum_R = scale_R * sum_R + tl.sum(scale_NR * sum_NR, 0)
        max_R = new_max_R
    target_R = tl.load(target_ptr + row_R, mask=inside_R, other=-1)
    owned_R = inside_R & (target_R >= 0) & (target_R < vocabulary)
    target_logit_R = tl.load(target_logit_ptr + row_R, mask=owned_R, other=0.0)
    out_R = out_ptr + 4 * row_R
    tl.store(out_R, max_R * inverse_temperature, mask=inside_R)
    tl.store(out_R + 1, sum_R, mask=inside_R)
    tl.store(out_R + 2, weighted_R * inverse_temperature, mask=inside_R)
    tl.store(out_R + 3, target_logit_R * inverse_temperature, mask=inside_R)


def head_partials(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    column_T: torch.Tensor,
    inverse_temperature: float,
    plan: HeadPlan,
) -> torch.Tensor:
    """Return this shard's partial sums, [T, P]. `column_T`: the targets' columns, which may lie
    outside the shard."""
    num_tokens = hidden_TD.shape[0]
    partials_TP = torch.empty(
        num_tokens, NUM_PARTIALS, dtype=torch.float32, device=hidden_TD.device
    )
    step = forward_tokens(weight_VD.shape[0], plan)
    tile_sums = TileSums(min(step, num_tokens), weight_VD.shape[0], hidden_TD.device, plan)
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        tile_sums.compute(hidden_TD[rows], weight_VD, column_T[rows], inverse_temperature)
        tile_sums.combine(column_T[rows], inverse_temperature, partials_TP[rows])
    return partials_TP


def forward_tokens(vocabulary: int, plan: HeadPlan) -> int:
    """Return how many tokens' partial sums fit the budget, in whole groups of tiles if possible."""
    tokens = plan.partials_bytes // (12 * triton.cdiv(vocabulary, plan.tile_columns))
    whole = tiles.ROWS * tiles.GROUP
    return max(1, tokens // whole * whole if tokens >= whole else tokens)


class TileSums:
    """The buffers for the partial sums of up to `num_tokens` rows, by tile."""

    def __init__(
        self, num_tokens: int, vocabulary: int, device: torch.device, plan: HeadPlan
    ) -> None:
        self.plan, self.vocabulary = plan, vocabulary
        self.num_tiles = triton.cdiv(vocabulary, plan.tile_columns)
        self.partials = torch.empty(3 * self.num_tiles * num_tokens, device=device)
        self.target_logits = torch.empty(num_tokens, device=device)

    def compute(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        column_T: torch.Tensor,
        inverse_temperature: float,
        shifted_TV: torch.Tensor | None = None,
    ) -> None:
        """Fill the sums; with `shifted_TV`, store each logit minus its tile's maximum there."""
        if not hidden_TD.shape[0]:
            return
        if self.plan.fused:
            self.compute_fused(hidden_TD, weight_VD, column_T, inverse_temperature, shifted_TV)
            return
        columns = scratch_columns(hidden_TD.shape[0], self.vocabulary, self.plan)
        logits = torch.empty(hidden_TD.shape[0], columns, device=hidden_TD.device)
        for first in range(0, self.vocabulary, columns):
            weight_CD = weight_VD[first : first + columns]
            logits_TC = logits[:, : weight_CD.shape[0]]
            write_product_(logits_TC, hidden_TD, weight_CD.t())
            self.reduce(logits_TC, first, column_T, inverse_temperature, shifted_TV)

    def compute_fused(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        column_T: torch.Tensor,
        inverse_temperature: float,
        shifted_TV: torch.Tensor | None,
    ) -> None:
        num_tokens, width = hidden_TD.shape
        rows, columns = tiles.ROWS, self.plan.tile_columns
        grid = (triton.cdiv(num_tokens, rows) * self.num_tiles,)
        product_statistics_kernel[grid](
            descriptor(hidden_TD, rows, tiles.DEPTH),
            descriptor(weight_VD, columns, tiles.DEPTH),
            column_T,
            self.partials,
            self.target_logits,
            None if shifted_TV is None else descriptor(shifted_TV, rows, columns),
            num_tokens,
            self.vocabulary,
            width,
            inverse_temperature * LOG2_E,
            R=rows,
            C=columns,
            D=tiles.DEPTH,
            GROUP=tiles.GROUP,
            KEEPS_LOGITS=shifted_TV is not None,
            num_warps=tiles.PRODUCT_WARPS,
            enable_fp_fusion=True,
            num_stages=tiles.PRODUCT_STAGES,
        )

    def reduce(
        self,
        logits_TC: torch.Tensor,
        first_column: int,
        column_T: torch.Tensor,
        inverse_temperature: float,
        shifted_TV: torch.Tensor | None = None,
    ) -> None:
        """Fill the sums of the tiles of these logits, which are in memory."""
        num_tokens, columns = logits_TC.shape
        rows = ROW_KERNEL_ELEMENTS // self.plan.tile_columns
        grid = (triton.cdiv(num_tokens, rows), triton.cdiv(columns, self.plan.tile_columns))
        logits_statistics_kernel[grid](
            logits_TC,
            logits_TC.stride(0),
            column_T,
            self.partials,
            self.target_logits,
            shifted_TV,
            0 if shifted_TV is None else shifted_TV.stride(0),
            num_tokens,
            columns,
            first_column,
            self.num_tiles,
            inverse_temperature * LOG2_E,
            R=rows,
            C=self.plan.tile_columns,
            KEEPS_LOGITS=shifted_TV is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )

    def combine(
        self, column_T: torch.Tensor, inverse_temperature: float, partials_TP: torch.Tensor
    ) -> None:
        """Combine the tiles of each row, and write its four numbers to `partials_TP`."""
        num_tokens = column_T.shape[0]
        if num_tokens:
            combine_tiles_kernel[(triton.cdiv(num_tokens, COMBINE_ROWS),)](
                self.partials,
                column_T,
                self.target_logits,
                partials_TP,
                num_tokens,
                self.vocabulary,
                self.num_tiles,
                inverse_temperature,
                R=COMBINE_ROWS,
                N=COMBINE_TILES,
                num_warps=4,
                enable_fp_fusion=True,
            )
