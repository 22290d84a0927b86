"""One rank of a run whose device is full at a named moment: RUN_DIR MOMENT; `none` runs to the
end."""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlef_mega import parts
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.megatron.learner import Learner
from rlef_mega.run.launch import worker_main
from rlef_mega.train import train

# what is called when memory runs out, and at which call
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "start": (parts, "make_learner", 1),
    "score": (Learner, "score", 1),
    "update": (Learner, "update_policy", 3),  # of the second step
}


held: list[torch.Tensor] = []


def rest_of_the_cache() -> Iterator[torch.Tensor]:
    """Take what PyTorch's allocator still has, in ever smaller pieces."""
    for bits in range(24, 8, -1):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                yield torch.empty(2**bits, dtype=torch.uint8, device="cuda")


def exhausting(function: Callable, number: int) -> Callable:
    """Exhaust the device's memory at this call of the function."""
    calls = 0

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            ctypes.CDLL(None).null_gpu_exhaust()
            held.extend(rest_of_the_cache())
        return function(*args, **kwargs)

    return call


def main(run: str, moment: str) -> None:
    sys.argv = ["rank", run]
    if moment in MOMENTS:
        owner, name, number = MOMENTS[moment]
        setattr(owner, name, exhausting(getattr(owner, name), number))
    worker_main(lambda folder: train(load_config(folder / "config.toml", [], TrainConfig)))


if __name__ == "__main__":
    main(*sys.argv[1:])
