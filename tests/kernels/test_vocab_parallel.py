"""Shards of the vocabulary in two and four gloo processes against one process that holds it all:
the PyTorch forms, and the Triton kernels in the interpreter (on GPUs the same code runs over NCCL).

Each process calls every operation twice, with tokens and without: a collective that one of them
left out would leave the other waiting, and the test would time out. Rounding differs (sums over
parts), so results agree to a tolerance of the largest entry, not to the bit; between the processes,
which add in the same order, log-probs are equal to the bit. What this cannot catch: anything of
NCCL's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlef_kernels import (
    linear_kl_reference,
    linear_logprob_reference,
    linear_ppo_loss_reference,
    logits_logprob_reference,
)

TOKENS, WIDTH, VOCABULARY = 23, 16, 52
# way -> type of the inputs: the kernels take fp32 by way of cuBLAS, bf16 fused
WAYS = {"pytorch": torch.float32, "cublas": torch.float32, "fused": torch.bfloat16}


def operations(way: str):
    """linear_logprob, linear_ppo_loss, linear_kl, logits_logprob."""
    if way == "pytorch":
        return (
            lambda *args, **options: linear_logprob_reference(*args, chunk_tokens=7, **options),
            lambda *args, **options: linear_ppo_loss_reference(*args, chunk_tokens=7, **options),
            lambda *args, **options: linear_kl_reference(*args, chunk_tokens=7, **options),
            logits_logprob_reference,
        )
    from rlef_kernels.gpu.linear_kl import linear_kl_kernels
    from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
    from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels
    from rlef_kernels.gpu.logits_logprob import logits_logprob_kernels

    return (
        linear_logprob_kernels,
        linear_ppo_loss_kernels,
        linear_kl_kernels,
        logits_logprob_kernels,
    )


def results(
    way: str, tokens: int, rank: int, ranks: int, group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """Every operation's outputs and gradients, on this rank's columns (all of them without a
    group)."""
    linear_logprob, linear_ppo_loss, linear_kl, logits_logprob = operations(way)
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, tokens, WIDTH, generator=generator).to(WAYS[way])
    weight, ref_weight = torch.randn(2, VOCABULARY, WIDTH, generator=generator).to(WAYS[way])
    weight[3] *= 5  # one shard dominates some rows, another one others
    target = torch.randint(VOCABULARY, (tokens,), generator=generator)
    if tokens:
        target[:6] = torch.tensor([0, 12, 13, 25, 26, 51])  # edges of the shards
    ramp = torch.linspace(-1, 2, tokens)
    size = VOCABULARY // ranks
    columns = slice(rank * size, (rank + 1) * size)
    hidden.requires_grad_()
    shard = weight[columns].clone().requires_grad_()
    logits = (hidden.detach() @ shard.detach().t()).requires_grad_()

    found = {}
    logprob, entropy, greedy = linear_logprob(hidden, shard, target, temperature=0.8, group=group)
    loss = (logprob * ramp + entropy * ramp.flip(0)).sum()
    found["linear hidden"], found["linear weight"] = torch.autograd.grad(loss, (hidden, shard))
    found["linear logprob"], found["linear entropy"] = logprob.detach(), entropy.detach()
    found["linear greedy"] = greedy.float()

    # the same on every rank and in every layout: not made from log-probs, which differ in rounding
    policy = tuple(-4 + torch.randn(3, tokens, generator=generator))
    values = linear_ppo_loss(
        hidden, shard, target, policy, clip_eps=0.2, temperature=0.8, group=group
    )
    found["ppo hidden"], found["ppo weight"] = torch.autograd.grad(values[0], (hidden, shard))
    found["ppo metrics"] = values.detach()

    logprob, entropy = logits_logprob(logits, target, temperature=0.8, group=group)
    loss = (logprob * ramp + entropy * ramp.flip(0)).sum()
    (found["logits weight"],) = torch.autograd.grad(loss, logits)
    found["logits logprob"], found["logits entropy"] = logprob.detach(), entropy.detach()

    kl = linear_kl(hidden, shard, ref_hidden, ref_weight[columns], group=group)
    found["kl hidden"], found["kl weight"] = torch.autograd.grad((kl * ramp).sum(), (hidden, shard))
    found["kl"] = kl.detach()
    return found


def run(folder: Path, way: str, ranks: int) -> list[dict[int, dict[str, torch.Tensor]]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if way != "pytorch":
        pytest.importorskip("triton", reason="Triton is not installed")
        environment |= {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(folder), way, str(ranks)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("way", WAYS)
def test_shards_give_what_one_process_gives(way, tmp_path):
    (tmp_path / "whole").mkdir()
    (whole,) = run(tmp_path / "whole", way, 1)
    for ranks in (2, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        of_ranks = run(folder, way, ranks)
        for rank, of_rank in enumerate(of_ranks):
            for tokens in (TOKENS, 0):
                compare(of_rank[tokens], whole[tokens], rank, VOCABULARY // ranks)
            # added in the same order everywhere
            for name in ("linear logprob", "linear entropy", "linear hidden", "ppo metrics", "kl"):
                assert torch.equal(of_rank[TOKENS][name], of_ranks[0][TOKENS][name]), name


def compare(
    of_rank: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], rank: int, size: int
) -> None:
    columns = slice(rank * size, (rank + 1) * size)
    for name, expected in whole.items():
        if name == "logits weight":
            expected = expected[:, columns]
        elif name.endswith("weight"):
            expected = expected[columns]
        found = of_rank[name]
        assert found.shape == expected.shape
        if expected.numel():
            error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            assert error < (1e-5 if expected.dtype == torch.float32 else 2e-2), (name, rank)


def main(folder: Path, way: str, ranks: int, rank: int) -> None:
    if way != "pytorch":
        import interpreter  # noqa: F401  (mends bf16; lies beside this file)
    group = None
    if ranks > 1:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        group = dist.group.WORLD
    found = {tokens: results(way, tokens, rank, ranks, group) for tokens in (TOKENS, 0)}
    torch.save(found, folder / f"rank{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
