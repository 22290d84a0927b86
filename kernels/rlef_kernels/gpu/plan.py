"""How a head is computed: the matrix product, the tile size, and the memory budgets.

There are two ways, with the same results up to rounding and the same layout of partial sums:

- *fused*: one Triton kernel multiplies and reduces; it stores logits only for a gradient. It needs
  the tensor memory accelerator (Hopper and newer), bf16, and rows aligned to 16 bytes.
- *cuBLAS*: the fp32 logits of some columns are written to a scratch buffer that fits the L2 cache
  (50 MB on an H100), and a row kernel reduces them. It runs on every GPU, and for fp32 too.

`rlef bench kernels` measures both.
"""

from dataclasses import dataclass

import torch

MIB = 2**20
FUSED_COLUMNS = 256  # the widest tile whose fp32 accumulator fits the registers of 8 warps
CUBLAS_COLUMNS = 1024  # of a row kernel's tile: 4 KiB of fp32, and few partial sums
ROW_KERNEL_ELEMENTS = 4096  # per program: 32 per thread


@dataclass(frozen=True)
class HeadPlan:
    """The way of computing a head, its tile, and its memory budgets in bytes."""

    fused: bool
    tile_columns: int
    # Partial sums of the forward pass; combining them takes the same amount again. 24 MiB hold
    # those of 4,096 tokens x 128,256 columns.
    partials_bytes: int = 24 * MIB
    # cuBLAS only: fp32 logits, small enough for the L2 cache.
    logits_bytes: int = 32 * MIB
    # A chunk's logits, then their gradients. Large, because each chunk reads and writes the whole
    # fp32 gradient of the weight.
    row_bytes: int = 1024 * MIB


FUSED = HeadPlan(fused=True, tile_columns=FUSED_COLUMNS)
CUBLAS = HeadPlan(fused=False, tile_columns=CUBLAS_COLUMNS)


def scratch_columns(num_tokens: int, vocabulary: int, plan: HeadPlan) -> int:
    """Return how many columns of logits cuBLAS's scratch buffer has: whole tiles, in the budget."""
    tile = plan.tile_columns
    columns = max(1, plan.logits_bytes // (4 * num_tokens * tile)) * tile
    return min(columns, -(-vocabulary // tile) * tile)


def choose_plan(*matrices: torch.Tensor) -> HeadPlan:
    """Return FUSED wherever it can run."""
    return FUSED if can_fuse(*matrices) else CUBLAS


def can_fuse(*matrices: torch.Tensor) -> bool:
    """Return whether the matrices are bf16 with 16-byte aligned rows, on Hopper or newer.

    Without a GPU (in the interpreter, or when only compiling) the device is not checked.
    """
    device = matrices[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(tensor.dtype == torch.bfloat16 and is_aligned(tensor) for tensor in matrices)


def is_aligned(matrix: torch.Tensor) -> bool:
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0
