"""Shared by the head's kernels: the order of tiles, a tile's product, a tile's statistics.

FLOPs of a tile: 2 R C D for the product, about 8 R C for the statistics. Bytes: 12 R written.

Shape suffixes: T tokens, D hidden size, V vocabulary shard; of a tile, R rows and C columns.
Inside `product_tile`, D is the depth of one step and `width` the hidden size.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Stands for "no logit here": its exp is 0, and 0 times it is 0 (0 times -inf would be NaN).
LOWEST_LOGIT = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(math.log2(math.e))

ROWS = 128  # of a fused tile
DEPTH = 64  # of a step of the product: 128 bytes of bf16, the widest swizzle of shared memory
# Tiles of this many row blocks run together: a wave of 132 tiles then reads 8 x 128 rows of hidden
# and 17 x 256 of the head.
GROUP = 8
# How the kernels that multiply are launched, and those that reduce rows in memory.
PRODUCT = {"R": ROWS, "D": DEPTH, "GROUP": GROUP, "num_warps": 8, "num_stages": 4}
PRODUCT |= {"enable_fp_fusion": True}
ROW_WISE = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return row and column of the n-th tile, counted column by column within a group of rows."""
    tiles_of_group = GROUP * column_tiles
    first_row = tile // tiles_of_group * GROUP
    rows = tl.minimum(row_tiles - first_row, GROUP)
    within = tile % tiles_of_group
    return first_row + within % rows, within // rows


@triton.jit
def product_tile(
    hidden_TD,
    weight_VD,
    row,
    column,
    width: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """Return hidden[row : row + R] weight[column : column + C]^T, accumulated in fp32.

    Past the edges the descriptors read zeros. `width` is a constant because, if the loop could run
    zero times, Triton 3.6.0 would wait for each product before it issues the next one.
    """
    product_RC = tl.zeros((R, C), tl.float32)
    for step in range(0, tl.cdiv(width, D)):
        hidden_RD = hidden_TD.load([row, step * D])
        weight_CD = weight_VD.load([column, step * D])
        product_RC = tl.dot(hidden_RD, weight_CD.T, product_RC)
    return product_RC


@triton.jit
def store_target_logit(
    logits_RC, row_R, first_column, target_ptr, out_ptr, num_tokens, C: tl.constexpr
):
    """Store the target's logit of each row whose target is in this tile."""
    inside_R = row_R < num_tokens
    target_R = tl.load(target_ptr + row_R, mask=inside_R, other=-1).to(tl.int32)
    hit_RC = target_R[:, None] == (first_column + tl.arange(0, C))[None, :]
    target_logit_R = tl.sum(tl.where(hit_RC, logits_RC, 0.0), 1)
    # only one tile has a row's target, so only one program writes it
    here_R = inside_R & (target_R >= first_column) & (target_R < first_column + C)
    tl.store(out_ptr + row_R, target_logit_R, mask=here_R)


@triton.jit
def store_statistics(
    logits_RC,
    row_R,
    first_column,
    target_ptr,
    partials_ptr,
    target_logit_ptr,
    tiles,
    num_tokens,
    inverse_temperature,
    C: tl.constexpr,
):
    """Store max, sum of exp and weighted sum of logits / temperature in partials[3, tiles, T].

    Also stores the target's logit if the target is in the tile. Returns the rows' maxima. Neither
    that logit nor the returned maxima are divided by the temperature.
    """
    inside_R = row_R < num_tokens
    at_R = partials_ptr + tl.cast(first_column // C, tl.int64) * num_tokens + row_R
    stride = tl.cast(tiles, tl.int64) * num_tokens
    # First what needs the logits, then what needs them minus the maximum. In any other order both
    # matrices are live, and the compiler spills registers.
    store_target_logit(logits_RC, row_R, first_column, target_ptr, target_logit_ptr, num_tokens, C)
    max_R = tl.max(logits_RC, 1)
    tl.store(at_R, max_R * inverse_temperature, mask=inside_R)
    shifted_RC = logits_RC - max_R[:, None]
    exp_RC = tl.exp2(shifted_RC * (inverse_temperature * LOG2_E))
    tl.store(at_R + stride, tl.sum(exp_RC, 1), mask=inside_R)
    weighted_R = tl.sum(exp_RC * shifted_RC, 1) * inverse_temperature
    tl.store(at_R + 2 * stride, weighted_R, mask=inside_R)
    return max_R


def descriptor(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return a TMA descriptor of [rows, columns] blocks; past the matrix's edges they are zero."""
    shape, stride = list(matrix.shape), list(matrix.stride())
    return TensorDescriptor(matrix, shape, stride, [rows, columns])
