"""One trained network: Megatron module, gradient buffers, optimizer and learning-rate schedule. The
policy, the critic and the supervised stage's model are trained networks; the frozen reference only
runs `forward`.

Theory of operation. Every rank of a network's layout runs the same micro-batches through Megatron's
pipeline schedule; a rank holds one chunk of the network, or several with a virtual pipeline. Only
the last stage computes losses and outputs. Gradients are summed, not averaged, over micro-batches
and data-parallel ranks, because each loss is already divided by a count over the whole update. The
optimizer's state is spread over the data-parallel ranks (Megatron's distributed optimizer; also
over a single one, so that checkpoints have one form). Parameters in bfloat16 have fp32 main copies
and gradients. With data parallelism and `overlap`, gradients are reduced during the last backward
pass, and the new weights are gathered during the next forward pass.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

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
    clip_grads,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from rlef_mega.config import OptimizerConfig
from rlef_mega.megatron.cpu_shim import calls_megatron, without_mode
from rlef_mega.megatron.microbatch import Microbatch
from rlef_mega.megatron.network.packed_llama import PackedLlama, PolicyAndReference
from rlef_mega.megatron.offload import HostMemory
from rlef_mega.megatron.parallel import Ranks

Metrics = dict[str, torch.Tensor]
Network = PackedLlama | PolicyAndReference  # one chunk of a network
ReadFunction = Callable[..., torch.Tensor]  # of the last chunk, its hidden states, the micro-batch
LossFunction = Callable[[torch.Tensor, Microbatch], tuple[torch.Tensor, Metrics]]


def l2_norm(
    chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm of the tensors in the first list as a vector of one, and None."""
    return torch.stack(torch._foreach_norm(lists[0])).norm()[None], None


clip_grads.l2_norm_impl = l2_norm  # Megatron's own would wait for the device once per parameter


def fuse_adam(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let AdamW use one kernel on a GPU; its default there makes temporaries of 4 bytes per
    parameter."""
    if device.type != "cpu":
        for group in optimizer.param_groups:
            group["fused"] = True


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Return the learning rate of an update, counted from 0: linear warm-up (above 0 from the first
    update on), constant, linear decay to min_lr_ratio x lr."""
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    if config.decay_start_update is None or update < config.decay_start_update:
        return config.lr
    progress = min(1.0, (update - config.decay_start_update + 1) / max(config.decay_updates, 1))
    return config.lr * (1 - (1 - config.min_lr_ratio) * progress)


def run_schedule(
    chunks: Sequence[Network | DistributedDataParallel],
    ranks: Ranks,
    microbatches: Sequence[Microbatch],
    at_last_stage: Callable[..., object],
    *,
    forward_only: bool,
) -> list:
    """Run Megatron's pipeline schedule over packed micro-batches. Returns the results of
    `at_last_stage` (in training, its metrics) for each, on the last stage; [] on the others."""

    def forward_step(iterator, model):
        microbatch = next(iterator)
        # RoPE positions come from the packed lengths; Megatron reads neither position_ids nor a
        # mask here
        with without_mode():
            hidden = model(
                microbatch.token_ids_T[None], None, None, packed_seq_params=microbatch.sequences
            )
        return hidden, lambda output, **options: at_last_stage(output, microbatch)

    group = ranks.groups.pp
    p2p = P2PCommunicator(group, chunks[0].config) if group.size() > 1 else None
    schedule = get_forward_backward_func(group.size(), len(chunks) if len(chunks) > 1 else None)
    results = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=0,  # unused: lengths vary and travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        pg_collection=ranks.groups,
        p2p_communicator=p2p,
    )
    for chunk in chunks:  # Megatron keeps the last input of each, and its gradient
        network: Any = getattr(chunk, "module", chunk)
        network.set_input_tensor([None])
    return results


@torch.no_grad()
@calls_megatron
def forward(
    chunks: Sequence[Network],
    ranks: Ranks,
    microbatches: Sequence[Microbatch],
    read: ReadFunction,
) -> list[torch.Tensor]:
    """Return what `read` returns for each micro-batch, on the last stage; [] on the others."""
    for chunk in chunks:
        chunk.eval()
    output = functools.partial(read, chunks[-1])
    return run_schedule(chunks, ranks, microbatches, output, forward_only=True)


