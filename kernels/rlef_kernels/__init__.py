"""Log-probs, policy loss and KL of a language model's head, without storing all logits.

The package imports only torch, and triton where a GPU computes. Each operation has a pure PyTorch
`*_reference`, which defines it and runs on any device. CUDA tensors in bf16 or fp32 go to the
kernels in `rlef_kernels.gpu`, all others to the reference (`rlef_kernels.dispatch`).
"""

from rlef_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from rlef_kernels.linear_ppo_loss import linear_ppo_loss, linear_ppo_loss_reference
from rlef_kernels.linear_score import linear_score, linear_score_reference

__all__ = [
    "linear_logprob",
    "linear_logprob_reference",
    "linear_ppo_loss",
    "linear_ppo_loss_reference",
    "linear_score",
    "linear_score_reference",
]
