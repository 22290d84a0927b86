"""Which folders are read, and what each refusal says to do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlef_mega.config import ConfigError
from rlef_mega.run.model_folder import EMBEDDING, HEAD, INDEX, ONE_FILE, SafetensorsFolder

EMBEDDED = {EMBEDDING: torch.arange(6.0).view(3, 2)}


def write(folder: Path, config: dict | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def index(*files: str) -> dict:
    return {"weight_map": {f"tensor{n}": file for n, file in enumerate(files)}}


def test_shards_are_those_of_the_index_and_a_single_file_may_have_an_index_too(tmp_path):
    shard = "model-00001-of-00001.safetensors"
    save_file(EMBEDDED, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps(index(shard)))
    assert SafetensorsFolder(write(tmp_path)).tensors[EMBEDDING].file == shard
    (tmp_path / shard).rename(tmp_path / ONE_FILE)
    (tmp_path / INDEX).write_text(json.dumps(index(ONE_FILE)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # many repositories have both
    assert SafetensorsFolder(tmp_path).tensors[EMBEDDING].file == ONE_FILE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "PyTorch weights: write safetensors by"),
        ("consolidated.00.pth", "PyTorch weights: write safetensors by"),
        ("model.q4.gguf", "GGUF: write safetensors"),
        ("adapter_model.safetensors", "a LoRA adapter: merge it"),
        ("model-00001-of-00002.safetensors", "shards without their .*index.json: copy it"),
        ("consolidated.safetensors", "other names"),
        ("README.md", "no weights: download them"),
    ],
)
def test_a_folder_without_weights_that_we_read_is_refused_with_the_remedy(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        SafetensorsFolder(write(tmp_path))


def test_an_adapter_beside_weights_is_refused(tmp_path):
    save_file(EMBEDDED, tmp_path / ONE_FILE)
    (tmp_path / "adapter_config.json").write_text("{}")  # transformers would load it too
    with pytest.raises(ConfigError, match="LoRA adapter"):
        SafetensorsFolder(write(tmp_path))


def test_a_single_file_beside_shards_is_refused(tmp_path):
    """One of them is left over from an earlier export, and readers differ in which they take."""
    for file in (ONE_FILE, "a.safetensors", "b.safetensors"):
        save_file(EMBEDDED, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps(index("a.safetensors", "b.safetensors")))
    with pytest.raises(ConfigError, match=r"both model.safetensors and .* remove those"):
        SafetensorsFolder(write(tmp_path))


@pytest.mark.parametrize("damage", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_refused_by_name(tmp_path, damage):
    (tmp_path / INDEX).write_text(damage)
    with pytest.raises(ConfigError, match=f"{INDEX}"):
        SafetensorsFolder(write(tmp_path))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_by_their_tensors(tmp_path, dtype):
    save_file({**EMBEDDED, "q": torch.zeros(2, 2).to(dtype)}, tmp_path / ONE_FILE)
    with pytest.raises(ConfigError, match=r"q has dtype .* use the model's unquantized weights"):
        SafetensorsFolder(write(tmp_path))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantized_weights_are_refused_by_their_config(tmp_path, method):
    save_file(EMBEDDED, tmp_path / ONE_FILE)
    config = {"quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(ConfigError, match=rf"quantization_config \({method}\)"):
        SafetensorsFolder(write(tmp_path, config))


def test_a_stored_head_must_be_the_embedding_if_the_config_says_so(tmp_path):
    config = {"tie_word_embeddings": True}
    save_file({**EMBEDDED, HEAD: EMBEDDED[EMBEDDING].clone()}, tmp_path / ONE_FILE)
    assert HEAD in SafetensorsFolder(write(tmp_path, config)).tensors
    save_file({**EMBEDDED, HEAD: EMBEDDED[EMBEDDING] + 0.01}, tmp_path / ONE_FILE)
    with pytest.raises(ConfigError, match=r"differs .* set it to false"):
        SafetensorsFolder(tmp_path)
    assert HEAD in SafetensorsFolder(write(tmp_path)).tensors
