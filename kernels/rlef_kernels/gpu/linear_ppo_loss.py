"""`linear_ppo_loss` on a GPU; the equations are in `rlef_kernels.linear_ppo_loss`.

One chunk of rows at a time: the forward kernel reduces the exact fp32 logits and stores, in bf16,
each logit minus its tile's maximum; a row kernel turns these into dz in place; cuBLAS multiplies. A
logit d below its tile's maximum is stored with an error of at most d / 512, and its probability is
at most exp(-d), so dz is off by less than exp(-d) d / 512 < 0.0008 of that tile's largest
probability: less than the rounding of dz itself. The target's log-prob, the entropy and the loss
are exact.

FLOPs: 3 P, P = 2 T V D. Bytes: 2 T V written, read, and written again, and 4 T V read by cuBLAS;
8 V D of main_grad per chunk. Memory: at most 1 GiB for a chunk, for any T, and the gradient of
hidden; without main_grad, and with several chunks, an fp32 gradient of the weight (4 V D).

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

import torch
import triton
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.head import TileSums
from rlef_kernels.gpu.head_gradient import pack_rows, write_gradient_from_logits
from rlef_kernels.gpu.plan import HeadPlan, choose_plan
from rlef_kernels.gpu.products import add_product_, write_product_
from rlef_kernels.main_grad import weight_gradient_sum
from rlef_kernels.ppo_policy_loss import (
    METRICS,
    PolicyInputs,
    policy_loss,
    save_gradients,
    scaled_gradients,
)
from rlef_kernels.vocab_parallel import (
    SavedForBackward,
    combine_shards,
    group_size,
    shard_start,
    sum_over_shards_,
)


class LinearPpoLoss(torch.autograd.Function):
    """Compute the gradients in the forward pass, and save them."""

    @staticmethod
    def forward(
        ctx: SavedForBackward,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_T: torch.Tensor,
        policy_T: PolicyInputs,
        clip_eps: float,
        temperature: float,
        group: ProcessGroup | None,
        denominator: float | torch.Tensor,
        accumulate_main_grad: bool,
        with_gradients: bool,
        plan: HeadPlan,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        num_tokens, step = hidden_TD.shape[0], chunk_rows(hidden_TD, weight_VD, plan)
        into_main_grad = accumulate_main_grad and needs_weight
        # a sum over chunks needs fp32
        sum_dtype = weight_VD.dtype if num_tokens <= step else torch.float32
        grad_weight_VD = weight_gradient_sum(
            weight_VD, sum_dtype, needed=needs_weight, into_main_grad=into_main_grad
        )
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        chunk = LogitsChunk(min(step, num_tokens), weight_VD, temperature, group, plan)
        metrics = torch.zeros(len(METRICS), device=hidden_TD.device)
        for start in range(0, max(1, num_tokens), step):
            rows = slice(start, min(start + step, num_tokens))
            hidden_CD = hidden_TD[rows]
            old_T, behaviour_T, advantages_T = policy_T
            values, gradient_CV = chunk.loss_and_gradient(
                hidden_CD,
                target_T[rows],
                (old_T[rows], behaviour_T[rows], advantages_T[rows]),
                clip_eps,
                denominator,
                needs_hidden or needs_weight,
            )
            metrics += values
            if grad_hidden_TD is not None:
                chunk.write_hidden_gradient(gradient_CV, grad_hidden_TD[rows])
            if grad_weight_VD is not None:
                add_product_(grad_weight_VD, gradient_CV.t(), hidden_CD)
        if grad_weight_VD is not None and not into_main_grad:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        save_gradients(ctx, weight_VD, grad_hidden_TD, grad_weight_VD, into_main_grad)
        return metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: SavedForBackward, grad_metrics: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_metrics[0]), *(None,) * 9)


class LogitsChunk:
    """The buffers for one chunk of rows of logits, reused for every chunk."""

    def __init__(
        self,
        num_tokens: int,
        weight_VD: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        plan: HeadPlan,
    ) -> None:
        self.weight_VD, self.group, self.plan = weight_VD, group, plan
        self.inverse_temperature = 1 / temperature
        vocabulary, device = weight_VD.shape[0], weight_VD.device
        self.sums = TileSums(num_tokens, vocabulary, device, plan)
        width = triton.cdiv(vocabulary, plan.tile_columns) * plan.tile_columns  # aligned rows
        self.logits = weight_VD.new_empty(num_tokens, width)[:, :vocabulary]

    def loss_and_gradient(
        self,
        hidden_CD: torch.Tensor,
        target_C: torch.Tensor,
        policy_C: PolicyInputs,
        clip_eps: float,
        denominator: float | torch.Tensor,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss of these rows; returns (METRICS, the gradient of their logits)."""
        num_tokens, shard = hidden_CD.shape[0], self.weight_VD.shape[0]
        column_C = target_C - shard_start(shard, self.group)
        logits_CV, scale = self.logits[:num_tokens], self.inverse_temperature
        kept = logits_CV if with_gradient else None
        partials_CP = self.sums.partials(hidden_CD, self.weight_VD, column_C, scale, kept)
        softmax = combine_shards(partials_CP, target_C, shard * group_size(self.group), self.group)
        metrics, grad_C = policy_loss(
            softmax.logprob_T,
            softmax.entropy_T,
            policy_C,
            clip_eps=clip_eps,
            denominator=denominator,
        )
        if with_gradient:
            write_gradient_from_logits(
                logits_CV,
                logits_CV,
                column_C,
                pack_rows(
                    softmax.row_max_T, softmax.sum_exp_T.log(), softmax.entropy_T, grad_C, None
                ),
                scale,
                tile_columns=self.plan.tile_columns,
                has_entropy=False,
                tile_max=self.sums.sums,
            )
        return metrics, logits_CV

    def write_hidden_gradient(self, gradient_CV: torch.Tensor, out_CD: torch.Tensor) -> None:
        """Write gradient_CV @ weight, summed over the tensor-parallel group, to `out_CD`."""
        if group_size(self.group) == 1:
            write_product_(out_CD, gradient_CV, self.weight_VD)
            return
        sum_CD = torch.empty(out_CD.shape, dtype=torch.float32, device=out_CD.device)
        write_product_(sum_CD, gradient_CV, self.weight_VD)
        out_CD.copy_(sum_over_shards_(sum_CD, self.group))


def chunk_rows(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, plan: HeadPlan) -> int:
    """Return how many rows of logits fit the plan's budget, in whole tiles where possible."""
    width = triton.cdiv(weight_VD.shape[0], plan.tile_columns) * plan.tile_columns
    rows = plan.row_bytes // (width * hidden_TD.element_size())
    return max(1, rows // tiles.ROWS * tiles.ROWS if rows >= tiles.ROWS else rows)


def linear_ppo_loss_kernels(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    policy_T: PolicyInputs,
    *,
    clip_eps: float,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    denominator: float | torch.Tensor | None = None,
    accumulate_main_grad: bool = False,
    plan: HeadPlan | None = None,
) -> torch.Tensor:
    """Compute `linear_ppo_loss` on the GPU; returns METRICS as a vector. `plan` is for tests."""
    plan = plan or choose_plan(hidden_TD, weight_VD)
    denominator = max(1, hidden_TD.shape[0]) if denominator is None else denominator
    return LinearPpoLoss.apply(
        hidden_TD,
        weight_VD,
        target_T,
        policy_T,
        clip_eps,
        temperature,
        group,
        denominator,
        accumulate_main_grad,
        torch.is_grad_enabled(),
        plan,
    )
