"""Ranks: torch.distributed and Megatron's process groups, set up once a process.

Theory of operation. Every process runs the same program (SPMD). `torchrun` or `srun` gives RANK,
WORLD_SIZE and LOCAL_RANK; a process without them is a world of one. Ranks are laid out tensor
first, then data, then pipeline (Megatron's "tp-cp-ep-dp-pp"), so that a tensor-parallel group sits
inside a node. All ranks call `initialize`, and all call `shutdown`; a rank that dies breaks the
others' collectives, and the launcher ends them.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.megatron import cpu_shim
from rlef_mega.megatron.accelerations import refuse_foreign_apex
from rlef_mega.versions import refuse_untested_megatron

# ranks wait in a collective while one of them rolls out or grades: longer than any step, shorter
# than a lost night
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `groups` is Megatron's own collection of process groups."""

    rank: int
    world_size: int
    tensor_parallel_rank: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: torch.device
    seed: int
    groups: "ProcessGroupCollection"  # type: ignore[name-defined] # noqa: F821

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_parallel_rank == 0

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


def initialize(parallel: ParallelConfig, *, seed: int) -> Ranks:
    """Join the world and split it. Raises ConfigError when the layout does not fit the processes
    that were started.
    """
    refuse_untested_megatron()
    refuse_foreign_apex()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != parallel.world_size:
        raise ConfigError(
            f"{world_size} processes were started, but the layout needs "
            f"parallel.tensor_model_parallel_size x pipeline_model_parallel_size x "
            f"data_parallel_size = {parallel.tensor_model_parallel_size} x "
            f"{parallel.pipeline_model_parallel_size} x {parallel.data_parallel_size} = "
            f"{parallel.world_size}; start {parallel.world_size} (torchrun --nproc-per-node) "
            f"or change the layout"
        )
    device = join_world(world_size)
    cpu_shim.install()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
    )
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return Ranks(
        rank=dist.get_rank(),
        world_size=world_size,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=parallel.pipeline_model_parallel_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel.data_parallel_size,
        device=device,
        seed=seed,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def join_world(world_size: int) -> torch.device:
    """NCCL where there is CUDA, else gloo; a world of one needs no launcher."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend, device_id = "nccl", device
    else:
        device, backend, device_id = torch.device("cpu"), "gloo", None
    if world_size == 1:
        dist.init_process_group(
            backend,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device_id,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=device_id)
    return device


def shutdown(ranks: Ranks) -> None:
    """Leave the world; every rank calls it, once all its work is done."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
