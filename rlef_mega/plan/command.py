"""`rlef plan`: print the facts of a recipe, and its memory, time and cost on a device."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console
from rich.table import Table

from rlef_mega.config import (
    RECIPES,
    ConfigError,
    TrainConfig,
    apply_override,
    find_recipe,
    load_config,
)
from rlef_mega.plan.hardware import CONTEXT_GIB, GIB, Device, find_device
from rlef_mega.plan.planned_run import PlannedRun, RankMemory, gib, refuse_without_room, total
from rlef_mega.plan.search import Split, balanced_split, settings, splits
from rlef_mega.preflight import check_stored_weights, model_shape, plan_train
from rlef_mega.run.directory import write_atomically
from rlef_mega.run.hub import find_model
from rlef_mega.run.model_folder import holds_weights

SHOWN = 5
SHORT = {"gradients": "grads", "optimizer": "adam", "reference": "refer", "activations": "activ"}
ASSUMED = "Computed, not measured; dialogue lengths and more are assumed (docs/scaling.md)."


def run_plan(
    recipe: str,
    *,
    overrides: Sequence[str] | None,
    gpus: int | None,
    gpu: str,
    sampling_gpus: int | None,
    out: Path | None,
    write: Path | None,
) -> None:
    """Print the plan of a recipe, and write it to `out`. With `gpus`, also write the recipe, with
    these overrides and in the best layout found, to `write`.

    Raises ConfigError if the recipe's layout (with `gpus`: every layout) does not fit, if `write`
    exists or is given without `gpus`, if `sampling_gpus` is given with `gpus` or for a recipe that
    samples on the ranks' GPUs, or if its servers need more GPUs than there are.
    """
    if write is not None and gpus is None:
        raise ConfigError(f"--write {write}: give --gpus, which searches for the layout to write")
    if write is not None and write.exists():
        raise ConfigError(f"--write {write}: the file exists; remove it, or give another name")
    if sampling_gpus is not None and gpus is not None:
        raise ConfigError(f"--sampling-gpus {sampling_gpus}: --gpus chooses them; give only one")
    path = find_recipe(recipe)
    config = load_config(path, overrides or [], TrainConfig)
    console = Console()
    shape, device = model_shape(config), find_device(gpu)
    facts = plan_train(config, shape)
    content: dict[str, Any] = {"recipe": recipe, "facts": facts, "device": device.name}
    model = find_model(config.model.path, fetch=False)
    if holds_weights(model):  # a shape is enough for a plan
        check_stored_weights(model)
    table = Table("fact", "value", title=str(path))
    for fact, value in facts.items():
        table.add_row(fact, str(value))
    console.print(table)
    run = PlannedRun.of(config, shape)
    if gpus is None:
        content |= show_recipe(console, run, device, sampling_gpus)
    else:
        best, found = show_search(console, run, device, gpus)
        content |= found
        if write is not None:
            write_recipe(write, path, overrides or [], best, device)
            console.print(f"wrote {write}")
    not_cpu = f" This is a plan for {device.name}, not for a CPU."
    console.print(ASSUMED + (not_cpu if config.model.dtype == "float32" else ""))
    if out is not None:
        write_atomically(out, json.dumps(content, indent=1) + "\n")
        console.print(f"wrote {out}")


def write_recipe(
    file: Path, recipe: Path, overrides: Sequence[str], best: Split, device: Device
) -> None:
    """Write a recipe that extends this one by the overrides and the layout found. Raises
    ConfigError if this one has a setting that the layout found lacks: it cannot be removed."""
    if best.run.config.critic_parallel or best.run.config.parallel.pipeline_layers:
        raise ConfigError(
            "--write: the layouts found have no critic_parallel and no parallel.pipeline_layers; "
            f"remove them from {recipe}"
        )
    name = recipe.stem if recipe.parent == RECIPES else str(recipe.absolute())
    tree: dict[str, Any] = {"extends": name}
    found = [f"{key}={json.dumps(value)}" for key, value in settings(best, device).items()]
    for override in (*overrides, *found):
        apply_override(tree, override)
    plan_train(load_config(recipe, [*overrides, *found], TrainConfig), best.run.shape)
    write_atomically(file, tomli_w.dumps(tree))


def show_recipe(
    console: Console, run: PlannedRun, device: Device, sampling_gpus: int | None
) -> dict[str, Any]:
    """Print the plan of the recipe's own layout, and return it for the JSON file."""
    console.print(memory_table(run.memory(), run, device))
    refuse_without_room(run, device)
    sampling, servers = 0, run.config.rollout.servers
    if sampling_gpus is not None and (run.colocated or not run.has_servers):
        apart = ", or set rollout.servers.release_memory to false" if run.colocated else ""
        raise ConfigError(
            f"--sampling-gpus {sampling_gpus} (of a Slurm job: ROLLOUT_NODES): this recipe samples "
            f"on the ranks' GPUs; leave it out{apart}"
        )
    if sampling_gpus and sampling_gpus % run.server_gpus:
        raise ConfigError(
            f"--sampling-gpus {sampling_gpus}: a server takes {run.server_gpus} "
            "(rollout.servers.tensor_parallel_size); give a multiple of that"
        )
    if run.colocated:
        nodes = 1 if servers.urls else -(-run.training_gpus // device.per_node)
        count = len(servers.urls) or servers.count  # of each node, unless URLs are given
        taken = count * run.server_gpus
        shared = run.training_gpus if servers.urls else min(run.training_gpus, device.per_node)
        if taken > shared:
            raise ConfigError(
                f"rollout.servers: {count} servers x tensor_parallel_size {run.server_gpus} = "
                f"{taken} GPUs, and they share the ranks' {shared}{' of a node' * (nodes > 1)}; "
                "lower one of them"
            )
        sampling = min(run.training_gpus, nodes * taken)  # the last node may be partly filled
    elif run.has_servers:
        own = servers.count * run.server_gpus if servers.first_gpu else 0  # not the ranks' GPUs
        sampling = sampling_gpus or own or balanced_split(run, device).sampling
    split = Split(run, sampling, run.step(device, sampling))
    show_step(console, split, device)
    return describe(split, device)


def show_search(
    console: Console, run: PlannedRun, device: Device, gpus: int
) -> tuple[Split, dict[str, Any]]:
    """Print the best layouts on `gpus` GPUs and the plan of the first. Returns the first, and the
    entries of the JSON file."""
    found = splits(run, device, gpus)
    table = Table(
        "layout", "recompute", "idle state", "train", "sample", "GiB", "s/step", "bound by",
        title=f"{len(found)} layouts fit {gpus:,} x {device.name}; the fastest",
    )  # fmt: skip
    for each in found[:SHOWN]:
        tried = each.run
        chunks = tried.parallel.virtual_pipeline_model_parallel_size
        pipeline = f"{tried.policy.pipeline}" + (f"x{chunks}" if chunks > 1 else "")
        table.add_row(
            f"TP{tried.policy.tensor} PP{pipeline} DP{tried.policy.data}",
            tried.recompute,
            "host" if tried.offloads else "GPU",
            f"{tried.training_gpus:,}",
            ("" if tried.has_servers and not tried.colocated else "same GPUs, ")
            + (f"{each.sampling:,}/{tried.server_gpus}" if tried.has_servers else "embedded"),
            f"{max(rank.total for rank in tried.memory()) / GIB:.1f}",
            f"{each.step.seconds:.1f}",
            each.step.bound_by,
        )
    console.print(table)
    best = found[0]
    console.print(memory_table(best.run.memory(), best.run, device))
    show_step(console, best, device)
    words = [f"--set {key}={json.dumps(value)}" for key, value in settings(best, device).items()]
    console.print("the recipe in this layout:", *(words or ["as it is"]), soft_wrap=True)
    return best, describe(best, device) | {"ranked": [summary(each) for each in found[:SHOWN]]}


def memory_table(ranks: Sequence[RankMemory], run: PlannedRun, device: Device) -> Table:
    parts = [SHORT.get(part, part) for part in ranks[0].parts]
    at = ", ".join(sorted({rank.phase for rank in ranks}))
    table = Table(
        "rank", *parts, "all", "host",
        title=f"GiB per GPU in the fullest phase, {at}; "
        f"{device.usable / GIB:,.1f} are usable on {device.name}",
    )  # fmt: skip
    for rank in ranks:
        sizes = [*rank.parts.values(), rank.total, rank.pinned]
        table.add_row(rank.name, *(f"{size / GIB:.1f}" for size in sizes))
    modes = (f"{mode} {size / GIB:.1f}" for mode, size in run.activations_by_mode().items())
    table.caption = f"activations with recomputation: {', '.join(modes)}; in addition "
    table.caption += f"{CONTEXT_GIB} GiB outside tensors"
    return table


def show_step(console: Console, split: Split, device: Device) -> None:
    """Print a step's phases, the servers' capacity, and the run's cost."""
    run, step, sampling = split.run, split.step, split.sampling
    table = Table("a step's seconds", "score", "update", "all")
    for name, update_s in step.update.items():
        if update_s:
            score_s = step.score.get(name, 0.0)
            table.add_row(name, *map(shown, (score_s, update_s, score_s + update_s)))
    table.add_row("move idle state", "", "", shown(step.move))
    table.add_row("publish", "", "", shown(step.publish), end_section=True)
    sums = (total(step.score), total(step.update), step.training)
    table.add_row("training: the sum", *map(shown, sums))
    if made := step.generation:
        received, beside = (" and publish", step.publish) if step.is_async else ("", 0.0)
        table.add_row(f"servers' work{received}", "", "", shown(made.work + beside))
        table.add_row(f"longest dialogue{received}", "", "", shown(made.longest + beside))
        table.add_section()
        rule = "the longest of the three" if step.is_async else "training and the longer of the two"
        table.add_row(f"step: {rule}", "", "", shown(step.seconds))
    table.caption = f"bound by {step.bound_by}"
    console.print(table)
    if run.has_servers:
        server = run.server(device)
        console.print(
            f"{sampling // server.gpus:,} servers of {server.gpus} GPUs: weights "
            f"{gib(server.weights)}, contexts {gib(server.cache)} per GPU, room for "
            f"{server.cached_tokens:,} tokens ({server.cached_tokens / run.dialogues.tokens:,.0f} "
            "dialogues of average length)"
        )
    steps = run.config.run.steps
    hours = steps * step.seconds / 3600
    console.print(
        f"{steps:,} steps: {hours:.3g} hours on {run.training_gpus:,} + "
        f"{split.gpus - run.training_gpus:,} = {split.gpus:,} GPUs, "
        f"{split.gpu_hours:,.{0 if hours > 1 else 3}f} GPU hours, without evaluations and "
        "checkpoints"
    )


def shown(seconds: float) -> str:
    if not seconds:
        return ""
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.3f}"


