"""The forward pass over a head: it reduces each row of logits to four numbers (`vocab_parallel`).

A program stores (max, sum exp, weighted sum) of the rows of one tile of logits, and PyTorch
combines the tiles of a row as it combines shards (`vocab_parallel.reduce_sums`).

FLOPs: P = 2 T V D, and about 8 T V for the statistics. Bytes: hidden and head, read from memory
about T / 1024 times and from the L2 cache otherwise; 12 T V / tile_columns of partial sums, written
once and read a few times.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, P the four partial sums; of a tile, R
rows and C columns.
"""

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
from rlef_kernels.vocab_parallel import reduce_sums

ROW_KERNEL_ELEMENTS = 4096  # per program: 32 per thread


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
    inverse_temperature,
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
    inside_C = column + tl.arange(0, C) < vocabulary
    logits_RC = tl.where(inside_C[None, :], product_RC, LOWEST_LOGIT)
    max_R = store_statistics(
        logits_RC,
        row + tl.arange(0, R),
        column,
        target_ptr,
        partials_ptr,
        target_logit_ptr,
        column_tiles,
        num_tokens,
        inverse_temperature,
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
    inverse_temperature,
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
        first_column + tl.program_id(1) * C,
        target_ptr,
        partials_ptr,
        target_logit_ptr,
        num_tiles,
        num_tokens,
        inverse_temperature,
        C,
    )
    if KEEPS_LOGITS:
        at_RC = row_R.to(tl.int64)[:, None] * shifted_stride + (first_column + within_C)[None, :]
        shifted_RC = (logits_RC - max_R[:, None]).to(shifted_ptr.dtype.element_ty)
        tl.store(shifted_ptr + at_RC, shifted_RC, mask=inside_RC)


def head_partials(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    column_T: torch.Tensor,
    inverse_temperature: float,
    plan: HeadPlan,
) -> torch.Tensor:
    """Return this shard's partial sums, [T, P]. `column_T`: the targets' columns, which may lie
    outside the shard."""
    num_tokens, step = hidden_TD.shape[0], forward_tokens(weight_VD.shape[0], plan)
    tile_sums = TileSums(min(step, num_tokens), weight_VD.shape[0], hidden_TD.device, plan)
    parts = [
        tile_sums.partials(hidden_TD[rows], weight_VD, column_T[rows], inverse_temperature)
        for rows in (slice(at, at + step) for at in range(0, max(1, num_tokens), step))
    ]
    return torch.cat(parts)


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
        self.sums = torch.empty(3 * self.num_tiles * num_tokens, device=device)
        self.target_logits = torch.empty(num_tokens, device=device)

    def partials(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        column_T: torch.Tensor,
        inverse_temperature: float,
        shifted_TV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the partial sums of these rows, [T, P]; with `shifted_TV`, store each logit minus
        its tile's maximum there."""
        num_tokens = hidden_TD.shape[0]
        if num_tokens and self.plan.fused:
            self.reduce_products(hidden_TD, weight_VD, column_T, inverse_temperature, shifted_TV)
        elif num_tokens:
            columns = scratch_columns(num_tokens, self.vocabulary, self.plan)
            logits = torch.empty(num_tokens, columns, device=hidden_TD.device)
            for first in range(0, self.vocabulary, columns):
                weight_CD = weight_VD[first : first + columns]
                logits_TC = logits[:, : weight_CD.shape[0]]
                write_product_(logits_TC, hidden_TD, weight_CD.t())
                self.reduce_logits(logits_TC, first, column_T, inverse_temperature, shifted_TV)
        of_tiles = self.sums[: 3 * self.num_tiles * num_tokens].view(3, self.num_tiles, num_tokens)
        owned_T = (column_T >= 0) & (column_T < self.vocabulary)
        target_logit_T = self.target_logits[:num_tokens] * inverse_temperature
        return torch.stack([*reduce_sums(*of_tiles), target_logit_T.where(owned_T, 0)], dim=-1)

    def reduce_products(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        column_T: torch.Tensor,
        inverse_temperature: float,
        shifted_TV: torch.Tensor | None,
    ) -> None:
        """Fill the sums of all tiles, whose logits stay on the chip."""
        (num_tokens, width), columns = hidden_TD.shape, self.plan.tile_columns
        product_statistics_kernel[(triton.cdiv(num_tokens, tiles.ROWS) * self.num_tiles,)](
            descriptor(hidden_TD, tiles.ROWS, tiles.DEPTH),
            descriptor(weight_VD, columns, tiles.DEPTH),
            column_T,
            self.sums,
            self.target_logits,
            None if shifted_TV is None else descriptor(shifted_TV, tiles.ROWS, columns),
            num_tokens,
            self.vocabulary,
            width,
            inverse_temperature,
            C=columns,
            KEEPS_LOGITS=shifted_TV is not None,
            **tiles.PRODUCT,
        )

    def reduce_logits(
        self,
        logits_TC: torch.Tensor,
        first_column: int,
        column_T: torch.Tensor,
        inverse_temperature: float,
        shifted_TV: torch.Tensor | None,
    ) -> None:
        """Fill the sums of the tiles of these logits, which are in memory."""
        num_tokens, columns = logits_TC.shape
        rows = ROW_KERNEL_ELEMENTS // self.plan.tile_columns
        grid = (triton.cdiv(num_tokens, rows), triton.cdiv(columns, self.plan.tile_columns))
        logits_statistics_kernel[grid](
            logits_TC,
            logits_TC.stride(0),
            column_T,
            self.sums,
            self.target_logits,
            shifted_TV,
            0 if shifted_TV is None else shifted_TV.stride(0),
            num_tokens,
            columns,
            first_column,
            self.num_tiles,
            inverse_temperature,
            R=rows,
            C=self.plan.tile_columns,
            KEEPS_LOGITS=shifted_TV is not None,
            **tiles.ROW_WISE,
        )
