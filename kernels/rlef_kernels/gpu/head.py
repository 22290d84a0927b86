"""The logits of a head on a GPU, one chunk of rows at a time (`rlef_kernels.logits`).

A program stores (max, sum exp, weighted sum) of the rows of one tile of logits, and PyTorch
combines the tiles of a row as it combines shards (`vocab_parallel.reduce_sums`). For a gradient it
also stores, in the inputs' dtype, each logit minus its tile's maximum; a row kernel turns these
into dz in place, and cuBLAS multiplies. In bf16, a logit d below its tile's maximum is stored with
an error of at most d / 512, and its probability is at most exp(-d), so dz of a log-prob is off by
less than exp(-d) d / 512 < 0.0008 of that tile's largest probability: less than the rounding of dz
itself. Log-probs and entropies are exact.

FLOPs: 2 T V D, and about 8 T V for the statistics. Bytes if fused (plan.py): hidden once and the
head about T / 1024 times, as the L2 cache serves all other reads of them; 12 T V / tile_columns of
partial sums, written once and read a few times; for a gradient 2 T V written, read and written
again, 4 T V read by cuBLAS, and 8 V D of main_grad per chunk.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk; of a tile, R rows
and C columns. As a kernel's constant, D is the depth of one step of the products.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch.distributed import ProcessGroup

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.head_gradient import write_gradient_
from rlef_kernels.gpu.plan import ROW_KERNEL_ELEMENTS, HeadPlan, choose_plan, scratch_columns
from rlef_kernels.gpu.products import add_product_, write_product_
from rlef_kernels.gpu.tiles import (
    LOWEST_LOGIT,
    descriptor,
    product_tile,
    store_statistics,
    tile_position,
)
from rlef_kernels.logits import LogitsChunk
from rlef_kernels.vocab_parallel import group_size, reduce_sums, sum_over_shards_


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


class KernelsChunk(LogitsChunk):
    """Computes what `LogitsChunk` does, with kernels. Logits are kept only for a gradient, in the
    inputs' dtype, each minus its tile's maximum."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        with_gradient: bool,
        *,
        temperature: float,
        group: ProcessGroup | None,
        plan: HeadPlan | None = None,
    ) -> None:
        self.inverse_temperature, self.group, self.weight_VD = 1 / temperature, group, weight_VD
        self.plan = plan or choose_plan(hidden_TD, weight_VD)
        num_tokens, (vocabulary, _) = hidden_TD.shape[0], weight_VD.shape
        self.num_tiles = triton.cdiv(vocabulary, self.plan.tile_columns)
        width = self.num_tiles * self.plan.tile_columns  # whole tiles, so that rows are aligned
        tokens = whole_tiles(self.plan.partials_bytes // (12 * self.num_tiles), tiles.GROUP)
        if with_gradient:
            tokens = whole_tiles(self.plan.row_bytes // (width * weight_VD.element_size()), 1)
        # a sum over chunks needs fp32
        self.sum_dtype = weight_VD.dtype if num_tokens <= tokens else torch.float32
        self.tokens = min(tokens, max(1, num_tokens))
        self.sums = hidden_TD.new_empty(3 * self.num_tiles * self.tokens, dtype=torch.float32)
        self.target_logits = self.sums.new_empty(self.tokens)
        self.stored_CV: torch.Tensor | None = None
        if with_gradient:
            self.stored_CV = weight_VD.new_empty(self.tokens, width)[:, :vocabulary]

    def partials(self, hidden_CD: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        self.compute(hidden_CD, column_C)
        rows, vocabulary = len(hidden_CD), self.weight_VD.shape[0]
        of_tiles = self.sums[: 3 * self.num_tiles * rows].view(3, self.num_tiles, rows)
        owned_C = (column_C >= 0) & (column_C < vocabulary)
        target_logit_C = self.target_logits[:rows] * self.inverse_temperature
        return torch.stack([*reduce_sums(*of_tiles), target_logit_C.where(owned_C, 0)], dim=-1)

    def compute(self, hidden_CD: torch.Tensor, column_C: torch.Tensor) -> None:
        rows, vocabulary = len(hidden_CD), self.weight_VD.shape[0]
        self.hidden_CD, self.column_C = hidden_CD, column_C
        stored_CV = None if self.stored_CV is None else self.stored_CV[:rows]
        if rows and self.plan.fused:
            self.reduce_products(hidden_CD, column_C, stored_CV)
        elif rows:
            columns = scratch_columns(rows, vocabulary, self.plan)
            logits = torch.empty(rows, columns, device=hidden_CD.device)
            for first in range(0, vocabulary, columns):
                weight_part = self.weight_VD[first : first + columns]
                part = logits[:, : len(weight_part)]
                write_product_(part, hidden_CD, weight_part.t())
                self.reduce_logits(part, first, column_C, stored_CV)

    def add_gradients(
        self,
        statistics: Sequence[torch.Tensor],
        grad_logprob_C: torch.Tensor | None,
        grad_entropy_C: torch.Tensor | None,
        grad_hidden_CD: torch.Tensor | None,
        grad_weight_VD: torch.Tensor | None,
    ) -> None:
        assert self.stored_CV is not None
        gradient_CV = self.stored_CV[: len(self.hidden_CD)]
        write_gradient_(
            gradient_CV,
            self.sums,  # the tiles' maxima come first
            self.column_C,
            statistics,
            grad_logprob_C,
            grad_entropy_C,
            self.inverse_temperature,
            tile_columns=self.plan.tile_columns,
        )
        if grad_hidden_CD is not None and group_size(self.group) == 1:
            write_product_(grad_hidden_CD, gradient_CV, self.weight_VD)
        elif grad_hidden_CD is not None:
            sum_CD = self.sums.new_empty(grad_hidden_CD.shape)
            write_product_(sum_CD, gradient_CV, self.weight_VD)
            grad_hidden_CD.copy_(sum_over_shards_(sum_CD, self.group))
        if grad_weight_VD is not None:
            add_product_(grad_weight_VD, gradient_CV.t(), self.hidden_CD)

    def reduce_products(
        self, hidden_CD: torch.Tensor, column_C: torch.Tensor, stored_CV: torch.Tensor | None
    ) -> None:
        """Fill the sums of all tiles."""
        (num_tokens, width), columns = hidden_CD.shape, self.plan.tile_columns
        product_statistics_kernel[(triton.cdiv(num_tokens, tiles.ROWS) * self.num_tiles,)](
            descriptor(hidden_CD, tiles.ROWS, tiles.DEPTH),
            descriptor(self.weight_VD, columns, tiles.DEPTH),
            column_C,
            self.sums,
            self.target_logits,
            None if stored_CV is None else descriptor(stored_CV, tiles.ROWS, columns),
            num_tokens,
            self.weight_VD.shape[0],
            width,
            self.inverse_temperature,
            C=columns,
            KEEPS_LOGITS=stored_CV is not None,
            **tiles.PRODUCT,
        )

    def reduce_logits(
        self,
        logits: torch.Tensor,
        first_column: int,
        column_C: torch.Tensor,
        stored_CV: torch.Tensor | None,
    ) -> None:
        """Fill the sums of the tiles of these logits, which are fp32 and in memory."""
        num_tokens, columns = logits.shape
        rows = ROW_KERNEL_ELEMENTS // self.plan.tile_columns
        grid = (triton.cdiv(num_tokens, rows), triton.cdiv(columns, self.plan.tile_columns))
        logits_statistics_kernel[grid](
            logits,
            logits.stride(0),
            column_C,
            self.sums,
            self.target_logits,
            stored_CV,
            0 if stored_CV is None else stored_CV.stride(0),
            num_tokens,
            columns,
            first_column,
            self.num_tiles,
            self.inverse_temperature,
            R=rows,
            C=self.plan.tile_columns,
            KEEPS_LOGITS=stored_CV is not None,
            **tiles.ROW_WISE,
        )


def whole_tiles(rows: int, group: int) -> int:
    """Round down to whole groups of tiles where possible."""
    whole = tiles.ROWS * group
    return max(1, rows // whole * whole if rows >= whole else rows)
