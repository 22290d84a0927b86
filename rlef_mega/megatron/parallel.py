"""Ranks: torch.distributed and the process groups of each network, set up once a process.

Theory of operation. Every process runs the same program (SPMD). `torchrun` or `srun` gives RANK,
WORLD_SIZE and LOCAL_RANK; a process without them is a world of one. A layout's ranks are laid out
tensor first, then data, then pipeline (Megatron's "tp-cp-ep-dp-pp"), so that a tensor-parallel
group sits inside a node. Policy and critic share all ranks (colocated), or the critic has the ranks
that follow the policy's (split). Groups are passed to Megatron, never read from its globals; what
it still reads there are numbers, not groups, and they are set here (`enter`). All
ranks call `initialize`, and all call `shutdown`; a rank that dies breaks the others' collectives,
and the launcher ends them.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.megatron import cpu_shim
from rlef_mega.megatron.network.accelerations import refuse_foreign_apex
from rlef_mega.run.manifest import refuse_untested_megatron

# ranks wait in a collective while one of them rolls out or grades: longer than any step, shorter
# than a lost night
COLLECTIVE_TIMEOUT = timedelta(hours=2)
POLICY, CRITIC = "policy", "critic"


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: in the world, and in the layout of the networks that it holds.
    `groups` is Megatron's own collection of that layout's process groups.
    """

    rank: int
    world_size: int
    networks: tuple[str, ...]  # which ones this rank holds a part of
    layout: ParallelConfig
    tensor_parallel_rank: int
    pipeline_parallel_rank: int
    data_parallel_rank: int
    device: torch.device
    seed: int
    groups: "ProcessGroupCollection"  # type: ignore[name-defined] # noqa: F821
    group: dist.ProcessGroup | None  # all ranks of this layout; None: the world
    receivers: dist.ProcessGroup | None = None  # split: the policy's first rank and the critic's

    @property
    def pipeline_parallel_size(self) -> int:
        return self.layout.pipeline_model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.layout.data_parallel_size

    @property
    def microbatch_multiple(self) -> int:
        """Megatron's interleaved schedule hands micro-batches round in groups of the pipeline's
        size p. The plain one would take fewer, but its stages are idle for (p - 1) / (m + p - 1) of
        the time with m of them (Narayanan et al., arXiv 2104.04473): more than half below p.
        """
        return self.pipeline_parallel_size

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    @property
    def is_writer(self) -> bool:
        """The one rank that writes files and prints."""
        return self.rank == 0

    @property
    def speaks_for_outputs(self) -> bool:
        """One rank a data-parallel part: its tensor-parallel peers hold the same outputs, other
        stages none.
        """
        return self.is_last_stage and self.tensor_parallel_rank == 0


def initialize(
    parallel: ParallelConfig, *, seed: int, critic: ParallelConfig | None = None
) -> Ranks:
    """Join the world and split it; `critic` is the critic's own layout, on ranks of its own. Raises
    ConfigError when the layouts do not fit the processes that were started.
    """
    refuse_untested_megatron()
    refuse_foreign_apex()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    needed = parallel.world_size + (critic.world_size if critic else 0)
    if world_size != needed:
        raise ConfigError(
            f"{world_size} processes were started, but the layout needs {describe(parallel)}"
            + (f", and critic_parallel {describe(critic)}" if critic else "")
            + f"; start {needed} (torchrun --nproc-per-node) or change the layout"
        )
    device = join_world(world_size)
    cpu_shim.install()
    rank = dist.get_rank()
    if critic is None:
        groups = make_groups(parallel, first_rank=0)
        return enter(parallel, groups, (POLICY, CRITIC), device, seed, group=None)
    # every rank takes part in making all groups, and keeps its own
    first = parallel.world_size
    policy_groups = make_groups(parallel, first_rank=0)
    critic_groups = make_groups(critic, first_rank=first)
    policy_ranks, critic_ranks = range(first), range(first, world_size)
    policy_group = dist.new_group(list(policy_ranks), timeout=COLLECTIVE_TIMEOUT)
    critic_group = dist.new_group(list(critic_ranks), timeout=COLLECTIVE_TIMEOUT)
    receivers = dist.new_group([0, *critic_ranks], timeout=COLLECTIVE_TIMEOUT)
    if rank in policy_ranks:
        return enter(
            parallel,
            policy_groups,
            (POLICY,),
            device,
            seed,
            group=policy_group,
            receivers=receivers if rank == 0 else None,
        )
    return enter(
        critic, critic_groups, (CRITIC,), device, seed, group=critic_group, receivers=receivers
    )


