"""The weights that SGLang must have after an update: names, shapes and checksums.

SGLang loads Hugging Face's names into parameters of its own: q, k and v are one, gate and up are
one, each tensor-parallel rank has its rows or columns, and the vocabulary is padded. It ignores an
unknown name, and crashes on a wrong shape. So weights are checked before they are sent, and
afterwards the servers' own hashes (`/weights_checker`) are compared with those of what was sent, in
SGLang's layout. A server on a CPU hashes a parameter with SHA-256, and reports the first 64 bits; a
server on a GPU uses a kernel of SGLang's, whose hash `gpu_checksum` computes without SGLang.

Shape suffixes: W 32-bit words, T tiles of words.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rlef_mega.config import differences
from rlef_mega.engines.checks import checked_weights, listed
from rlef_mega.flops import LlamaShape
from rlef_mega.run.model_folder import HEAD
from rlef_mega.run.ranks import gather, my_share

FUSED_INTO = {  # HF's module: (SGLang's module, its index in it)
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
BY_COLUMNS = ("o_proj", "down_proj")
BY_VOCABULARY = ("embed_tokens", "lm_head")
VOCABULARY_MULTIPLE = 64  # SGLang's DEFAULT_VOCAB_PADDING_SIZE

LOW_32, LOW_64 = 2**32 - 1, 2**64 - 1
TILE_WORDS = 8192  # SGLang's, as are the numbers of HASH_LANES: multiplier, seed, rotation
WORDS_AT_ONCE = 512 * TILE_WORDS
HASH_LANES = (
    (0x27D4EB2D, 0x243F6A88, 15),
    (0x165667B1, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & LOW_32, 13),
)

Checksums = list[dict[str, str]]  # one for each tensor-parallel rank, by SGLang's names


class ServedModel:
    """The model of a Hugging Face folder, as a server lays it out."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self.shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self.tied = bool(self.config.tie_word_embeddings)

    def shard(self, name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """Return the part of a whole tensor that a tensor-parallel rank has, contiguous."""
        module = name.split(".")[-2]
        if module in BY_VOCABULARY:
            padding = -len(tensor) % VOCABULARY_MULTIPLE
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
            return padded.chunk(ranks)[rank]
        if module in ("k_proj", "v_proj"):
            heads = self.config.num_key_value_heads
            # with more ranks than heads, neighbouring ranks have the same head
            return tensor.chunk(min(ranks, heads))[rank * min(ranks, heads) // ranks]
        if module in FUSED_INTO:
            return tensor.chunk(ranks)[rank]
        if module in BY_COLUMNS and tensor.dim() == 2:
            return tensor.chunk(ranks, dim=1)[rank].contiguous()
        return tensor


class SentWeights:
    """Weights to send: yields (HF name, whole tensor of `dtype`) once, and fills `checksums`.

    Tensors are checked by `checked_weights`. They are kept, not copied, until all parts of a fused
    parameter have come, so they must not be written to again (publish.PolicyWeights).

    Collective if torch.distributed is initialised: each rank hashes its share of the parameters,
    and after the last tensor all ranks have the checksums of all. So every rank must exhaust it,
    even after an error.
    """

    def __init__(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        model: ServedModel,
        dtype: torch.dtype,
        ranks: int,
        device: str = "cpu",
    ) -> None:
        self.named_tensors, self.model, self.dtype, self.ranks = named_tensors, model, dtype, ranks
        self.checksum = cpu_checksum if device == "cpu" else gpu_checksum
        self.parts: dict[tuple[int, str], dict[int, torch.Tensor]] = {}
        self.checksums: Checksums = [{} for _ in range(ranks)]
        names = (name for name in model.shapes if not (model.tied and name == HEAD))
        served = dict.fromkeys(served_name(name)[0] for name in names)
        self.mine = set(my_share([(rank, name) for name in served for rank in range(ranks)]))
        self.iterator = self.checked_and_hashed()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.iterator

    def checked_and_hashed(self) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.model
        for name, tensor in checked_weights(self.named_tensors, model.shapes, tied=model.tied):
            if model.tied and name == HEAD:
                continue  # the servers have one tensor for both names
            sent = tensor.detach().to(self.dtype).contiguous()
            self.add(name, sent)
            yield name, sent
        assert not self.parts, "a fused parameter of which a part is missing"
        for theirs in gather(self.checksums):
            for of_rank, found in zip(self.checksums, theirs, strict=True):
                of_rank |= found

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Note the checksums of the tensor that a server's ranks must report, if they are in this
        process's share."""
        served, index, parts = served_name(name)
        for rank in range(self.ranks):
            if (rank, served) not in self.mine:
                continue
            mine = self.parts.setdefault((rank, served), {})
            mine[index] = self.model.shard(name, tensor, rank, self.ranks)
            if len(mine) == parts:
                self.checksums[rank][served] = self.checksum([mine[n] for n in range(parts)])
                del self.parts[rank, served]


def served_name(name: str) -> tuple[str, int, int]:
    """Return SGLang's parameter that an HF weight is part of, the part's index, and how many parts
    it has."""
    *path, module, kind = name.split(".")
    served, index = FUSED_INTO.get(module, (module, 0))
    return ".".join([*path, served, kind]), index, PARTS.get(served, 1)


def bytes_of(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().reshape(-1).view(torch.uint8)


def cpu_checksum(parts: Sequence[torch.Tensor]) -> str:
    """Return the hash that a CPU server reports for the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(bytes_of(part).cpu().numpy().data)
    return digest.hexdigest()[:16]


def gpu_checksum(parts: Sequence[torch.Tensor]) -> str:
    """Return the hash that a GPU server reports (sglang.kernels.ops.memory.gpu_tensor_hash),
    computed on the parts' device.

    tensor_hash.py explains the hash of a tile; the sum of the tiles' numbers is mixed once more.
    """
    data = bytes_of(parts[0]) if len(parts) == 1 else torch.cat([bytes_of(p) for p in parts])
    if len(data) % 4 or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(-len(data) % 4)])
    words_W = data.view(torch.int32)
    if not len(words_W):
        return f"{0:016x}"
    if data.is_cuda and find_spec("triton"):  # what `sum_of_tiles` does, in one launch
        from rlef_mega.engines.sglang.tensor_hash import tile_hashes

        total = int(tile_hashes(words_W, TILE_WORDS, *HASH_LANES).sum())
    else:
        total = sum_of_tiles(words_W)
    return f"{finalized(total):016x}"


def sum_of_tiles(words_W: torch.Tensor) -> int:
    """Return the sum of the tiles' 64-bit numbers."""
    length, total = 4 * len(words_W), 0
    for start in range(0, len(words_W), WORDS_AT_ONCE):
        chunk_W = words_W[start : start + WORDS_AT_ONCE].long() & LOW_32
        index_W = torch.arange(start, start + len(chunk_W), device=words_W.device)
        halves = []
        for multiplier, seed, turn in HASH_LANES:
            turned_W = (index_W << turn | index_W >> (32 - turn)) & LOW_32
            salt_W = (index_W * multiplier + seed) & LOW_32 ^ turned_W
            mixed_W = mixed(chunk_W ^ salt_W)
            padded_W = torch.nn.functional.pad(mixed_W, (0, -len(mixed_W) % TILE_WORDS))
            sums_T = padded_W.view(-1, TILE_WORDS).sum(1) & LOW_32
            halves.append(mixed(sums_T ^ (length & LOW_32)))
        high_T, low_T = halves
        # as Python's integers: 64 bits without a sign
        total += (int(high_T.sum()) << 32) + int(low_T.sum())
    return total


def mixed(words_W: torch.Tensor) -> torch.Tensor:
    """Apply MurmurHash3's 32-bit finalizer to words in int64. A product may overflow, but its low
    32 bits are correct, and only they are kept."""
    words_W = words_W ^ words_W >> 16
    words_W = words_W * 0x85EBCA6B & LOW_32
    words_W = words_W ^ words_W >> 13
    words_W = words_W * 0xC2B2AE35 & LOW_32
    return words_W ^ words_W >> 16


def finalized(number: int) -> int:
    """Apply splitmix64's finalizer."""
    number &= LOW_64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & LOW_64
    number = (number ^ number >> 27) * 0x94D049BB133111EB & LOW_64
    return number ^ number >> 31


def differing_parameters(expected: Checksums, found: Checksums) -> str:
    """Say what differs on a server, parameters or the number of ranks; empty if nothing."""
    if len(expected) != len(found):
        return f"{len(found)} tensor-parallel ranks instead of {len(expected)}"
    wrong = [
        name if len(expected) == 1 else f"{name} (rank {rank})"
        for rank, (ours, theirs) in enumerate(zip(expected, found, strict=True))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return listed(wrong)


def check_same_model(folder: Path, served: Path) -> None:
    """Raise ValueError unless the server's folder has a model of the same type and sizes."""
    from transformers import AutoConfig

    if not (served / "config.json").is_file():
        raise ValueError(
            f"cannot read {served / 'config.json'}; servers and trainer need the model at the same "
            "path of a shared file system"
        )
    configs = [AutoConfig.from_pretrained(f, local_files_only=True) for f in (served, folder)]
    settings = [{"type": c.model_type, **LlamaShape.of(c).hf_settings()} for c in configs]
    if other := differences(*settings):
        raise ValueError(f"{served} is not the model of {folder}: {other}")
