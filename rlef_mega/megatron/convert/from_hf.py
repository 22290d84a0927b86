"""A Hugging Face folder to a checkpoint of our own: `rlef import-hf`.

    CKPT/manifest.json  meta.json  networks/  hf/

The folder has weights alone, under `policy.` and `critic.`: no optimizer, no random state. `hf/`
keeps config, tokenizer and licence.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints import files
from rlef_mega.megatron.convert.checkpoint_folder import MODEL, NETWORKS, prefix
from rlef_mega.megatron.convert.config_and_tokenizer import Role, copy_companions
from rlef_mega.megatron.convert.network_file import (
    MetadataOfFiles,
    Parameter,
    Piece,
    Place,
    append,
    cut,
)
from rlef_mega.megatron.convert.resumable_folder import DONE, Job, Mark, Part, PartFile, fingerprint
from rlef_mega.megatron.convert.weights import (
    Weights,
    layer_of,
    open_folder,
    runs,
    tensors_of,
)
from rlef_mega.megatron.hf_names import EMBEDDING, HEAD, HFTensor
from rlef_mega.megatron.network.families import read_config


@dataclass(frozen=True)
class Import:
    """What to write: `dtype` None keeps the folder's; a value head is fp32 in any. `seed` draws the
    value head of a critic that is made from a language model."""

    roles: tuple[Role, ...] = ("policy",)
    dtype: torch.dtype | None = None
    pad_vocabulary_to_multiple: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Packed:
    """A Megatron parameter and the tensors that are packed in it."""

    parameter: Parameter
    tensors: tuple[HFTensor, ...]
    weights: Weights


def plan_import(folder: Path, out: Path, wanted: Import, *, overwrite: bool = False) -> Job:
    """The files of the checkpoint and how each is written. Raises ConfigError where the folder's
    tensors do not fit its config."""
    config = read_config(folder)
    packed: list[Packed] = []
    dtypes: dict[Role, torch.dtype] = {}
    for role in wanted.roles:
        tensors = tensors_of(role, config)
        weights = open_folder(role, folder, tensors, wanted.seed)
        dtypes[role] = wanted.dtype or the_dtype(weights, tensors, folder)
        packed += pack(role, tensors, weights, dtypes[role], wanted.pad_vocabulary_to_multiple)
    by_parameter = {each.parameter: each for each in packed}
    files = cut(each.parameter for each in packed)
    names = [f"{NETWORKS}/__0_{number}.distcp" for number in range(len(files))]
    layers = config.num_hidden_layers

    def part(number: int) -> Part:
        def write(file: PartFile) -> list[Place]:
            return [
                append(file, gather(piece, by_parameter[piece.parameter], layers))
                for piece in files[number]
            ]

        return Part(names[number], sum(piece.bytes for piece in files[number]), write)

    def finish(partial: Path, marks: dict[str, Mark]) -> None:
        write_metadata(partial / NETWORKS, files, names, marks, layers)
        (partial / MODEL).mkdir(exist_ok=True)
        kept: Role = "critic" if wanted.roles == ("critic",) else "policy"
        copy_companions(folder, partial / MODEL, role=kept, dtype=dtypes[kept])
        meta = {"step": 0, "updates": {}, "state": {}, "imported": list(wanted.roles)}
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        write_manifest(partial, marks)

    order: dict[str, Any] = {
        "import": [wanted.roles, {role: str(dtype) for role, dtype in dtypes.items()}],
        "padding": wanted.pad_vocabulary_to_multiple,
        "seed": wanted.seed,
        "folder": fingerprint(folder),
    }
    return Job(out, order, [part(number) for number in range(len(files))], finish, overwrite)


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
) -> Iterator[Packed]:
    """Megatron's parameters, in the order of their first tensors."""
    parts: dict[tuple[str, int | None], list[HFTensor]] = {}
    for tensor in tensors:
        parts.setdefault((tensor.parameter, layer_of(tensor)), []).append(tensor)
    for (name, layer), group in parts.items():
        rows = sum(tensor.shape[0] for tensor in group)
        if group[0].name in (EMBEDDING, HEAD):
            rows = -(-rows // multiple) * multiple
        shape = (rows, *group[0].shape[1:])
        parameter = Parameter(prefix(role) + name, layer, shape, group[0].dtype or dtype)
        yield Packed(parameter, tuple(group), weights)


def gather(piece: Piece, source: Packed, layers: int) -> torch.Tensor:
    """The numbers of one chunk, from the rows of the tensors that are packed in it. Rows of no
    tensor are padding, and zero."""
    parameter = piece.parameter
    out = torch.empty(piece.rows, parameter.columns, dtype=parameter.dtype)
    out[max(0, sum(tensor.shape[0] for tensor in source.tensors) - piece.row) :] = 0
    for tensor in source.tensors:
        for packed, row, count in runs(tensor, parameter.shape[0]):
            first, last = max(packed, piece.row), min(packed + count, piece.row + piece.rows)
            if first < last:
                start = row + first - packed
                source.weights.read(tensor, start, out[first - piece.row : last - piece.row])
    return out.view(piece.in_stack(layers)[1].sizes)


def write_metadata(
    folder: Path,
    files: Sequence[Sequence[Piece]],
    names: Sequence[str],
    marks: dict[str, Mark],
    layers: int,
) -> None:
    metadata = MetadataOfFiles(layers)
    for pieces, name in zip(files, names, strict=True):
        file = Path(name).name
        for piece, place in zip(pieces, marks[name]["facts"], strict=True):
            metadata.add_piece(piece, file, tuple(place))
    metadata.write(folder)


def write_manifest(folder: Path, marks: dict[str, Mark]) -> None:
    """Checksums of the large files are in their marks already."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    files.write_manifest(
        folder,
        {
            name: {"bytes": marks[name]["bytes"], "sha256": marks[name]["sha256"]}
            if name in marks
            else files.describe_file(folder / name)
            for name in names
            if not name.startswith(DONE)
        },
    )
