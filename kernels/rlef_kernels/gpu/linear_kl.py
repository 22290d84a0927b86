"""`linear_kl` on a GPU; the equations are in `rlef_kernels.linear_kl`.

Works like `linear_logprob`, but a tile has 128 x 128 logits of each model, so that both
accumulators fit in registers. A tile stores five partial sums, which combine like those of shards.

FLOPs: P + P' forward, 3 P + P' backward, P = 2 T V D and P' = 2 T V E. Memory: 48 MiB of partial
sums forward; backward a block of gradients and the fp32 gradient of hidden, as in `linear_logprob`;
with cuBLAS also 2 x 32 MiB of logits. Bytes: hidden states and heads as in `head`; 20 T V / 128 of
partial sums written and read once.

Shape suffixes: T tokens, D and E hidden sizes, V vocabulary shard, C columns of a block, P partial
sums; of a tile, R rows and C columns.
"""

from typing import NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.head import LOG2_E
from rlef_kernels.gpu.linear_kl_kernels import (
    combine_two_tiles_kernel,
    two_logits_gradient_kernel,
    two_logits_statistics_kernel,
    two_products_gradient_kernel,
    two_products_statistics_kernel,
)
from rlef_kernels.gpu.linear_logprob import KernelContext
from rlef_kernels.gpu.plan import HeadPlan, can_fuse, choose_plan, scratch_columns
from rlef_kernels.gpu.products import multiply_blocks, write_product_
from rlef_kernels.gpu.tiles import descriptor
from rlef_kernels.rows import rows_with_gradient, scatter_rows, select_rows
from rlef_kernels.vocab_parallel import combine_two_shards, gather_partials

NUM_SUMS = 5
FUSED_COLUMNS = 128
ROW_KERNEL_ROWS = 4  # per program, in two tiles of 1,024 columns


