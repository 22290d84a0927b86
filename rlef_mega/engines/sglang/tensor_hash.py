"""Compute the hash that SGLang's servers on GPUs report of a tensor, tile by tile in one launch.

One program of the kernel hashes one tile of words: it mixes each word twice with its index (two
lanes), sums each lane, and mixes the sums with the length into the halves of one 64-bit number.
This takes about 40 integer operations and reads 4 bytes per word, and writes 8 bytes per tile.

Shape suffixes: W 32-bit words, of a tile in the kernel; T tiles.
"""

import torch
import triton
import triton.language as tl

Lane = tuple[int, int, int]  # multiplier, seed and rotation of the index


@triton.jit
def mixed(words):
    """Apply MurmurHash3's 32-bit finalizer."""
    words ^= words >> 16
    words *= 0x85EBCA6B
    words ^= words >> 13
    words *= 0xC2B2AE35
    return words ^ (words >> 16)


@triton.jit
def lane_hash(
    words_W,
    index_W,
    inside_W,
    length,
    MULTIPLIER: tl.constexpr,
    SEED: tl.constexpr,
    TURN: tl.constexpr,
):
    """Return one half of a tile's number."""
    salt_W = index_W * MULTIPLIER + SEED
    salt_W ^= (index_W << TURN) | (index_W >> (32 - TURN))
    mixed_W = tl.where(inside_W, mixed(words_W ^ salt_W), 0)
    total = tl.sum(mixed_W.to(tl.uint64), 0).to(tl.uint32)  # modulo 2^32
    return mixed(total ^ length).to(tl.uint64)


@triton.jit(do_not_specialize=["length"])
def tile_hash_kernel(
    words_ptr, hashes_ptr, num_words, length, W: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr
):
    tile = tl.program_id(0)
    at_W = tile.to(tl.int64) * W + tl.arange(0, W)
    inside_W = at_W < num_words
    words_W = tl.load(words_ptr + at_W, mask=inside_W, other=0).to(tl.uint32, bitcast=True)
    index_W = at_W.to(tl.uint32)
    length = length.to(tl.uint32)
    high = lane_hash(words_W, index_W, inside_W, length, HIGH[0], HIGH[1], HIGH[2])
    low = lane_hash(words_W, index_W, inside_W, length, LOW[0], LOW[1], LOW[2])
    tl.store(hashes_ptr + tile, ((high << 32) | low).to(tl.int64, bitcast=True))


def tile_hashes(words_W: torch.Tensor, tile_words: int, high: Lane, low: Lane) -> torch.Tensor:
    """Return the 64-bit hash of each tile of int32 words, as int64 [T]; their sum modulo 2^64,
    finalized, is the tensor's hash."""
    num_words = words_W.shape[0]
    assert num_words < 2**32, "an index has 32 bits"
    tiles = triton.cdiv(num_words, tile_words)
    hashes_T = torch.empty(tiles, dtype=torch.int64, device=words_W.device)
    if tiles:
        length = 4 * num_words & (2**32 - 1)
        tile_hash_kernel[(tiles,)](
            words_W,
            hashes_T,
            num_words,
            length,
            W=tile_words,
            HIGH=high,
            LOW=low,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return hashes_T
