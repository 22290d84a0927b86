"""Hugging Face's weight files: read a range of rows at a time, and written a tensor at a time.

The format is an eight-byte length, a JSON header with every tensor's dtype, shape and place, then
the tensors' bytes. All sizes are known beforehand, so a file is written from its first byte to its
last with no more than one block of rows in memory. Files that we write are those that
`safetensors.torch.save_file` would write, to the byte; which tensor goes to which file, and the
index, are Hugging Face's own (`huggingface_hub`, transformers' `save_pretrained`).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.byte_ranges import ByteRanges, bytes_of

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERN = "model{suffix}.safetensors"
MAX_SHARD_SIZE = "5GB"  # of one file, Hugging Face's default for hosting
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
HEADER_BYTES = 100 * 10**6  # safetensors' own bound


@dataclass(frozen=True)
class Stored:
    """A tensor and where it is. `offset` counts from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str = ""
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes


class SafetensorsFolder:
    """The tensors of a Hugging Face folder. Raises ConfigError for one that is missing, truncated
    or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = ByteRanges(folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.file_names():
            for stored in self.read_header(file):
                self.tensors[stored.name] = stored

    def file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / ONE_FILE).is_file():
                raise ConfigError(
                    f"no file {self.folder / ONE_FILE} and no {INDEX}; "
                    f"give a Hugging Face folder with safetensors"
                )
            return [ONE_FILE]
        try:
            placed = json.loads(index.read_text())["weight_map"]
            return sorted(set(placed.values()))
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{index} is damaged ({error!r}); fetch it again") from None

    def read_header(self, file: str) -> list[Stored]:
        length = torch.zeros(1, dtype=torch.int64)
        self.files.read_into(file, 0, length)
        if not 0 < length < HEADER_BYTES:
            raise ConfigError(f"{self.folder / file} is no safetensors file; fetch it again")
        header = torch.zeros(int(length), dtype=torch.uint8)
        self.files.read_into(file, 8, header)
        try:
            entries = json.loads(bytes(header.numpy()))
        except ValueError as error:
            raise ConfigError(f"{self.folder / file} is damaged ({error}); fetch it") from None
        entries.pop("__metadata__", None)
        found = []
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ConfigError(
                    f"{self.folder / file}: {name} has dtype {entry['dtype']}, which is not "
                    f"supported; use a model that is not quantized"
                )
            start, end = entry["data_offsets"]
            stored = Stored(
                name, tuple(entry["shape"]), DTYPES[entry["dtype"]], file, 8 + int(length) + start
            )
            if stored.offset + (end - start) > self.files.size(file):
                raise ConfigError(
                    f"{self.folder / file} is truncated: {name} ends at byte "
                    f"{stored.offset + end - start} of {self.files.size(file)}; fetch it again"
                )
            found.append(stored)
        return found

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out`, contiguous and of the stored dtype, with rows from `start` on."""
        stored = self.tensors[name]
        assert out.dtype == stored.dtype, name
        self.files.read_into(stored.file, stored.offset + start * stored.row_bytes, out)


@dataclass(frozen=True)
class Shard:
    """One file to be written: its header, then its tensors one after the other."""

    file: str
    header: bytes
    tensors: tuple[Stored, ...]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[Stored], max_shard_size: str | int) -> list[Shard]:
    """Which file takes what, in Hugging Face's order. ConfigError for a size that is none."""
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


def plan_shard(file: str, tensors: Sequence[Stored]) -> Shard:
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
    return Shard(file, header, tuple(placed(file, len(header), ordered)))


def placed(file: str, start: int, tensors: Sequence[Stored]) -> Iterator[Stored]:
    for tensor in tensors:
        yield Stored(tensor.name, tensor.shape, tensor.dtype, file, start)
        start += tensor.bytes


def write_tensors(
    folder: Path, shards: Sequence[Shard], named_tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Tensors as they come, in any order, each to its place."""
    places = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    with ExitStack() as stack:
        files = {s.file: stack.enter_context((folder / s.file).open("wb")) for s in shards}
        for shard in shards:
            files[shard.file].write(shard.header)
        for name, tensor in named_tensors:
            place = places.pop(name)
            assert tuple(tensor.shape) == place.shape, name
            files[place.file].seek(place.offset)
            content = tensor.detach().to("cpu", place.dtype).contiguous()
            files[place.file].write(bytes_of(content))
    assert not places, f"never came: {sorted(places)}"


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """One file alone has no index."""
    if len(shards) == 1:
        return
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    numbers = {
        "total_parameters": sum(torch.Size(t.shape).numel() for t in tensors),
        "total_size": sum(t.bytes for t in tensors),
    }
    index = {"metadata": numbers, "weight_map": {t.name: t.file for t in tensors}}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
