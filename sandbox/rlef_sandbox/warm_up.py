"""Runs of programs in the zygote itself, before it forks.

When code runs, the interpreter fills caches: one of types' attributes, and one in each instruction,
of the types it met. A child that fills them writes to pages that it shares with the zygote, and the
kernel has to copy these. Runs in the zygote save a tenth of the copies.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from . import exchange, values
from .program import EXCHANGE_DESCRIPTOR, Child

REPETITIONS = 16  # the interpreter adapts an instruction after 8
PROGRAM = b"""
import sys
def total(numbers):
    return sum(numbers)
def check(candidate):
    assert candidate([1, 2]) == 3
print(total(map(int, sys.stdin.readline().split())))
"""
# The call of a run, and what the other process of a CheckTest sends to it.
RUNS = (
    (b"", b""),
    (b'{"entry_point": "total", "args": "[[1,2]]"}', b""),
    (b'{"serve": "total"}', values.encode([[[1, 2]], {}])),
    (b'{"check": "check"}', exchange.RETURNED + values.encode(3)),
)


def warm_up(child_of: Callable[[int], Child], reserve_low_descriptors: Callable[[], None]) -> None:
    """Run PROGRAM in this process. `child_of` makes a run's Child, given how many files it has."""
    main = sys.modules["__main__"]
    for call, message in RUNS * REPETITIONS:
        files = [_file(call)] if call else []
        if message:
            ours, theirs = socket.socketpair()
            files.append(ours.detach())
            exchange.send(theirs.fileno(), message)
            theirs.shutdown(socket.SHUT_WR)
        files.append(_file(PROGRAM))
        for target, file in enumerate(files, EXCHANGE_DESCRIPTOR):
            os.dup2(file, target)
            os.close(file)
        child = child_of(EXCHANGE_DESCRIPTOR + len(files))
        exec(child.code, child.namespace)
        child.call()
        child.end()
        reserve_low_descriptors()
    sys.stdout.seek(0)
    sys.modules["__main__"] = main


def _file(content: bytes) -> int:
    file = os.memfd_create("warm-up")
    os.write(file, content)
    return file
