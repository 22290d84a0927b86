"""The model families that are supported, and reading a Hugging Face config: Llama, and the dense
Qwen2 and Qwen3.

All three are the same decoder: RMSNorm before each block, rotary positions, grouped queries, a
gated feed-forward block, no biases. Qwen2 adds biases to queries, keys and values; Qwen3 normalises
each query and key head over its own dimension. A config that differs is refused, with the name of
what differs: its weights might load and run, but as another model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError

from rlef_mega.config import ConfigError, read_json
from rlef_mega.run.model_folder import refuse_quantized

if TYPE_CHECKING:  # importing a config takes 2 s of CPU time; `rlef plan` can do without one
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

DenseConfig: TypeAlias = "LlamaConfig | Qwen2Config | Qwen3Config"


@dataclass(frozen=True)
class Family:
    """How a model type differs from the others."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}
SIZES = (  # must be in config.json, because transformers has defaults
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
ROPE_TYPES = ("default", "llama3")
SUPPORTED = "supported are Llama, Qwen2 and Qwen3, dense"


def read_config(folder: Path) -> DenseConfig:
    """Read the config of a Hugging Face folder. Raises ConfigError for a damaged file and for a
    model that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"no file {path}; model.path must be a Hugging Face folder")
    content = read_json(path)
    try:
        model_type, _ = content.get("model_type"), [content[key] for key in SIZES]
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a model's config.json ({error!r}); export it again"
        ) from None
    refuse_quantized(folder, content)
    if model_type not in FAMILIES:
        raise ConfigError(f"{path}: model_type {model_type!r} is not supported; {SUPPORTED}")
    from transformers import CONFIG_MAPPING

    try:
        config: Any = CONFIG_MAPPING[model_type].from_pretrained(folder)
        check_family(config)
    except (ValueError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    return config


def family_of(config: DenseConfig) -> Family:
    return FAMILIES[config.model_type]


def check_family(config: DenseConfig) -> None:
    """Raise ConfigError for a config that would be built wrongly; names what differs."""
    rope = config.rope_parameters
    assert rope is not None, "the config fills them in"
    if rope["rope_type"] not in ROPE_TYPES:
        raise ConfigError(f"rope_type {rope['rope_type']!r} is not supported; known: {ROPE_TYPES}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']} is not supported; "
            f"whole heads are rotated"
        )
    for option in ("attention_bias", "mlp_bias"):
        if getattr(config, option, False):
            raise ConfigError(f"{option} = true is not supported; {SUPPORTED}, without it")
    heads, groups = config.num_attention_heads, config.num_key_value_heads or 0
    if min(heads, groups) < 1 or heads % groups:
        raise ConfigError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}; "
            "copy config.json from where the model was published"
        )
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise ConfigError(
            f"num_attention_heads = {heads} does not divide hidden_size = {config.hidden_size}; "
            "copy config.json from where the model was published"
        )
    if config.hidden_act != "silu":
        raise ConfigError(f"hidden_act {config.hidden_act!r} is not supported; it must be 'silu'")
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise ConfigError(
            f"layers with {', '.join(sorted(other))} are not supported; every layer must attend to "
            f"the whole context (use_sliding_window = false)"
        )
