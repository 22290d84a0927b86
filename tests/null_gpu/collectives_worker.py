"""One rank of test_collectives.py: python -m tests.null_gpu.collectives_worker WHAT."""

import os
import sys

import torch
import torch.distributed as dist


def check_collectives(rank: int, ranks: int) -> None:
    """Compare each collective with its definition, for a tensor of several chunks of memory."""
    for dtype, count in ((torch.float32, 300_001), (torch.bfloat16, 5), (torch.int64, 3)):
        own = [(torch.arange(count) % 7 + 10 * r).to("cuda", dtype) for r in range(ranks)]
        total = own[rank].clone()
        dist.all_reduce(total)
        assert torch.equal(total, sum(own[1:], own[0])), dtype
        most = own[rank].clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        assert torch.equal(most, own[-1])
        everything = own[0].new_empty(ranks * count)
        dist.all_gather_into_tensor(everything, own[rank])
        assert torch.equal(everything, torch.cat(own))
        part = own[0].new_empty(count)
        dist.reduce_scatter_tensor(part, torch.cat([own[rank] + 100 * r for r in range(ranks)]))
        assert torch.equal(part, sum(own[1:], own[0]) + ranks * 100 * rank)
        sent = own[rank].clone()
        dist.broadcast(sent, src=1)
        assert torch.equal(sent, own[1])
        exchanged = own[0].new_empty(ranks * count)
        dist.all_to_all_single(exchanged, torch.cat([own[rank] + r for r in range(ranks)]))
        assert torch.equal(exchanged, torch.cat([own[r] + rank for r in range(ranks)]))
        received = torch.empty_like(own[rank])
        peer = (rank + 1) % ranks
        messages = [
            dist.P2POp(dist.isend, own[rank], peer),
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        assert torch.equal(received, own[(rank - 1) % ranks])
    alone = dist.new_group([0])
    if rank == 0:
        dist.all_reduce(total, group=alone)
    objects: list[object] = [None] * ranks
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(ranks)]


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    if sys.argv[1] == "check":
        check_collectives(rank, ranks)
    else:
        for number in range(10):
            dist.all_reduce(torch.ones(3, device="cuda"))
            torch.cuda.synchronize()
            print("done", number, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
