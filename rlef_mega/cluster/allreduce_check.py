"""Measure an all-reduce over the training ranks: `srun python -m rlef_mega.cluster.allreduce_check
FLOOR_GBPS`, with one process per rank, as in training.

It uses NCCL on GPUs, else gloo. The figure is the bus bandwidth of NCCL's own tests, bytes x 2
(n - 1) / n over seconds, which does not depend on the number of ranks n.
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from rlef_mega.run.launch import FAILED, take_rank_from_slurm

TRIES = 5
TIMEOUT = timedelta(minutes=5)


def bus_bandwidth_gbps(device: torch.device, size_bytes: int) -> float:
    """Return the bus bandwidth in GB/s of the fastest of TRIES all-reduces, after one to warm up.
    Raises RuntimeError if the sum is wrong."""
    data = torch.empty(size_bytes // 4, device=device)
    best_s = float("inf")
    for attempt in range(TRIES + 1):
        data.fill_(1)
        dist.barrier()  # world
        began = time.perf_counter()
        dist.all_reduce(data)  # world: sums the tensor
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best_s = min(best_s, time.perf_counter() - began)
    ranks = dist.get_world_size()
    if data.min().item() != ranks or data.max().item() != ranks:
        raise RuntimeError(f"an all-reduce over {ranks} ranks gave a wrong sum; drain the node")
    return 2 * (ranks - 1) / ranks * size_bytes / best_s / 1e9


def main() -> int:
    floor_gbps = float(sys.argv[1])
    take_rank_from_slurm()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    try:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
        found = bus_bandwidth_gbps(device, 2**28 if cuda else 2**22)
    except (RuntimeError, ValueError) as error:
        print(f"the all-reduce check failed: {error}", flush=True)
        os._exit(FAILED)
    slow = found < floor_gbps
    if dist.get_rank() == 0:
        print(
            f"all-reduce over {dist.get_world_size()} ranks: {found:.2f} GB/s"
            + (f", below the floor of {floor_gbps:g}; check which network is used" if slow else ""),
            flush=True,
        )
    dist.barrier()  # world: rank 0 has printed
    dist.destroy_process_group()
    return FAILED if slow else 0


if __name__ == "__main__":
    sys.exit(main())
