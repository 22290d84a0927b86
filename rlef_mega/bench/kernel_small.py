"""The kernels beside the head: logits, KL, losses, advantages; each beside its PyTorch form."""

from collections.abc import Callable, Iterator

import torch

import rlef_kernels
from rlef_mega.bench.figures import Figure
from rlef_mega.bench.measure import measure_call

LOSS_TOKENS, SEQUENCES = 32768, 256


def figures(device: torch.device, sample_s: float) -> list[Figure]:
    found = []
    for name, call, num_bytes in calls(device):
        measured = measure_call(call, device, sample_s)
        found.append(Figure(name, "ms", tuple(1e3 * s for s in measured.seconds)))
        if num_bytes:
            rates = tuple(num_bytes / s / 1e9 for s in measured.seconds)
            found.append(Figure(f"{name}, bandwidth", "GB/s", rates))
    return found


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, call, bytes that it must move; 0 where bytes are not what counts)."""
    on_gpu = device.type == "cuda"
    # logits of the 8B head for 4,096 tokens: 1 GiB of bf16
    tokens, vocabulary = (4096, 128256) if on_gpu else (64, 512)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    logits = torch.randn(tokens, vocabulary, dtype=dtype, device=device)
    size = logits.numel() * logits.element_size()
    yield "copy", logits.clone, 2 * size
    yield from logits_calls(logits, size)
    del logits
    yield from kl_calls(device, dtype)
    yield from loss_calls(device)


def logits_calls(
    logits: torch.Tensor, size: int
) -> Iterator[tuple[str, Callable[[], object], int]]:
    tokens, vocabulary = logits.shape
    target = torch.randint(vocabulary, (tokens,), device=logits.device)
    yield "logits_logprob | forward", lambda: rlef_kernels.logits_logprob(logits, target), size
    leaf = logits.clone().requires_grad_()

    def train() -> None:
        logprob, entropy = rlef_kernels.logits_logprob(leaf, target, inplace_backward=True)
        torch.autograd.grad(logprob.sum() + entropy.sum(), leaf)

    yield "logits_logprob | forward and backward", train, 3 * size


def kl_calls(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object], int]]:
    tokens, width, vocabulary = (2048, 4096, 128256) if device.type == "cuda" else (64, 32, 512)
    shapes = [(tokens, width), (vocabulary, width)] * 2
    inputs = [torch.randn(shape, device=device, dtype=dtype) / width**0.25 for shape in shapes]
    for tensor in inputs[:2]:
        tensor.requires_grad_()

    for name in ("linear_kl", "linear_kl_reference"):
        compute = getattr(rlef_kernels, name)

        def train(compute: Callable[..., torch.Tensor] = compute) -> None:
            torch.autograd.grad(compute(*inputs).sum(), inputs[:2])

        yield f"{name} | forward and backward", train, 0


def loss_calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object], int]]:
    logprobs, old, behaviour, advantages = torch.randn(4, LOSS_TOKENS, device=device)
    mask = torch.rand(LOSS_TOKENS, device=device) < 0.5
    bounds = torch.arange(0, LOSS_TOKENS + 1, LOSS_TOKENS // SEQUENCES, device=device)
    leaf = logprobs.requires_grad_()
    policy = (leaf, old, behaviour, advantages)

    def losses(suffix: str) -> dict[str, Callable[[], object]]:
        policy_loss = getattr(rlef_kernels, f"ppo_policy_loss{suffix}")
        value_loss = getattr(rlef_kernels, f"clipped_value_loss{suffix}")
        scan = getattr(rlef_kernels, f"advantage_scan{suffix}")
        return {
            "ppo_policy_loss": lambda: torch.autograd.grad(
                policy_loss(*policy, clip_eps=0.2, mask_T=mask)[0], leaf
            ),
            "clipped_value_loss": lambda: torch.autograd.grad(
                value_loss(leaf, old, advantages, clip_alpha=0.2, mask_N=mask)[0], leaf
            ),
            "advantage_scan": lambda: scan(old, behaviour, bounds, gamma=0.99, lam=0.95),
        }

    for suffix in ("", "_reference"):
        for name, call in losses(suffix).items():
            yield f"{name}{suffix}", call, 0
