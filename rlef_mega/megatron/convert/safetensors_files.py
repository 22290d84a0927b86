"""The weights of a Hugging Face folder: what it stores, checked against a model, and one whole
tensor at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rlef_mega.config import ConfigError, read_json
from rlef_mega.megatron.hf_names import HEAD, HFTensor

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
IGNORED = "rotary_emb.inv_freq"  # old conversions store it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def open_safetensors(path: Path):
    """Open a file, its header and its size verified. Raises ConfigError for a missing or damaged
    one."""
    if not path.is_file():
        raise ConfigError(f"no file {path}; give a Hugging Face folder with safetensors")
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
    """The tensors of a Hugging Face folder. Raises ConfigError for a file that is missing,
    truncated or damaged, and for a quantized tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.file_names():
            with open_safetensors(folder / file) as content:
                for name in content.keys():  # noqa: SIM118 - not a dictionary
                    entry = content.get_slice(name)
                    dtype = entry.get_dtype()
                    if dtype not in DTYPES:
                        raise ConfigError(
                            f"{folder / file}: {name} has dtype {dtype}, which is not supported; "
                            f"use a model that is not quantized"
                        )
                    shape = tuple(entry.get_shape())
                    self.tensors[name] = StoredTensor(file, shape, DTYPES[dtype])

    def file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            return [ONE_FILE]
        try:
            return sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{index} is damaged ({error!r}); download it again") from None

    def check(self, tensors: Sequence[HFTensor]) -> None:
        """Raise ConfigError if the folder lacks a tensor, has one that the model does not have, or
        one of another shape. A language model's head is allowed: a tied one may be stored all the
        same, and a critic does not read it.
        """
        found, expected = self.tensors, {tensor.name for tensor in tensors}
        unknown = {n for n in found.keys() - expected - {HEAD} if not n.endswith(IGNORED)}
        for what, names in (("lacks", expected - found.keys()), ("has unknown", unknown)):
            if names:
                some = ", ".join(sorted(names)[:5])
                raise ConfigError(
                    f"{self.folder} {what} {len(names)} tensor(s): {some}; the weights must be "
                    f"those of its config.json"
                )
        for tensor in tensors:
            if found[tensor.name].shape != tensor.shape:
                raise ConfigError(
                    f"{self.folder}: {tensor.name} has shape {found[tensor.name].shape}, "
                    f"config.json says {tensor.shape}"
                )

    def dtype_of(self, tensors: Sequence[HFTensor]) -> torch.dtype:
        """Return the dtype of these tensors. Raises ConfigError if there are several."""
        found = {self.tensors[tensor.name].dtype for tensor in tensors}
        if len(found) > 1:
            names = ", ".join(sorted(str(dtype) for dtype in found))
            raise ConfigError(f"{self.folder} stores {names}; choose one with --dtype")
        return found.pop()

    def read(self, tensor: HFTensor) -> torch.Tensor:
        """Read one tensor, in the stored dtype."""
        with open_safetensors(self.folder / self.tensors[tensor.name].file) as file:
            return file.get_tensor(tensor.name)
