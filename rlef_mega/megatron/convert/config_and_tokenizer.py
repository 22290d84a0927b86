"""The files of a Hugging Face folder other than its weights: config, generation config, tokenizer,
chat template, licence."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from rlef_mega.config import ConfigError, read_json
from rlef_mega.megatron.hf_names import Role
from rlef_mega.run.model_folder import INDEX

COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")
TEMPLATES = "additional_chat_templates"


def copy_companions(source: Path, out: Path, *, role: Role, dtype: torch.dtype) -> None:
    """Copy the source's files as they are, but adapt `config.json` to the role and dtype."""
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, out / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, out / TEMPLATES, dirs_exist_ok=True)
    config = config_for(read_json(source / "config.json"), role, dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if role == "critic":  # it generates nothing
        (out / "generation_config.json").unlink(missing_ok=True)


def config_for(config: dict[str, Any], role: Role, dtype: torch.dtype) -> dict[str, Any]:
    """Adapt a config. A critic is a token-classification model whose one label is the value."""
    names: Any = {
        "policy": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "critic": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }[role]
    if config["model_type"] not in names:
        raise ConfigError(
            f"transformers has no class for a {role} of model_type {config['model_type']!r}"
        )
    dropped = {"torch_dtype", "id2label", "label2id", "num_labels"}
    config = {key: value for key, value in config.items() if key not in dropped}
    config["architectures"] = [names[config["model_type"]]]
    config["dtype"] = str(dtype).removeprefix("torch.")
    if role == "critic":
        config |= {"id2label": {"0": "value"}, "label2id": {"value": 0}}
        config["tie_word_embeddings"] = False  # there is no head to tie
    return config