class Models(NamedTuple):
    """Both models' hidden states and heads, or some rows and columns of them."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    ref_hidden_TE: torch.Tensor
    ref_weight_VE: torch.Tensor

    def rows(self, rows: slice) -> "Models":
        return self._replace(hidden_TD=self.hidden_TD[rows], ref_hidden_TE=self.ref_hidden_TE[rows])

    def columns(self, columns: slice) -> "Models":
        return self._replace(
            weight_VD=self.weight_VD[columns], ref_weight_VE=self.ref_weight_VE[columns]
        )

    @property
    def num_tokens(self) -> int:
        return self.hidden_TD.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight_VD.shape[0]

    def descriptors(self) -> list[object]:
        R, C, D = tiles.ROWS, FUSED_COLUMNS, tiles.DEPTH
        return [descriptor(matrix, n, D) for matrix, n in zip(self, (R, C, R, C), strict=True)]


class LinearKl(torch.autograd.Function):
    """Save the inputs and five numbers per token; backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: KernelContext,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        ref_hidden_TE: torch.Tensor,
        ref_weight_VE: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        plan: HeadPlan,
    ) -> torch.Tensor:
        models = Models(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE)
        partials_TP = kl_partials(models, 1 / temperature, plan)
        saved = combine_two_shards(gather_partials(partials_TP, group))
        ctx.save_for_backward(*models, *saved)
        ctx.temperature, ctx.group, ctx.plan = temperature, group, plan
        return saved[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: KernelContext, grad_kl_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        models, statistics = Models(*ctx.saved_tensors[:4]), ctx.saved_tensors[4:]
        num_tokens, rows_R = models.num_tokens, rows_with_gradient(grad_kl_T)
        rows_6T = torch.stack([select_rows(tensor, rows_R) for tensor in (*statistics, grad_kl_T)])
        models = models._replace(
            hidden_TD=select_rows(models.hidden_TD, rows_R),
            ref_hidden_TE=select_rows(models.ref_hidden_TE, rows_R),
        )

        def write(rows: slice, columns: slice, gradient_TC: torch.Tensor) -> None:
            block = models.rows(rows).columns(columns)
            of_rows = rows_6T[:, rows].contiguous()
            write_gradient(block, of_rows, gradient_TC, 1 / ctx.temperature, ctx.plan)

        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = multiply_blocks(
            models.hidden_TD,
            models.weight_VD,
            write,
            ctx.plan,
            needs_hidden=needs_hidden,
            needs_weight=needs_weight,
            group=ctx.group,
        )
        if grad_hidden is not None:
            grad_hidden = scatter_rows(grad_hidden, rows_R, num_tokens)
        return grad_hidden, grad_weight, None, None, None, None, None


def kl_partials(models: Models, inverse_temperature: float, plan: HeadPlan) -> torch.Tensor:
    """Return the five sums of this shard, [T, 5]."""
    num_tokens, vocabulary = models.num_tokens, models.vocabulary
    columns = FUSED_COLUMNS if plan.fused else plan.tile_columns
    num_tiles = triton.cdiv(vocabulary, columns)
    step = max(1, plan.partials_bytes // (4 * NUM_SUMS * num_tiles))
    step = max(1, step // tiles.ROWS) * tiles.ROWS
    device = models.hidden_TD.device
    out_TP = torch.empty(num_tokens, NUM_SUMS, device=device)
    sums = torch.empty(NUM_SUMS * num_tiles * min(step, num_tokens), device=device)
    for start in range(0, num_tokens, step):
        part = models.rows(slice(start, start + step))
        write_sums(part, sums, num_tiles, inverse_temperature, plan)
        rows = 32
        combine_two_tiles_kernel[(triton.cdiv(part.num_tokens, rows),)](
            sums,
            out_TP[start:],
            part.num_tokens,
            num_tiles,
            inverse_temperature,
            R=rows,
            N=32,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out_TP


def write_sums(
    models: Models, sums: torch.Tensor, num_tiles: int, inverse_temperature: float, plan: HeadPlan
) -> None:
    """Write the five sums of every tile of these rows to `sums`."""
    scale = inverse_temperature * LOG2_E
    if plan.fused:
        two_products_statistics_kernel[(triton.cdiv(models.num_tokens, tiles.ROWS) * num_tiles,)](
            *models.descriptors(),
            sums,
            models.num_tokens,
            models.vocabulary,
            models.hidden_TD.shape[1],
            models.ref_hidden_TE.shape[1],
            scale,
            **FUSED_OPTIONS,
        )
        return
    for first, logits_TC, ref_TC in logits_in_parts(models, plan):
        two_logits_statistics_kernel[row_grid(logits_TC, plan)](
            logits_TC,
            ref_TC,
            sums,
            logits_TC.stride(0),
            *logits_TC.shape,
            first // plan.tile_columns,
            num_tiles,
            scale,
            R=ROW_KERNEL_ROWS,
            C=plan.tile_columns,
            num_warps=4,
            enable_fp_fusion=True,
        )


def write_gradient(
    models: Models,
    rows_6T: torch.Tensor,
    gradient_TC: torch.Tensor,
    inverse_temperature: float,
    plan: HeadPlan,
) -> None:
    """Write the gradient of the policy's logits of these rows and columns to `gradient_TC`."""
    if not models.num_tokens:
        return
    if plan.fused:
        R, C = tiles.ROWS, FUSED_COLUMNS
        grid = (triton.cdiv(models.num_tokens, R) * triton.cdiv(models.vocabulary, C),)
        two_products_gradient_kernel[grid](
            *models.descriptors(),
            descriptor(gradient_TC, R, C),
            rows_6T,
            models.num_tokens,
            models.vocabulary,
            models.hidden_TD.shape[1],
            models.ref_hidden_TE.shape[1],
            inverse_temperature,
            **FUSED_OPTIONS,
        )
        return
    for first, logits_TC, ref_TC in logits_in_parts(models, plan):
        two_logits_gradient_kernel[row_grid(logits_TC, plan)](
            logits_TC,
            ref_TC,
            gradient_TC[:, first:],
            rows_6T,
            logits_TC.stride(0),
            gradient_TC.stride(0),
            *logits_TC.shape,
            inverse_temperature,
            R=ROW_KERNEL_ROWS,
            C=plan.tile_columns,
            num_warps=4,
            enable_fp_fusion=True,
        )


FUSED_OPTIONS = {
    "R": tiles.ROWS,
    "C": FUSED_COLUMNS,
    "D": tiles.DEPTH,
    "GROUP": tiles.GROUP,
    "num_warps": tiles.PRODUCT_WARPS,
    "enable_fp_fusion": True,
    "num_stages": tiles.PRODUCT_STAGES,
}


def logits_in_parts(models: Models, plan: HeadPlan):
    """Yield (first column, logits, reference's logits), some columns at a time, in fp32.

    Each yield overwrites the buffers of the one before.
    """
    step = scratch_columns(models.num_tokens, models.vocabulary, plan)
    buffers = torch.empty(2, models.num_tokens, step, device=models.hidden_TD.device)
    for first in range(0, models.vocabulary, step):
        part = models.columns(slice(first, first + step))
        logits_TC, ref_TC = (buffer[:, : part.vocabulary] for buffer in buffers)
        write_product_(logits_TC, part.hidden_TD, part.weight_VD.t())
        write_product_(ref_TC, part.ref_hidden_TE, part.ref_weight_VE.t())
        yield first, logits_TC, ref_TC


def row_grid(logits_TC: torch.Tensor, plan: HeadPlan) -> tuple[int, int]:
    num_tokens, columns = logits_TC.shape
    return triton.cdiv(num_tokens, ROW_KERNEL_ROWS), triton.cdiv(columns, plan.tile_columns)


def linear_kl_kernels(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    ref_hidden_TE: torch.Tensor,
    ref_weight_VE: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    plan: HeadPlan | None = None,
) -> torch.Tensor:
    """Compute `linear_kl` on the GPU. `plan` is for measurements and tests."""
    if plan is None:
        plan = choose_plan(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE)
    assert not plan.fused or can_fuse(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE)
    return LinearKl.apply(
        hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE, temperature, group, plan
    )
