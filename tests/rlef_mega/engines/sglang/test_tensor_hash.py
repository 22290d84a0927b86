"""The kernel of a tensor's hash: against the definition in Python's integers and a hash that SGLang
0.5.23's kernel gave, both in Triton's interpreter, in a process of its own; and its machine code.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from rlef_mega.engines.sglang.tensor_hash import tile_hashes
from rlef_mega.engines.sglang.weights import HASH_LANES, LOW_32, TILE_WORDS, finalized
from tests.kernels.compiler import compiled_for


def mixed(word: int) -> int:
    word = (word ^ word >> 16) * 0x85EBCA6B & LOW_32
    word = (word ^ word >> 13) * 0xC2B2AE35 & LOW_32
    return word ^ word >> 16


def tile_hash(words: list[int], first: int, length: int) -> int:
    halves = []
    for multiplier, seed, turn in HASH_LANES:
        total = 0
        for index, word in enumerate(words, first):
            salt = index * multiplier + seed & LOW_32
            total += mixed(word ^ salt ^ (index << turn | index >> (32 - turn)) & LOW_32)
        halves.append(mixed((total ^ length) & LOW_32))
    return halves[0] << 32 | halves[1]


def test_the_kernel_hashes_as_defined_and_as_sglang_does():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def compare() -> None:
    for count in (0, 1, 256, 257, 1000):
        generator = torch.Generator().manual_seed(count)
        words = torch.randint(-(2**31), 2**31, (count,), generator=generator).int()
        found = [number % 2**64 for number in tile_hashes(words, 256, *HASH_LANES).tolist()]
        unsigned = [word & LOW_32 for word in words.tolist()]
        parts = [(first, unsigned[first : first + 256]) for first in range(0, count, 256)]
        assert found == [tile_hash(part, first, 4 * count) for first, part in parts]
    words = torch.arange(85000, dtype=torch.int32)
    total = int(tile_hashes(words, TILE_WORDS, *HASH_LANES).sum())
    assert f"{finalized(total):016x}" == "ed36bfe30c26797a"  # test_weights.GPU_HASHES


def test_on_sm_90_the_kernel_reads_16_bytes_at_a_time_and_spills_nothing(tmp_path):
    words = torch.empty(2**20, dtype=torch.int32, device="meta")
    with compiled_for(90, tmp_path) as found:
        tile_hashes(words, TILE_WORDS, *HASH_LANES)
    (code,) = found.values()
    assert code.usage["STACK"] == code.usage["LOCAL"] == 0
    assert code.assembly.count("LDG") == code.assembly.count("LDG.E.128") > 0


if __name__ == "__main__":
    compare()
