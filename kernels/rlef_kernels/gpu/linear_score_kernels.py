"""The Triton kernels of `rlef_kernels.gpu.linear_score`.

A tile stores the six sums of `vocab_parallel.reduce_two_heads`, and the targets' logits. FLOPs
of a tile: 2 R C (D + E) for the products, and about 16 R C.

Shape suffixes: T tokens, D and E hidden sizes, V vocabulary shard; of a tile, R rows and C columns.
As a kernel's constant, D is the depth of one step of the products.
"""

import triton
import triton.language as tl

from rlef_kernels.gpu.tiles import (
    LOG2_E,
    LOWEST_LOGIT,
    product_tile,
    store_target_logit,
    tile_position,
)


@triton.jit
def store_sums(
    logits_RC,
    ref_RC,
    row_R,
    first_column,
    target_ptr,
    sums_ptr,
    target_logits_ptr,
    tiles,
    num_tokens,
    inverse_temperature,
    C: tl.constexpr,
):
    """Store one tile's part of sums[6, tiles, T] and of target_logits[2, T]. The target logits are
    not divided by the temperature. Both models' logits must be LOWEST_LOGIT past the vocabulary."""
    inside_R = row_R < num_tokens
    at_R = sums_ptr + tl.cast(first_column // C, tl.int64) * num_tokens + row_R
    stride = tl.cast(tiles, tl.int64) * num_tokens
    ref_target_logits_ptr = target_logits_ptr + num_tokens
    store_target_logit(logits_RC, row_R, first_column, target_ptr, target_logits_ptr, num_tokens, C)
    store_target_logit(
        ref_RC, row_R, first_column, target_ptr, ref_target_logits_ptr, num_tokens, C
    )
    max_R, ref_max_R = tl.max(logits_RC, 1), tl.max(ref_RC, 1)
    shifted_RC, ref_shifted_RC = logits_RC - max_R[:, None], ref_RC - ref_max_R[:, None]
    exponent_scale = inverse_temperature * LOG2_E
    exp_RC = tl.exp2(shifted_RC * exponent_scale)
    weighted_R = tl.sum(exp_RC * shifted_RC, 1) * inverse_temperature
    tl.store(at_R, max_R * inverse_temperature, mask=inside_R)
    tl.store(at_R + stride, tl.sum(exp_RC, 1), mask=inside_R)
    tl.store(at_R + 2 * stride, weighted_R, mask=inside_R)
    tl.store(at_R + 3 * stride, ref_max_R * inverse_temperature, mask=inside_R)
    cross_R = tl.sum(exp_RC * (shifted_RC - ref_shifted_RC), 1) * inverse_temperature
    tl.store(at_R + 5 * stride, cross_R, mask=inside_R)
    ref_sum_R = tl.sum(tl.exp2(ref_shifted_RC * exponent_scale), 1)
    tl.store(at_R + 4 * stride, ref_sum_R, mask=inside_R)


@triton.jit(do_not_specialize=["num_tokens"])  # it varies from call to call
def two_products_statistics_kernel(
    hidden_TD,
    weight_VD,
    ref_hidden_TE,
    ref_weight_VE,
    target_ptr,
    sums_ptr,
    target_logits_ptr,
    num_tokens,
    vocabulary,
    width: tl.constexpr,
    ref_width: tl.constexpr,
    inverse_temperature,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(num_tokens, R), tl.cdiv(vocabulary, C)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row, column = row_tile * R, column_tile * C
    logits_RC = product_tile(hidden_TD, weight_VD, row, column, width, R, C, D)
    ref_RC = product_tile(ref_hidden_TE, ref_weight_VE, row, column, ref_width, R, C, D)
    inside_RC = (column + tl.arange(0, C) < vocabulary)[None, :]
    store_sums(
        tl.where(inside_RC, logits_RC, LOWEST_LOGIT),
        tl.where(inside_RC, ref_RC, LOWEST_LOGIT),
        row + tl.arange(0, R),
        column,
        target_ptr,
        sums_ptr,
        target_logits_ptr,
        column_tiles,
        num_tokens,
        inverse_temperature,
        C,
    )


@triton.jit(do_not_specialize=["num_tokens", "first_column"])
def two_logits_statistics_kernel(
    logits_ptr,
    ref_ptr,
    row_stride,
    target_ptr,
    sums_ptr,
    target_logits_ptr,
    num_tokens,
    columns,
    first_column,
    num_tiles,
    inverse_temperature,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Reduce one tile of both models' fp32 logits in memory, whose columns start at
    `first_column`."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    within_C = tl.program_id(1) * C + tl.arange(0, C)
    inside_RC = (row_R < num_tokens)[:, None] & (within_C < columns)[None, :]
    at_RC = row_R.to(tl.int64)[:, None] * row_stride + within_C[None, :]
    store_sums(
        tl.load(logits_ptr + at_RC, mask=inside_RC, other=LOWEST_LOGIT),
        tl.load(ref_ptr + at_RC, mask=inside_RC, other=LOWEST_LOGIT),
        row_R,
        first_column + tl.program_id(1) * C,
        target_ptr,
        sums_ptr,
        target_logits_ptr,
        num_tiles,
        num_tokens,
        inverse_temperature,
        C,
    )
