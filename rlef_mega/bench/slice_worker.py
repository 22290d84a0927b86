"""The workers of `rlef bench slice`: our learner's phases on the slice, and our policy update
beside Hugging Face's on the same batch.

Phases and sides are measured in turn, round after round, so other work on the machine affects all
alike. The peer must begin with our loss and gradient norm, or it is left out with the reason: then
the same work is compared.
"""

import dataclasses
import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlef_mega import ppo
from rlef_mega.bench.hf_policy import HEADS, HuggingFacePolicy, has_liger
from rlef_mega.bench.measure import peak_bytes, seconds, wall_seconds
from rlef_mega.bench.workload import REQUEST, describe_batch, run_rank, slice_episodes
from rlef_mega.config import TrainConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.learner import Learner, ReadFunction
from rlef_mega.megatron.network.accelerations import report
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.megatron.trained_model import FrozenModel, Residence, TrainedModel
from rlef_mega.packing import pack
from rlef_mega.parts import make_learner
from rlef_mega.types import Batch, Targets

Phases = dict[str, Callable[[], object]]
PRODUCTS = 10  # samples of the largest product's rate
OURS = "ours"
# Of the first loss, a mean of terms of about 1, and, relative, of the gradient norm: rounding, and
# the noise of another attention kernel.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
NORM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def measure(folder: Path, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    request = json.loads((folder / REQUEST).read_text())
    worker = with_peer if request["peer"] else all_phases
    return worker(request, config, ranks)


def all_phases(request: dict[str, Any], config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    device, dtype = ranks.device, getattr(torch, config.model.dtype)
    shape = LlamaShape(**request["shape"])
    learner = make_learner(config, ranks)
    batch, targets = on_policy_targets(learner, config, slice_batch(config, request))
    return {
        "matmul_flops": product_rates(device, dtype, request["microbatch_tokens"], shape),
        "batch": describe_batch(batch) | {"microbatches": request["microbatches"]},
        "lengths": batch.cu_seqlens.diff().tolist(),
        "accelerations": report(device, dtype),
        "load_average": os.getloadavg()[0],
    } | measure_phases(
        phases(learner, batch, targets), device, request["repeats"], request["deadline"]
    )


def slice_batch(config: TrainConfig, request: dict[str, Any]) -> Batch:
    episodes = slice_episodes(
        config.rollout,
        request["shape"]["vocabulary"],
        request["microbatch_tokens"],
        request["microbatches"],
        config.run.seed,
    )
    return pack(episodes)


def on_policy_targets(learner: Learner, config: TrainConfig, batch: Batch) -> tuple[Batch, Targets]:
    """Return the batch as if this policy had sampled it, so that ratios begin at 1 and few are
    clipped, and its targets."""
    scores = learner.score(batch)
    batch = dataclasses.replace(batch, behaviour_logprobs_A=scores.old_logprobs_A)
    targets, _ = ppo.targets(batch, scores, config.ppo)
    return batch, targets


def policy_update(learner: Learner, batch: Batch, targets: Targets) -> dict[str, float]:
    """Make one optimizer step of the policy on the whole batch."""
    return learner.update_policy(batch, targets, list(range(batch.num_sequences)))


def critic_update(learner: Learner, batch: Batch, targets: Targets) -> dict[str, float]:
    return learner.update_critic(batch, targets, list(range(batch.num_sequences)))


def phases(learner: Learner, batch: Batch, targets: Targets) -> Phases:
    """Return the parts of a training step, in its order."""
    everything = range(batch.num_sequences)
    policy, critic, reference = learner.policy, learner.critic, learner.reference
    assert policy and critic, "a slice is measured on ranks that hold all networks"

    def outputs(model: TrainedModel | FrozenModel, read: ReadFunction) -> Callable[[], object]:
        return lambda: learner.outputs(model.chunks, learner.cutting.cut(batch, everything), read)

    found: Phases = {
        "old log-probs": outputs(policy, learner.read_logprobs),
        "values": outputs(critic, learner.read_values),
        "critic update": lambda: critic_update(learner, batch, targets),
        "policy update": lambda: policy_update(learner, batch, targets),
        "policy optimizer step alone": policy.step,
        "weights gathered for publication": lambda: [None for _ in learner.policy_weights()],
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
    """Measure each phase's memory after a warm-up, then the seconds of all of them in turn."""
    samples: dict[str, list[float]] = {name: [] for name in found}
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
            samples[name].append(wall_seconds(phase, device))
    memory = {"resident_bytes": resident, "beyond_it_bytes": extra}
    return {"seconds": samples, "memory": memory, "unmeasured": unmeasured}


def product_rates(
    device: torch.device, dtype: torch.dtype, tokens: int, shape: LlamaShape
) -> list[float]:
    """Return samples of the FLOP/s that the vendor's library reaches in a layer's largest product
    (hidden to gate and up): what a step made of nothing but such products would reach."""
    hidden_TD = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    weight_FD = torch.randn(2 * shape.ffn, shape.hidden, device=device, dtype=dtype)
    flops = 2 * hidden_TD.numel() * weight_FD.shape[0]

    def multiply() -> None:
        torch.nn.functional.linear(hidden_TD, weight_FD)

    multiply()
    return [flops / seconds(multiply, device) for _ in range(PRODUCTS)]


# ------------------------------------------------------------------------------------- the peer


def with_peer(request: dict[str, Any], config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    # an update has no part for the reference
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"beta": 0.0})})
    learner = make_learner(config, ranks)
    batch, targets = on_policy_targets(learner, config, slice_batch(config, request))
    learner.critic = None  # its memory is for the peer
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    peer = HuggingFacePolicy(
        Path(config.model.path),
        ranks.device,
        getattr(torch, config.model.dtype),
        config.learner.policy,
        token_budget=request["microbatch_tokens"],
        temperature=config.rollout.temperature,
        clip_eps=config.ppo.clip_eps,
        recompute=config.model.recompute == "full",
    )
    liger = f"with Liger {version('liger-kernel')}" if has_liger(ranks.device) else "without Liger"
    return (
        describe_batch(batch)
        | {"peer": f"Hugging Face {liger}"}
        | compare_updates(
            lambda: policy_update(learner, batch, targets),
            peer,
            batch,
            targets,
            list(HEADS) if has_liger(ranks.device) else ["logits"],
            rounds=request["repeats"],
            deadline=request["deadline"],
        )
    )


