"""Layouts that fit, ranked; how GPUs are best divided between training and sampling; and what more
of them bring.

Layouts are those of networks that share all ranks: tensor-parallel sizes within a node, pipelines,
chunks of them, and data-parallel sizes that divide an update. For each, the least recomputation
that fits is taken, then offloading of idle state: both cost time. All of a recipe's batch stays as
it is, so the data-parallel size ends at the sequences of an update.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlef_mega.config import ConfigError, ParallelConfig, check_layout
from rlef_mega.flops import LlamaShape
from rlef_mega.plan.hardware import Device
from rlef_mega.plan.job import RECOMPUTE, Job, Step, refuse_small_servers, refuse_without_room

TENSOR, PIPELINE, CHUNKS = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 5)
FEWEST_BYTES = "full"
EQUAL = 1.05  # steps that differ by less count as equal


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, with as little recomputation as it can do with."""

    job: Job
    memory: float  # bytes of the fullest rank
    step: Step  # without servers

    @property
    def gpus(self) -> int:
        return self.job.training_gpus


@dataclass(frozen=True)
class Split:
    """A layout and the GPUs that sample for it."""

    job: Job
    sampling: int
    step: Step

    @property
    def gpus(self) -> int:
        return self.job.training_gpus + self.sampling


def layouts(job: Job, device: Device, most_gpus: int) -> Iterator[ParallelConfig]:
    """All that the trainer takes."""
    update = job.batch // job.updates
    data_sizes = [size for size in range(1, update + 1) if update % size == 0]
    for tensor in TENSOR:
        for pipeline in PIPELINE:
            for chunks in CHUNKS if pipeline > 1 else (1,):
                for data in data_sizes:
                    layout = ParallelConfig.model_construct(
                        tensor_model_parallel_size=tensor,
                        pipeline_model_parallel_size=pipeline,
                        virtual_pipeline_model_parallel_size=chunks,
                        pipeline_layers=None,
                        data_parallel_size=data,
                        sequence_parallel=tensor > 1,
                        overlap=True,
                        processes_per_node=job.parallel.processes_per_node,
                    )
                    small_enough = layout.world_size <= most_gpus and tensor <= device.per_node
                    if small_enough and is_possible(job.shape, layout):
                        yield layout


def is_possible(shape: LlamaShape, layout: ParallelConfig) -> bool:
    try:
        check_layout(
            heads=shape.heads,
            key_value_heads=shape.key_value_heads,
            layers=shape.layers,
            vocab_size=shape.vocabulary,
            ffn=shape.ffn,
            parallel=layout,
        )
    except ConfigError:
        return False
    return True


def candidates(job: Job, device: Device, most_gpus: int) -> list[Candidate]:
    """Every layout up to so many GPUs that fits, the quickest to train first."""
    found = []
    for layout in layouts(job, device, most_gpus):
        fitting = lightest_that_fits(replace(job, parallel=layout, critic_parallel=None), device)
        if fitting is not None:
            chosen, memory = fitting
            found.append(Candidate(chosen, memory, chosen.step(device, 0)))
    return sorted(found, key=lambda each: (each.step.training, each.gpus))


def lightest_that_fits(job: Job, device: Device) -> tuple[Job, float] | None:
    for offloads in (False, True):
        for recompute in RECOMPUTE:
            tried = replace(job, recompute=recompute, offloads=offloads)
            most = max(rank.total for rank in tried.memory())
            if most <= device.usable:
                return tried, most
    return None


def refuse_if_nothing_fits(job: Job, device: Device, gpus: int) -> None:
    """ConfigError with what the roomiest layout lacks."""
    tried = [
        replace(job, parallel=layout, critic_parallel=None, recompute=FEWEST_BYTES, offloads=True)
        for layout in layouts(job, device, gpus)
    ]
    if not tried:
        raise ConfigError(f"--gpus {gpus}: no layout of this model has so few ranks")
    roomiest = min(tried, key=lambda each: max(rank.total for rank in each.memory()))
    try:
        refuse_without_room(roomiest, device)
    except ConfigError as error:
        raise ConfigError(
            f"--gpus {gpus}: no layout fits; the roomiest has TP "
            f"{roomiest.policy.tensor} x PP {roomiest.policy.pipeline} x DP "
            f"{roomiest.policy.data} with full recomputation and offloading, and {error}"
        ) from None


