"""How a head is computed: whose matrix product, in tiles of what size, with how much memory at a
time.

There are two ways, with the same results up to rounding and the same memory layout in between:

- *fused*: one Triton kernel multiplies and reduces, and no logit leaves the chip. Needs the tensor
  memory accelerator (Hopper and newer) and rows that start at multiples of 16 bytes.
- *cuBLAS*: the logits of some columns go to a scratch buffer that stays in the L2 cache (50 MB on
  an H100), in fp32, and a row kernel reduces them from there. Runs everywhere, for fp32 too.

`rlef bench kernels` measures both.
"""

from dataclasses import dataclass

import torch

MIB = 2**20
FUSED_COLUMNS = 256  # of a tile: the widest whose fp32 accumulator fits the registers of 8 warps
CUBLAS_COLUMNS = 1024  # of a row kernel's tile: 4 KiB of fp32, few enough partial sums


@dataclass(frozen=True)
class Plan:
    fused: bool
    tile_columns: int
    # Partial sums alive in the forward pass. 48 MiB: all of 8,192 tokens x 128,256 words.
    partials_bytes: int = 48 * MIB
    # cuBLAS only: logits in fp32, small enough for the L2 cache
    logits_bytes: int = 32 * MIB
    # The backward pass: gradients of a block of logits. Wide enough for full GEMM waves.
    gradient_bytes: int = 512 * MIB
    # Tokens of a block of the backward pass at most: bounds the fp32 gradient of hidden.
    gradient_tokens: int = 32768
    # The loss inside the head: shifted logits, then their gradients, of whole rows. As few chunks
    # as fit 1.1 GiB, because each reads and writes the whole fp32 gradient of the weight.
    row_bytes: int = 1024 * MIB


FUSED = Plan(fused=True, tile_columns=FUSED_COLUMNS)
CUBLAS = Plan(fused=False, tile_columns=CUBLAS_COLUMNS)


def scratch_columns(num_tokens: int, vocabulary: int, plan: Plan) -> int:
    """Columns of logits in the scratch buffer of the cuBLAS way: whole tiles, within its budget."""
    tile = plan.tile_columns
    columns = max(1, plan.logits_bytes // (4 * num_tokens * tile)) * tile
    return min(columns, -(-vocabulary // tile) * tile)


def choose_plan(*matrices: torch.Tensor) -> Plan:
    """Fused wherever it can run."""
    return FUSED if can_fuse(*matrices) else CUBLAS


def can_fuse(*matrices: torch.Tensor) -> bool:
    """bf16, on Hopper or newer, with 16-byte aligned rows. Off GPUs (the interpreter, the compiler)
    only the tensors decide.
    """
    device = matrices[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(tensor.dtype == torch.bfloat16 and is_aligned(tensor) for tensor in matrices)


def is_aligned(matrix: torch.Tensor) -> bool:
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0
