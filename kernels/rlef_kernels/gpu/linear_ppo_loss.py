"""`linear_ppo_loss` on a GPU; the equations are in `rlef_kernels.linear_ppo_loss`.

A chunk of rows at a time: the forward kernel keeps, in bf16, each logit less its tile's maximum,
while it reduces the exact fp32 logits; from these the row kernel makes dz in place; cuBLAS
multiplies. A logit d below its tile's maximum is kept with an error of at most d / 512, and its
probability is at most exp(-d), so dz is off by less than exp(-d) d / 512 < 0.0008 of that tile's
largest probability: less than the rounding of dz itself. The target's log-prob, the entropy and the
loss are exact.

FLOPs: 3 P. Bytes: 2 T V written, read, written, and 4 T V read by cuBLAS; 8 V D of main_grad a
chunk.
Memory: at most 1 GiB for a chunk, whatever T, and the gradient of hidden.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

import torch
import triton
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.gpu import tiles
from rlef_kernels.gpu.head import TileSums
from rlef_kernels.gpu.head_gradient import pack_rows, write_gradient_from_logits
from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
from rlef_kernels.gpu.plan import Plan, choose_plan
from rlef_kernels.gpu.ppo_policy_loss import launch_policy_loss, ppo_policy_loss_kernels
from rlef_kernels.gpu.products import add_product_, write_product_
from rlef_kernels.ppo_policy_loss import METRICS, PolicyInputs, save_gradients, scaled_gradients
from rlef_kernels.vocab_parallel import (
    NUM_PARTIALS,
    SavedForBackward,
    combine_shards,
    group_size,
    shard_start,
    sum_over_shards_,
)


class LinearPpoLoss(torch.autograd.Function):
    """Saves the gradients themselves."""

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
        plan: Plan,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        num_tokens, step = hidden_TD.shape[0], chunk_rows(hidden_TD, weight_VD, plan)
        into_main_grad = accumulate_main_grad and needs_weight
        grad_weight_VD = None
        if into_main_grad:
            grad_weight_VD = weight_VD.main_grad  # type: ignore[attr-defined]
        elif needs_weight:
            assert num_tokens <= step, "a sum over chunks needs fp32"
            grad_weight_VD = torch.empty_like(weight_VD)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        chunk = Chunk(min(step, num_tokens), weight_VD, temperature, group, plan)
        metrics = torch.zeros(len(METRICS), device=hidden_TD.device)
        for start in range(0, max(1, num_tokens), step):
            rows = slice(start, min(start + step, num_tokens))
            hidden_CD = hidden_TD[rows]
            policy_C = [tensor_T[rows] for tensor_T in policy_T]
            values, gradient_CV = chunk.loss_and_gradient(
                hidden_CD,
                target_T[rows],
                policy_C,
                clip_eps,
                denominator,
                needs_hidden or needs_weight,
            )
            metrics += values
            if grad_hidden_TD is not None:
                chunk.write_hidden_gradient(gradient_CV, grad_hidden_TD[rows])
            if grad_weight_VD is not None:
                add = add_product_ if into_main_grad else write_product_
                add(grad_weight_VD, gradient_CV.t(), hidden_CD)
        save_gradients(ctx, weight_VD, grad_hidden_TD, grad_weight_VD, into_main_grad)
        return metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: SavedForBackward, grad_metrics: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_metrics[0]), *(None,) * 9)


class Chunk:
    """The buffers for some rows of logits, and what happens to them there."""

    def __init__(
        self,
        num_tokens: int,
        weight_VD: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        plan: Plan,
    ) -> None:
        self.weight_VD, self.group, self.plan = weight_VD, group, plan
        self.inverse_temperature = 1 / temperature
        vocabulary, device = weight_VD.shape[0], weight_VD.device
        self.sums = TileSums(num_tokens, vocabulary, device, plan)
        self.partials_CP = torch.empty(num_tokens, NUM_PARTIALS, device=device)
        width = triton.cdiv(vocabulary, plan.tile_columns) * plan.tile_columns  # aligned rows
        self.logits = weight_VD.new_empty(num_tokens, width)[:, :vocabulary]

    def loss_and_gradient(
        self,
        hidden_CD: torch.Tensor,
        target_C: torch.Tensor,
        policy_C: list[torch.Tensor],
        clip_eps: float,
        denominator: float | torch.Tensor,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """METRICS of these rows, and the gradient of their logits."""
        num_tokens, shard = hidden_CD.shape[0], self.weight_VD.shape[0]
        column_C = target_C - shard_start(shard, self.group)
        logits_CV, partials_CP = self.logits[:num_tokens], self.partials_CP[:num_tokens]
        scale = self.inverse_temperature
        kept = logits_CV if with_gradient else None
        self.sums.compute(hidden_CD, self.weight_VD, column_C, scale, kept)
        self.sums.combine(column_C, scale, partials_CP)
        softmax = combine_shards(partials_CP, target_C, shard * group_size(self.group), self.group)
        old_C, behaviour_C, advantages_C = policy_C
        out, grad_C = launch_policy_loss(
            softmax.logprob_T,
            old_C,
            behaviour_C,
            advantages_C,
            clip_eps=clip_eps,
            mask_T=None,
            entropy_T=softmax.entropy_T,
            denominator=denominator,
        )
        if with_gradient:
            write_gradient_from_logits(
                logits_CV,
                logits_CV,
                column_C,
                pack_rows(
                    softmax.row_max_T,
                    softmax.sum_exp_T.log(),
                    softmax.entropy_T,
                    grad_C * out[-1],
                    None,
                ),
                scale,
                tile_columns=self.plan.tile_columns,
                has_entropy=False,
                tile_max=self.sums.partials,
            )
        return out[:-1], logits_CV

    def write_hidden_gradient(self, gradient_CV: torch.Tensor, out_CD: torch.Tensor) -> None:
        if self.group is None:
            write_product_(out_CD, gradient_CV, self.weight_VD)
            return
        sum_CD = torch.empty(out_CD.shape, dtype=torch.float32, device=out_CD.device)
        write_product_(sum_CD, gradient_CV, self.weight_VD)
        out_CD.copy_(sum_over_shards_(sum_CD, self.group))


def chunk_rows(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, plan: Plan) -> int:
    """Rows of logits that fit the budget, in whole tiles where possible."""
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
    plan: Plan | None = None,
) -> torch.Tensor:
    """METRICS as a vector, the loss first.

    The weight's gradient over several chunks is a sum that needs fp32: main_grad, if there is one.
    Otherwise the four products of `linear_logprob` take less memory than an fp32 matrix.
    """
    plan = plan or choose_plan(hidden_TD, weight_VD)
    denominator = max(1, hidden_TD.shape[0]) if denominator is None else denominator
    with_gradients = torch.is_grad_enabled()
    needs_weight = with_gradients and weight_VD.requires_grad and not accumulate_main_grad
    if needs_weight and hidden_TD.shape[0] > chunk_rows(hidden_TD, weight_VD, plan):
        logprob_T, entropy_T, _ = linear_logprob_kernels(
            hidden_TD, weight_VD, target_T, temperature=temperature, group=group, plan=plan
        )
        old_T, behaviour_T, advantages_T = policy_T
        loss, metrics = ppo_policy_loss_kernels(
            logprob_T,
            old_T,
            behaviour_T,
            advantages_T,
            clip_eps=clip_eps,
            entropy_T=entropy_T.detach(),
            denominator=denominator,
        )
        return torch.stack([loss, *(metrics[name] for name in METRICS[1:])])
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
        with_gradients,
        plan,
    )
