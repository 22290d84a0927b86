"""The Triton kernels of `rlef_kernels.gpu.linear_score`.

A tile stores six sums: max z, sum e^a, sum e^a a, max y, sum e^b, sum e^a (a - b), where
a = z - max z and b = y - max y over the tile, z are the policy's logits and y the reference's; and
the targets' logits. FLOPs of a tile: 2 R C (D + E) for the products, and about 16 R C.

Shape suffixes: T tokens, D and E hidden sizes, V vocabulary shard; of a tile, R rows and C columns;
N tiles.
"""

import triton
import triton.language as tl

from rlef_kernels.gpu.tiles import LOWEST_LOGIT, product_tile, store_target_logit, tile_position


@triton.jit
def store_sums(
    logits_RC,
    ref_RC,
    row_R,
    column_C,
    first_column,
    target_ptr,
    sums_ptr,
    target_logits_ptr,
    tile,
    tiles,
    num_tokens,
    exponent_scale,
    C: tl.constexpr,
):
    """Store one tile's part of sums[6, tiles, T] and target_logits[2, T]; columns past the
    vocabulary are LOWEST_LOGIT."""
    inside_R = row_R < num_tokens
    at_R = sums_ptr + tl.cast(tile, tl.int64) * num_tokens + row_R
    stride = tl.cast(tiles, tl.int64) * num_tokens
    ref_target_logits_ptr = target_logits_ptr + num_tokens
    store_target_logit(
        logits_RC, row_R, column_C, first_column, target_ptr, target_logits_ptr, num_tokens, C
    )
    store_target_logit(
        ref_RC, row_R, column_C, first_column, target_ptr, ref_target_logits_ptr, num_tokens, C
    )
    max_R, ref_max_R = tl.max(logits_RC, 1), tl.max(ref_RC, 1)
    shifted_RC, ref_shifted_RC = logits_RC - max_R[:, None], ref_RC - ref_max_R[:, None]
    exp_RC = tl.exp2(shifted_RC * exponent_scale)
    tl.store(at_R, max_R, mask=inside_R)
    tl.store(at_R + stride, tl.sum(exp_RC, 1), mask=inside_R)
    tl.store(at_R + 2 * stride, tl.sum(exp_RC * shifted_RC, 1), mask=inside_R)
    tl.store(at_R + 3 * stride, ref_max_R, mask=inside_R)
    cross_R = tl.sum(exp_RC * (shifted_RC - ref_shifted_RC), 1)
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
    exponent_scale,
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
    column_C = column + tl.arange(0, C)
    inside_RC = (column_C < vocabulary)[None, :]
    store_sums(
        tl.where(inside_RC, logits_RC, LOWEST_LOGIT),
        tl.where(inside_RC, ref_RC, LOWEST_LOGIT),
        row + tl.arange(0, R),
        column_C,
        column,
        target_ptr,
        sums_ptr,
        target_logits_ptr,
        column_tile,
        column_tiles,
        num_tokens,
        exponent_scale,
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
    exponent_scale,
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
        first_column + within_C,
        first_column + tl.program_id(1) * C,
        target_ptr,
        sums_ptr,
        target_logits_ptr,
        first_column // C + tl.program_id(1),
        num_tiles,
        num_tokens,
        exponent_scale,
        C,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def combine_two_tiles_kernel(
    sums_ptr,
    target_ptr,
    target_logits_ptr,
    out_ptr,
    num_tokens,
    vocabulary,
    num_tiles,
    inverse_temperature,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """Combine the tiles of each row, N at a time in ascending order, into out[T, 8]
    (`vocab_parallel.combine_two_heads`)."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = row_R < num_tokens
    stride = tl.cast(num_tiles, tl.int64) * num_tokens
    max_R = tl.full((R,), LOWEST_LOGIT, tl.float32)
    ref_max_R = tl.full((R,), LOWEST_LOGIT, tl.float32)
    sum_R, ref_sum_R = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    weighted_R, cross_R = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for first in range(0, num_tiles, N):
        tile_N = first + tl.arange(0, N)
        at_NR = sums_ptr + tile_N.to(tl.int64)[:, None] * num_tokens + row_R[None, :]
        inside_NR = (tile_N < num_tiles)[:, None] & inside_R[None, :]
        max_NR = tl.load(at_NR, mask=inside_NR, other=LOWEST_LOGIT)
        sum_NR = tl.load(at_NR + stride, mask=inside_NR, other=0.0)
        weighted_NR = tl.load(at_NR + 2 * stride, mask=inside_NR, other=0.0)
        ref_max_NR = tl.load(at_NR + 3 * stride, mask=inside_NR, other=LOWEST_LOGIT)
        ref_sum_NR = tl.load(at_NR + 4 * stride, mask=inside_NR, other=0.0)
        cross_NR = tl.load(at_NR + 5 * stride, mask=inside_NR, other=0.0)
        new_max_R = tl.maximum(max_R, tl.max(max_NR, 0))
        new_ref_max_R = tl.maximum(ref_max_R, tl.max(ref_max_NR, 0))
        shift_NR, shift_R = max_NR - new_max_R[None, :], max_R - new_max_R
        ref_shift_NR, ref_shift_R = ref_max_NR - new_ref_max_R[None, :], ref_max_R - new_ref_max_R
        scale_NR = tl.exp(shift_NR * inverse_temperature)
        scale_R = tl.exp(shift_R * inverse_temperature)
        weighted_R = scale_R * (weighted_R + sum_R * shift_R)
        weighted_R += tl.sum(scale_NR * (weighted_NR + sum_NR * shift_NR), 0)
        cross_R = scale_R * (cross_R + sum_R * (shift_R - ref_shift_R))
        cross_R += tl.sum(scale_NR * (cross_NR + sum_NR * (shift_NR - ref_shift_NR)), 0)
        sum_R = scale_R * sum_R + tl.sum(scale_NR * sum_NR, 0)
        ref_sum_R *= tl.exp(ref_shift_R * inverse_temperature)
        ref_sum_R += tl.sum(tl.exp(ref_shift_NR * inverse_temperature) * ref_sum_NR, 0)
        max_R, ref_max_R = new_max_R, new_ref_max_R
    target_R = tl.load(target_ptr + row_R, mask=inside_R, other=-1)
    owned_R = inside_R & (target_R >= 0) & (target_R < vocabulary)
    at_R = target_logits_ptr + row_R
    target_logit_R = tl.load(at_R, mask=owned_R, other=0.0)
    ref_target_logit_R = tl.load(at_R + num_tokens, mask=owned_R, other=0.0)
    out_R = out_ptr + 8 * row_R
    tl.store(out_R, max_R * inverse_temperature, mask=inside_R)
    tl.store(out_R + 1, sum_R, mask=inside_R)
    tl.store(out_R + 2, weighted_R * inverse_temperature, mask=inside_R)
    tl.store(out_R + 3, target_logit_R * inverse_temperature, mask=inside_R)
    tl.store(out_R + 4, ref_max_R * inverse_temperature, mask=inside_R)
    tl.store(out_R + 5, ref_sum_R, mask=inside_R)
    tl.store(out_R + 6, cross_R * inverse_temperature, mask=inside_R)
    tl.store(out_R + 7, ref_target_logit_R * inverse_temperature, mask=inside_R)
