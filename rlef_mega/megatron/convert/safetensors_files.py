"""Hugging Face's weight files: read a range of rows at a time, and written a tensor at a time.

A file is an eight-byte length, a JSON header with every tensor's dtype, shape and offsets, then the
tensors' bytes. All sizes are known beforehand, so a file is written from its first byte to its last
with no more than one block of rows in memory. The files are byte by byte those that
`safetensors.torch.save_file` would write; which tensor goes to which file, and the index, are
Hugging Face's own (`huggingface_hub`, transformers' `save_pretrained`).

Nothing is mapped into memory: a mapped page counts as resident memory of the process, a page that
was read through a system call does not.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from rlef_mega.config import ConfigError
from rlef_mega.megatron.hf_names import HEAD, HFTensor

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERN = "model{suffix}.safetensors"
MAX_SHARD_SIZE = "5GB"  # of one file, Hugging Face's default for hosting
IGNORED = "rotary_emb.inv_freq"  # old conversions store it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_into(path: Path, offset: int, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor from a file. Raises ConfigError if the file ends before."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(bytes_of(tensor)) != tensor.nbytes:
            raise ConfigError(f"{path} is truncated: it ends within a tensor; copy it again")


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
    """A tensor in a file, or drawn by us. `offset` counts from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str = ""
    offset: int = 0
    drawn: torch.Tensor | None = None

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes


class SafetensorsFolder:
    """The tensors of a Hugging Face folder. Raises ConfigError for a file that is missing,
    truncated or damaged, and for a quantized tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = {
            stored.name: stored for file in self.file_names() for stored in self.read_header(file)
        }

    def file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            return [ONE_FILE]
        try:
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{index} is damaged ({error!r}); download it again") from None

    def read_header(self, file: str) -> Iterator[StoredTensor]:
        path = self.folder / file
        open_safetensors(path)  # verifies what is read here
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            entries = json.loads(content.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ConfigError(
                    f"{path}: {name} has dtype {entry['dtype']}, which is not supported; "
                    f"use a model that is not quantized"
                )
            offset = 8 + length + entry["data_offsets"][0]
            yield StoredTensor(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], file, offset)

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

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return self.tensors[tensor.name].dtype

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        """Fill `out` [rows, columns], contiguous and of the stored dtype, from row `start` on."""
        stored = self.tensors[tensor.name]
        if stored.drawn is not None:
            out.copy_(stored.drawn.view(stored.shape[0], -1)[start : start + len(out)])
        else:
            read_into(self.folder / stored.file, stored.offset + start * stored.row_bytes, out)


@dataclass(frozen=True)
class Shard:
    """One file to be written: its header, then its tensors one after the other."""

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[StoredTensor], max_shard_size: str | int) -> list[Shard]:
    """Assign the tensors to files, in Hugging Face's order. Raises ConfigError for a size that
    cannot be read."""
    empty = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors}
    try:
        split = split_torch_state_dict_into_shards(
            empty, filename_pattern=PATTERN, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size!r}: {error}") from None
    by_name = {tensor.name: tensor for tensor in tensors}
    return [
        plan_shard(file, [by_name[name] for name in names])
        for file, names in split.filename_to_tensors.items()
    ]


def plan_shard(file: str, tensors: Sequence[StoredTensor]) -> Shard:
    # safetensors' order: the widest dtypes first, so that every tensor is aligned
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.bytes],
        }
        start += tensor.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    located = [
        replace(tensor, file=file, offset=len(header) + entries[tensor.name]["data_offsets"][0])
        for tensor in ordered
    ]
    return Shard(file, header, tuple(located))


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several files; one file alone has none."""
    if len(shards) == 1:
        return
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    numbers = {
        "total_parameters": sum(torch.Size(t.shape).numel() for t in tensors),
        "total_size": sum(t.bytes for t in tensors),
    }
    index = {"metadata": numbers, "weight_map": {t.name: t.file for t in tensors}}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
