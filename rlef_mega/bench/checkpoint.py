"""`rlef bench checkpoint`: how long training waits for a checkpoint, how much slower it runs during
the write, and how long resuming takes.

Run as a module it is the worker, which the command launches on the recipe's ranks.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rlef_mega.bench.results import Figure, Results
from rlef_mega.bench.workload import random_batch, run_rank, workload
from rlef_mega.config import TrainConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.checkpoints.files import read_manifest, step_folder
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.packing import pack, shuffled
from rlef_mega.parts import make_learner
from rlef_mega.preflight import model_shape
from rlef_mega.targets import targets_of

REPEATS = 5
EPISODES = 4  # of a step, so that a step takes a few seconds on two cores
# without the recipe's model on this machine: large enough that a save takes a while
LARGE = LlamaShape(8, 512, 1408, 8, 4, 64, vocabulary=8192)


def benchmark(recipe: str) -> Results:
    with workload(recipe, otherwise=LARGE) as work:
        measured = work.run("rlef_mega.bench.checkpoint")
    about = work.about(
        tokens_per_step=measured["tokens"], checkpoint_MiB=round(measured["bytes"] / 2**20)
    )
    figures = [Figure(name, "s", tuple(samples)) for name, samples in measured["seconds"].items()]
    return Results(f"rlef bench checkpoint: {recipe}", about, tuple(figures))


def measure(folder: Path, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    learner = make_learner(config, Path(config.model.path), ranks)
    episodes = random_batch(config.rollout, model_shape(config).vocabulary, config.run.seed)
    batch = pack(episodes[: max(EPISODES, config.ppo.updates_per_batch)])
    order = shuffled(batch.num_sequences, config.run.seed)

    def step() -> None:
        targets, _ = targets_of(batch, learner.score(batch), config.ppo)
        learner.update(batch, targets, order)

    checkpoints = Checkpoints(folder / "asynchronous", learner, keep=1)
    waiting = Checkpoints(folder / "synchronous", learner, keep=1, asynchronous=False)
    step()
    checkpoints.save(0, {})  # makes the host buffer
    checkpoints.require_saved()
    waiting.save(0, {})
    seconds = defaultdict(list)
    for number in range(1, 1 + REPEATS):
        seconds["a step with nothing in flight"].append(timed(step))
        waits = timed(partial(checkpoints.save, number, {}))
        seconds["a step during a save"].append(timed(step))
        while checkpoints.saving is not None:
            waits += timed(checkpoints.poll)
            time.sleep(0.001)
        seconds["training waits, asynchronous"].append(waits)
        seconds["training waits, synchronous"].append(timed(partial(waiting.save, number, {})))
        newest = step_folder(folder / "asynchronous", number)
        seconds["resuming: checksums and reading"].append(timed(checkpoints.resume))
    return {
        "tokens": batch.num_tokens,
        "bytes": sum(entry["bytes"] for entry in read_manifest(newest).values()),
        "seconds": seconds,
    }


def timed(action: Callable[[], object]) -> float:
    dist.barrier()  # all ranks begin together
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


if __name__ == "__main__":
    run_rank(measure)
