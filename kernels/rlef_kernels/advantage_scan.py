"""Generalised advantage estimation over packed sequences of steps (turns, or tokens).

    delta_t = r_t + gamma V_(t+1) - V_t        V after a sequence's last step is 0
    A_t     = delta_t + gamma lambda A_(t+1)   within a sequence
    G_t     = A_t + V_t

Source: Schulman et al., arXiv 1506.02438, eq. 16. gamma = lambda = 1 gives A_t = (sum of rewards to
go) - V_t, which is what RLEF uses (A.1).

The recurrence is a scan over the pairs (c_t, a_t), A_t = a_t + c_t A_(t+1), with c_t = 0 at the
last step of a sequence. Composing neighbours, then neighbours at distance 2, 4, ... takes log2(N)
passes of 4 N FLOPs and 20 N bytes each, and no loop over steps. On NVIDIA GPUs
`rlef_kernels.gpu.advantage_scan` does all of it in one launch.

Shape suffixes: N steps of all sequences, in order.
"""

import torch

from rlef_kernels.dispatch import uses_kernels


def advantage_scan_reference(
    rewards_N: torch.Tensor,
    values_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`advantage_scan` in plain PyTorch, for any device, without host synchronisation."""
    num_steps = rewards_N.shape[0]
    if num_steps == 0:
        return rewards_N.float(), values_N.float()
    rewards_N, values_N = rewards_N.float(), values_N.float()
    is_last_N = torch.zeros(num_steps + 1, dtype=torch.bool, device=rewards_N.device)
    is_last_N[cu_seqlens.long()] = True  # marks the starts; shifted by one, the last steps
    goes_on_N = (~is_last_N[1:]).to(rewards_N.dtype)
    next_values_N = torch.cat([values_N[1:], values_N.new_zeros(1)])
    total_N = rewards_N + gamma * goes_on_N * next_values_N - values_N
    factor_N = gamma * lam * goes_on_N
    distance = 1
    while distance < num_steps:
        reach = num_steps - distance
        # (c, a) at t followed by (c', a') at t + distance is (c c', a + c a')
        total_N = torch.cat(
            [total_N[:reach] + factor_N[:reach] * total_N[distance:], total_N[reach:]]
        )
        # past the end there is nothing: the factor of the tail is never used again
        factor_N = torch.cat([factor_N[:reach] * factor_N[distance:], factor_N[reach:]])
        distance *= 2
    return total_N, total_N + values_N


def advantage_scan(
    rewards_N: torch.Tensor,
    values_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages_N, returns_N), fp32, without normalisation; no gradient flows through them.

    Sequence e owns the steps cu_seqlens[e]:cu_seqlens[e + 1]; cu_seqlens starts with 0 and ends
    with N.

    Raises ValueError for shapes that do not fit, gamma or lam outside [0, 1] and, on a CPU, a
    cu_seqlens that does not cover the steps in order.
    """
    if rewards_N.dim() != 1 or rewards_N.shape != values_N.shape:
        raise ValueError(
            f"rewards_N has shape {tuple(rewards_N.shape)}, values_N {tuple(values_N.shape)}: "
            "both must be [N]"
        )
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} is {factor}, must be in [0, 1]")
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[:1] != [0] or bounds[-1] != len(rewards_N) or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of steps, {len(rewards_N)}; "
                f"it starts {bounds[:4]} and ends {bounds[-4:]}"
            )
    if uses_kernels(rewards_N, values_N):
        from rlef_kernels.gpu.advantage_scan import advantage_scan_kernels as compute
    else:
        compute = advantage_scan_reference
    with torch.no_grad():
        return compute(rewards_N, values_N, cu_seqlens, gamma=gamma, lam=lam)
