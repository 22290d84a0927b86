"""`linear_ppo_loss` on a GPU; the equations are in `rlef_kernels.linear_ppo_loss`.

FLOPs: 3 P, P = 2 T V D. Bytes: those of `head`. Memory: at most 1 GiB for a chunk, for any T, and
the gradient of hidden; with `group`, a chunk of it in fp32 too; without main_grad, and with
several chunks, an fp32 gradient of the weight (4 V D).

Shape suffixes: T tokens, D hidden size, V vocabulary shard.
"""

from functools import partial
from typing import Any

import torch
from torch.distributed import ProcessGroup

from rlef_kernels.gpu.head import KernelsChunk
from rlef_kernels.gpu.plan import HeadPlan
from rlef_kernels.linear_ppo_loss import compute_loss
from rlef_kernels.ppo_policy_loss import PolicyInputs


def linear_ppo_loss_kernels(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    policy_T: PolicyInputs,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    plan: HeadPlan | None = None,
    **options: Any,
) -> torch.Tensor:
    """Compute `linear_ppo_loss` on the GPU, with the options of `compute_loss`; returns METRICS as
    a vector. `plan` is for tests."""
    make_chunk = partial(KernelsChunk, temperature=temperature, group=group, plan=plan)
    return compute_loss(hidden_TD, weight_VD, target_T, policy_T, make_chunk, **options)
