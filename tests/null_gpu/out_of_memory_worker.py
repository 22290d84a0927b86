"""One rank of a run whose device is full at a named moment: RUN_DIR MOMENT; `none` runs to the
end."""

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from rlef_mega import parts
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.engines.local import LocalEngine
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.learner import Learner
from rlef_mega.run.launch import worker_main
from rlef_mega.train import train

# what is called when memory runs out, and at which call
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "start": (parts, "make_learner", 1),
    "rollout": (LocalEngine, "generate", 2),
    "score": (Learner, "score", 1),
    "update": (Learner, "update_policy", 3),  # of the second step
    "publish": (Learner, "policy_weights", 2),
    "checkpoint": (Checkpoints, "save", 1),
}


def exhausting(function: Callable, number: int) -> Callable:
    """Exhaust the device's memory at this call of the function."""
    calls = 0

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            torch.cuda.empty_cache()
            ctypes.CDLL(None).null_gpu_exhaust()
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