def splits(
    job: Job, device: Device, gpus: int, found: Sequence[Candidate] | None = None
) -> list[Split]:
    """For each layout the quickest division of so many GPUs, and of servers into GPUs; the quickest
    step first, among equals, which differ by under 5%, the one with the fewest GPUs. ConfigError
    where nothing fits."""
    if found is None:
        found = candidates(job, device, gpus)
    sizes = server_sizes(job, device)
    ranked = [
        made
        for each in found
        if (made := quickest_servers(each, device, gpus - each.gpus, sizes)) is not None
    ]
    if not ranked:
        refuse_if_nothing_fits(job, device, gpus)
        raise ConfigError(
            f"--gpus {gpus}: a layout fits, but leaves no {min(sizes)} GPUs for a server"
        )
    best = min(each.step.seconds for each in ranked)
    equals = [each for each in ranked if each.step.seconds <= EQUAL * best]
    others = [each for each in ranked if each.step.seconds > EQUAL * best]
    equals = [without_idle_servers(each, device, EQUAL * best) for each in equals]
    return [
        *sorted(equals, key=lambda each: (each.gpus, each.step.seconds)),
        *sorted(others, key=lambda each: each.step.seconds),
    ]


def server_sizes(job: Job, device: Device) -> list[int]:
    """GPUs of a server that hold the model and a dialogue. ConfigError if none do."""
    if job.engine == "local":
        return [1]
    fitting = []
    for size in TENSOR:
        try:
            refuse_small_servers(replace(job, server_gpus=size), device)
        except ConfigError:
            continue
        if job.shape.key_value_heads % size == 0:
            fitting.append(size)
    if not fitting:
        refuse_small_servers(replace(job, server_gpus=max(TENSOR)), device)
    return fitting


def quickest_servers(
    candidate: Candidate, device: Device, left: int, sizes: Sequence[int]
) -> Split | None:
    if candidate.job.engine == "local":
        return with_servers(candidate.job, candidate.step, device, 0) if left >= 0 else None
    tried = [
        with_servers(
            replace(candidate.job, server_gpus=size), candidate.step, device, left // size * size
        )
        for size in sizes
        if left >= size
    ]
    return min(tried, key=lambda each: each.step.seconds, default=None)


def with_servers(job: Job, step: Step, device: Device, sampling: int) -> Split:
    return Split(job, sampling, replace(step, generation=job.generation(device, sampling)))


def without_idle_servers(split: Split, device: Device, limit_s: float) -> Split:
    """With fewer servers, a 16th less at a time, while the step stays below the limit."""
    while split.job.engine == "sglang":
        size = split.job.server_gpus
        fewer = (split.sampling - max(size, split.sampling // 16)) // size * size
        if fewer < size:
            break
        tried = with_servers(split.job, split.step, device, fewer)
        if tried.step.seconds > limit_s:
            break
        split = tried
    return split


def balanced_sampling(job: Job, device: Device, most_gpus: int = 16384) -> int:
    """The fewest GPUs of servers with which a step is within 5% of the quickest that servers can
    make it: more would wait for training, or for the longest dialogue."""
    step = job.step(device, 0)
    counts = [job.server_gpus]
    while counts[-1] < most_gpus:
        more = max(1, counts[-1] // 8 // job.server_gpus)
        counts.append(counts[-1] + more * job.server_gpus)
    times = [with_servers(job, step, device, count).step.seconds for count in counts]
    return next(
        count for count, time in zip(counts, times, strict=True) if time <= EQUAL * min(times)
    )


def scaling(job: Job, device: Device, counts: Sequence[int]) -> list[tuple[int, Split]]:
    """The quickest step with each number of GPUs, where there is one."""
    found = candidates(job, device, max(counts))
    reached = []
    for gpus in counts:
        try:
            reached.append((gpus, splits(job, device, gpus, found)[0]))
        except ConfigError:
            continue
    return reached
