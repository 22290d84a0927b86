"""What PPO needs from a language model's head, without storing logits. Imports torch and triton
only, and triton only where it computes.

Each operation has a pure PyTorch `*_reference` beside it, which defines it and runs on any device.
CUDA tensors go to the kernels in `rlef_kernels.gpu`, everything else to the reference
(`rlef_kernels.dispatch`); there is nothing to set.
"""

from rlef_kernels.advantage_scan import advantage_scan, advantage_scan_reference
from rlef_kernels.clipped_value_loss import clipped_value_loss, clipped_value_loss_reference
from rlef_kernels.linear_kl import linear_kl, linear_kl_reference
from rlef_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from rlef_kernels.linear_ppo_loss import linear_ppo_loss, linear_ppo_loss_reference
from rlef_kernels.logits_logprob import logits_logprob, logits_logprob_reference
from rlef_kernels.ppo_policy_loss import ppo_policy_loss, ppo_policy_loss_reference

__all__ = [
    "advantage_scan",
    "advantage_scan_reference",
    "clipped_value_loss",
    "clipped_value_loss_reference",
    "linear_kl",
    "linear_kl_reference",
    "linear_logprob",
    "linear_logprob_reference",
    "linear_ppo_loss",
    "linear_ppo_loss_reference",
    "logits_logprob",
    "logits_logprob_reference",
    "ppo_policy_loss",
    "ppo_policy_loss_reference",
]
