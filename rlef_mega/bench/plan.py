"""The planner beside a real learner on this machine's CPU: memory of the process, and seconds of
scoring and of an update, in processor time, so that other work on the machine does not count.
Written as `benchmarks/results/plan_cpu.json`.

Three models in fp32 with random weights, each in one process with one thread. The demo's is so
small that the interpreter is most of its memory, and calls are most of its time. The rate of the
largest product is measured in the same process, and the plan takes it for the device's; which part
of it a pass reaches is a round number in `plan/hardware.py`, so that the two larger models lie on
both sides of it.

Run as a module it is the worker.
"""

import json
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from rlef_mega import ppo
from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.slice_model import REQUEST, demo_shape, write_model
from rlef_mega.bench.workload import RESULT, random_episodes
from rlef_mega.config import TrainConfig, dump_toml, find_recipe, load_config
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron import parallel
from rlef_mega.packing import pack, shuffled
from rlef_mega.parts import make_learner
from rlef_mega.plan.hardware import this_cpu
from rlef_mega.plan.planned_run import PlannedRun
from rlef_mega.plan.rollouts import DialogueLengths, DialogueSample
from rlef_mega.plan.step_time import TRAINING
from rlef_mega.run.launch import launch, worker_main

SHAPES = {
    "demo": demo_shape(),
    "8M": LlamaShape(8, 256, 704, 8, 4, 32, vocabulary=4096),
    "28M": LlamaShape(8, 512, 1408, 8, 4, 64, vocabulary=4096),
}
REPEATS = 3
EPISODES = {"demo": 256, "8M": 32, "28M": 16}


def benchmark() -> Report:
    figures: list[Figure] = []
    for name, shape in SHAPES.items():
        figures += compare(name, shape, EPISODES[name], REPEATS)
    return Report(
        "rlef bench plan: a learner on a CPU beside its plan",
        describe_benchmark(layout="one process, one thread, fp32", load_average=os.getloadavg()[0]),
        tuple(figures),
        pivoted=True,
    )


def compare(name: str, shape: LlamaShape, episodes: int, repeats: int) -> list[Figure]:
    """A model of this shape, with so many episodes a batch, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="rlef-plan-") as place:
        folder = Path(place)
        write_model(folder / "model", shape, torch.float32, torch.device("cpu"))
        overrides = (
            f"model.path={json.dumps(str(folder / 'model'))}",
            "parallel.tensor_model_parallel_size=1",
            "learner.microbatch_tokens=2048",
            f"rollout.episodes_per_batch={episodes}",
        )
        config = load_config(find_recipe("demo"), list(overrides), TrainConfig)
        (folder / "config.toml").write_text(dump_toml(config))
        (folder / REQUEST).write_text(json.dumps({"shape": vars(shape), "repeats": repeats}))
        code = launch("rlef_mega.bench.plan", folder, 1)
        if code:
            raise RuntimeError(f"the worker ended with exit code {code}")
        measured = json.loads((folder / RESULT).read_text())
    planned = plan(config, shape, measured)
    rows = {
        "peak memory": ("MiB", [b / 2**20 for b in measured["peak_bytes"]]),
        "memory of the learner": ("MiB", [b / 2**20 for b in measured["learner_bytes"]]),
        "score": ("s", measured["score_s"]),
        "update": ("s", measured["update_s"]),
    }
    found = []
    for what, (unit, samples) in rows.items():
        found.append(Figure(f"{name}, {what} | measured", unit, tuple(samples)))
        found.append(Figure(f"{name}, {what} | planned", unit, (planned[what],)))
        ratio = planned[what] / median(samples)
        found.append(Figure(f"{name}, {what} | planned / measured", "ratio", (ratio,)))
    return found


def plan(config: TrainConfig, shape: LlamaShape, measured: dict[str, Any]) -> dict[str, float]:
    """For the lengths and the rate of products that the worker saw."""
    drawn = tuple(DialogueLengths(*each) for each in measured["dialogues"])
    job = replace(PlannedRun.of(config, shape, on_cpu=True), dialogues=DialogueSample(drawn))
    device = replace(this_cpu(), flops=median(measured["matmul_flops"]))
    load = job.load(job.policy, TRAINING)
    tokens = round(load.tokens / load.microbatches)
    state = sum(
        network.weights(0) + network.gradients(0) + network.optimizer(0)
        for network in (job.policy, job.critic)
    )
    work = max(
        network.activations(0, tokens, load.microbatches)
        + network.scratch(0, tokens, round(load.read / load.microbatches))
        for network in (job.policy, job.critic)
    )
    learner = state + job.policy.weights(0) + work
    step = job.step(device, 0)
    return {
        "peak memory": (measured["base_bytes"] + learner) / 2**20,
        "memory of the learner": learner / 2**20,
        "score": step.score,
        "update": step.update,
    }


def product_rates(tokens: int, shape: LlamaShape) -> list[float]:
    """FLOP/s of the largest product of a layer."""
    hidden_TD, weight_FD = (
        torch.randn(tokens, shape.hidden),
        torch.randn(2 * shape.ffn, shape.hidden),
    )
    calls = 1 + 10**10 // (2 * hidden_TD.numel() * weight_FD.shape[0])
    rates = []
    for _ in range(5):
        begun = time.process_time()
        for _ in range(calls):
            torch.nn.functional.linear(hidden_TD, weight_FD)
        seconds = time.process_time() - begun
        rates.append(calls * 2 * hidden_TD.numel() * weight_FD.shape[0] / seconds)
    return rates


def work(folder: Path) -> int:
    config = load_config(folder / "config.toml", [], TrainConfig)
    request = json.loads((folder / REQUEST).read_text())
    shape = LlamaShape(**request["shape"])
    ranks = parallel.initialize(config.parallel, seed=config.run.seed)
    torch.set_num_threads(1)
    episodes = random_episodes(config.rollout, shape.vocabulary, config.run.seed)
    rates = product_rates(config.learner.microbatch_tokens, shape)
    base = psutil.Process().memory_info().rss
    learner = make_learner(config, ranks)
    batch = pack(episodes)
    score_s, update_s = [], []
    for repeat in range(1 + request["repeats"]):
        started = time.process_time()
        scores = learner.score(batch)
        scored = time.process_time()
        targets, _ = ppo.targets(batch, scores, config.ppo)
        begun = time.process_time()
        learner.update(batch, targets, shuffled(batch.num_sequences, config.run.seed))
        if repeat:  # the first warms up
            score_s.append(scored - started)
            update_s.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {
        "base_bytes": base,
        "peak_bytes": [peak],
        "learner_bytes": [peak - base],
        "score_s": score_s,
        "update_s": update_s,
        "matmul_flops": rates,
        "dialogues": [
            [
                len(e.token_ids),
                sum(len(turn.completion.token_ids) for turn in e.turns),
                len(e.turns),
            ]
            for e in episodes
        ],
    }
    (folder / RESULT).write_text(json.dumps(measured))
    parallel.shutdown(ranks)
    return 0


if __name__ == "__main__":
    worker_main(work)
