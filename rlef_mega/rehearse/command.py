"""`rlef rehearse`: run one rank of each kind of a recipe's layout on the null GPU, and report."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from rlef_mega.config import ConfigError, TrainConfig, dump_toml, find_recipe, load_config
from rlef_mega.flops import LlamaShape
from rlef_mega.plan.command import memory_table
from rlef_mega.plan.hardware import CONTEXT_GIB, GIB, Device, find_device
from rlef_mega.plan.memory import Network
from rlef_mega.plan.planned_run import PlannedRun
from rlef_mega.plan.step_time import TRAINING
from rlef_mega.preflight import model_shape
from rlef_mega.run.directory import write_atomically
from rlef_mega.run.hub import CONFIG, find_model

CHECKOUT = Path(__file__).parents[2]
NULL_GPU = CHECKOUT / "tests/null_gpu/launch.py"
NULL_DEVICES = {"h100-80gb": "h100", "h200": "h200", "b200": "b200"}
# The null GPU computes nothing and makes no copy above 1 MiB: memory does not depend on values.
SETTINGS = {"NULL_GPU_COMPUTE_MIB": "0", "NULL_GPU_COPY_MIB": "1"}
SIZES = ("peak", "kept", "reserved", "pinned")
OTHERS = "rest"
WIDTH = 108  # of the tables
GROUPS = ("tp", "pp", "dp", OTHERS)  # tensor, pipeline, data parallel
Phases = dict[str, dict[str, Any]]
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
    recipe: str,
    *,
    overrides: Sequence[str] | None,
    rank: int | None,
    gpu: str,
    dialogue_tokens: int | None,
    out: Path | None,
) -> None:
    """Rehearse `rank` or a rank of each kind; print tables, and write all figures to `out`.

    Raises ConfigError if a rank needs more memory than the device has, or the null GPU is missing.
    """
    path, device = find_recipe(recipe), find_device(gpu)
    console = Console(width=max(WIDTH, Console().width))
    config = load_config(path, overrides or [], TrainConfig)
    shape = model_shape(config)
    run = PlannedRun.of(config, shape)
    kinds = [Rank.of(run, number).kind for number in range(run.training_gpus)]
    ranks = {kind: kinds.index(kind) for kind in kinds}
    if rank is not None:
        ranks = {Rank.of(run, rank).kind: rank}
    request = rehearsed_update(run, dialogue_tokens)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rlef-rehearse-") as name:
        folder = Path(name)
        write_inputs(folder, config, shape, request)
        for kind, number in ranks.items():
            with console.status(f"rank {number} of {config.world_size:,}: {kind}"):
                measured = rehearse_rank(folder, config, number, device)
            if "error" in measured:
                raise ConfigError(
                    f"rank {number} ({kind}) does not fit {device.name}: {measured['error']}; "
                    + REMEDIES
                )
            plan, pinned = planned(run, number, request)
            found[kind] = {"rank": number, "ranks": kinds.count(kind), "plan": plan}
            found[kind] |= {"planned_pinned_bytes": pinned} | measured
            alike = f"{kinds.count(kind):,} of the {len(kinds):,} ranks are of this kind"
            console.print(f"rank {number}: {kind}; {alike}")
            console.print(*rank_tables(measured, plan, device))
    console.print(memory_table(run.memory(), run, device))
    console.print(
        f"Scored and updated: {request.microbatches} micro-batches on each rank, each of "
        f"{request.per_microbatch} dialogues of {request.dialogue:,} tokens, {request.responses:,} "
        f"of them sampled. A step does so {run.updates} times, and gathers the weights once."
    )
    if out is not None:
        content = {"recipe": recipe, "device": device.name, "request": asdict(request)}
        write_atomically(out, json.dumps(content | {"ranks": found}, indent=1) + "\n")
        console.print(f"wrote {out}")


@dataclass(frozen=True)
class Rank:
    kind: str  # the network, if it has ranks of its own, and the stage
    stage: int
    network: Network  # whose layout the rank belongs to

    @classmethod
    def of(cls, run: PlannedRun, rank: int) -> Self:
        """Find a rank's stage and network; ranks are numbered by tensor, then data, then pipeline.
        Raises ConfigError if the layout has no such rank."""
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
    """Run one rank of the layout on the null GPU, in a process of its own. Returns its figures."""
    settings = dict(SETTINGS)
    if device.name not in NULL_DEVICES:  # rehearsed as an H100 with this device's memory
        settings["NULL_GPU_MEMORY_MIB"] = str(round(device.memory_gib * 1024))
    if not NULL_GPU.is_file():
        raise ConfigError(f"rlef rehearse needs the project's checkout: there is no {NULL_GPU}")
    own = CHECKOUT / ".venv-gpu/bin/python"
    python = str(own) if own.is_file() else sys.executable
    result = folder / RESULT.format(rank)
    settings |= {"RANK": str(rank), "WORLD_SIZE": str(config.world_size), "LOCAL_RANK": "0"}
    ended = subprocess.run(
        [sys.executable, str(NULL_GPU), "--device", NULL_DEVICES.get(device.name, "h100"),
         "--gpus", "1", "--", python, "-P", "-m", "rlef_mega.rehearse.rank", str(folder)],
        env=os.environ | settings,
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


def planned(run: PlannedRun, rank: int, request: Request) -> tuple[Phases, float]:
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


def number_table(first: str, *names: str) -> Table:
    columns = (Column(name, justify="right") for name in names)
    return Table(Column(first, no_wrap=True), *columns, box=SIMPLE_HEAD)


def rank_tables(measured: dict[str, Any], plan: Phases, device: Device) -> tuple[Table, Table]:
    """Return two tables of the phases: memory in GiB; what is launched, computed and sent."""
    memory = number_table("GiB", "planned", "", *SIZES)
    groups = (f"GB {group}" for group in GROUPS)
    work = number_table("", "launches", "waits", "PFLOPs", "planned", "collectives", *groups)
    phases = {name.replace("_", " "): phase for name, phase in measured["phases"].items()}
    for name, phase in phases.items():
        computed = plan[name.replace(" ", "_")]
        sizes = [phase[f"{kind}_bytes"] for kind in SIZES]
        memory.add_row(
            name,
            f"{computed['bytes'] / GIB:.2f}",
            f"{computed['bytes'] / phase['peak_bytes'] - 1:+.1%}",
            *(f"{size / GIB:.2f}" for size in sizes),
        )
        sent = dict.fromkeys(GROUPS, 0.0)
        for what, size in phase["collective_bytes"].items():
            group = what.partition(" ")[0]
            sent[group if group in sent else OTHERS] += size / 1e9
        flops = phase["product_flops"]
        work.add_row(
            name,
            f"{phase['launches']:,}",
            f"{phase['waits']:,}",
            f"{flops / 1e15:.3f}" if flops else "",
            f"{computed['product_flops'] / flops - 1:+.1%}" if flops else "",
            f"{sum(phase['collectives'].values()):,}",
            *(f"{size:.1f}" if size else "" for size in sent.values()),
        )
    fullest = max(phases, key=lambda name: phases[name]["peak_bytes"])
    reserved, process = (
        max(phase[f"{kind}_bytes"] for phase in phases.values()) / GIB
        for kind in ("reserved", "process")
    )
    left = device.memory_gib - CONTEXT_GIB - reserved
    memory.caption = (
        f"fullest in '{fullest}'; {left:.1f} of {device.memory_gib:.0f} GiB are left beside the "
        f"reserved memory and {CONTEXT_GIB:.0f} GiB for CUDA and NCCL (assumed); the process takes "
        f"{process:.1f} GiB of the host beside pinned memory"
    )
    seconds = sum(phase["seconds"] for phase in phases.values())
    work.caption = f"GB of each collective's largest tensor; rehearsed in {seconds:.0f} s"
    return memory, work
