"""`rlef bench slice RECIPE`: a training step of the recipe's model, cut to as many layers as fit
one device, phase by phase.

Run as a module it is the worker, one process, so that the networks begin with an empty device. It
measures phases in turn, round after round, so other work on the machine affects all equally, and
starts no round once its time is up. Nothing needs CUDA: on a CPU the same code runs, for example
on the demo's shape.

What is counted (`rlef_mega/flops.py`): causal attention, no embedding, no recomputation, no head
for the critic, and the policy's head only for response tokens, since its loss reads no others. The
usual convention counts the head for all tokens; that figure has its own row.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from rlef_mega.bench.measure import peak_bytes, peak_flops, seconds, wall_seconds
from rlef_mega.bench.random_model import find_shape, layers_that_fit, write_model
from rlef_mega.bench.results import Figure, Results
from rlef_mega.bench.workload import (
    Workload,
    describe_batch,
    fill_microbatches,
    random_episodes,
    run_rank,
)
from rlef_mega.config import (
    ConfigError,
    ParallelConfig,
    TrainConfig,
    dump_toml,
    find_recipe,
    load_config,
)
from rlef_mega.flops import LlamaShape, forward_flops, recomputed_flops, training_flops
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.network.accelerations import report
from rlef_mega.megatron.network.families import read_config
from rlef_mega.megatron.network.packed_llama import CriticModel
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.megatron.trained_model import (
    FrozenModel,
    ReadFunction,
    Residence,
    TrainedModel,
    forward,
)
from rlef_mega.packing import pack
from rlef_mega.parts import make_learner
from rlef_mega.plan.planned_run import RECOMPUTE
from rlef_mega.targets import targets_of
from rlef_mega.types import Batch, Targets

Phases = dict[str, Callable[[], object]]
MINUTES = 6.5  # after which no round is started; the command ends about half a minute later
MINUTES_FILE = "minutes"
REPEATS = 7
MICROBATCHES = 4  # of an update
GPU_TOKENS, CPU_TOKENS = 8192, 2048  # of a micro-batch
PRODUCTS = 10  # samples of the largest product's rate


def benchmark(
    recipe: str, *, layers: str = "auto", recompute: str = "none", minutes: float = MINUTES
) -> Results:
    """Measure the slice; `layers` is a number, or "auto" for as many as fit."""
    with slice_workload(recipe, layers, recompute, minutes=minutes) as work:
        measured = work.run("rlef_mega.bench.slice")
        shape = LlamaShape.of(read_config(Path(work.config.model.path)))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    # the table holds bfloat16 peaks
    peak = peak_flops(name) if work.config.model.dtype == "bfloat16" else None
    about = work.about(
        shape=vars(shape),
        recompute=recompute,
        peak_tflops=peak and peak / 1e12,
        **{of: measured[of] for of in ("accelerations", "batch", "memory", "load_average")},
    )
    late = REPEATS - min(map(len, measured["seconds"].values()))
    notes = (f"not measured: {late} of {REPEATS} repeats: the time was up",) if late else ()
    return Results(
        f"rlef bench slice: {recipe}",
        about,
        tuple(figures(shape, measured, recompute, peak)),
        notes,
    )


@contextmanager
def slice_workload(
    recipe: str, layers: str, recompute: str, *, beside: int = 0, minutes: float = MINUTES
) -> Iterator[Workload]:
    """Load the recipe for one process, with random weights for a slice of its model. `beside` is
    the memory that something else needs on the device, in bytes per parameter; the worker starts
    no round after `minutes`.

    Raises ConfigError for a bad option, or if not even one layer fits.
    """
    if recompute not in RECOMPUTE:
        raise ConfigError(f"--recompute {recompute}: known are {', '.join(RECOMPUTE)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(find_recipe(recipe), [], TrainConfig)
    whole = find_shape(config)
    with tempfile.TemporaryDirectory(prefix="rlef-slice-") as name:
        config = slice_config(config, Path(name) / "model", recompute, device)
        shape = whole.with_layers(how_many_layers(layers, config, whole, device, beside))
        dtype = getattr(torch, config.model.dtype)
        write_model(Path(config.model.path), shape, dtype, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the networks need all of it
        (Path(name) / "config.toml").write_text(dump_toml(config))
        (Path(name) / MINUTES_FILE).write_text(str(minutes))
        words = f"random weights, {shape.layers} of {whole.layers} layers"
        yield Workload(Path(name), config, words)


def slice_config(
    config: TrainConfig, model: Path, recompute: str, device: torch.device
) -> TrainConfig:
    """Return the recipe on one process with the slice as its model."""
    tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    context = min(config.rollout.max_context, tokens)
    network = {"path": str(model), "shape": None, "recompute": recompute}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=network),
            "learner": config.learner.model_copy(update={"microbatch_tokens": tokens}),
            "rollout": config.rollout.model_copy(update={"max_context": context}),
            "parallel": ParallelConfig(processes_per_node=1),
            "critic_parallel": None,
        }
    )


def how_many_layers(
    asked: str, config: TrainConfig, shape: LlamaShape, device: torch.device, beside: int
) -> int:
    if asked != "auto":
        if not asked.isdigit() or not 1 <= int(asked) <= shape.layers:
            raise ConfigError(f"--layers {asked}: a number from 1 to {shape.layers}, or auto")
        return int(asked)
    if device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory().available
    return layers_that_fit(config, shape, memory, beside=beside)


# ---------------------------------------------------------------------------------------- worker


def measure(folder: Path, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    deadline = time.monotonic() + 60 * float((folder / MINUTES_FILE).read_text())
    dtype, offloads = getattr(torch, config.model.dtype), config.learner.offload == "idle"
    resident = config.learner.model_copy(update={"offload": "none"})
    config_here = config.model_copy(update={"learner": resident})
    learner = make_learner(config_here, Path(config.model.path), ranks)
    batch, targets = on_policy_targets(learner, config, slice_batch(config))
    found = phases(learner, batch, targets, offloads=offloads)
    return {
        "matmul_flops": product_rates(ranks.device, dtype, config),
        "batch": describe_batch(batch) | {"microbatches": MICROBATCHES},
        "lengths": batch.cu_seqlens.diff().tolist(),
        "accelerations": report(ranks.device, dtype),
        "load_average": os.getloadavg()[0],
        **measure_phases(found, ranks.device, deadline),
    }


def slice_batch(config: TrainConfig) -> Batch:
    vocabulary = read_config(Path(config.model.path)).vocab_size
    episodes = random_episodes(config.rollout, vocabulary, config.run.seed)
    return pack(fill_microbatches(episodes, config.learner.microbatch_tokens, MICROBATCHES))


def on_policy_targets(learner: Learner, config: TrainConfig, batch: Batch) -> tuple[Batch, Targets]:
    """Return the batch as if this policy had sampled it, so that ratios begin at 1 and few are
    clipped, and its targets."""
    scores = learner.score(batch)
    batch = dataclasses.replace(batch, behaviour_logprobs_A=scores.old_logprobs_A)
    targets, _ = targets_of(batch, scores, config.ppo)
    return batch, targets


def phases(learner: Learner, batch: Batch, targets: Targets, *, offloads: bool) -> Phases:
    """Return the parts of a training step, in its order. With `offloads`, also the moves of an idle
    policy to the host (into pinned memory, if the device is a GPU) and back."""
    everything = range(batch.num_sequences)
    policy, critic, reference = learner.policy, learner.critic, learner.reference
    assert policy, "a slice is measured on ranks that hold all networks"

    def outputs(model: TrainedModel | FrozenModel, read: ReadFunction) -> Callable[[], object]:
        return lambda: forward(
            model.chunks, learner.ranks, learner.cutting.cut(batch, everything), read
        )

    found: Phases = {"old log-probs": outputs(policy, learner.read_logprobs)}
    if critic is not None:
        found["values"] = outputs(critic, CriticModel.values)
        found["critic update"] = lambda: learner.update_critic(batch, targets, everything)
    found |= {
        "policy update": lambda: learner.update_policy(batch, targets, everything),
        "policy optimizer step alone": policy.step,
        "weights gathered for publication": lambda: [None for _ in learner.policy_weights()],
    }
    if offloads:  # in this order only
        found["policy to the host"] = lambda: policy.reside(Residence.NOTHING)
        found["policy back on the device"] = lambda: policy.reside(Residence.TRAINING)
    if reference is not None:
        found = {"reference log-probs": outputs(reference, learner.read_logprobs), **found}
    return found


def measure_phases(found: Phases, device: torch.device, deadline: float) -> dict[str, Any]:
    """Run every phase once to warm up, measure the peak memory of each, then time them in turn."""
    samples: dict[str, list[float]] = {name: [] for name in found}
    for phase in found.values():
        phase()  # compiles, and makes the optimizer's state
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    beyond = {name: peak_bytes(phase, device) for name, phase in found.items()}
    for _ in range(REPEATS):
        if time.monotonic() > deadline:
            break
        for name, phase in found.items():
            samples[name].append(wall_seconds(phase, device))
    memory = {"resident_bytes": resident, "beyond_it_bytes": beyond}
    return {"seconds": samples, "memory": memory}


def product_rates(device: torch.device, dtype: torch.dtype, config: TrainConfig) -> list[float]:
    """Return samples of the FLOP/s that the vendor's library reaches in a layer's largest product
    (hidden to gate and up). A step of nothing but such products would reach it."""
    shape = LlamaShape.of(read_config(Path(config.model.path)))
    tokens = config.learner.microbatch_tokens
    hidden_TD = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    weight_FD = torch.randn(2 * shape.ffn, shape.hidden, device=device, dtype=dtype)
    flops = 2 * hidden_TD.numel() * weight_FD.shape[0]

    def multiply() -> None:
        torch.nn.functional.linear(hidden_TD, weight_FD)

    multiply()
    return [flops / seconds(multiply, device) for _ in range(PRODUCTS)]


# --------------------------------------------------------------------------------------- figures


def figures(
    shape: LlamaShape, measured: dict[str, Any], recompute: str, peak: float | None
) -> Iterator[Figure]:
    lengths, read = measured["lengths"], measured["batch"]["response_tokens"]
    flops = {
        "policy update": training_flops(shape, lengths, read),
        "critic update": training_flops(shape, lengths, 0),
        "old log-probs": forward_flops(shape, lengths, read),
        "reference log-probs": forward_flops(shape, lengths, read),
        "values": forward_flops(shape, lengths, 0),
    }

    def rates(row: str, quantity: str, flops: int, times: Sequence[float]) -> Iterator[Figure]:
        yield Figure(f"{row} | {quantity}", "TFLOP/s", tuple(flops / s / 1e12 for s in times))
        if peak and quantity == "model":
            yield Figure(f"{row} | utilisation", "share", tuple(flops / s / peak for s in times))

    for phase, times in measured["seconds"].items():
        if times:
            yield Figure(f"{phase} | time", "s", tuple(times))
        if times and phase in flops:
            speeds = tuple(sum(lengths) / s for s in times)
            yield Figure(f"{phase} | speed", "tokens/s", speeds)
            yield from rates(phase, "model", flops[phase], times)
        if times and phase.endswith("update") and recompute != "none":
            again = recomputed_flops(shape, lengths, recompute)
            yield from rates(phase, "hardware", flops[phase] + again, times)
        if times and phase == "policy update":
            everywhere = training_flops(shape, lengths)
            yield from rates(f"{phase}, head counted everywhere", "model", everywhere, times)
        beyond = measured["memory"]["beyond_it_bytes"][phase]
        yield Figure(f"{phase} | memory beyond resident", "MiB", (beyond / 2**20,))
    roof = tuple(rate / 1e12 for rate in measured["matmul_flops"])
    yield Figure("largest product alone | model", "TFLOP/s", roof)


if __name__ == "__main__":
    run_rank(measure)
