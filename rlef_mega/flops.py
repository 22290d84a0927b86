"""The FLOPs of training: the count behind its TFLOP/s, and what micro-batches balance.

    F(s, r) = 6 [W s + h V r] + 6 L n d s^2        W = L (2 h n d + 2 h k d + 3 h f)

for a sequence of s tokens, r of which the head reads: L layers, width h, n query and k key-value
heads of dimension d, gated feed-forward width f, vocabulary V. A multiply-add is two operations, so
each weight and token takes six: two forward and four backward. Attention counts only the causal
half of its products; the embedding is a look-up and counts nothing. (Narayanan et al., arXiv
2104.04473, appendix, and Korthikanti et al., 2205.05198, appendix A, count the whole square and a
head that reads every token.) Recomputation in backward is counted separately, as hardware FLOPs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import SimpleNamespace

    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a dense decoder with gated feed-forward blocks: the Llama and Qwen families."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # head and embedding are one matrix

    @classmethod
    def of(cls, config: "PretrainedConfig | SimpleNamespace") -> Self:
        """Return the sizes in a Hugging Face config."""
        width, heads = config.hidden_size, config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=width,
            ffn=config.intermediate_size,
            heads=heads,
            key_value_heads=config.num_key_value_heads or heads,
            # as transformers' attention has it; Qwen2's config has none
            head_dim=getattr(config, "head_dim", None) or width // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    def hf_settings(self) -> dict[str, Any]:
        """Return the sizes under their names in Hugging Face's configs, the inverse of `of`."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }

    def with_layers(self, layers: int) -> "LlamaShape":
        return replace(self, layers=layers)

    @property
    def layer_products(self) -> int:
        """Return how many weights a layer's matrices have: all but those of norms and biases."""
        attention = 2 * (self.heads + self.key_value_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.ffn)

    @property
    def table_parameters(self) -> int:
        """Return the parameters of the embedding; an untied head has the same number."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        layer = self.layer_products + 2 * self.hidden
        tables = 1 if self.tied else 2
        return self.layers * layer + tables * self.table_parameters + self.hidden

    def flops(self, tokens: int, read: int) -> int:
        """Return F(tokens, read): the FLOPs of training on a sequence, with the head reading `read`
        tokens."""
        layer = self.layer_products * tokens + self.heads * self.head_dim * tokens**2
        return 6 * (self.layers * layer + self.table_parameters * read)


# From Meta's config.json of each size
LLAMA_31_8B = LlamaShape(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_31_70B = LlamaShape(80, 8192, 28672, 64, 8, 128, 128256)
LLAMA_31_405B = LlamaShape(126, 16384, 53248, 128, 8, 128, 128256)


def training_flops(shape: LlamaShape, lengths: Sequence[int], read: int | None = None) -> int:
    """Return the model FLOPs of forward and backward over sequences of these lengths.

    `read`: tokens that the head reads; None for all, 0 for a critic.
    """
    head = shape.flops(0, sum(lengths) if read is None else read)
    return head + sum(shape.flops(length, 0) for length in lengths)


def forward_flops(shape: LlamaShape, lengths: Sequence[int], read: int | None = None) -> int:
    """Return the model FLOPs of one forward pass: a third of training."""
    return training_flops(shape, lengths, read) // 3


def recomputed_flops(shape: LlamaShape, lengths: Sequence[int], recompute: str) -> int:
    """Return what activation recomputation adds to training's model FLOPs; their sum is the
    hardware FLOPs. "selective" runs each feed-forward block again, "full" each layer."""
    if recompute == "none":
        return 0
    if recompute == "selective":
        return 2 * sum(lengths) * shape.layers * 3 * shape.hidden * shape.ffn
    if recompute == "full":
        return forward_flops(shape, lengths, read=0)
    raise ValueError(f"recompute is {recompute!r}; use none, selective or full")
