"""`linear_score` on a GPU; the equations are in `rlef_kernels.linear_score`.

Works like `linear_logprob`'s forward pass, but a tile has 128 x 128 logits of each model, so that
both accumulators fit in registers. A tile stores six partial sums, which combine like those of
shards.

FLOPs: 2 T V D + 2 T V E. Memory at T = 8,192, V = 128,256: 39 MiB to combine partial sums; with
cuBLAS 88 MiB, of which 2 x 32 MiB are logits. Bytes: hidden states and heads as in `head`;
24 T V / 128 of partial sums (with cuBLAS 24 T V / 1,024), written once and read a few times.

Shape suffixes: T tokens, D and E hidden sizes, V vocabulary shard, C columns of a block, P partial
sums, N tiles, R rows of a part; 6 sums of a tile's row, 2 target logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch.distributed import ProcessGroup

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.linear_score_kernels import (
    two_logits_statistics_kernel,
    two_products_statistics_kernel,
)
from rlef_kernels.gpu.plan import HeadPlan, can_fuse, choose_plan, scratch_columns
from rlef_kernels.gpu.products import write_product_
from rlef_kernels.gpu.tiles import descriptor
from rlef_kernels.vocab_parallel import (
    TokenScores,
    combine_two_heads,
    group_size,
    reduce_two_heads,
    shard_start,
)

NUM_SUMS = 6
TILE_COLUMNS = 128  # of a fused tile of each model
ROW_KERNEL_ROWS = 4  # per program, in two tiles of 1,024 columns


class Models(NamedTuple):
    """Both models' hidden states and heads, or some rows and columns of them."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    ref_hidden_TE: torch.Tensor
    ref_weight_VE: torch.Tensor

    def rows(self, rows: slice) -> "Models":
        return self._replace(hidden_TD=self.hidden_TD[rows], ref_hidden_TE=self.ref_hidden_TE[rows])

    @property
    def num_tokens(self) -> int:
        return self.hidden_TD.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight_VD.shape[0]

    def descriptors(self) -> list[object]:
        R, C, D = tiles.ROWS, TILE_COLUMNS, tiles.DEPTH
        return [descriptor(matrix, n, D) for matrix, n in zip(self, (R, C, R, C), strict=True)]


def score_partials(
    models: Models, column_T: torch.Tensor, inverse_temperature: float, plan: HeadPlan
) -> torch.Tensor:
    """Return the partial sums of this shard, [T, 8]. `column_T`: the targets' columns, which may
    lie outside the shard."""
    num_tokens, vocabulary = models.num_tokens, models.vocabulary
    num_tiles = triton.cdiv(vocabulary, TILE_COLUMNS if plan.fused else plan.tile_columns)
    step = max(1, plan.partials_bytes // (4 * NUM_SUMS * num_tiles))
    step = max(1, step // tiles.ROWS) * tiles.ROWS
    sums = models.hidden_TD.new_empty(
        NUM_SUMS * num_tiles * min(step, num_tokens), dtype=torch.float32
    )
    parts = []
    for start in range(0, max(1, num_tokens), step):
        part, column_R = models.rows(slice(start, start + step)), column_T[start : start + step]
        sums_6NR = sums[: NUM_SUMS * num_tiles * len(column_R)].view(
            NUM_SUMS, num_tiles, len(column_R)
        )
        target_logits_2R = sums.new_empty(2, len(column_R))
        if len(column_R):
            write_sums(part, column_R, sums_6NR, target_logits_2R, inverse_temperature, plan)
        owned_R = (column_R >= 0) & (column_R < vocabulary)
        logit_R, ref_logit_R = (target_logits_2R * inverse_temperature).where(owned_R, 0)
        *of_policy, ref_max_R, ref_sum_R, cross_R = reduce_two_heads(*sums_6NR)
        numbers = (*of_policy, logit_R, ref_max_R, ref_sum_R, cross_R, ref_logit_R)
        parts.append(torch.stack(numbers, dim=-1))
    return torch.cat(parts)


def write_sums(
    models: Models,
    column_T: torch.Tensor,
    sums_6NT: torch.Tensor,
    target_logits_2T: torch.Tensor,
    inverse_temperature: float,
    plan: HeadPlan,
) -> None:
    """Write the six sums of every tile of these rows, and both logits of their targets."""
    num_tiles = sums_6NT.shape[1]
    if plan.fused:
        two_products_statistics_kernel[(triton.cdiv(models.num_tokens, tiles.ROWS) * num_tiles,)](
            *models.descriptors(),
            column_T,
            sums_6NT,
            target_logits_2T,
            models.num_tokens,
            models.vocabulary,
            models.hidden_TD.shape[1],
            models.ref_hidden_TE.shape[1],
            inverse_temperature,
            C=TILE_COLUMNS,
            **tiles.PRODUCT,
        )
        return
    for first, logits_TC, ref_TC in logits_in_parts(models, plan):
        rows, columns = logits_TC.shape
        grid = (triton.cdiv(rows, ROW_KERNEL_ROWS), triton.cdiv(columns, plan.tile_columns))
        two_logits_statistics_kernel[grid](
            logits_TC,
            ref_TC,
            logits_TC.stride(0),
            column_T,
            sums_6NT,
            target_logits_2T,
            rows,
            columns,
            first,
            num_tiles,
            inverse_temperature,
            R=ROW_KERNEL_ROWS,
            C=plan.tile_columns,
            **tiles.ROW_WISE,
        )


def logits_in_parts(
    models: Models, plan: HeadPlan
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (first column, logits, reference's logits), some columns at a time, in fp32.

    Each yield overwrites the buffers of the one before.
    """
    step = scratch_columns(models.num_tokens, models.vocabulary, plan)
    buffers = torch.empty(2, models.num_tokens, step, device=models.hidden_TD.device)
    for first in range(0, models.vocabulary, step):
        weight_CD, ref_weight_CE = (
            weight[first : first + step] for weight in (models.weight_VD, models.ref_weight_VE)
        )
        logits_TC, ref_TC = (buffer[:, : len(weight_CD)] for buffer in buffers)
        write_product_(logits_TC, models.hidden_TD, weight_CD.t())
        write_product_(ref_TC, models.ref_hidden_TE, ref_weight_CE.t())
        yield first, logits_TC, ref_TC


@torch.no_grad()
def linear_score_kernels(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    ref_hidden_TE: torch.Tensor,
    ref_weight_VE: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    plan: HeadPlan | None = None,
) -> TokenScores:
    """Compute `linear_score` on the GPU. `plan` is for measurements and tests."""
    models = Models(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE)
    plan = plan or choose_plan(*models)
    assert not plan.fused or can_fuse(*models)
    shard = models.vocabulary
    column_T = target_T - shard_start(shard, group)
    partials_TP = score_partials(models, column_T, 1 / temperature, plan)
    return combine_two_heads(partials_TP, target_T, shard * group_size(group), group)
