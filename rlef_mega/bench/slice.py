"""`rlef bench slice RECIPE`: a training step of the recipe's model, cut down to as many layers as
fit one device, phase by phase, and its policy update beside Hugging Face with Liger's kernels.

Theory of operation. The command writes the slice's random weights and a request into a temporary
folder and starts workers one after the other, each a process of its own, so that each begins with
an empty device: `slice_phases` for each recompute mode, and `slice_peers`. Every worker gets the
same deadline, starts no measurement after it and writes what it has; one that fails costs its own
figures and leaves its reason in the report. Nothing here needs CUDA: on a CPU the same code runs on
the demo's shape.

Counting (`rlef_mega/flops.py`): causal attention, no embedding, no recomputation, the critic
without a head, and of the head's products those for the response tokens, the only ones its loss
reads. The usual convention counts the head for all tokens; that figure stands apart.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from rlef_mega.bench import beside_hf
from rlef_mega.bench.devices import device_name, peak_flops
from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.slice_model import REQUEST, find_shape, layers_that_fit, write_model
from rlef_mega.bench.workload import RESULT
from rlef_mega.config import (
    ConfigError,
    ParallelConfig,
    TrainConfig,
    dump_toml,
    find_recipe,
    load_config,
)
from rlef_mega.flops import (
    LlamaShape,
    forward_flops,
    recomputed_flops,
    training_flops,
)
from rlef_mega.run.launch import launch

TIME_LIMIT_S = 390.0  # of the 7 minutes that the command may take: the last measurement ends too
REPEATS = 7
RECOMPUTE = ("none", "selective", "full")
UTILISATION_GOAL = 0.45
PEER_GOAL = 1.15
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
) -> Report:
    """`layers`: a number, or "auto" for what fits; `recompute`: modes, with commas between; the
    first is the one whose phases are measured. `microbatch_tokens` 0: 8,192 on a GPU, 2,048
    elsewhere. An update has `microbatches` of them.
    """
    deadline = time.time() + limit_s
    modes = recompute.split(",")
    if unknown := set(modes) - set(RECOMPUTE):
        raise ConfigError(f"--recompute {sorted(unknown)}: known are {', '.join(RECOMPUTE)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(find_recipe(recipe), [], TrainConfig)
    config = in_dtype(config, dtype or config.model.dtype)
    tokens = microbatch_tokens or (8192 if device.type == "cuda" else 2048)
    torch_dtype = getattr(torch, config.model.dtype)
    whole = find_shape(recipe)
    shape = whole.with_layers(how_many_layers(layers, whole, device, torch_dtype, tokens))
    with tempfile.TemporaryDirectory(prefix="rlef-slice-") as name:
        folder = Path(name)
        write_model(folder / "model", shape, torch_dtype, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the workers need all of it
        request = {
            "microbatches": microbatches,
            "microbatch_tokens": tokens,
            "repeats": repeats,
            "deadline": deadline,
            "shape": vars(shape),
        }
        found, failures = run_workers(folder, config, request, modes)
    report = Slice(shape, found, failures, modes, config.model.dtype, device_name(device))
    return report.as_report(f"rlef bench slice: {recipe}", whole)


def in_dtype(config: TrainConfig, dtype: str) -> TrainConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


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
    """What each worker measured, by its name; why others measured nothing."""
    found, failures = {}, {}
    for name, module, mode in [
        (f"phases, {modes[0]}", "rlef_mega.bench.slice_phases", modes[0]),
        ("peers", "rlef_mega.bench.slice_peers", modes[0]),
        *((f"phases, {mode}", "rlef_mega.bench.slice_phases", mode) for mode in modes[1:]),
    ]:
        if time.time() > request["deadline"]:
            failures[name] = "the time was up"
            continue
        place = folder / name.replace(", ", "-")
        place.mkdir()
        (place / "config.toml").write_text(dump_toml(slice_config(config, folder, request, mode)))
        (place / REQUEST).write_text(json.dumps(request))
        code = launch(module, place, 1)
        if code or not (place / RESULT).is_file():
            failures[name] = f"{module} ended with exit code {code}"
        else:
            found[name] = json.loads((place / RESULT).read_text())
    return found, failures


def slice_config(
    config: TrainConfig, folder: Path, request: dict[str, Any], recompute: str
) -> TrainConfig:
    """The recipe on one process, with the slice for its model."""
    model = {"path": str(folder / "model"), "shape": None, "recompute": recompute}
    learner = {"microbatch_tokens": request["microbatch_tokens"]}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "learner": config.learner.model_copy(update=learner),
            "parallel": ParallelConfig(processes_per_node=1),
        }
    )


class Slice:
    """What the workers found, as figures."""

    def __init__(
        self,
        shape: LlamaShape,
        found: dict[str, Any],
        failures: dict[str, str],
        modes: Sequence[str],
        dtype: str,
        device: str,
    ) -> None:
        self.shape, self.found, self.failures, self.modes = shape, found, failures, modes
        self.dtype, self.device = dtype, device
        # the table holds bfloat16 peaks
        self.peak = peak_flops(device) if dtype == "bfloat16" else None

    def as_report(self, title: str, whole: LlamaShape) -> Report:
        phases = self.found.get(f"phases, {self.modes[0]}", {})
        rows, said = [], []
        for mode in self.modes:
            if measured := self.found.get(f"phases, {mode}"):
                rows += self.phase_figures(measured, mode, only_updates=mode != self.modes[0])
        said += self.utilisation_note(rows)
        if peers := self.found.get("peers"):
            name = peers["peer"]
            beside = beside_hf.figures(peers, peers["tokens"], name)
            rows += beside
            # beside Liger, whose kernels need a GPU
            goal = PEER_GOAL if self.device != "CPU" else None
            said += beside_hf.notes(peers, beside, name, goal)
        said += [f"not measured: {name}: {why}" for name, why in self.failures.items()]
        for measured in self.found.values():
            said += [f"not measured: {what}" for what in measured.get("unmeasured", ())]
        about = describe_benchmark(
            model=f"random weights, {self.shape.layers} of {whole.layers} layers",
            shape=vars(self.shape),
            dtype=self.dtype,
            recompute=list(self.modes),
            accelerations=phases.get("accelerations"),
            batch=phases.get("batch"),
            memory=phases.get("memory"),
            peak_tflops=self.peak and self.peak / 1e12,
            peers={
                name: value
                for name, value in self.found.get("peers", {}).items()
                if name in ("peer", "versions", "first", "tried", "chosen")
            },
            load_average=phases.get("load_average"),
        )
        return Report(title, about, tuple(rows), tuple(said), pivoted=True)

    def phase_figures(
        self, measured: dict[str, Any], mode: str, *, only_updates: bool
    ) -> list[Figure]:
        lengths, read = measured["lengths"], measured["batch"]["response_tokens"]
        tokens = sum(lengths)
        shape = self.shape
        flops = {
            "policy update": training_flops(shape, lengths, read),
            "critic update": training_flops(shape, lengths, 0),
            "old log-probs": forward_flops(shape, lengths, read),
            "reference log-probs": forward_flops(shape, lengths, read),
            "values": forward_flops(shape, lengths, 0),
        }
        suffix = "" if mode == "none" else f", recompute {mode}"
        rows = []
        for phase, seconds in measured["seconds"].items():
            if not seconds or (only_updates and phase not in UPDATES):
                continue
            name = phase + suffix if phase in UPDATES else phase
            rows.append(Figure(f"{name} | time", "s", tuple(seconds)))
            if phase in flops:
                rows.append(
                    Figure(f"{name} | speed", "tokens/s", tuple(tokens / s for s in seconds))
                )
                rows += self.rates(name, "model", flops[phase], seconds)
            if phase in UPDATES and mode != "none":
                again = recomputed_flops(shape, lengths, mode)
                rows += self.rates(name, "hardware", flops[phase] + again, seconds)
            if phase == "policy update":
                everywhere = training_flops(shape, lengths)
                rows += self.rates(f"{name}, head counted everywhere", "model", everywhere, seconds)
            beyond = measured["memory"]["beyond_it_bytes"].get(phase)
            if beyond is not None:
                rows.append(Figure(f"{name} | memory beyond resident", "MiB", (beyond / 2**20,)))
        if not only_updates:
            roof = tuple(rate / 1e12 for rate in measured["matmul_flops"])
            rows.append(Figure("largest product alone | model", "TFLOP/s", roof))
        return rows

    def rates(self, name: str, counted: str, flops: int, seconds: Sequence[float]) -> list[Figure]:
        rates = tuple(flops / s / 1e12 for s in seconds)
        rows = [Figure(f"{name} | {counted}", "TFLOP/s", rates)]
        if self.peak and counted == "model":
            part = tuple(rate * 1e12 / self.peak for rate in rates)
            rows.append(Figure(f"{name} | utilisation", "share", part))
        return rows

    def utilisation_note(self, rows: Sequence[Figure]) -> list[str]:
        """Of the policy update in the fastest of the modes."""
        found = [
            row
            for row in rows
            if row.name.startswith("policy update")
            and row.name.endswith(" | utilisation")
            and "everywhere" not in row.name
        ]
        if not found:
            return [
                f"no bf16 peak is known for this device and dtype, so goal {UTILISATION_GOAL:.0%} "
                "of it is open"
            ]
        assert self.peak is not None, "without a peak there is no such row"
        best = max(found, key=lambda row: row.median)
        verdict = "met" if best.median >= UTILISATION_GOAL else "missed"
        return [
            f"{best.name.replace(' | ', ', model FLOPs ')}: {best.median:.1%} ({best.low:.1%} to "
            f"{best.high:.1%}) of {self.peak / 1e12:,.0f} TFLOP/s, goal {UTILISATION_GOAL:.0%}: "
            f"{verdict}"
        ]
