"""What PPO needs from a language model's head, without storing logits. Imports torch and triton
only.

Each operation has a pure PyTorch `*_reference` beside it, which defines it and runs on any device.
Dispatch is by the device of the tensors. Tuned Triton kernels are not there yet: every device runs
the reference.
"""

from rlef_kernels.linear_logprob import linear_logprob, linear_logprob_reference

__all__ = ["linear_logprob", "linear_logprob_reference"]
