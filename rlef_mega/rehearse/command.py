"""`rlef rehearse`: run one rank of each kind of a recipe's layout on the null GPU, and report."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from rlef_mega.config import ConfigError, TrainConfig, dump_toml
from rlef_mega.flops import LlamaShape
from rlef_mega.plan.hardware import GIB, Device, find_device
from rlef_mega.plan.memory import Network
from rlef_mega.plan.planned_run import PlannedRun, shape_of
from rlef_mega.plan.step_time import TRAINING
from rlef_mega.run.directory import write_atomically
from rlef_mega.run.hub import CONFIG, find_model

CHECKOUT = Path(__file__).parents[2]
NULL_GPU = CHECKOUT / "tests/null_gpu/launch.py"
NULL_DEVICES = {"h100-80gb": "h100", "h200": "h200", "b200": "b200"}
# The null GPU computes nothing and makes no copy above 1 MiB: memory does not depend on values.
SETTINGS = {"NULL_GPU_COMPUTE_MIB": "0", "NULL_GPU_COPY_MIB": "1"}
REQUEST, RESULT = "request.json", "rank_{}.json"  # in a rehearsal's folder
REMEDIES = (
    "lower learner.microbatch_tokens, raise model.recompute (selective, full), set "
    "learner.offload=idle, or give the model more tensor- or pipeline-parallel ranks"
)


@dataclass(frozen=True)
class Request:
    """The lengths of dialogues in tokens, and an update's micro-batches on each rank."""

    dialogue: int
    responses: int
    per_microbatch: int
    microbatches: int


def run_rehearsal(
    title: str,
    config: TrainConfig,
    *,
    rank: int | None,
    gpu: str,
    dialogue_tokens: int | None,
    out: Path | None,
) -> None:
    """Rehearse and print a table of each rank; write all figures to `out`.

    Raises ConfigError if a rank needs more memory than the device has, or the null GPU is missing.
    """
    console, device = Console(), find_device(gpu)
    shape = shape_of(config)
    if shape is None:
        raise ConfigError(f"{title}: give model.shape, or a model.path with a config.json")
    run = PlannedRun.of(config, shape)
    ranks: dict[str, int] = {}
    for number in range(run.training_gpus) if rank is None else [rank]:
        ranks.setdefault(Rank.of(run, number).kind, number)
    request = rehearsed_update(run, dialogue_tokens)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rlef-rehearse-") as name:
        folder = Path(name)
        write_inputs(folder, config, shape, request)
        for name, number in ranks.items():
            with console.status(f"rank {number} of {config.world_size:,}: {name}"):
                measured = rehearse_rank(folder, config, number, device)
            if "error" in measured:
                raise ConfigError(
                    f"rank {number} ({name}) does not fit {device.name}: {measured['error']}; "
                    + REMEDIES
                )
            plan, pinned = planned(run, number, request)
            console.print(rank_table(f"{title}, rank {number}: {name}", measured, plan, device))
            found[name] = {"rank": number, "plan": plan, "planned_pinned_bytes": pinned}
            found[name] |= measured
    if out is not None:
        content = {"recipe": title, "device": device.name, "request": asdict(request)}
        write_atomically(out, json.dumps(content | {"ranks": found}, indent=1) + "\n")
        console.print(f"wrote {out}")


@dataclass(frozen=True)
class Rank:
    kind: str  # the network, if it has ranks of its own, and the stage
    stage: int
    network: Network  # whose layout the rank belongs to

    @classmethod
    def of(cls, run: PlannedRun, rank: int) -> Self:
        """Raises ConfigError if the layout has no such rank. Ranks are in the order tensor, data,
        pipeline."""
        if not 0 <= rank < run.training_gpus:
            raise ConfigError(f"--rank {rank}: the layout has ranks 0 to {run.training_gpus - 1}")
        critics = rank - run.parallel.world_size
        network = run.policy if critics < 0 else run.critic
        stage = (rank if critics < 0 else critics) // (network.tensor * network.data)
        place = "last" if network.is_last(stage) else "inner" if stage else "first"
        kind = f"{'only' if network.pipeline == 1 else place} stage"
        return cls(kind if critics < 0 else f"critic's {kind}", stage, network)


def rehearsed_update(run: PlannedRun, dialogue_tokens: int | None) -> Request:
    """Return an update of full micro-batches, with dialogues of about the assumed mean length."""
    budget, tensor = run.config.learner.microbatch_tokens, run.policy.tensor
    mean = dialogue_tokens or round(run.dialogues.tokens)
    if not 1 < mean <= budget:
        limits = f"from 2 to learner.microbatch_tokens, {budget}"
        raise ConfigError(f"dialogues of {mean} tokens (--dialogue-tokens): must be {limits}")
    each = budget // mean
    dialogue = budget // each // tensor * tensor
    return Request(
        dialogue=dialogue,
        responses=max(1, round(dialogue * run.dialogues.sampled / run.dialogues.tokens)),
        per_microbatch=each,
        microbatches=run.load(run.policy, TRAINING).microbatches,
    )


