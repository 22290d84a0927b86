"""`rlef bench slice RECIPE`: a training step of the recipe's model, cut to as many layers as fit
one device, phase by phase, and its policy update beside Hugging Face's with Liger's kernels.

Theory of operation. The command writes the slice's random weights and a request into a temporary
folder and starts workers (`slice_worker`) one after the other, each a process of its own, so that
each begins with an empty device: one for the phases of each recompute mode, and one beside the
peer. Every worker gets the
same deadline, starts no measurement after it and writes what it has; one that fails loses its own
figures, and the results give the reason. Nothing needs CUDA: on a CPU the same code runs on the
demo's shape.

Counting (`rlef_mega/flops.py`): causal attention, no embedding, no recomputation, the critic
without a head, and of the head's products those for the response tokens, the only ones its loss
reads. The usual convention counts the head for all tokens; that figure stands apart.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from rlef_mega.bench.measure import device_name, peak_flops
from rlef_mega.bench.random_model import find_shape, layers_that_fit, write_model
from rlef_mega.bench.results import Figure, Results, describe_benchmark
from rlef_mega.bench.workload import REQUEST, run_worker
from rlef_mega.config import (
    ConfigError,
    ParallelConfig,
    TrainConfig,
    dump_toml,
    find_recipe,
    load_config,
)
from rlef_mega.flops import LlamaShape, forward_flops, recomputed_flops, training_flops

TIME_LIMIT_S = 390.0  # of the 7 minutes that the command may take: the last measurement ends too
REPEATS = 7
RECOMPUTE = ("none", "selective", "full")
UPDATES = ("policy update", "critic update")


def benchmark(
    recipe: str,
    *,
    layers: str = "auto",
    recompute: str = "none",
    microbatch_tokens: int = 0,
    microbatches: int = 4,
    repeats: int = REPEATS,
    dtype: str | None = None,
    limit_s: float = TIME_LIMIT_S,
) -> Results:
    """Measure the slice.

    `layers` is a number, or "auto" for what fits; `recompute` lists modes separated by commas, and
    the first is the one whose phases are all measured. `microbatch_tokens` 0 means 8,192 on a GPU
    and 2,048 elsewhere. An update has `microbatches` of them.
    """
    deadline = time.time() + limit_s
    modes = recompute.split(",")
    if unknown := set(modes) - set(RECOMPUTE):
        raise ConfigError(f"--recompute {sorted(unknown)}: known are {', '.join(RECOMPUTE)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(find_recipe(recipe), [], TrainConfig)
    if dtype:
        model = config.model.model_copy(update={"dtype": dtype})
        config = config.model_copy(update={"model": model})
    torch_dtype = getattr(torch, config.model.dtype)
    tokens = microbatch_tokens or (8192 if device.type == "cuda" else 2048)
    whole = find_shape(recipe)
    shape = whole.with_layers(how_many_layers(layers, whole, device, torch_dtype, tokens))
    request = {
        "microbatches": microbatches,
        "microbatch_tokens": tokens,
        "repeats": repeats,
        "deadline": deadline,
        "shape": vars(shape),
    }
    with tempfile.TemporaryDirectory(prefix="rlef-slice-") as name:
        write_model(Path(name) / "model", shape, torch_dtype, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the workers need all of it
        found, failures = run_workers(Path(name), config, request, modes)
    name = device_name(device)
    # the table holds bfloat16 peaks
    peak = peak_flops(name) if config.model.dtype == "bfloat16" else None
    phases = found.get(f"phases, {modes[0]}", {})
    missing = [f"{worker}: {reason}" for worker, reason in failures.items()]
    missing += [what for measured in found.values() for what in measured["unmeasured"]]
    about = describe_benchmark(
        model=f"random weights, {shape.layers} of {whole.layers} layers",
        shape=vars(shape),
        dtype=config.model.dtype,
        recompute=modes,
        **{of: phases.get(of) for of in ("accelerations", "batch", "memory", "load_average")},
        peak_tflops=peak and peak / 1e12,
        peers={of: found.get("peers", {}).get(of) for of in ("peer", "first")},
    )
    return Results(
        f"rlef bench slice: {recipe}",
        about,
        tuple(figures(shape, found, modes, peak)),
        tuple(f"not measured: {what}" for what in missing),
    )


def how_many_layers(
    asked: str, shape: LlamaShape, device: torch.device, dtype: torch.dtype, tokens: int
) -> int:
    if asked != "auto":
        if not asked.isdigit() or not 1 <= int(asked) <= shape.layers:
            raise ConfigError(f"--layers {asked}: a number from 1 to {shape.layers}, or auto")
        return int(asked)
    if device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory().available
    return layers_that_fit(shape, memory, dtype, tokens)


def run_workers(
    folder: Path, config: TrainConfig, request: dict[str, Any], modes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what each worker measured, and the reasons of those that failed, by name."""
    found, failures = {}, {}
    workers = [(f"phases, {mode}", mode) for mode in modes]
    workers.insert(1, ("peers", modes[0]))
    for name, mode in workers:
        if time.time() > request["deadline"]:
            failures[name] = "the time was up"
            continue
        own = folder / name.replace(", ", "-")
        own.mkdir()
        (own / "config.toml").write_text(dump_toml(slice_config(config, folder, request, mode)))
        (own / REQUEST).write_text(json.dumps(request | {"peer": name == "peers"}))
        try:
            found[name] = run_worker("rlef_mega.bench.slice_worker", own, 1)
        except RuntimeError as error:
            failures[name] = str(error)
    return found, failures


