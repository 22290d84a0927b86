"""`linear_logprob` on a GPU; the equations are in `rlef_kernels.linear_logprob`.

FLOPs: 2 T V D forward, three times that backward. Bytes: those of `head`. Memory beyond inputs and
outputs, at T = 8,192, V = 128,256, D = 4,096 in bf16: forward 47 MiB to combine partial sums;
backward 1 GiB for a chunk of logits (tests/kernels/test_compiled.py).

Shape suffixes: T tokens, D hidden size, V vocabulary shard.
"""

from functools import partial

import torch
from torch.distributed import ProcessGroup

from rlef_kernels.gpu.head import KernelsChunk
from rlef_kernels.gpu.plan import HeadPlan
from rlef_kernels.linear_logprob import LinearLogprob


def linear_logprob_kernels(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    accumulate_main_grad: bool = False,
    plan: HeadPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `linear_logprob` on the GPU. `plan` is for measurements and tests."""
    make_chunk = partial(KernelsChunk, temperature=temperature, group=group, plan=plan)
    return LinearLogprob.apply(hidden_TD, weight_VD, target_T, make_chunk, accumulate_main_grad)