def write_inputs(folder: Path, config: TrainConfig, shape: LlamaShape, request: Request) -> None:
    """Write what a rehearsed rank reads: the recipe with one update a batch, the model's config."""
    model = find_model(config.model.path, files=CONFIG, fetch=False)
    if not (model / "config.json").is_file():
        from transformers import LlamaConfig

        model = folder / "model"
        LlamaConfig(
            **shape.hf_settings(), dtype=config.model.dtype, architectures=["LlamaForCausalLM"]
        ).save_pretrained(model)
    rehearsed = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(model), "weights": None}),
            "ppo": config.ppo.model_copy(update={"updates_per_batch": 1}),
        }
    )
    (folder / "config.toml").write_text(dump_toml(rehearsed))
    (folder / REQUEST).write_text(json.dumps(asdict(request)))


def rehearse_rank(folder: Path, config: TrainConfig, rank: int, device: Device) -> dict[str, Any]:
    """Run one rank in a process of its own on the null GPU. Returns what it measured."""
    settings = dict(SETTINGS)
    if device.name not in NULL_DEVICES:  # an H100 with its memory
        settings["NULL_GPU_MEMORY_MIB"] = str(round(device.memory_gib * 1024))
    if not NULL_GPU.is_file():
        raise ConfigError(f"rlef rehearse needs the project's checkout: there is no {NULL_GPU}")
    own = CHECKOUT / ".venv-gpu/bin/python"
    python = str(own) if own.is_file() else sys.executable
    result = folder / RESULT.format(rank)
    ended = subprocess.run(
        [sys.executable, str(NULL_GPU), "--device", NULL_DEVICES.get(device.name, "h100"),
         "--gpus", "1", "--", python, "-P", "-m", "rlef_mega.rehearse.rank", str(folder)],
        env={
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(config.world_size),
            "LOCAL_RANK": "0",
            **settings,
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    if not result.is_file():
        printed = "\n".join((ended.stdout + ended.stderr).splitlines()[-12:])
        raise RuntimeError(
            f"rank {rank} ended with exit code {ended.returncode}; is there a CUDA build of "
            f"PyTorch in {python} (make setup-gpu)?\n{printed}"
        )
    return json.loads(result.read_text())


def planned(
    run: PlannedRun, rank: int, request: Request
) -> tuple[dict[str, dict[str, float]], float]:
    """Return what `rlef plan` and flops.py compute for this rank: for each of the learner's phases
    the bytes of memory and the FLOPs of PyTorch's matrix products, and the bytes of pinned memory.
    """
    its = Rank.of(run, rank)
    row = its.stage + (run.policy.pipeline if its.network is run.critic else 0)
    tokens = request.dialogue * request.per_microbatch * request.microbatches
    read = tokens * request.responses / request.dialogue
    memory = run.memory()[row]
    found = {}
    for name, size in memory.phases.items():
        network = run.critic if "critic" in name else run.policy
        flops = products(run, network, name, its.stage, tokens)
        if name == "update policy" and run.policy.is_last(its.stage):
            # a Triton kernel computes the first of the head's three products
            flops += 4 * run.shape.table_parameters * read / run.policy.tensor
        found[name.replace(" ", "_")] = {"bytes": size, "product_flops": flops}
    return found, memory.pinned


def products(run: PlannedRun, network: Network, phase: str, stage: int, tokens: int) -> float:
    """Return the FLOPs of the layers' matrix products in a phase."""
    shape = run.shape
    token = 2 * network.layers[stage] * shape.layer_products / network.tensor
    block = 2 * network.layers[stage] * 3 * shape.hidden * shape.ffn / network.tensor
    again = {"none": 0.0, "selective": block, "full": token}[run.recompute]
    if "reference" in phase.split()[2:]:  # together with the policy
        token *= 2
    return tokens * {"score": token, "update": 3 * token + again}.get(phase.split()[0], 0.0)


def rank_table(
    title: str, measured: dict[str, Any], plan: dict[str, dict[str, float]], device: Device
) -> Table:
    """Return a row for each phase; the caption compares the fullest one with the device."""
    table = Table(
        "phase", "plan", "peak", "kept", "reserved", "pinned", "launches", "waits", "collectives",
        "GB", "PFLOPs", "s here", title=f"{title}; memory in GiB",
    )  # fmt: skip
    for name, phase in measured["phases"].items():
        sizes = (phase[f"{kind}_bytes"] / GIB for kind in ("peak", "kept", "reserved", "pinned"))
        table.add_row(
            name.replace("_", " "),
            f"{plan[name]['bytes'] / GIB:.2f}" if name in plan else "",
            *(f"{size:.2f}" for size in sizes),
            f"{phase['launches']:,}",
            f"{phase['waits']:,}",
            f"{sum(phase['collectives'].values()):,}",
            f"{sum(phase['collective_bytes'].values()) / 1e9:.1f}",
            share(phase["product_flops"], plan.get(name, {}).get("product_flops", 0.0)),
            f"{phase['seconds']:.1f}",
        )
    fullest, phase = max(measured["phases"].items(), key=lambda item: item[1]["peak_bytes"])
    table.caption = (
        f"fullest in '{fullest.replace('_', ' ')}': {phase['peak_bytes'] / GIB:.1f} of "
        f"{device.memory_gib:.0f} GiB; CUDA and NCCL take about {device.context_gib:.0f} GiB more"
    )
    return table


def share(counted: float, computed: float) -> str:
    """Return the counted PFLOPs of matrix products, and how many percent of flops.py's they are."""
    return f"{counted / 1e15:.3f} ({counted / computed:.1%})" if computed else ""
