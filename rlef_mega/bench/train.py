"""`rlef bench train`: scoring and updating a batch of the recipe's size, on the recipe's ranks.

Run as a module it is the worker: the command launches it on all ranks, and rank 0 writes what it
measured.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlef_mega.bench.results import Figure, Results, shares
from rlef_mega.bench.workload import describe_batch, random_batch, run_rank, workload
from rlef_mega.config import TrainConfig
from rlef_mega.engines.publish import publish
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.packing import pack, shuffled
from rlef_mega.parts import make_learner
from rlef_mega.preflight import model_shape
from rlef_mega.run.directory import Clock
from rlef_mega.targets import targets_of

REPEATS = 5
LEARNING = ("pack", "score", "targets", "update")  # from episodes to new weights


def benchmark(recipe: str) -> Results:
    with workload(recipe) as work:
        measured = work.run("rlef_mega.bench.train")
        about = work.about(
            batch=measured["batch"],
            updates_per_batch=work.config.ppo.updates_per_batch,
            threads_per_process=measured["threads"],
        )
    return Results(f"rlef bench train: {recipe}", about, figures(measured))


def figures(measured: dict[str, Any]) -> tuple[Figure, ...]:
    tokens, phases = measured["batch"]["tokens"], measured["phases"]

    def speed(name: str, *parts: str) -> Figure:
        seconds = [sum(times[part] for part in parts) for times in phases]
        return Figure(name, "tokens/s", tuple(tokens / s for s in seconds))

    return (
        speed("scoring: policy, reference, critic", "score"),
        speed("updating: policy and critic", "update"),
        speed("learning: pack, score, targets, update", *LEARNING),
        *shares(phases),
    )


def measure(folder: Path, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    learner = make_learner(config, Path(config.model.path), ranks)
    vocabulary = model_shape(config).vocabulary
    episodes = random_batch(config.rollout, vocabulary, config.run.seed)
    phases = []
    for _ in range(1 + REPEATS):
        dist.barrier()  # all ranks begin together
        clock = Clock()
        with clock("pack"):
            batch = pack(episodes)
        with clock("score"):
            scores = learner.score(batch)
        with clock("targets"):
            targets, _ = targets_of(batch, scores, config.ppo)
        order = shuffled(batch.num_sequences, config.run.seed)
        with clock("update"):
            learner.update(batch, targets, order)
        with clock("publish"):
            publish(learner.policy_weights, None, version=0)
        phases.append(clock.lap())
    return {
        "batch": describe_batch(batch),
        "threads": torch.get_num_threads(),
        "phases": phases[1:],  # the first is the warm-up
    }


if __name__ == "__main__":
    run_rank(measure)
