"""Llama and its relatives (`families`) as a Megatron-core GPTModel, in two forms: a policy and a
critic with a scalar head.

The last stage returns hidden states after the final norm, not logits. Scores and losses read the
rows that they need and call the fused head (`rlef_kernels`), which never stores all their
logits. The critic computes values at a few rows in the same way. Both are built from a Hugging Face
config; `hf_weights` loads their weights.

Megatron's layout is [s, b, h]; packed micro-batches have b = 1, and with sequence parallelism each
tensor-parallel rank holds s / tp of the tokens. Shape suffixes: T packed tokens, R rows read, D
hidden size, E half of a head's dimension, V values of a micro-batch.
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rlef_kernels import linear_logprob, linear_score
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.microbatch import Microbatch
from rlef_mega.megatron.network.accelerations import WEIGHT_GRADIENTS, uses
from rlef_mega.megatron.network.attention import PackedAttention
from rlef_mega.megatron.network.families import DenseConfig, family_of
from rlef_mega.megatron.network.feed_forward import GatedMLP
from rlef_mega.megatron.network.stages import Stages, split_layers
from rlef_mega.megatron.parallel import Ranks


def transformer_config(
    config: DenseConfig, ranks: Ranks, dtype: torch.dtype, recompute: str, stages: Stages
) -> TransformerConfig:
    parallel, device = ranks.layout, ranks.device
    on_cpu = device.type == "cpu"
    pipelined = parallel.pipeline_model_parallel_size > 1
    interleaved = stages.chunks > 1
    recomputations: dict[str, dict[str, Any]] = {
        "none": {},
        # The feed-forward block, whose activations are the largest of a layer. Attention kernels
        # store nothing of size s x s.
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=LlamaShape.of(config).head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=family_of(config).qkv_bias,
        qk_layernorm=family_of(config).qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        # Megatron takes the number of chunks from this layout too
        pipeline_model_parallel_layout=stages.megatron_layout() if pipelined else None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # losses carry their global denominators; Megatron must not average over micro-batches or
        # ranks
        calculate_per_token_loss=True,
        # packed micro-batches differ in length; Megatron ties that option to this dispatcher
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # weights are loaded, never drawn
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        gradient_accumulation_fusion=uses(WEIGHT_GRADIENTS, device),
        # Megatron's fused form is compiled, by Triton
        bias_activation_fusion=uses("triton", device),
        batch_p2p_sync=not on_cpu,
        # No batched exchange between interleaved stages: with two ranks, where the next stage's
        # rank is also the previous one's, Megatron 0.16 then computes wrong gradients without an
        # error (measured: a gradient norm of 13951 in place of 2.88).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=pipelined,
        **recomputations[recompute],
    )


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's local norm refuses sequence parallelism; this one marks its weight for the
    gradient all-reduce."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def layer_spec(config: DenseConfig) -> ModuleSpec:
    # each tensor-parallel rank normalises its own heads; Megatron sums these weights' gradients
    # over the ranks because of `qk_layernorm`
    qk_norm = RMSNorm if family_of(config).qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    feed_forward = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=feed_forward),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class PackedLlama(GPTModel):
    """One stage of the trunk. On the last stage, forward returns hidden states after the final
    norm."""

    has_language_head: ClassVar[bool]

    def __init__(
        self,
        hf_config: DenseConfig,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        recompute: str = "none",
        chunk: int = 0,
    ) -> None:
        shape = LlamaShape.of(hf_config)
        stages = split_layers(shape, ranks.layout, with_head=self.has_language_head)
        stage = chunk * stages.pipeline_size + ranks.groups.pp.rank()
        config = transformer_config(hf_config, ranks, dtype, recompute, stages)
        specs = [layer_spec(hf_config)] * stages.layers[stage]
        super().__init__(
            config,
            TransformerBlockSubmodules(specs, layer_norm=RMSNorm),
            vocab_size=hf_config.vocab_size,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=stage == 0,
            post_process=stage == stages.last,
            share_embeddings_and_output_weights=(
                self.has_language_head and hf_config.tie_word_embeddings
            ),
            position_embedding_type="none",  # `PackedAttention` applies rotary embeddings
            pg_collection=ranks.groups,
            vp_stage=chunk if stages.chunks > 1 else None,
        )
        self.hf_config, self.stages = hf_config, stages
        mark_shards(self)
        for module in self.modules():  # one without tp_group would use Megatron's global group
            if isinstance(module, MegatronModule) and not hasattr(module, "tp_group"):
                module.tp_group = ranks.groups.tp
        # Hugging Face's own frequencies, one formula for all families, with Llama 3.1's scaling
        with torch.device("cpu"):  # real values, even if weights are on the meta device
            frequencies = LlamaRotaryEmbedding(hf_config).inv_freq.clone()  # type: ignore[arg-type]
        frequencies_E = frequencies.to(ranks.device, torch.float32)
        for layer in self.decoder.layers:
            if type(layer.mlp) is MLP:  # Megatron's specs accept only this class
                layer.mlp.__class__ = GatedMLP
            layer.self_attention.core_attention.frequencies_E = frequencies_E

    def _postprocess(self, hidden_states: torch.Tensor, *unused: object, **options: object):
        """Return hidden states in place of Megatron's logits."""
        return hidden_states

    def rows(self, hidden: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """Select rows of [T, 1, D], or of this rank's part of it under sequence parallelism.
        Returns [R, D] on every tensor-parallel rank.

        Every rank computes the same from them and has the same gradient, so backward keeps this
        rank's slice without a sum.
        """
        if self.config.sequence_parallel:
            # tensor-parallel group: gathers the tokens
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden.squeeze(1).index_select(0, rows_R)


def mark_shards(model: torch.nn.Module) -> None:
    """Mark the split weights. megatron-core before 0.18 marks them only when it initialises them;
    without the mark, the gradient norm omits them on all but the first tensor-parallel rank."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dimension = 0
        elif isinstance(module, RowParallelLinear):
            dimension = 1
        else:
            continue
        marked = getattr(module.weight, "tensor_model_parallel", False)
        if module.weight is not None and not marked:
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)


class PolicyModel(PackedLlama):
    """A language model: log-probs of chosen tokens."""

    has_language_head = True

    @property
    def output_weight(self) -> torch.Tensor:
        """Return this rank's rows of the head, which are the embedding's if the two are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logprobs(
        self, hidden: torch.Tensor, microbatch: Microbatch, *, temperature: float
    ) -> torch.Tensor:
        """Return the actions' log-probs, in fp32, from the last stage's output."""
        logprobs_R, _ = linear_logprob(
            self.rows(hidden, microbatch.action_rows_R),
            self.output_weight,
            microbatch.action_ids_R,
            temperature=temperature,
            group=self.pg_collection.tp,
            accumulate_main_grad=self.has_main_grad,
        )
        return logprobs_R

    @property
    def has_main_grad(self) -> bool:
        """Return whether gradients are computed, and Megatron has a buffer for the head's."""
        return torch.is_grad_enabled() and hasattr(self.output_weight, "main_grad")


class PolicyAndReference(torch.nn.Module):
    """A stage of the policy and the same stage of the reference, which Megatron's schedule runs as
    one module. Their hidden states travel side by side, as [s, b, 2 h]."""

    def __init__(self, policy: PolicyModel, reference: PolicyModel) -> None:
        super().__init__()
        self.policy, self.reference = policy, reference
        self.config = copy.copy(policy.config)
        self.config.hidden_size *= 2  # of the hidden states between stages
        self.model_type = policy.model_type

    def set_input_tensor(self, inputs: Sequence[torch.Tensor | None]) -> None:
        (self.both,) = inputs

    def forward(self, *inputs: Any, **options: Any) -> torch.Tensor:
        halves = (None, None) if self.both is None else self.both.chunk(2, dim=-1)
        outputs = []
        for model, half in zip((self.policy, self.reference), halves, strict=True):
            model.set_input_tensor([half if half is None else half.contiguous()])
            outputs.append(model(*inputs, **options))
            model.set_input_tensor([None])
        return torch.cat(outputs, dim=-1)

    def scores(
        self, hidden: torch.Tensor, microbatch: Microbatch, *, temperature: float
    ) -> torch.Tensor:
        """Return the actions' log-probs under policy and reference, and KL(policy || reference), as
        [3, R] in fp32, from the last stage's output."""
        hidden, ref_hidden = hidden.chunk(2, dim=-1)
        rows_R = microbatch.action_rows_R
        found = linear_score(
            self.policy.rows(hidden, rows_R),
            self.policy.output_weight,
            self.reference.rows(ref_hidden, rows_R),
            self.reference.output_weight,
            microbatch.action_ids_R,
            temperature=temperature,
            group=self.policy.pg_collection.tp,
        )
        return torch.stack([found.logprob_T, found.ref_logprob_T, found.kl_T])


class ValueHead(torch.nn.Linear):
    """An fp32 projection to one number, the same on every tensor-parallel rank.

    After the norm, entries of hidden states are about 1; with the spread of the new weights the
    first values are about a tenth of a reward.
    """

    def __init__(self, hidden_size: int, ranks: Ranks) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32, device=ranks.device)
        # drawn on the CPU, so that every layout has the same
        generator = torch.Generator().manual_seed(ranks.seed)
        weight_1D = torch.randn(1, hidden_size, generator=generator, device="cpu")
        with torch.no_grad():
            self.weight.copy_(weight_1D * 0.1 / hidden_size**0.5)
            self.bias.zero_()
        for parameter in self.parameters():
            # `TrainedModel` gives such parameters optimizer groups of their own
            parameter.is_value_head = True  # type: ignore[attr-defined]


class CriticModel(PackedLlama):
    """A network of its own (RLEF A.1): the policy's architecture with a scalar head."""

    has_language_head = False

    def __init__(self, hf_config: DenseConfig, ranks: Ranks, **options: Any) -> None:
        super().__init__(hf_config, ranks, **options)
        if self.post_process:
            self.output_layer = ValueHead(hf_config.hidden_size, ranks)

    def values(self, hidden: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        """Return the critic's values, in fp32, from the last stage's output."""
        return self.output_layer(self.rows(hidden, microbatch.value_rows_V).float()).squeeze(-1)