def compare_updates(
    our_update: Callable[[], dict[str, float]],
    peer: HuggingFacePolicy,
    batch: Batch,
    targets: Targets,
    heads: Sequence[str],
    *,
    rounds: int,
    deadline: float,
) -> dict[str, Any]:
    """Return seconds of an update by side, a sample a round; the first losses and gradient norms;
    and what was not measured, with the reason."""
    first = {OURS: our_update()}
    unmeasured = []
    sides: dict[str, Callable[[], object]] = {OURS: our_update}
    # all gradients before the first update of the peer's weights
    for head in heads:
        name = f"Hugging Face, head: {head}"
        if time.time() > deadline:
            unmeasured.append(f"{name}: the time was up")
            continue
        try:
            first[name] = peer.gradients(batch, targets, head)
        # a peer may fail in its own ways, running out of memory among them
        except Exception as error:
            unmeasured.append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        if difference := differs(first[name], first[OURS], peer.dtype):
            unmeasured.append(f"{name}: {difference}")
        else:
            sides[name] = partial(peer.update, batch, targets, head)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    if len(sides) > 1:
        for update in sides.values():
            update()  # compiles, and makes the optimizers' state
        orders = itertools.cycle(itertools.permutations(sides))
        for _ in range(rounds):
            if time.time() > deadline:
                break
            for name in next(orders):
                samples[name].append(wall_seconds(sides[name], peer.device))
    return {"seconds": samples, "first": first, "unmeasured": unmeasured}


def differs(theirs: dict[str, float], ours: dict[str, float], dtype: torch.dtype) -> str:
    """Return how the first update differs from ours, "" if it does not."""
    limits = {
        "policy_loss": LOSS_TOLERANCE[dtype],
        "policy_grad_norm": NORM_TOLERANCE[dtype] * ours["policy_grad_norm"],
    }
    for name, limit in limits.items():
        if abs(theirs[name] - ours[name]) > limit:
            return f"computes a {name} of {theirs[name]}, not {ours[name]}"
    return ""


if __name__ == "__main__":
    run_rank(measure)
