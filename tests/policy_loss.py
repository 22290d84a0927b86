"""RLEF's policy loss as the paper writes it (A.1), for autograd to differentiate: the truth for
`rlef_kernels.ppo_policy_loss` and for the learner's policy step."""

import torch


def policy_loss(
    logprobs_A: torch.Tensor,
    old_logprobs_A: torch.Tensor,
    behaviour_logprobs_A: torch.Tensor,
    advantages_A: torch.Tensor,
    *,
    clip_eps: float,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and its metrics: sums over tokens, divided by `denominator`, by default their
    number."""
    count = max(1, len(logprobs_A)) if denominator is None else denominator
    log_ratio_A = logprobs_A - old_logprobs_A
    behaviour_factor_A = (logprobs_A.detach() - behaviour_logprobs_A).exp().clamp(max=1)
    ratio_A = log_ratio_A.exp() * behaviour_factor_A
    clipped_A = ratio_A.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -torch.minimum(ratio_A * advantages_A, clipped_A * advantages_A).sum() / count
    metrics = {
        "policy_loss": loss,
        "ratio": ratio_A.sum() / count,
        "clip_fraction": ((ratio_A - 1).abs() > clip_eps).sum() / count,
        "behaviour_factor": behaviour_factor_A.sum() / count,
        "approx_kl": (log_ratio_A.exp() - 1 - log_ratio_A).sum() / count,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
