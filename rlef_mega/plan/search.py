"""The search for layouts that fit, and for the best split of the GPUs into training and sampling.

Servers get GPUs of their own (a split), or take turns with the ranks on the same GPUs (colocated:
synchronous, and with `release_memory`). All networks of a layout share all ranks. The search varies
the tensor-parallel size within a node, the pipeline and its chunks, and the data-parallel sizes
that divide an update. For each it takes the least recomputation that fits, then offloading of idle
state, because both cost time. The recipe's batch stays as it is, so an update's sequences bound the
data-parallel size.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rlef_mega.config import ConfigError, ParallelConfig, flatten
from rlef_mega.megatron.network.stages import check_layout
from rlef_mega.plan.hardware import Device
from rlef_mega.plan.planned_run import (
    RECOMPUTE,
    PlannedRun,
    StepTime,
    refuse_small_servers,
    refuse_without_room,
)

TENSOR, PIPELINE, CHUNKS = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 5)
EQUAL = 1.05  # steps that differ by less count as equal
MOST_SAMPLING = 16384  # GPUs: more servers make no step faster


@dataclass(frozen=True)
class Split:
    """A layout and the GPUs that sample for it."""

    run: PlannedRun
    sampling: int
    step: StepTime

    @property
    def gpus(self) -> int:
        return self.run.training_gpus + (0 if self.run.colocated else self.sampling)

    @property
    def gpu_hours(self) -> float:
        return self.run.config.run.steps * self.step.seconds * self.gpus / 3600


def settings(split: Split, device: Device) -> dict[str, Any]:
    """Return the settings, by key, that a recipe must change to train with this split."""
    run, config = split.run, split.run.config
    layout = run.parallel.model_dump(exclude={"pipeline_layers", "processes_per_node"})
    chosen = {f"parallel.{key}": value for key, value in layout.items()} | {
        "model.recompute": run.recompute,
        "learner.offload": "idle" if run.offloads else "none",
    }
    if run.has_servers:
        own_gpus = split.gpus <= device.per_node and not run.colocated  # of the ranks' node
        chosen |= {
            "rollout.mode": run.mode,
            "rollout.servers.release_memory": run.colocated,
            "rollout.servers.memory_fraction": run.memory_fraction,
            "rollout.servers.tensor_parallel_size": run.server_gpus,
            "rollout.servers.count": min(split.sampling, device.per_node) // run.server_gpus,
            "rollout.servers.first_gpu": run.training_gpus * own_gpus,
            "rollout.servers.publish": run.publish,
        }
    own = flatten(config.model_dump())
    return {key: value for key, value in chosen.items() if own.get(key) != value}


def layouts(run: PlannedRun, device: Device, most_gpus: int) -> Iterator[ParallelConfig]:
    """Yield every layout of at most `most_gpus` GPUs that the trainer accepts for the run's model
    and batch, if each tensor-parallel group fits in one node."""
    update, problems = run.batch // run.updates, run.batch // run.config.rollout.samples_per_problem
    data_sizes = [size for size in range(1, update + 1) if update % size == 0]
    for tensor, pipeline, chunks, data in product(TENSOR, PIPELINE, CHUNKS, data_sizes):
        layout = ParallelConfig.model_construct(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=chunks,
            data_parallel_size=data,
            sequence_parallel=tensor > 1,
            processes_per_node=run.parallel.processes_per_node,
        )
        too_large = layout.world_size > most_gpus or tensor > device.per_node
        uneven = run.mode == "async" and problems % layout.world_size
        if too_large or uneven or (pipeline == 1 and chunks > 1):
            continue
        with suppress(ConfigError):
            check_layout(run.shape, layout)
            yield layout


def candidates(run: PlannedRun, device: Device, most_gpus: int) -> list[Split]:
    """Return every layout of up to `most_gpus` that fits, without servers, the fastest first."""
    fitting = (
        lightest_that_fits(replace(run, parallel=layout, critic_parallel=None), device)
        for layout in layouts(run, device, most_gpus)
    )
    found = [Split(fits, 0, fits.step(device, 0)) for fits in fitting if fits is not None]
    return sorted(found, key=lambda each: (each.step.training, each.gpus))


def placements(run: PlannedRun) -> list[PlannedRun]:
    """Return the run with its servers on GPUs of their own and, if they can, on the trainer's."""
    apart = replace(run, colocated=False, mode="async") if run.colocated else run
    if not run.has_servers or run.config.rollout.servers.device == "cpu":
        return [apart]
    return [apart, replace(run, colocated=True, mode="sync")]


def lightest_that_fits(run: PlannedRun, device: Device) -> PlannedRun | None:
    """Return the run with as little recomputation and offloading as it needs to fit; colocated
    servers get at most the memory that the ranks leave."""
    for offloads in (False, True):
        for recompute in RECOMPUTE:
            tried = replace(run, recompute=recompute, offloads=offloads)
            if max(rank.total for rank in tried.memory()) > device.usable:
                continue
            if tried.colocated:
                most = tried.largest_memory_fraction(device)
                tried = replace(tried, memory_fraction=min(run.memory_fraction, most))
            if tried.sampling_fits(device) and (not tried.colocated or server_sizes(tried, device)):
                return tried
    return None


