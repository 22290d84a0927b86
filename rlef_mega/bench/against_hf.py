"""`rlef bench train --against-hf`: our policy update beside a plain training loop of Hugging Face
transformers and torch.optim.AdamW, on the CPU, in one process with one thread.

Same model, same episodes, one update's share of the recipe's batch; `hf_policy` says what exactly
the peer does, `beside_hf` how the two are measured. Run as a module it is the worker.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import torch

from rlef_mega import ppo
from rlef_mega.bench import beside_hf
from rlef_mega.bench.figures import Report, describe_benchmark
from rlef_mega.bench.hf_policy import HuggingFacePolicy
from rlef_mega.bench.workload import RESULT, random_episodes, workload
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.megatron import parallel
from rlef_mega.megatron.learner import Learner
from rlef_mega.packing import pack
from rlef_mega.parts import make_learner
from rlef_mega.preflight import model_shape
from rlef_mega.run.launch import worker_main
from rlef_mega.types import Batch, Targets

ROUNDS = 12
TIME_LIMIT_S = 300.0
# tokens a micro-batch of the peer: what attention reads of its cache, against calls
BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
GOAL = 0.9
PEER = "Hugging Face"


def benchmark(recipe: str) -> Report:
    with workload(recipe) as work:
        alone = work.in_one_process()
        measured = alone.run("rlef_mega.bench.against_hf")
        about = describe_benchmark(
            dtype=alone.config.model.dtype,
            model=alone.model,
            processes=1,
            threads_per_process=measured["threads"],
            # the benchmark is 1 of it; the rest is other work on the machine
            load_average=measured["load_average"],
            shared_machine=measured["load_average"] > 1.5,
            batch={name: measured[name] for name in ("sequences", "tokens", "response_tokens")},
            first_update=measured["first"],
            tried_seconds=measured["tried"],
        )
    rows = beside_hf.figures(measured, measured["tokens"], PEER)
    said = beside_hf.notes(measured, rows, PEER, GOAL)
    return Report(f"rlef bench train --against-hf: {recipe}", about, tuple(rows), tuple(said))


def work(folder: Path) -> int:
    deadline = time.time() + TIME_LIMIT_S
    torch.set_num_threads(1)
    config = load_config(folder / "config.toml", [], TrainConfig)
    ranks = parallel.initialize(config.parallel, seed=config.run.seed)
    learner = make_learner(config, ranks)
    batch = one_update(config)
    batch, targets = on_policy_targets(learner, config, batch)
    dtype = getattr(torch, config.model.dtype)
    peer = HuggingFacePolicy(
        Path(config.model.path),
        ranks.device,
        dtype,
        config.learner.policy,
        temperature=config.rollout.temperature,
        clip_eps=config.ppo.clip_eps,
    )
    duel = beside_hf.Duel(
        lambda: policy_update(learner, batch, targets),
        peer,
        batch,
        targets,
        ranks.device,
        dtype,
        deadline=deadline,
    )
    found = duel.run(beside_hf.ways(ranks.device, BUDGETS), ROUNDS)
    measured = dataclasses.asdict(found) | describe_batch(batch)
    measured |= {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    (folder / RESULT).write_text(json.dumps(measured))
    parallel.shutdown(ranks)
    return 0


def one_update(config: TrainConfig) -> Batch:
    """What one optimizer step takes of the recipe's batch."""
    vocabulary = model_shape(config)["vocab_size"]
    episodes = random_episodes(config.rollout, vocabulary, config.run.seed)
    share = len(episodes) // config.ppo.updates_per_batch
    return pack(episodes[:share])


def on_policy_targets(learner: Learner, config: TrainConfig, batch: Batch) -> tuple[Batch, Targets]:
    """The batch as if this policy had sampled it, so that ratios begin at 1 and few are clipped;
    and what its updates aim for.
    """
    scores = learner.score(batch)
    batch = dataclasses.replace(batch, behaviour_logprobs_A=scores.old_logprobs_A)
    targets, _ = ppo.targets(batch, scores, config.ppo)
    return batch, targets


def policy_update(learner: Learner, batch: Batch, targets: Targets) -> dict[str, float]:
    """One optimizer step of the policy on the whole batch."""
    everything = list(range(batch.num_sequences))
    return learner.update_policy(batch, targets, everything)


def critic_update(learner: Learner, batch: Batch, targets: Targets) -> dict[str, float]:
    everything = list(range(batch.num_sequences))
    return learner.update_critic(batch, targets, everything)


def describe_batch(batch: Batch) -> dict[str, int]:
    return {
        "sequences": batch.num_sequences,
        "tokens": batch.num_tokens,
        "response_tokens": batch.num_actions,
    }


if __name__ == "__main__":
    worker_main(work)
