"""`linear_logprob` on a GPU; the equations are in `rlef_kernels.linear_logprob`.

FLOPs: 2 T V D forward, three times that backward. Bytes: those of `head`, `head_gradient` and
`products`. Memory beyond inputs and outputs, at T = 8,192, V = 128,256, D = 4,096 in bf16: forward
47 MiB to combine partial sums; backward 512 MiB for a block of gradients of logits and 128 MiB for
the fp32 gradient of hidden (tests/kernels/test_compiled.py).

Shape suffixes: T tokens, D hidden size, V vocabulary shard, P partial sums, R rows with an upstream
gradient; 5: the five numbers of a row that `pack_rows` stacks.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.gpu.head import head_partials
from rlef_kernels.gpu.head_gradient import RecomputedGradient, pack_rows
from rlef_kernels.gpu.plan import HeadPlan, choose_plan
from rlef_kernels.gpu.products import multiply_blocks
from rlef_kernels.main_grad import placeholder_gradient
from rlef_kernels.rows import rows_with_gradient, scatter_rows, select_rows
from rlef_kernels.vocab_parallel import (
    SavedForBackward,
    combine_shards,
    group_size,
    shard_start,
)


class KernelContext(SavedForBackward):
    plan: HeadPlan


class LinearLogprob(torch.autograd.Function):
    """Save the inputs and three numbers per token; backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: KernelContext,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_T: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        accumulate_main_grad: bool,
        plan: HeadPlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard = weight_VD.shape[0]
        column_T = target_T - shard_start(shard, group)
        partials_TP = head_partials(hidden_TD, weight_VD, column_T, 1 / temperature, plan)
        softmax = combine_shards(partials_TP, target_T, shard * group_size(group), group)
        log_sum_T = softmax.sum_exp_T.log()
        ctx.save_for_backward(
            hidden_TD, weight_VD, column_T, softmax.row_max_T, log_sum_T, softmax.entropy_T
        )
        ctx.temperature, ctx.group, ctx.plan = temperature, group, plan
        ctx.accumulate_main_grad = accumulate_main_grad
        ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
        return softmax.logprob_T, softmax.entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: KernelContext,
        grad_logprob_T: torch.Tensor | None,
        grad_entropy_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        if grad_logprob_T is None and grad_entropy_T is None:
            return (None,) * 7
        hidden_TD, weight_VD, column_T, row_max_T, log_sum_T, entropy_T = ctx.saved_tensors
        rows_5T = pack_rows(row_max_T, log_sum_T, entropy_T, grad_logprob_T, grad_entropy_T)
        rows_R = rows_with_gradient(grad_logprob_T, grad_entropy_T)
        num_tokens = hidden_TD.shape[0]
        hidden_TD = select_rows(hidden_TD, rows_R)
        gradient = RecomputedGradient(
            hidden_TD,
            weight_VD,
            select_rows(column_T, rows_R),
            rows_5T if rows_R is None else rows_5T[:, rows_R],
            1 / ctx.temperature,
            ctx.plan,
            has_entropy=grad_entropy_T is not None,
        )
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        into_main_grad = ctx.accumulate_main_grad and needs_weight
        grad_hidden, grad_weight = multiply_blocks(
            hidden_TD,
            weight_VD,
            gradient.write,
            ctx.plan,
            needs_hidden=needs_hidden,
            needs_weight=needs_weight,
            main_grad_VD=weight_VD.main_grad if into_main_grad else None,  # type: ignore[attr-defined]
            group=ctx.group,
        )
        if grad_hidden is not None:
            grad_hidden = scatter_rows(grad_hidden, rows_R, num_tokens)
        if into_main_grad:
            grad_weight = placeholder_gradient(weight_VD)
        return grad_hidden, grad_weight, None, None, None, None, None


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
    plan = plan or choose_plan(hidden_TD, weight_VD)
    return LinearLogprob.apply(
        hidden_TD, weight_VD, target_T, temperature, group, accumulate_main_grad, plan
    )