def finalize_summed_gradients(model: list, num_tokens: object = None, **options: object) -> None:
    """Reduce gradients as Megatron does, but without its division by a token count: the losses have
    denominators of their own."""
    finalize_model_grads(model, None, **options)


class Residence(IntEnum):
    """How much of a network is on the device; the rest is in host memory."""

    NOTHING = 0
    WEIGHTS = 1  # enough to score
    STATE = 2  # and the optimizer's state: enough to save
    TRAINING = 3  # and gradients


class FrozenModel:
    """A network that only scores: the reference."""

    def __init__(self, chunks: Sequence[PackedLlama]) -> None:
        self.chunks = [chunk.requires_grad_(False) for chunk in chunks]
        self.memory = HostMemory()

    def reside(self, residence: Residence) -> None:
        """Move the weights to the device or to the host."""
        if residence >= Residence.WEIGHTS:
            self.memory.reload()
        else:
            self.memory.offload(torch.nn.ModuleList(self.chunks).parameters())


class TrainedModel:
    """The chunks of a network (its pipeline stages) that this rank trains, with their gradients and
    optimizer. `updates` counts optimizer steps and is part of a checkpoint."""

    @calls_megatron
    def __init__(
        self, chunks: Sequence[PackedLlama], ranks: Ranks, config: OptimizerConfig
    ) -> None:
        self.chunks, self.ranks, self.config = list(chunks), ranks, config
        self.last_chunk: Any = self.chunks[-1]  # has the head, on the last stage's ranks
        self.updates = 0
        model_config = self.chunks[0].config
        self.overlaps = ranks.layout.overlap and ranks.groups.dp.size() > 1
        self.wrapped = [
            DistributedDataParallel(
                chunk.config,
                DistributedDataParallelConfig(  # one each: Megatron writes the bucket size into it
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=self.overlaps,
                    overlap_param_gather=self.overlaps,
                ),
                chunk,
                disable_bucketing=number > 0,
                pg_collection=ranks.groups,
            )
            for number, chunk in enumerate(self.chunks)
        ]
        options = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=self.overlaps,
        )
        overrides = get_standard_config_overrides(options)
        if model_config.bf16:
            # The distributed optimizer mixes up a parameter group with two dtypes. An override that
            # changes nothing (our schedule sets the rates) gives the critic's fp32 head groups of
            # its own.
            overrides[ParamKey(attr="is_value_head")] = {"min_lr": 0.0}
        self.optimizer = get_megatron_optimizer(
            options,
            self.wrapped,
            overrides,
            use_gloo_process_groups=False,
            pg_collection=ranks.groups,
        )
        for optimizer in self.optimizer.chained_optimizers:
            fuse_adam(optimizer.optimizer, ranks.device)
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_summed_gradients
            if self.overlaps:
                # the schedule delays the reductions until the last micro-batch
                no_sync = [wrapped.no_sync for wrapped in self.wrapped]
                chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.weights_memory, self.optimizer_memory = HostMemory(), HostMemory()
        self.residence = Residence.TRAINING

    @calls_megatron
    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss: LossFunction, names: Sequence[str]
    ) -> dict[str, float]:
        """Fill the gradient buffers with the gradients of the loss, summed over all ranks'
        micro-batches. Returns the named metrics, summed alike, on every rank of the layout."""
        for wrapped in self.wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        no_tokens = torch.tensor(0, dtype=torch.int, device=self.ranks.device)

        def loss_and_metrics(hidden: torch.Tensor, microbatch: Microbatch):
            self.await_head()
            value, metrics = loss(hidden, microbatch)
            return value, no_tokens, torch.stack([metrics[name].float() for name in names])

        parts = run_schedule(
            self.wrapped, self.ranks, microbatches, loss_and_metrics, forward_only=False
        )
        total = torch.zeros(len(names), device=self.ranks.device)
        if self.ranks.reports_outputs:
            total = torch.stack(parts).sum(0)
        if self.ranks.layout.world_size > 1:
            # the layout's ranks: sums the data-parallel parts; the other ranks add zeros
            dist.all_reduce(total, group=self.ranks.group)
        return dict(zip(names, total.tolist(), strict=True))

    @calls_megatron
    @torch.no_grad()
    def step(self) -> tuple[float, float]:
        """Take a clipped optimizer step from the gradients in the buffers. Returns the gradient
        norm and the learning rate.

        Raises FloatingPointError before anything changes if the norm is not finite.
        """
        rate = learning_rate(self.config, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]  # 0 for norms
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at update {self.updates}")
        if self.config.clip_grad and (scale := self.config.clip_grad / (norm + 1e-6)) < 1:
            for optimizer in self.optimizer.chained_optimizers:
                found = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
                if found:  # a rank may own no parameter
                    torch._foreach_mul_(found, scale)
        self.optimizer.step_with_ready_grads()
        self.updates += 1
        return norm, rate

    # ------------------------------------------------------------------ overlapped weight gathering

    def await_head(self) -> None:
        """Finish gathering the head's weights: they are read outside their module, where Megatron's
        hook does not run."""
        if self.overlaps and self.last_chunk.post_process:
            for parameter in self.last_chunk.output_layer.parameters():
                self.wrapped[-1].param_to_bucket_group[parameter].finish_param_sync()

    def gather_weights(self) -> None:
        """Gather the new weights now. With overlap, the next forward pass would gather them, so
        call this before reading weights elsewhere. Collective."""
        if self.overlaps:
            for wrapped in self.wrapped:
                wrapped.start_param_sync(force_sync=True)

    # ------------------------------------------------------------------ idle memory

    def reside(self, residence: Residence) -> None:
        """Move state between device and host, until this much of the network is on the device."""
        if residence == self.residence:
            return
        if residence < Residence.WEIGHTS <= self.residence:
            self.weights_memory.offload(torch.nn.ModuleList(self.chunks).parameters())
        if residence < Residence.STATE <= self.residence:
            self.optimizer_memory.offload(self.optimizer_tensors())
        if residence < Residence.TRAINING <= self.residence:
            for wrapped in self.wrapped:
                wrapped.offload_grad_buffers(synchronize=False, empty_cache=False)
        if residence >= Residence.WEIGHTS:
            self.weights_memory.reload()
        if residence >= Residence.STATE:
            self.optimizer_memory.reload()
        if residence >= Residence.TRAINING:
            for wrapped in self.wrapped:
                wrapped.restore_grad_buffers(synchronize=False)
        self.residence = residence

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the moments, and the fp32 main copies of bfloat16 weights; fp32 weights have no
        copies."""
        parameters = torch.nn.ModuleList(self.chunks).parameters()
        weights = {weight.untyped_storage()._cdata for weight in parameters}
        for optimizer in self.optimizer.chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                for parameter in group["params"]:
                    held = [parameter, *optimizer.optimizer.state[parameter].values()]
                    for tensor in held:
                        if (
                            torch.is_tensor(tensor)
                            and tensor.dim()  # not a fused AdamW's count of steps
                            and tensor.device.type == self.ranks.device.type
                            and tensor.untyped_storage()._cdata not in weights
                        ):
                            yield tensor


def train_step(
    model: TrainedModel,
    microbatches: list[Microbatch],
    loss: LossFunction,
    names: Sequence[str],
    prefix: str,
) -> dict[str, float]:
    """Run forward, backward and one optimizer step. Returns the metrics called `names`, gradient
    norm and learning rate. If the loss is not finite, FloatingPointError is raised on every rank
    before the step."""
    metrics = model.forward_backward(microbatches, loss, names)
    if not math.isfinite(metrics[names[0]]):
        raise FloatingPointError(f"{names[0]} is {metrics[names[0]]} at update {model.updates}")
    norm, rate = model.step()
    return metrics | {f"{prefix}_grad_norm": norm, f"{prefix}_lr": rate}
