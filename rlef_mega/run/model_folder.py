"""Read the weights of a Hugging Face folder. Only this module decides which files hold them, so all
commands that take such a folder refuse the same ones, before anything starts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rlef_mega.config import ConfigError, read_json

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONVERT = "transformers' from_pretrained(FOLDER).save_pretrained(OTHER)"
# Files with weights in forms that we do not read, and what to do with each.
OTHER_FILES = {
    "adapter_*": "a LoRA adapter: merge it into its base by peft's merge_and_unload",
    "model-*-of-*.safetensors": f"shards without their {INDEX}: copy it from the same place",
    "*.bin": f"PyTorch weights: write safetensors by {CONVERT}",
    "*.pt*": f"PyTorch weights: write safetensors by {CONVERT}",
    "*.gguf": f"GGUF: write safetensors by {CONVERT} with gguf_file",
    "*.safetensors": f"safetensors under other names: write them by {CONVERT}",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IGNORED = "rotary_emb.inv_freq"  # old conversions store it
NOT_QUANTIZED = "use the model's unquantized weights (float32, bfloat16 or float16)"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ConfigError if `config`, the folder's config.json, describes a quantized model."""
    if about := config.get("quantization_config"):
        method = about.get("quant_method", "?") if isinstance(about, dict) else about
        raise ConfigError(
            f"{folder / 'config.json'} has a quantization_config ({method}), and quantized weights "
            f"cannot be trained; {NOT_QUANTIZED}"
        )


def holds_weights(folder: Path) -> bool:
    """Return whether the folder has weights in any format, also in one that we do not read."""
    return any(any(folder.glob(pattern)) for pattern in (INDEX, ONE_FILE, *OTHER_FILES))


def open_safetensors(path: Path) -> safe_open:
    """Open a file after verifying its header and its size. Raises ConfigError for a missing or
    damaged one."""
    if not path.is_file():
        raise ConfigError(f"no file {path}; download it again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is truncated or damaged ({error}); download it again") from None


@dataclass(frozen=True)
class StoredTensor:
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFolder:
    """The tensors of a Hugging Face folder. Raises ConfigError for files that are missing, damaged,
    ambiguous or of another format, for quantized weights, and for a head that differs from the
    embedding although the config ties them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        config = read_json(folder / "config.json")
        refuse_quantized(folder, config)
        for file in self.file_names():
            with open_safetensors(folder / file) as content:
                for name in content.keys():  # noqa: SIM118 - not a dictionary
                    entry = content.get_slice(name)
                    dtype = entry.get_dtype()
                    if dtype not in DTYPES:
                        raise ConfigError(
                            f"{folder / file}: {name} has dtype {dtype}, as quantized weights "
                            f"have; {NOT_QUANTIZED}"
                        )
                    shape = tuple(entry.get_shape())
                    self.tensors[name] = StoredTensor(file, shape, DTYPES[dtype])
        if config.get("tie_word_embeddings") and {EMBEDDING, HEAD} <= self.tensors.keys():
            self.check_tied_head()

    def file_names(self) -> list[str]:
        """Return the files that hold the weights."""
        index, one = self.folder / INDEX, self.folder / ONE_FILE
        others = [p for p in OTHER_FILES if any(self.folder.glob(p))]
        if "adapter_*" in others or not (index.is_file() or one.is_file()):
            what = next((OTHER_FILES[p] for p in others), "no weights: download them")
            raise ConfigError(f"{self.folder} holds {what}")
        if not index.is_file():
            return [ONE_FILE]
        try:
            files = sorted(set(read_json(index)["weight_map"].values()))
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged ({error!r}); download it again") from None
        if one.is_file() and files != [ONE_FILE]:
            raise ConfigError(
                f"{self.folder} holds both {ONE_FILE} and {INDEX} with {len(files)} other files, "
                "which may be other weights; remove those that are out of date"
            )
        return files

    def check_tied_head(self) -> None:
        """Raise ConfigError if the stored head of a model with tied embeddings differs from the
        embedding."""
        if not torch.equal(self.read(EMBEDDING), self.read(HEAD)):
            raise ConfigError(
                f"{self.folder} stores a {HEAD} that differs from {EMBEDDING}, but its config.json "
                "says tie_word_embeddings = true; set it to false to train with the stored head, "
                "or remove the head from the file"
            )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConfigError if the folder lacks one of these tensors, has one that is not among
        them, or one of another shape. A language model's head is allowed: a tied one may be stored
        too, and a critic does not read it."""
        found, expected = self.tensors, set(shapes)
        unknown = {n for n in found.keys() - expected - {HEAD} if not n.endswith(IGNORED)}
        for what, names in (("lacks", expected - found.keys()), ("has unknown", unknown)):
            if names:
                some = ", ".join(sorted(names)[:5])
                raise ConfigError(
                    f"{self.folder} {what} {len(names)} tensor(s): {some}; the weights must be "
                    f"those of its config.json"
                )
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise ConfigError(
                    f"{self.folder}: {name} has shape {found[name].shape}, config.json says {shape}"
                )

    def dtype_of(self, names: Iterable[str]) -> torch.dtype:
        """Return the dtype of these tensors. Raises ConfigError if there are several."""
        found = {self.tensors[name].dtype for name in names}
        if len(found) > 1:
            dtypes = ", ".join(sorted(str(dtype) for dtype in found))
            raise ConfigError(f"{self.folder} stores {dtypes}; choose one with --dtype")
        return found.pop()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in the stored dtype."""
        with open_safetensors(self.folder / self.tensors[name].file) as file:
            return file.get_tensor(name)