def refuse_if_nothing_fits(run: PlannedRun, device: Device, gpus: int) -> None:
    """Raise ConfigError, with what the smallest layout lacks, if no layout fits."""
    tried = [
        replace(run, parallel=layout, critic_parallel=None, recompute="full", offloads=True)
        for layout in layouts(run, device, gpus)
    ]
    if not tried:
        raise ConfigError(f"--gpus {gpus}: no layout of this model has so few ranks; give more")
    smallest = min(tried, key=lambda each: max(rank.total for rank in each.memory()))
    try:
        refuse_without_room(smallest, device)
    except ConfigError as error:
        raise ConfigError(
            f"--gpus {gpus}: no layout fits. The one that needs least memory has TP "
            f"{smallest.policy.tensor} x PP {smallest.policy.pipeline} x DP "
            f"{smallest.policy.data}, full recomputation and offloading: {error}"
        ) from None


def splits(
    run: PlannedRun, device: Device, gpus: int, found: Sequence[Split] | None = None
) -> list[Split]:
    """Find for each layout the split of `gpus` and the size of a server with the fastest step.

    Returns the fastest step first; among steps within 5% of it, the one with the fewest GPUs.
    Raises ConfigError if nothing fits.
    """
    if found is None:
        found = [each for placed in placements(run) for each in candidates(placed, device, gpus)]
    if not (sizes := server_sizes(run, device)):
        refuse_small_servers(replace(run, server_gpus=max(divisors_of_heads(run))), device)
    tried = (fastest_servers(each, device, gpus - each.gpus) for each in found)
    ranked = [split for split in tried if split is not None]
    if not ranked:
        refuse_if_nothing_fits(run, device, gpus)
        raise ConfigError(
            f"--gpus {gpus}: a layout fits, but leaves fewer than {min(sizes)} GPUs for a server; "
            "give more"
        )
    limit_s = EQUAL * min(each.step.seconds for each in ranked)
    equals = [
        without_idle_servers(each, device, limit_s)
        for each in ranked
        if each.step.seconds <= limit_s
    ]
    others = [each for each in ranked if each.step.seconds > limit_s]
    return [
        *sorted(equals, key=lambda each: (each.gpus, each.step.seconds)),
        *sorted(others, key=lambda each: each.step.seconds),
    ]


def server_sizes(run: PlannedRun, device: Device) -> list[int]:
    """Return the sizes, in GPUs, at which a server has room for the model and a dialogue."""
    if not run.has_servers:
        return [1]
    fitting = []
    for size in divisors_of_heads(run):
        with suppress(ConfigError):
            refuse_small_servers(replace(run, server_gpus=size), device)
            fitting.append(size)
    return fitting


def divisors_of_heads(run: PlannedRun) -> list[int]:
    """Return the sizes of a server at which each GPU has the same number of key-value heads."""
    return [size for size in TENSOR if run.shape.key_value_heads % size == 0]


def fastest_servers(candidate: Split, device: Device, left: int) -> Split | None:
    """Give the `left` GPUs, or the trainer's own, to servers of the fastest size. Returns None if
    they are too few."""
    run, step = candidate.run, candidate.step
    if not run.has_servers:
        return with_servers(run, step, device, 0) if left >= 0 else None
    given = run.training_gpus if run.colocated else left
    tried = [
        with_servers(replace(run, server_gpus=size), step, device, given // size * size)
        for size in server_sizes(run, device)
        if given >= size and not (run.colocated and given % size)
    ]
    return min(tried, key=lambda each: each.step.seconds, default=None)


def with_servers(run: PlannedRun, step: StepTime, device: Device, sampling: int) -> Split:
    one_node = Split(run, sampling, step).gpus <= device.per_node
    run = replace(run, publish=way_to_publish(run, one_node=one_node))
    publish, sampled = run.publish_s(device), run.generation(device, sampling)
    return Split(run, sampling, replace(step, publish=publish, generation=sampled))


def way_to_publish(run: PlannedRun, *, one_node: bool) -> str:
    """Return the recipe's way to publish weights, or the fastest that is possible instead."""
    if run.colocated:
        return "tensor" if one_node else "disk"
    asked = run.config.rollout.servers.publish
    return "distributed" if asked == "tensor" and not one_node else asked


def without_idle_servers(split: Split, device: Device, limit_s: float) -> Split:
    """Remove servers, a 16th at a time, while the step stays below the limit."""
    while split.run.has_servers and not split.run.colocated:
        size = split.run.server_gpus
        fewer = (split.sampling - max(size, split.sampling // 16)) // size * size
        if fewer < size:
            break
        tried = with_servers(split.run, split.step, device, fewer)
        if tried.step.seconds > limit_s:
            break
        split = tried
    return split


def balanced_split(run: PlannedRun, device: Device) -> Split:
    """Give the run the fewest servers with which a step is within 5% of the fastest.

    More servers would wait for training, or for the longest dialogue.
    """
    most = MOST_SAMPLING // run.server_gpus * run.server_gpus
    fastest = with_servers(run, run.step(device, 0), device, most)
    return without_idle_servers(fastest, device, EQUAL * fastest.step.seconds)
