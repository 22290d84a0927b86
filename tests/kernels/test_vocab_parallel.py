"""Shards of the vocabulary in two and four gloo processes against one process that has all of it:
the PyTorch forms, and the Triton kernels in the interpreter (on GPUs the same code runs over NCCL).

Theory of operation. Four processes, forked from one that has imported Triton for its interpreter,
start once for the module. For each way of computing, rank 0
computes alone, ranks 0 and 1 in a group of two, and all in a group of four; each rank saves its
results to a file, which the tests compare. Each process calls every operation twice, with tokens
and without: if one left out a collective, the others would wait, and the fixture would time out.

Rounding differs (sums over parts), so results agree within a tolerance of the largest entry, not to
the bit; between the ranks of a group, which add in the same order, log-probs are equal to the bit.
NCCL is not tested.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlef_kernels import (
    linear_logprob_reference,
    linear_ppo_loss_reference,
    linear_score_reference,
)

TOKENS, WIDTH, VOCABULARY = 23, 16, 52
RANKS = 4
# way of computing -> dtype of the inputs: fp32 uses cuBLAS, bf16 the fused kernels
WAYS = {"pytorch": torch.float32, "cublas": torch.float32, "fused": torch.bfloat16}


def operations(way: str):
    """Return linear_logprob, linear_ppo_loss and linear_score."""
    if way == "pytorch":
        return (
            lambda *args, **options: linear_logprob_reference(*args, chunk_tokens=7, **options),
            lambda *args, **options: linear_ppo_loss_reference(*args, chunk_tokens=7, **options),
            lambda *args, **options: linear_score_reference(*args, chunk_tokens=7, **options),
        )

    from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
    from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels
    from rlef_kernels.gpu.linear_score import linear_score_kernels

    return linear_logprob_kernels, linear_ppo_loss_kernels, linear_score_kernels


def results(
    way: str, tokens: int, rank: int, ranks: int, group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """Compute every operation's outputs and gradients on this rank's columns (all without a
    group)."""
    linear_logprob, linear_ppo_loss, linear_score = operations(way)
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, tokens, WIDTH, generator=generator).to(WAYS[way])
    weight, ref_weight = torch.randn(2, VOCABULARY, WIDTH, generator=generator).to(WAYS[way])
    weight[3] *= 5  # so that different shards dominate different rows
    target = torch.randint(VOCABULARY, (tokens,), generator=generator)
    if tokens:
        target[:6] = torch.tensor([0, 12, 13, 25, 26, 51])  # edges of the shards
    ramp = torch.linspace(-1, 2, tokens)
    size = VOCABULARY // ranks
    columns = slice(rank * size, (rank + 1) * size)
    hidden.requires_grad_()
    shard = weight[columns].clone().requires_grad_()

    found = {}
    logprob, entropy = linear_logprob(hidden, shard, target, temperature=0.8, group=group)
    loss = (logprob * ramp + entropy * ramp.flip(0)).sum()
    found["linear hidden"], found["linear weight"] = torch.autograd.grad(loss, (hidden, shard))
    found["linear logprob"], found["linear entropy"] = logprob.detach(), entropy.detach()

    # equal on every rank and in every layout; computed log-probs would differ by rounding
    policy = tuple(-4 + torch.randn(3, tokens, generator=generator))
    values = linear_ppo_loss(
        hidden, shard, target, policy, clip_eps=0.2, temperature=0.8, group=group
    )
    found["ppo hidden"], found["ppo weight"] = torch.autograd.grad(values[0], (hidden, shard))
    found["ppo metrics"] = values.detach()

    models = (hidden.detach(), shard.detach(), ref_hidden, ref_weight[columns])
    scores = linear_score(*models, target, temperature=0.8, group=group)
    found |= {f"score {name}": values for name, values in scores._asdict().items()}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[tuple[str, int, int], dict[str, torch.Tensor]]]:
    """Run all ranks. Returns the results by rank, then by (way, ranks of the group, tokens)."""
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, str(Path(__file__)), str(folder)]
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_give_what_one_process_gives(found, way, ranks):
    for rank, of_rank in enumerate(found[:ranks]):
        for tokens in (TOKENS, 0):
            whole = found[0][way, 1, tokens]
            compare(of_rank[way, ranks, tokens], whole, rank, VOCABULARY // ranks)
        # added in the same order everywhere
        scores = tuple(name for name in of_rank[way, ranks, TOKENS] if "score" in name)
        assert len(scores) == 4
        for name in ("linear logprob", "linear entropy", "linear hidden", "ppo metrics", *scores):
            first = found[0][way, ranks, TOKENS][name]
            assert torch.equal(of_rank[way, ranks, TOKENS][name], first), name


def compare(
    of_rank: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], rank: int, size: int
) -> None:
    columns = slice(rank * size, (rank + 1) * size)
    for name, expected in whole.items():
        if name.endswith("weight"):
            expected = expected[columns]
        found = of_rank[name]
        assert found.shape == expected.shape
        if expected.numel():
            error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            assert error < (1e-5 if expected.dtype == torch.float32 else 2e-2), (name, rank)


def run_rank(folder: Path, rank: int) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    groups = {1: None, 2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    found = {
        (way, ranks, tokens): results(way, tokens, rank, ranks, group)
        for way in WAYS
        for ranks, group in groups.items()
        if rank < ranks
        for tokens in (TOKENS, 0)
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    import interpreter  # noqa: F401  (fixes bf16; in this file's folder)

    operations("fused")
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=run_rank, args=(folder, rank), daemon=True) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        time.sleep(0.02)
        if any(process.exitcode for process in ranks):
            break  # the others wait for it; they end with this process
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
