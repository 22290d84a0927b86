"""A worker of `rlef bench slice`: our learner's phases on the slice, in turn, round after round."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlef_mega.bench.against_hf import (
    critic_update,
    describe_batch,
    on_policy_targets,
    policy_update,
)
from rlef_mega.bench.devices import matmul_roof
from rlef_mega.bench.measure import peak_bytes, wall_seconds
from rlef_mega.bench.slice_model import REQUEST, slice_episodes
from rlef_mega.bench.workload import RESULT
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron import parallel
from rlef_mega.megatron.learner import Learner, ReadFunction
from rlef_mega.megatron.network.accelerations import report
from rlef_mega.megatron.trained_model import FrozenModel, Residence, TrainedModel
from rlef_mega.packing import pack
from rlef_mega.parts import make_learner
from rlef_mega.run.launch import worker_main
from rlef_mega.types import Batch, Targets

Phases = dict[str, Callable[[], object]]


def work(folder: Path) -> int:
    config = load_config(folder / "config.toml", [], TrainConfig)
    request = json.loads((folder / REQUEST).read_text())
    ranks = parallel.initialize(config.parallel, seed=config.run.seed)
    device, dtype = ranks.device, getattr(torch, config.model.dtype)
    shape = LlamaShape(**request["shape"])
    learner = make_learner(config, ranks)
    batch, targets = on_policy_targets(learner, config, slice_batch(config, shape, request))
    measured: dict[str, Any] = {
        "matmul_flops": matmul_roof(device, dtype, request["microbatch_tokens"], shape),
        "batch": describe_batch(batch) | {"microbatches": request["microbatches"]},
        "lengths": batch.cu_seqlens.diff().tolist(),
        "accelerations": report(device, dtype),
        "load_average": os.getloadavg()[0],
    }
    measured |= measure_phases(
        phases(learner, batch, targets), device, request["repeats"], request["deadline"]
    )
    (folder / RESULT).write_text(json.dumps(measured))
    parallel.shutdown(ranks)
    return 0


def slice_batch(config: TrainConfig, shape: LlamaShape, request: dict[str, Any]) -> Batch:
    episodes = slice_episodes(
        config.rollout,
        shape.vocabulary,
        request["microbatch_tokens"],
        request["microbatches"],
        config.run.seed,
    )
    return pack(episodes)


def phases(learner: Learner, batch: Batch, targets: Targets) -> Phases:
    """What a training step is made of, in its order."""
    everything = range(batch.num_sequences)

    policy, critic, reference = learner.policy, learner.critic, learner.reference
    assert policy and critic, "a slice is measured on ranks that hold all networks"

    def outputs(model: TrainedModel | FrozenModel, read: ReadFunction) -> Callable[[], object]:
        return lambda: learner.outputs(model.chunks, learner.cutting.cut(batch, everything), read)

    def gather() -> None:
        for _ in learner.policy_weights():
            pass

    found: Phases = {
        "old log-probs": outputs(policy, learner.read_logprobs),
        "values": outputs(critic, learner.read_values),
        "critic update": lambda: critic_update(learner, batch, targets),
        "policy update": lambda: policy_update(learner, batch, targets),
        "policy optimizer step alone": policy.step,
        "weights gathered for publication": gather,
        # all that an idle policy leaves to others, and back: the two go together
        "policy to the host": lambda: policy.reside(Residence.NOTHING),
        "policy back on the device": lambda: policy.reside(Residence.TRAINING),
    }
    if reference is not None:
        found = {"reference log-probs": outputs(reference, learner.read_logprobs), **found}
    return found


def measure_phases(
    found: Phases, device: torch.device, repeats: int, deadline: float
) -> dict[str, Any]:
    """Each once to warm up, with its memory; then all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    extra, unmeasured = {}, []
    for phase in found.values():
        phase()  # compiles, and makes the optimizer's state
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    for name, phase in found.items():
        if time.time() > deadline:
            break
        extra[name] = peak_bytes(phase, device)
    for number in range(repeats):
        if time.time() > deadline:
            unmeasured.append(f"{repeats - number} of {repeats} repeats: the time was up")
            break
        for name, phase in found.items():
            seconds[name].append(wall_seconds(phase, device))
    memory = {"resident_bytes": resident, "beyond_it_bytes": extra}
    return {"seconds": seconds, "memory": memory, "unmeasured": unmeasured}


if __name__ == "__main__":
    worker_main(work)
