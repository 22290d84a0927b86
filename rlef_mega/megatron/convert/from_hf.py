"""A Hugging Face folder to a checkpoint of our own: `rlef import-hf`.

    CKPT/manifest.json  meta.json  networks/  hf/

The folder has weights alone, under `policy.` and `critic.`: no optimizer, no random state. `hf/`
keeps config, tokenizer and licence. The weights are divided into chunks of at most `CHUNK_BYTES`,
each a range of rows, in files of at most `FILE_BYTES`; each rank of any layout reads from them what
it needs.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints.files import META, NETWORKS, describe_file, write_manifest
from rlef_mega.megatron.checkpoints.torch_dist import ChecksummedFile, Locations, write_index
from rlef_mega.megatron.convert.checkpoint_folder import MODEL
from rlef_mega.megatron.convert.config_and_tokenizer import Role, copy_companions
from rlef_mega.megatron.convert.resumable_folder import (
    FINISHED,
    FileMark,
    PlannedFile,
    ResumableFolder,
    fingerprint,
)
from rlef_mega.megatron.convert.weights import (
    Weights,
    open_folder,
    read_as,
    tensors_of,
)
from rlef_mega.megatron.hf_names import EMBEDDING, HEAD, HFTensor
from rlef_mega.megatron.network.families import read_config

CHUNK_BYTES = 16 * 2**20  # glibc's limit, as in `weights`
FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class PackedParameter:
    """A Megatron parameter of one layer (None: outside of the layers), and the tensors that are
    packed in it."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[HFTensor, ...]
    weights: Weights

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Pack these rows of the parameter. Rows of no tensor are padding, and zero."""
        out = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        out[max(0, sum(tensor.shape[0] for tensor in self.tensors) - start) :] = 0
        for tensor in self.tensors:
            for packed, row, count in tensor.runs(self.shape[0]):
                first, last = max(packed, start), min(packed + count, stop)
                if first < last:
                    offset = row - packed
                    target = out[first - start : last - start].view(last - first, -1)
                    read_as(self.weights, tensor, first + offset, target)
        return out


@dataclass(frozen=True)
class RowRange:
    """Rows of a parameter: one chunk of a checkpoint."""

    parameter: PackedParameter
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * self.parameter.row_bytes

    @property
    def in_stack(self) -> ChunkStorageMetadata:
        """The chunk, with the layers' dimension if the parameter has one."""
        layer, rest = self.parameter.layer, self.parameter.shape[1:]
        offsets, sizes = (self.start, *(0 for _ in rest)), (self.stop - self.start, *rest)
        if layer is not None:
            offsets, sizes = (layer, *offsets), (1, *sizes)
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    def append_to(self, file: ChecksummedFile) -> _StorageInfo:
        rows = self.parameter.read(self.start, self.stop)
        return file.append(rows.view(self.in_stack.sizes))


def plan_import(
    folder: Path,
    out: Path,
    *,
    roles: tuple[Role, ...] = ("policy",),
    dtype: torch.dtype | None = None,
    pad_vocabulary_to_multiple: int = 1,
    seed: int = 0,
    overwrite: bool = False,
) -> ResumableFolder:
    """Plan the files of the checkpoint. `dtype` None keeps the folder's; a value head is fp32 in
    any. `seed` draws the value head of a critic that is made from a language model. Raises
    ConfigError where the folder's tensors do not fit its config."""
    config = read_config(folder)
    parameters: list[PackedParameter] = []
    dtypes: dict[Role, torch.dtype] = {}
    for role in roles:
        tensors = tensors_of(role, config)
        weights = open_folder(role, folder, tensors, seed)
        dtypes[role] = dtype or the_dtype(weights, tensors, folder)
        parameters += pack(role, tensors, weights, dtypes[role], pad_vocabulary_to_multiple)
    files = {
        f"{NETWORKS}/__0_{number}.distcp": ranges
        for number, ranges in enumerate(divide(parameters))
    }

    def planned(name: str, ranges: Sequence[RowRange]) -> PlannedFile:
        def write(file: ChecksummedFile) -> list[tuple[int, int]]:
            stored = [rows.append_to(file) for rows in ranges]
            return [(info.offset, info.length) for info in stored]

        return PlannedFile(name, sum(rows.bytes for rows in ranges), write)

    def finish(partial: Path, marks: dict[str, FileMark]) -> None:
        index_files(partial / NETWORKS, files, marks, config.num_hidden_layers)
        (partial / MODEL).mkdir(exist_ok=True)
        kept: Role = "critic" if roles == ("critic",) else "policy"
        copy_companions(folder, partial / MODEL, role=kept, dtype=dtypes[kept])
        meta = {"step": 0, "updates": {}, "state": {}, "imported": list(roles)}
        (partial / META).write_text(json.dumps(meta, indent=2) + "\n")
        seal_files(partial, marks)

    request: dict[str, Any] = {
        "import": [roles, {role: str(dtype) for role, dtype in dtypes.items()}],
        "padding": pad_vocabulary_to_multiple,
        "seed": seed,
        "folder": fingerprint(folder),
    }
    plan = [planned(name, ranges) for name, ranges in files.items()]
    return ResumableFolder(out, request, plan, finish, overwrite)