def summary(split: Split) -> dict[str, Any]:
    run, step = split.run, split.step
    return {
        "layout": run.parallel.model_dump(exclude={"processes_per_node", "pipeline_layers"}),
        "recompute": run.recompute,
        "offload": "idle" if run.offloads else "none",
        "training_gpus": run.training_gpus,
        "sampling_gpus": split.sampling,
        "server_gpus": run.server_gpus,
        "colocated": run.colocated,
        "step_s": step.seconds,
        "bounds_s": step.bounds,
        "bound_by": step.bound_by,
        "gpu_hours": split.gpu_hours,
    }


def describe(split: Split, device: Device) -> dict[str, Any]:
    """Return the whole plan of a split for the JSON file."""
    run = split.run
    found = summary(split) | {
        "usable_bytes": device.usable,
        "memory": [
            {"rank": rank.name, "phase": rank.phase, "pinned_bytes": rank.pinned}
            | {f"{part}_bytes": size for part, size in rank.parts.items()}
            for rank in run.memory()
        ],
        "activation_bytes": run.activations_by_mode(),
        "seconds": {
            "score": split.step.score,
            "update": split.step.update,
            "move": split.step.move,
            "publish": split.step.publish,
        },
    }
    if run.has_servers:
        server = run.server(device)
        found["server"] = {
            "weights_bytes": server.weights,
            "cache_bytes": server.cache,
            "cached_tokens": server.cached_tokens,
        }
    return found
