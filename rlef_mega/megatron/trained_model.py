"""One trained network: Megatron module, gradient buffers, optimizer and schedule. Policy, critic
and the supervised stage's model are instances of it; the frozen reference is a bare module that
only runs `forward`.

Theory of operation. Every rank of a network's world runs the same micro-batches through Megatron's
pipeline schedule. Only the last stage computes losses and outputs. Gradients are summed, not
averaged, over micro-batches and data-parallel ranks, because each loss is already divided by a
count over the whole update. The optimizer's state is spread over the data-parallel ranks
(Megatron's distributed optimizer; also over one, so that checkpoints have one form). Parameters in
bfloat16 have fp32 main copies and gradients.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import (
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from rlef_mega.config import OptimizerConfig
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.microbatch import Microbatch
from rlef_mega.megatron.model import PackedLlama
from rlef_mega.megatron.parallel import Ranks

Metrics = dict[str, torch.Tensor]
OutputFunction = Callable[[torch.Tensor, Microbatch], torch.Tensor]
LossFunction = Callable[[torch.Tensor, Microbatch], tuple[torch.Tensor, Metrics]]


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Linear warm-up, constant, linear decay to min_lr_ratio; `update` counts from 0, and the first
    one is not zero.
    """
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    if config.decay_start_update is None or update < config.decay_start_update:
        return config.lr
    progress = min(1.0, (update - config.decay_start_update + 1) / max(config.decay_updates, 1))
    return config.lr * (1 - (1 - config.min_lr_ratio) * progress)


def run_schedule(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    at_last_stage: Callable[..., object],
    *,
    forward_only: bool,
) -> list:
    """Megatron's pipeline schedule over packed micro-batches; what the last stage returned for
    each, there only.
    """

    def forward_step(iterator, model):
        microbatch = next(iterator)
        # RoPE positions come from the packed lengths; Megatron reads neither position_ids nor a
        # mask here
        hidden = model(
            microbatch.token_ids_T[None], None, None, packed_seq_params=microbatch.sequences
        )
        return hidden, lambda output, **options: at_last_stage(output, microbatch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=0,  # unused: lengths vary and travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


@torch.no_grad()
@calls_megatron
def forward(
    module: PackedLlama, microbatches: Sequence[Microbatch], output: OutputFunction
) -> list[torch.Tensor]:
    """The outputs of each micro-batch on the last stage; an empty list on the others."""
    module.eval()
    return run_schedule(module, microbatches, output, forward_only=True)


def finalize_summed_gradients(model: list, num_tokens: object = None, **options: object) -> None:
    """Megatron's gradient reductions without its division by a token count: the losses have their
    denominators.
    """
    finalize_model_grads(model, None, **options)


class TrainedModel:
    """A module and what trains it. `updates` counts optimizer steps and is part of a checkpoint."""

    @calls_megatron
    def __init__(self, module: PackedLlama, ranks: Ranks, config: OptimizerConfig) -> None:
        self.module, self.ranks, self.config = module, ranks, config
        self.updates = 0
        module.config.finalize_model_grads_func = finalize_summed_gradients
        self.wrapped = DistributedDataParallel(
            module.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            module,
        )
        options = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=module.config.bf16,
            params_dtype=module.config.params_dtype,
            use_distributed_optimizer=True,
        )
        overrides = get_standard_config_overrides(options)
        if module.config.bf16:
            # The distributed optimizer mixes up a group that holds two dtypes; an override that
            # changes nothing (our schedule sets the rates) gives the critic's fp32 head groups of
            # its own.
            overrides[ParamKey(attr="is_value_head")] = {"min_lr": 0.0}
        self.optimizer = get_megatron_optimizer(options, [self.wrapped], overrides)

    @property
    def chunks(self) -> list[PackedLlama]:
        """The network's parts on this rank."""
        return [self.module]

    @calls_megatron
    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss: LossFunction, names: Sequence[str]
    ) -> dict[str, float]:
        """Gradients of the summed loss into the buffers; these metrics summed over the update, on
        every rank.
        """
        self.module.train()
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        no_tokens = torch.tensor(0, dtype=torch.int, device=self.ranks.device)

        def loss_and_metrics(hidden: torch.Tensor, microbatch: Microbatch):
            value, metrics = loss(hidden, microbatch)
            return value, no_tokens, torch.stack([metrics[name].float() for name in names])

        metrics = run_schedule(self.wrapped, microbatches, loss_and_metrics, forward_only=False)
        return self.sum_metrics(metrics, names)

    def sum_metrics(self, parts: list[torch.Tensor], names: Sequence[str]) -> dict[str, float]:
        total = torch.zeros(len(names), device=self.ranks.device)
        if self.ranks.speaks_for_outputs:
            total = torch.stack(parts).sum(0)
        if self.ranks.world_size > 1:
            # world: sums the data-parallel parts; all other ranks add zeros and so learn the result
            dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    @calls_megatron
    @torch.no_grad()
    def step(self) -> tuple[float, float]:
        """One clipped optimizer step from the gradients in the buffers: (gradient norm, learning
        rate).

        Raises FloatingPointError before anything changes when the norm is not finite.
        """
        rate = learning_rate(self.config, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]  # 0 for norms
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at update {self.updates}")
        if self.config.clip_grad:
            for optimizer in self.optimizer.chained_optimizers:
                if parameters := optimizer.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, norm)
        self.optimizer.step_with_ready_grads()
        self.updates += 1
        return norm, rate
