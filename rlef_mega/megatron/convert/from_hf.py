"""Convert a Hugging Face folder to one of our checkpoints: `rlef import-hf`.

    CKPT/manifest.json  meta.json  networks/  hf/

The folder has only a policy's weights: no critic, no optimizer, no random state. `hf/` keeps
config, tokenizer and licence. The weights are divided into chunks of at most `CHUNK_BYTES`, each a
range of rows, in files of about `FILE_BYTES`; each rank of any layout reads from them what it
needs.
"""

import functools
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

from rlef_mega.megatron.checkpoints.files import META, NETWORKS, describe_file, write_manifest
from rlef_mega.megatron.checkpoints.torch_dist import ChecksummedFile, Locations, write_index
from rlef_mega.megatron.convert.checkpoint_folder import MODEL, Checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import copy_companions
from rlef_mega.megatron.convert.resumable_folder import (
    FINISHED,
    PlannedFile,
    ResumableFolder,
    file_stats,
)
from rlef_mega.megatron.convert.verify import compare_weights
from rlef_mega.megatron.hf_names import HFTensor, name_map, shapes_of
from rlef_mega.megatron.network.families import read_config
from rlef_mega.run.hub import find_model
from rlef_mega.run.model_folder import SafetensorsFolder

CHUNK_BYTES = 16 * 2**20
FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class PackedParameter:
    """A Megatron parameter of one layer (None: outside of the layers), and the tensors that are
    packed in it."""

    key: str
    layer: int | None
    tensors: Sequence[HFTensor]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(tensor.shape[0] for tensor in self.tensors), *self.tensors[0].shape[1:]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def chunks(self) -> Iterator[ChunkStorageMetadata]:
        """Divide the rows; a chunk has the layers' dimension if the parameter has one."""
        rows, *rest = self.shape
        step = max(1, CHUNK_BYTES * rows // self.bytes)
        for start in range(0, rows, step):
            offsets, sizes = [start, *(0 for _ in rest)], [min(step, rows - start), *rest]
            if self.layer is not None:
                offsets, sizes = [self.layer, *offsets], [1, *sizes]
            yield ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    def copy(self, weights: SafetensorsFolder, file: ChecksummedFile) -> Iterator[tuple[int, int]]:
        """Pack the parameter and write its chunks. Yields where each one begins, and its length."""
        packed = torch.empty(self.shape, dtype=self.dtype)
        for tensor in self.tensors:
            part = tensor.rows.view(packed) if tensor.rows else packed
            part.copy_(weights.read(tensor.name).view(part.shape))
        for chunk in self.chunks():
            start, rows = (part[-len(self.shape)] for part in (chunk.offsets, chunk.sizes))
            # cloned: torch saves the whole storage that a view is part of
            info = file.append(packed[start : start + rows].clone().view(chunk.sizes))
            yield info.offset, info.length


def import_folder(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Write a Hugging Face folder as a checkpoint of a policy's weights. `dtype` None keeps the
    folder's. Raises ConfigError; `out` is complete or does not exist."""
    folder = find_model(folder)
    plan = plan_import(folder, out, getattr(torch, dtype) if dtype else None)
    plan.write(source=folder, overwrite=overwrite)
    if verify:
        compare_weights(Checkpoint(out, folder), folder, "policy", exported=False)


def plan_import(folder: Path, out: Path, dtype: torch.dtype | None) -> ResumableFolder:
    """Plan the files of the checkpoint. Raises ConfigError where the folder's tensors do not fit
    its config."""
    config, weights = read_config(folder), SafetensorsFolder(folder)
    tensors = name_map(config)
    weights.check(shapes_of(tensors))
    dtype = dtype or weights.dtype_of(tensor.name for tensor in tensors)
    files = {
        f"{NETWORKS}/__0_{number}.distcp": part
        for number, part in enumerate(divide(packed_parameters(tensors, dtype)))
    }

    def write(part: Sequence[PackedParameter], path: Path) -> dict[str, Any]:
        with ChecksummedFile(path) as file:
            chunks = [chunk for parameter in part for chunk in parameter.copy(weights, file)]
            return {"chunks": chunks, "file": file.to_disk()}

    def finish(partial: Path, facts: dict[str, Any]) -> None:
        index_files(partial / NETWORKS, files, facts, config.num_hidden_layers)
        (partial / MODEL).mkdir(exist_ok=True)
        copy_companions(folder, partial / MODEL, role="policy", dtype=dtype)
        meta = {"step": 0, "updates": {}, "state": {}, "models": {"policy": {}}}
        (partial / META).write_text(json.dumps(meta, indent=2) + "\n")
        names = [str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()]
        manifest = {
            name: facts[name]["file"] if name in facts else describe_file(partial / name)
            for name in names
            if not name.startswith(FINISHED)
        }
        write_manifest(partial, manifest)

    request = {"import": str(dtype), "folder": file_stats(folder)}
    planned = [
        PlannedFile(name, sum(each.bytes for each in part), functools.partial(write, part))
        for name, part in files.items()
    ]
    return ResumableFolder(out, request, planned, finish)


def packed_parameters(tensors: Sequence[HFTensor], dtype: torch.dtype) -> list[PackedParameter]:
    """List Megatron's parameters, in the order of their first tensors."""
    parts: dict[tuple[str, int | None], list[HFTensor]] = {}
    for tensor in tensors:
        parts.setdefault((tensor.parameter, tensor.layer), []).append(tensor)
    return [
        PackedParameter(f"policy.{name}", layer, part, dtype)
        for (name, layer), part in parts.items()
    ]


def divide(parameters: Iterable[PackedParameter]) -> list[list[PackedParameter]]:
    """Divide the parameters, in their order, into files of at most FILE_BYTES, or of one larger
    parameter."""
    files: list[list[PackedParameter]] = [[]]
    for parameter in parameters:
        if files[-1] and sum(each.bytes for each in files[-1]) + parameter.bytes > FILE_BYTES:
            files.append([])
        files[-1].append(parameter)
    return files


def index_files(
    folder: Path, files: dict[str, list[PackedParameter]], facts: dict[str, Any], layers: int
) -> None:
    """Write the index of all files, from what their writers returned."""
    entries: dict[str, Any] = {}
    locations: Locations = {}
    for name, part in files.items():
        chunks = iter(facts[name]["chunks"])
        for parameter in part:
            whole = parameter.shape if parameter.layer is None else (layers, *parameter.shape)
            properties = TensorProperties(dtype=parameter.dtype)
            empty = TensorStorageMetadata(properties, torch.Size(whole), [])
            entry = entries.setdefault(parameter.key, empty)
            for chunk in parameter.chunks():
                entry.chunks.append(chunk)
                index = MetadataIndex(parameter.key, chunk.offsets)
                locations[index] = _StorageInfo(Path(name).name, *next(chunks))
    write_index(folder, Metadata(entries), locations)
