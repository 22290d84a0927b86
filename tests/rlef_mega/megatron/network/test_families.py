"""Each family computes what transformers' model does: scores and all gradients, policy and critic,
in one process and in two. Other models are refused by name.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlef_mega.config import ConfigError, ParallelConfig, TrainConfig, find_recipe, load_config
from rlef_mega.megatron.hf_names import name_map
from rlef_mega.megatron.network.families import check_family, read_config
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.preflight import model_shape, plan_train
from tests.rlef_mega.distributed import launch
from tests.rlef_mega.megatron.families_worker import (
    CASES,
    IN_LAYOUT,
    ROPE_31,
    check,
    make_family,
)
from tests.rlef_mega.megatron.hugging_face import hf_logprobs
from tests.rlef_mega.megatron.megatron_worker import make_batch

ALONE = ParallelConfig()


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_agree_with_hugging_face(
    ranks: Ranks, tmp_path: Path, case: str
) -> None:
    check(tmp_path, ranks, make_family(tmp_path, case))


@pytest.mark.slow
def test_the_families_agree_with_hugging_face_in_split_layouts(tmp_path: Path) -> None:
    """Two processes compare their parts; among them are norms that each tensor-parallel rank
    applies to its own heads, and biases that are split."""
    for case in {case for cases in IN_LAYOUT.values() for case in cases}:
        make_family(tmp_path / case, case)
    launch("tests.rlef_mega.megatron.families_worker", str(tmp_path), *IN_LAYOUT, processes=2)


def test_llama_31_scaling_shows_in_these_lengths(tmp_path: Path) -> None:
    """Otherwise equality would not prove that it is applied."""
    scaled = make_family(tmp_path / "scaled", "llama31")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500_000.0}
    plain = type(scaled)(type(scaled.config)(**config)).eval()
    plain.load_state_dict(scaled.state_dict())
    batch = make_batch(6)
    with torch.no_grad():
        apart = (hf_logprobs(scaled, batch) - hf_logprobs(plain, batch)).abs().max()
    assert apart > 0.05


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("llama31", {"model_type": "mistral"}, "'mistral' is not supported; supported are Llama"),
        ("llama31", {"model_type": "gemma2"}, "'gemma2' is not supported"),
        ("qwen3", {"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported"),
        ("qwen2", {"model_type": "qwen2_moe"}, "'qwen2_moe' is not supported"),
        ("llama31", {"model_type": None}, "None is not supported"),
        ("llama31", {"attention_bias": True}, "attention_bias = true is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias = true is not supported"),
        ("llama31", {"mlp_bias": True}, "mlp_bias = true is not supported"),
        ("llama31", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": None,
                "max_window_layers": 2,
            },
            "layers with sliding_attention are not supported",
        ),
        *(
            (
                "qwen2",
                {"rope_parameters": {"rope_type": kind, "rope_theta": 1e6, "factor": 4.0}},
                f"rope_type '{kind}' is not supported",
            )
            for kind in ("yarn", "dynamic", "linear")
        ),
        (
            "llama31",
            {"rope_parameters": ROPE_31 | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not supported",
        ),
    ],
)
def test_models_of_other_families_are_refused_by_name(
    tmp_path: Path, case: str, change: dict, message: str
) -> None:
    make_family(tmp_path, case)
    check_family(read_config(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=f"config.json: .*{message}"):
        read_config(tmp_path)


def test_a_run_with_another_family_is_refused_before_a_rank_starts(tmp_path: Path) -> None:
    make_family(tmp_path, "llama31")
    config = load_config(find_recipe("demo"), [f"model.path={tmp_path}"], TrainConfig)
    plan_train(config, model_shape(config))
    published = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | {"model_type": "phi3"}))
    with pytest.raises(ConfigError, match="'phi3' is not supported"):
        plan_train(config, model_shape(config))


def test_a_sliding_window_that_no_layer_uses_is_accepted(tmp_path: Path) -> None:
    """Qwen2's own configs have one, disabled."""
    make_family(tmp_path, "qwen2")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2}
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).sliding_window is None


# The keys of published config.json files that determine the model
PUBLISHED = {
    "Llama-3.1-8B": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_names_and_shapes_of_the_map(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path)
    assert config.rope_parameters is not None
    assert config.rope_parameters["rope_theta"] == PUBLISHED[name]["rope_theta"]
    with torch.device("meta"):
        truth = AutoModelForCausalLM.from_config(config)
    mapped = [(tensor.name, tensor.shape) for tensor in name_map(config)]
    assert mapped == [(name, tuple(each.shape)) for name, each in truth.named_parameters()]
