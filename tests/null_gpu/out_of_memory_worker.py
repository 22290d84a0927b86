"""A rank whose device is full at a named moment: RUN_DIR MOMENT ...; `none` runs to the end. Each
moment has a process of its own, which resumes the run; prints each one's exit code."""

import contextlib
import ctypes
import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

# what is called when memory runs out, and at which call of the process
MOMENTS = {
    "start": ("rlef_mega.parts", "make_learner", 1),
    "rollout": ("rlef_mega.engines.local:LocalEngine", "generate", 1),
    "score": ("rlef_mega.megatron.learner:Learner", "score", 1),
    "update": ("rlef_mega.megatron.learner:Learner", "update_policy", 3),  # of the second step
    # the resumed run publishes first of all, and has loaded a checkpoint
    "publish": ("rlef_mega.megatron.hf_weights", "gather_bucket", 2),
    "checkpoint": ("rlef_mega.megatron.learner:Learner", "whole", 2),
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


def run(folder: str, moment: str) -> None:
    from rlef_mega.config import TrainConfig, load_config
    from rlef_mega.run.launch import worker_main
    from rlef_mega.train import train

    sys.argv = ["rank", folder]
    if moment in MOMENTS:
        place, name, number = MOMENTS[moment]
        owner = pkgutil.resolve_name(place)
        setattr(owner, name, exhausting(getattr(owner, name), number))
    worker_main(lambda folder: train(load_config(folder / "config.toml", [], TrainConfig)))


def main(folder: str, *moments: str) -> None:
    with mock.patch("torch.cuda.is_available", lambda: True):  # it would forbid to fork
        importlib.import_module("rlef_mega.train")
    for moment in moments:
        Path(folder, ".failed").unlink(missing_ok=True)  # as the launcher does
        if not (child := os.fork()):
            run(folder, moment)
        print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
