"""An interpreter of seccomp's BPF, from the kernel's documentation, to test filters with."""

from __future__ import annotations

import struct
from collections.abc import Sequence

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant

LOAD_WORD, AND, RETURN, ALWAYS = 0x20, 0x54, 0x06, 0x05
CONDITIONS = {
    0x15: lambda value, constant: value == constant,
    0x25: lambda value, constant: value > constant,
    0x35: lambda value, constant: value >= constant,
    0x45: lambda value, constant: value & constant != 0,
}


def parsed(program: bytes) -> list[Instruction]:
    return list(struct.iter_unpack("<HBBI", program))


def run(
    program: Sequence[Instruction], architecture: int, number: int, arguments: Sequence[int] = ()
) -> int:
    """Return what the filter returns for a call. Raises IndexError at a jump past its end."""
    words = [argument & 2**64 - 1 for argument in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<IIQ6Q", number & 2**32 - 1, architecture, 0xDEAD, *words)
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, constant = program[position]
        position += 1
        if code == LOAD_WORD:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == AND:
            accumulator &= constant
        elif code == ALWAYS:
            position += constant
        elif code == RETURN:
            return constant
        else:
            position += if_true if CONDITIONS[code](accumulator, constant) else if_false