def slice_config(
    config: TrainConfig, folder: Path, request: dict[str, Any], recompute: str
) -> TrainConfig:
    """Return the recipe on one process with the slice as its model."""
    model = {"path": str(folder / "model"), "shape": None, "recompute": recompute}
    learner = {"microbatch_tokens": request["microbatch_tokens"]}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "learner": config.learner.model_copy(update=learner),
            "parallel": ParallelConfig(processes_per_node=1),
        }
    )


# --------------------------------------------------------------------------------------- figures


def figures(
    shape: LlamaShape, found: dict[str, Any], modes: Sequence[str], peak: float | None
) -> Iterator[Figure]:
    for mode in modes:
        if measured := found.get(f"phases, {mode}"):
            yield from phase_figures(shape, measured, mode, peak, only_updates=mode != modes[0])
    if peers := found.get("peers"):
        yield from peer_figures(peers)


def phase_figures(
    shape: LlamaShape,
    measured: dict[str, Any],
    mode: str,
    peak: float | None,
    *,
    only_updates: bool,
) -> Iterator[Figure]:
    lengths, read = measured["lengths"], measured["batch"]["response_tokens"]
    flops = {
        "policy update": training_flops(shape, lengths, read),
        "critic update": training_flops(shape, lengths, 0),
        "old log-probs": forward_flops(shape, lengths, read),
        "reference log-probs": forward_flops(shape, lengths, read),
        "values": forward_flops(shape, lengths, 0),
    }

    def rates(row: str, quantity: str, flops: int, seconds: Sequence[float]) -> Iterator[Figure]:
        yield Figure(f"{row} | {quantity}", "TFLOP/s", tuple(flops / s / 1e12 for s in seconds))
        if peak and quantity == "model":
            yield Figure(f"{row} | utilisation", "share", tuple(flops / s / peak for s in seconds))

    for phase, seconds in measured["seconds"].items():
        if not seconds or (only_updates and phase not in UPDATES):
            continue
        is_update = phase in UPDATES
        row = f"{phase}, recompute {mode}" if is_update and mode != "none" else phase
        yield Figure(f"{row} | time", "s", tuple(seconds))
        if phase in flops:
            speeds = tuple(sum(lengths) / s for s in seconds)
            yield Figure(f"{row} | speed", "tokens/s", speeds)
            yield from rates(row, "model", flops[phase], seconds)
        if is_update and mode != "none":
            again = recomputed_flops(shape, lengths, mode)
            yield from rates(row, "hardware", flops[phase] + again, seconds)
        if phase == "policy update":
            everywhere = training_flops(shape, lengths)
            yield from rates(f"{row}, head counted everywhere", "model", everywhere, seconds)
        beyond = measured["memory"]["beyond_it_bytes"].get(phase)
        if beyond is not None:
            yield Figure(f"{row} | memory beyond resident", "MiB", (beyond / 2**20,))
    if not only_updates:
        roof = tuple(rate / 1e12 for rate in measured["matmul_flops"])
        yield Figure("largest product alone | model", "TFLOP/s", roof)


def peer_figures(measured: dict[str, Any]) -> Iterator[Figure]:
    """Return tokens a second of each side, and ours over each peer's, with a sample a round."""
    seconds = {name: samples for name, samples in measured["seconds"].items() if samples}
    for name, samples in seconds.items():
        speeds = tuple(measured["tokens"] / s for s in samples)
        yield Figure(f"policy update, {name}", "tokens/s", speeds)
    for name, samples in seconds.items():
        if name != "ours":
            ratios = tuple(t / o for o, t in zip(seconds["ours"], samples, strict=True))
            yield Figure(f"policy update, ours / {name}", "ratio", ratios)
