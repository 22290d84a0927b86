"""Ranks: torch.distributed and the process groups of each network, set up once per process.

Theory of operation. Every process runs the same program (SPMD). `torchrun` or `srun` sets RANK,
WORLD_SIZE and LOCAL_RANK; a process without them is a world of one. A layout's ranks are ordered
tensor first, then data, then pipeline (Megatron's "tp-cp-ep-dp-pp"), so that a tensor-parallel
group is inside a node. Policy and critic share all ranks (colocated), or the critic has the ranks
that follow the policy's (split). Process groups are passed to Megatron as arguments. From its
globals it still reads a few numbers, which `set_globals` sets. All ranks call `initialize` and
`shutdown`; if a rank dies, the others' collectives fail and the launcher ends them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.megatron import cpu_shim
from rlef_mega.run.manifest import refuse_untested_megatron
from rlef_mega.run.ranks import meet, node_of

# Ranks wait in a collective while one of them samples or grades: longer than any step, but a hang
# does not last a night.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
POLICY, CRITIC = "policy", "critic"


@dataclass(frozen=True)
class Ranks:
    """This process's rank in the world, and the layout of the networks that it holds parts of.
    `groups` is Megatron's own collection of the layout's process groups.
    """

    rank: int
    world_size: int
    networks: tuple[str, ...]  # which ones this rank holds a part of
    layout: ParallelConfig
    device: torch.device
    seed: int
    groups: ProcessGroupCollection
    group: dist.ProcessGroup | None  # all ranks of this layout; None: the world
    receivers: dist.ProcessGroup | None  # split: rank 0 and the critic's ranks

    @property
    def is_writer(self) -> bool:
        """Return whether this is the rank that writes files and prints."""
        return self.rank == 0

    @property
    def reports_outputs(self) -> bool:
        """Return whether this rank reports outputs: one rank of each data-parallel part does. Its
        tensor-parallel peers have the same outputs, other stages have none.
        """
        tensor, pipeline = self.groups.tp, self.groups.pp
        return pipeline.rank() == pipeline.size() - 1 and tensor.rank() == 0


def initialize(
    parallel: ParallelConfig, *, seed: int, critic: ParallelConfig | None = None
) -> Ranks:
    """Join the world and make its process groups. `critic` is the critic's own layout, on ranks of
    its own. Raises ConfigError if the layouts do not fit the processes that were started.
    """
    refuse_untested_megatron()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    needed = parallel.world_size + (critic.world_size if critic else 0)
    if world_size != needed:
        raise ConfigError(
            f"{world_size} processes were started, but the layout needs {sizes_in_words(parallel)}"
            + (f", and critic_parallel {sizes_in_words(critic)}" if critic else "")
            + f"; start {needed} (torchrun --nproc-per-node) or change the layout"
        )
    device = join_world(world_size, parallel, *([critic] if critic else []))
    cpu_shim.install()
    rank, critics = dist.get_rank(), range(parallel.world_size, world_size)
    layout, first, group, receivers = parallel, 0, None, None
    networks: tuple[str, ...] = (POLICY, CRITIC)
    if critic:
        networks = (POLICY,)
        if rank in critics:
            layout, first, networks = critic, critics.start, (CRITIC,)
        group = new_group(list(range(first, first + layout.world_size)))
    groups = make_groups(layout, first_rank=first)
    if critic:
        # by all ranks: rank 0 has made other groups than the critic's ranks (see `make_groups`)
        made = dist.new_group([0, *critics], timeout=COLLECTIVE_TIMEOUT)
        receivers = made if rank in (0, *critics) else None
    set_globals(layout, groups, seed)
    return Ranks(rank, world_size, networks, layout, device, seed, groups, group, receivers)


def sizes_in_words(parallel: ParallelConfig) -> str:
    return (
        f"tensor_model_parallel_size x pipeline_model_parallel_size x data_parallel_size = "
        f"{parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size} x "
        f"{parallel.data_parallel_size} = {parallel.world_size}"
    )


def make_groups(parallel: ParallelConfig, *, first_rank: int) -> ProcessGroupCollection:
    """Make Megatron's process groups of one layout, on the ranks from `first_rank` on. Only these
    ranks call it, and each makes only the groups that it is in: 1,024 ranks have hundreds.
    """
    generator = RankGenerator(
        tp=parallel.tensor_model_parallel_size,
        dp=parallel.data_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        ep=1,
        cp=1,
        order="tp-cp-ep-dp-pp",
        rank_offset=first_rank,
    )
    alone = new_group([dist.get_rank()])

    def mine(dimensions: str) -> dist.ProcessGroup:
        (ranks,) = (r for r in generator.get_ranks(dimensions) if dist.get_rank() in r)
        return new_group(ranks) if len(ranks) > 1 else alone

    tensor, data, model, pipeline = mine("tp"), mine("dp"), mine("tp-pp"), mine("pp")
    tensor_data, everyone = mine("tp-dp"), mine("tp-dp-pp")
    # First and last stage hold a tied embedding. Their group is made last: members agree on a name
    # by counting the groups that they made before, and middle stages do not make this one.
    stages = dist.get_process_group_ranks(pipeline)
    ends = sorted({stages[0], stages[-1]})
    embedding = alone if len(ends) == 1 else None
    if embedding is None and dist.get_rank() in ends:
        embedding = new_group(ends)
    return ProcessGroupCollection(
        tp=tensor,
        pp=pipeline,
        mp=model,
        dp=data,
        # context parallelism is not offered: each rank is its own group
        cp=alone,
        dp_cp=data,
        tp_cp=tensor,
        tp_dp_cp=tensor_data,
        embd=embedding,
        pos_embd=None,
        # no experts: each rank alone, or the dense part's groups if Megatron uses them
        ep=alone,
        expt_tp=alone,
        expt_dp=data,
        tp_ep=alone,
        tp_ep_pp=model,
        intra_dp_cp=data,
        intra_expt_dp=data,
        inter_dist_opt=None,
        # the distributed optimizer's norm goes over all ranks of the layout
        intra_dist_opt=everyone,
    )


def new_group(ranks: list[int]) -> dist.ProcessGroup:
    """Make a group of these ranks. Only these ranks call it, and they wait for each other."""
    return dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT, use_local_synchronization=True)


def set_globals(parallel: ParallelConfig, groups: ProcessGroupCollection, seed: int) -> None:
    """Set what Megatron reads from its globals, and seed the generators."""
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.set_data_parallel_rank(groups.dp.rank())
    parallel_state.set_pipeline_model_parallel_rank(groups.pp.rank())
    parallel_state.set_pipeline_model_parallel_world_size(groups.pp.size())
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual if virtual > 1 else None)
    parallel_state._set_global_memory_buffer()  # scratch for sequence parallelism's gathers
    model_parallel_cuda_manual_seed(seed, tp_rank=groups.tp.rank(), ep_rank=0, etp_rank=0)
    torch.manual_seed(seed)


def join_world(world_size: int, *layouts: ParallelConfig) -> torch.device:
    """Join the world, with NCCL where there is CUDA, else gloo. A world of one needs no launcher.

    The world gets no `device_id`. With one, torch would make every later NCCL group by splitting
    the world's communicator, for which all ranks must make it. The group for publications, which
    contains other processes, cannot be split off the world: rank 0 would wait in it forever.
    Without `device_id`, a group connects when first used.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    rank = 0 if world_size == 1 else int(os.environ["RANK"])
    store = dist.HashStore() if world_size == 1 else meet()
    check_tensor_groups(store, rank, layouts)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    return device


def check_tensor_groups(store: dist.Store, rank: int, layouts: Sequence[ParallelConfig]) -> None:
    """Raise ConfigError if this rank's tensor-parallel group is spread over nodes, although a node
    has room for it: each layer's all-reduces would cross the network."""
    start = 0
    for layout in layouts:
        size = layout.tensor_model_parallel_size
        if start <= rank < start + layout.world_size and 1 < size <= layout.processes_per_node:
            first = rank - (rank - start) % size
            nodes = node_of(store, first), node_of(store, rank)
            if nodes[0] != nodes[1]:
                raise ConfigError(
                    f"ranks {first} and {rank} of a tensor-parallel group are on nodes {nodes[0]} "
                    f"and {nodes[1]}; start parallel.processes_per_node = "
                    f"{layout.processes_per_node} ranks on each node, in blocks "
                    "(srun --distribution=block)"
                )
        start += layout.world_size


def shutdown(ranks: Ranks) -> None:
    """Wait for all ranks to finish their work, then leave the world."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