def describe(parallel: ParallelConfig) -> str:
    return (
        f"tensor_model_parallel_size x pipeline_model_parallel_size x data_parallel_size = "
        f"{parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size} x "
        f"{parallel.data_parallel_size} = {parallel.world_size}"
    )


def make_groups(parallel: ParallelConfig, *, first_rank: int):
    """Megatron's process groups of one layout, on the ranks from `first_rank` on. Every rank of the
    world calls it, members or not.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    grid = rank_grid(parallel, first_rank=first_rank)
    tensor = member_group(groups_along(grid, "tp"))
    data = member_group(groups_along(grid, "dp"))
    model = member_group(groups_along(grid, "tp", "pp"))
    pipelines = groups_along(grid, "pp")
    alone = member_group(groups_along(grid))
    return ProcessGroupCollection(
        tp=tensor,
        pp=member_group(pipelines),
        mp=model,
        dp=data,
        # context parallelism is not offered: each rank is its own group
        cp=alone,
        dp_cp=data,
        tp_cp=tensor,
        tp_dp_cp=member_group(groups_along(grid, "tp", "dp")),
        # first and last stage hold a tied embedding
        embd=member_group([sorted({ranks[0], ranks[-1]}) for ranks in pipelines]),
        pos_embd=None,
        # no experts: alone, or as for the dense part where Megatron asks
        ep=alone,
        expt_tp=alone,
        expt_dp=data,
        tp_ep=alone,
        tp_ep_pp=model,
        intra_dp_cp=data,
        intra_expt_dp=data,
        inter_dist_opt=None,
        # the distributed optimizer's norm goes over all ranks of the layout
        intra_dist_opt=member_group(groups_along(grid, "tp", "dp", "pp")),
    )


DIMENSIONS = ("pp", "dp", "tp")  # of the grid of ranks, the fastest last


def rank_grid(parallel: ParallelConfig, *, first_rank: int) -> torch.Tensor:
    """[pipeline, data, tensor] ranks of one layout."""
    ranks = torch.arange(first_rank, first_rank + parallel.world_size)
    return ranks.view(
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
        parallel.tensor_model_parallel_size,
    )


def groups_along(grid: torch.Tensor, *dimensions: str) -> list[list[int]]:
    """The ranks that differ in these dimensions only, group by group; without any, each alone."""
    kept = [DIMENSIONS.index(name) for name in DIMENSIONS if name in dimensions]
    others = [place for place in range(grid.dim()) if place not in kept]
    size = torch.Size(grid.shape[place] for place in kept).numel()
    return grid.permute(*others, *kept).reshape(-1, size).tolist()


def member_group(enumeration: list[list[int]]) -> dist.ProcessGroup | None:
    """This rank's group among these; None for a rank in none of them."""
    mine = None
    for ranks in enumeration:
        group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def enter(
    parallel: ParallelConfig,
    groups: "ProcessGroupCollection",  # type: ignore[name-defined] # noqa: F821
    networks: tuple[str, ...],
    device: torch.device,
    seed: int,
    *,
    group: dist.ProcessGroup | None,
    receivers: dist.ProcessGroup | None = None,
) -> Ranks:
    """Take this rank's place in its layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.set_data_parallel_rank(groups.dp.rank())
    parallel_state.set_pipeline_model_parallel_rank(groups.pp.rank())
    parallel_state.set_pipeline_model_parallel_world_size(groups.pp.size())
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual if virtual > 1 else None)
    parallel_state._set_global_memory_buffer()  # scratch for sequence parallelism's gathers
    model_parallel_cuda_manual_seed(seed, tp_rank=groups.tp.rank(), ep_rank=0, etp_rank=0)
    torch.manual_seed(seed)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        networks=networks,
        layout=parallel,
        tensor_parallel_rank=groups.tp.rank(),
        pipeline_parallel_rank=groups.pp.rank(),
        data_parallel_rank=groups.dp.rank(),
        device=device,
        seed=seed,
        groups=groups,
        group=group,
        receivers=receivers,
    )


def join_world(world_size: int) -> torch.device:
    """NCCL where there is CUDA, else gloo; a world of one needs no launcher.

    The world gets no `device_id`. With one, torch makes every later NCCL group by splitting the
    world's communicator, one after another with all ranks: hundreds of them, most of one rank. And
    the group for publications, which has foreign processes in it, cannot be split off the world:
    rank 0 would wait in it for ever. Without, a group connects its members when it is first used.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if world_size == 1:
        dist.init_process_group(
            backend,
            timeout=COLLECTIVE_TIMEOUT,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return device


def shutdown(ranks: Ranks) -> None:
    """Leave the world, when the last rank has come here: each does, once all its work is done."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