def the_dtype(weights: Weights, tensors: Sequence[HFTensor], folder: Path) -> torch.dtype:
    found = {weights.dtype(tensor) for tensor in tensors if tensor.dtype is None}
    if len(found) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise ConfigError(f"{folder} stores {names}; choose one with --dtype")
    return found.pop()


def pack(
    role: Role,
    tensors: Sequence[HFTensor],
    weights: Weights,
    dtype: torch.dtype,
    multiple: int,
) -> Iterator[PackedParameter]:
    """Yield Megatron's parameters, in the order of their first tensors."""
    parts: dict[tuple[str, int | None], list[HFTensor]] = {}
    for tensor in tensors:
        parts.setdefault((tensor.parameter, tensor.own_layer), []).append(tensor)
    for (name, layer), group in parts.items():
        rows = sum(tensor.shape[0] for tensor in group)
        if group[0].name in (EMBEDDING, HEAD):
            rows = -(-rows // multiple) * multiple
        shape = (rows, *group[0].shape[1:])
        stored_dtype = group[0].dtype or dtype
        key = f"{role}.{name}"
        yield PackedParameter(key, layer, shape, stored_dtype, tuple(group), weights)


def divide(parameters: Iterable[PackedParameter]) -> list[list[RowRange]]:
    """Divide the parameters into chunks. Returns the chunks of each file, in order."""
    files: list[list[RowRange]] = [[]]
    filled = 0
    for parameter in parameters:
        step = max(1, CHUNK_BYTES // parameter.row_bytes)
        for start in range(0, parameter.shape[0], step):
            rows = RowRange(parameter, start, min(start + step, parameter.shape[0]))
            if files[-1] and filled + rows.bytes > FILE_BYTES:
                files.append([])
                filled = 0
            files[-1].append(rows)
            filled += rows.bytes
    return files


def index_files(
    folder: Path,
    files: dict[str, list[RowRange]],
    marks: dict[str, FileMark],
    layers: int,
) -> None:
    """Write the index of all files, from their marks."""
    entries: dict[str, TensorStorageMetadata] = {}
    locations: Locations = {}
    for name, ranges in files.items():
        for rows, (offset, length) in zip(ranges, marks[name]["facts"], strict=True):
            parameter, chunk = rows.parameter, rows.in_stack
            whole = parameter.shape if parameter.layer is None else (layers, *parameter.shape)
            properties = TensorProperties(dtype=parameter.dtype)
            empty = TensorStorageMetadata(properties, torch.Size(whole), [])
            entries.setdefault(parameter.key, empty).chunks.append(chunk)
            index = MetadataIndex(parameter.key, chunk.offsets)
            locations[index] = _StorageInfo(Path(name).name, offset, length)
    write_index(folder, Metadata(dict(entries)), locations)


def seal_files(folder: Path, marks: dict[str, FileMark]) -> None:
    """Write the manifest. The marks have the checksums of the large files already."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    manifest = {
        name: {key: marks[name][key] for key in ("bytes", "sha256")}
        if name in marks
        else describe_file(folder / name)
        for name in names
        if not name.startswith(FINISHED)
    }
    write_manifest(folder, manifest)
