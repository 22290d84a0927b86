"""How fast the learner is: scoring and updating on a batch of the recipe's size, on the recipe's
ranks.

Run as a module it is the worker: `rlef bench train` launches it on all ranks, rank 0 writes what it
measured.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from rlef_mega import ppo
from rlef_mega.bench.figures import Figure, Report, shares
from rlef_mega.bench.workload import RESULT, Workload, random_episodes, workload
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.engines.publish import publish
from rlef_mega.megatron import parallel
from rlef_mega.megatron.learner import Learner
from rlef_mega.packing import pack, shuffled
from rlef_mega.parts import make_learner
from rlef_mega.preflight import model_shape
from rlef_mega.run.directory import Clock
from rlef_mega.run.launch import STOPPED, StopRequest, worker_main
from rlef_mega.run.ranks import any_rank
from rlef_mega.types import Batch, Targets

REPEATS = 5
LEARNING = ("pack", "score", "targets", "update")  # what makes an update out of episodes


def benchmark(recipe: str) -> Report:
    with workload(recipe) as work:
        measured = work.run("rlef_mega.bench.train")
        about = describe_work(work, measured)
    return Report(f"rlef bench train: {recipe}", about, figures(measured))


def describe_work(work: Workload, measured: dict) -> dict:
    config = work.config
    return work.about(
        batch={name: measured[name] for name in ("sequences", "tokens", "response_tokens")},
        updates_per_batch=config.ppo.updates_per_batch,
        threads_per_process=measured["threads"],
    )


def figures(measured: dict) -> tuple[Figure, ...]:
    tokens, phases = measured["tokens"], measured["phases"]

    def speed(name: str, *parts: str) -> Figure:
        seconds = [sum(times[part] for part in parts) for times in phases]
        return Figure(name, "tokens/s", tuple(tokens / s for s in seconds))

    policy = tuple(tokens / seconds for seconds in measured["policy_alone"])
    return (
        speed("scoring: policy, reference, critic", "score"),
        speed("updating: policy and critic", "update"),
        speed("learning: pack, score, targets, update", *LEARNING),
        Figure("policy alone: score with reference, update", "tokens/s", policy),
        *shares(phases),
    )


def work(folder: Path) -> int:
    config = load_config(folder / "config.toml", [], TrainConfig)
    ranks = parallel.initialize(config.parallel, seed=config.run.seed)
    stop = StopRequest(folder / "stop")
    learner = make_learner(config, ranks)
    vocabulary = model_shape(config)["vocab_size"]
    episodes = random_episodes(config.rollout, vocabulary, config.run.seed)
    phases, policy_alone = [], []
    for _ in range(1 + REPEATS):
        if any_rank(stop.requested()):
            return STOPPED
        clock = Clock()
        with clock("pack"):
            batch = pack(episodes)
        with clock("score"):
            scores = learner.score(batch)
        with clock("targets"):
            targets, _ = ppo.targets(batch, scores, config.ppo)
        order = shuffled(batch.num_sequences, config.run.seed)
        with clock("update"):
            learner.update(batch, targets, order)
        with clock("publish"):
            publish(learner.policy_weights, None, version=0)
        phases.append(clock.lap())
        dist.barrier()  # all ranks begin together
        clock = Clock()
        train_policy_alone(learner, batch, targets, order)
        policy_alone.append(clock.lap()["step"])
        dist.barrier()
    if ranks.is_writer:
        measured = {
            "sequences": batch.num_sequences,
            "tokens": batch.num_tokens,
            "response_tokens": batch.num_actions,
            "threads": torch.get_num_threads(),
            "phases": phases[1:],  # the first is the warm-up
            "policy_alone": policy_alone[1:],
        }
        (folder / RESULT).write_text(json.dumps(measured))
    parallel.shutdown(ranks)
    return 0


def train_policy_alone(
    learner: Learner, batch: Batch, targets: Targets, order: torch.Tensor
) -> None:
    """What a trainer without a critic does with a batch: old and reference log-probs, then the
    policy's updates."""
    everything = learner.cutting.cut(batch, range(batch.num_sequences))
    for model in (learner.policy, learner.reference):
        if model is not None:
            learner.outputs(model.chunks, everything, learner.read_logprobs)
    for part in order.view(learner.ppo.updates_per_batch, -1).tolist():
        learner.update_policy(batch, targets, part)


if __name__ == "__main__":
    worker_main(work)
