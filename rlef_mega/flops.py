"""How much arithmetic training is: the convention of every figure in TFLOP/s, and what
micro-batches are balanced by.

    F(s, r) = 6 [W s + h V r] + 6 L n d s^2        W = L (2 h n d + 2 h k d + 3 h f)

for a sequence of s tokens of which r are read by the head: L layers, width h, n query and k
key-value heads of dimension d, gated feed-forward width f, vocabulary V. A multiply-add is two
operations; six a weight and token, two forward and four backward; the causal half of the attention
products; no embedding, which is a look-up (Narayanan et al., arXiv 2104.04473, appendix;
Korthikanti et al., 2205.05198, appendix A, who count the whole square and read the head
everywhere). What is computed again in backward is no work of the model's: it is counted apart, as
hardware FLOPs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from transformers import PretrainedConfig


@dataclass(frozen=True)
class SequenceFlops:
    """A model's part of the formula."""

    layers: int  # W, weights of the layers' matrices
    head: int  # h V
    attention: int  # L n d

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """Of a dense decoder with gated feed-forward blocks: the Llama and Qwen families."""
        width, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or width // heads
        key_value_heads = config.num_key_value_heads or heads
        projections = 2 * (heads + key_value_heads) * head_dim + 3 * config.intermediate_size
        return cls(
            layers=config.num_hidden_layers * width * projections,
            head=width * config.vocab_size,
            attention=config.num_hidden_layers * heads * head_dim,
        )

    def __call__(self, tokens: int, read: int) -> int:
        """FLOPs of training on a sequence of so many tokens, with the head at `read` of them."""
        return 6 * (self.layers * tokens + self.head * read + self.attention * tokens**2)


@dataclass(frozen=True)
class LlamaShape:
    """What arithmetic and memory of a Llama depend on."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # head and embedding are one matrix

    def with_layers(self, layers: int) -> "LlamaShape":
        return replace(self, layers=layers)

    @property
    def layer_products(self) -> int:
        """Weights of one layer that enter matrix products: all but its two norms."""
        attention = 2 * (self.heads + self.key_value_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.ffn)

    @property
    def table_parameters(self) -> int:
        """Of the embedding; of the head, as many again."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        layer = self.layer_products + 2 * self.hidden
        tables = 1 if self.tied else 2
        return self.layers * layer + tables * self.table_parameters + self.hidden

    @property
    def flops(self) -> SequenceFlops:
        return SequenceFlops(
            layers=self.layers * self.layer_products,
            head=self.table_parameters,
            attention=self.layers * self.heads * self.head_dim,
        )


# Meta's config.json of each size
LLAMA_31_8B = LlamaShape(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_31_70B = LlamaShape(80, 8192, 28672, 64, 8, 128, 128256)
LLAMA_31_405B = LlamaShape(126, 16384, 53248, 128, 8, 128, 128256)


def training_flops(shape: LlamaShape, lengths: Sequence[int], read: int | None = None) -> int:
    """Model FLOPs of forward and backward over sequences of these lengths. `read`: tokens that the
    head reads; None for all, 0 for a critic.
    """
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    part = shape.flops
    head = part.head * (tokens if read is None else read)
    return 6 * (part.layers * tokens + head + part.attention * squares)


def forward_flops(shape: LlamaShape, lengths: Sequence[int], read: int | None = None) -> int:
    """Of one forward pass: a third of training."""
    return training_flops(shape, lengths, read) // 3


def recomputed_flops(shape: LlamaShape, lengths: Sequence[int], recompute: str) -> int:
    """What activation recomputation adds to training: "selective" runs each feed-forward block
    again, "full" each layer (`megatron/model.py` says what is chosen). Hardware FLOPs are training
    FLOPs and these.
    """
    if recompute == "none":
        return 0
    if recompute == "selective":
        return 2 * sum(lengths) * shape.layers * 3 * shape.hidden * shape.ffn
    if recompute == "full":
        return forward_flops(shape, lengths, read=0)
    raise ValueError(f"recompute is {recompute!r}; known: none, selective, full")


def ppo_flops(
    shape: LlamaShape,
    lengths: Sequence[int],
    read: int | None = None,
    *,
    epochs: int = 1,
    with_reference: bool = True,
) -> int:
    """Model FLOPs of learning from a batch once: old and reference log-probs, values of a critic of
    the same size, and `epochs` passes of updates of both networks. In all 3 + 6 epochs forward
    passes, those of the critic without a head.
    """
    policy = forward_flops(shape, lengths, read)
    critic = forward_flops(shape, lengths, read=0)
    return (1 + with_reference + 3 * epochs) * policy + (1 + 3 * epochs) * critic
