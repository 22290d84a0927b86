"""Shards of the vocabulary in two gloo processes against one process that holds it all.

Each process calls every operation twice, with tokens and without: a collective that one of them
left out would leave the other waiting, and the test would time out. Rounding differs (sums over
halves), so results agree to 1e-5 of the largest entry, not to the bit; between the processes, which
add in the same order, log-probs are equal to the bit. What this cannot catch: anything of NCCL's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlef_kernels import linear_kl_reference, linear_logprob_reference, logits_logprob

TOKENS, WIDTH, VOCABULARY, RANKS = 23, 12, 50, 2


def results(tokens: int, rank: int, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Every operation's outputs and gradients, on this rank's columns (all of them without a
    group)."""
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, tokens, WIDTH, generator=generator)
    weight, ref_weight = torch.randn(2, VOCABULARY, WIDTH, generator=generator)
    weight[3] *= 5  # one shard dominates some rows, the other one others
    target = torch.randint(VOCABULARY, (tokens,), generator=generator)
    if tokens:
        target[:4] = torch.tensor([0, 24, 25, 49])  # edges of the shards
    ramp = torch.linspace(-1, 2, tokens)
    size = VOCABULARY // (RANKS if group else 1)
    columns = slice(rank * size, (rank + 1) * size)
    hidden.requires_grad_()
    shard = weight[columns].clone().requires_grad_()
    logits = (hidden.detach() @ shard.detach().t()).requires_grad_()

    found = {}
    logprob, entropy, _ = linear_logprob_reference(
        hidden, shard, target, temperature=0.8, group=group, chunk_tokens=7
    )
    loss = (logprob * ramp + entropy * ramp.flip(0)).sum()
    found["linear hidden"], found["linear weight"] = torch.autograd.grad(loss, (hidden, shard))
    found["linear logprob"], found["linear entropy"] = logprob.detach(), entropy.detach()

    logprob, entropy = logits_logprob(logits, target, temperature=0.8, group=group)
    loss = (logprob * ramp + entropy * ramp.flip(0)).sum()
    (found["logits weight"],) = torch.autograd.grad(loss, logits)
    found["logits logprob"], found["logits entropy"] = logprob.detach(), entropy.detach()

    kl = linear_kl_reference(
        hidden, shard, ref_hidden, ref_weight[columns], group=group, chunk_tokens=7
    )
    found["kl hidden"], found["kl weight"] = torch.autograd.grad((kl * ramp).sum(), (hidden, shard))
    found["kl"] = kl.detach()
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[dict[int, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("vocab_parallel")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("tokens", [TOKENS, 0])
def test_shards_give_what_one_process_gives(of_ranks, tokens):
    whole = results(tokens, 0, None)
    for rank, of_rank in enumerate(of_ranks):
        for name, expected in whole.items():
            size = VOCABULARY // RANKS
            if name == "logits weight":
                expected = expected[:, rank * size : (rank + 1) * size]
            elif name.endswith("weight"):
                expected = expected[rank * size : (rank + 1) * size]
            found = of_rank[tokens][name]
            assert found.shape == expected.shape
            if tokens:
                error = (found - expected).abs().max() / expected.abs().max()
                assert error < 1e-5, (name, rank)


def test_every_rank_has_the_same_bits(of_ranks):
    for name in ("linear logprob", "linear entropy", "linear hidden", "kl"):
        assert torch.equal(of_ranks[0][TOKENS][name], of_ranks[1][TOKENS][name]), name


def main(folder: Path, rank: int) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {tokens: results(tokens, rank, dist.group.WORLD) for tokens in (TOKENS, 0)}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
