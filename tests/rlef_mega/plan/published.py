"""Compare each row of published.toml with what the planner computes for it."""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlef_mega.config import ParallelConfig
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, LLAMA_31_405B
from rlef_mega.plan.hardware import DEVICES, GIB
from rlef_mega.plan.memory import Network
from rlef_mega.plan.step_time import TRAINING, Load, seconds

TABLES = tomllib.loads((Path(__file__).parent / "published.toml").read_text())
SHAPES = {"8B": LLAMA_31_8B, "70B": LLAMA_31_70B, "405B": LLAMA_31_405B}


@dataclass(frozen=True)
class PublishedFigure:
    what: str
    published: float
    planned: float
    fitted: bool = False

    @property
    def error(self) -> float:
        """Return the planner's error, relative to the published figure."""
        return self.planned / self.published - 1


def rows(table: str) -> list[dict[str, Any]]:
    found = TABLES[table]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def even_load(sequences: int, length: int, microbatches: int, ranks: int = 1) -> Load:
    """Return the load of sequences of one length, of which the head reads every token, on one of
    `ranks` context-parallel ranks."""
    tokens = sequences * length / ranks
    return Load(tokens, tokens * length, tokens, microbatches)


class StoredLogitsNetwork(Network):
    """A network whose head stores its logits, as Megatron's own does."""

    def head_scratch(self, tokens: int, read: int) -> float:
        logits = self.weight_bytes * self.shape.vocabulary / self.tensor
        gradient = self.weight_bytes * self.shape.table_parameters / self.tensor
        return tokens * logits + gradient


def simumax_network(row: dict[str, Any]) -> Network:
    shape = SHAPES[row["model"]].with_layers(row["layers"])
    if row["model"] == "405B":
        shape = replace(shape, key_value_heads=16)
    stages = row["pipeline"]
    layout = ParallelConfig(
        tensor_model_parallel_size=row["tensor"],
        pipeline_model_parallel_size=stages,
        pipeline_layers=(row["layers"] // stages,) * stages,
        data_parallel_size=row["data"],
        sequence_parallel=row["tensor"] > 1,
        overlap=False,
    )
    return StoredLogitsNetwork(shape, layout)


def peak(network: Network, rank: int, tokens: int, microbatches: int) -> float:
    """Return the bytes of a rank while it trains."""
    return (
        network.weights(rank)
        + network.gradients(rank)
        + network.optimizer(rank)
        + network.activations(rank, tokens, microbatches)
        + network.scratch(rank, tokens, 0)
        + network.standing(tokens)
    )


def memory() -> list[PublishedFigure]:
    """Compare with SimuMax's GiB on the fullest rank."""
    length = TABLES["simumax"]["length"]
    found = []
    for row in rows("simumax"):
        network = simumax_network(row)
        peaks = [peak(network, rank, length, 4) for rank in range(network.pipeline)]
        found.append(PublishedFigure(str(row), row["alloc_gib"], max(peaks) / GIB))
    return found


def slice_seconds() -> list[PublishedFigure]:
    """Compare with SimuMax's step times on B200."""
    table = TABLES["simumax"]
    device, fitted = DEVICES[table["device"]], table["fitted"]
    found = []
    for number, row in enumerate(rows("simumax")):
        for count in (4, 8, 32):
            column = f"seconds_{count}"
            load = even_load(count, table["length"], count)
            planned = sum(seconds(simumax_network(row), device, load, TRAINING).values())
            is_fitted = (fitted["row"], fitted["seconds"]) == (number, column)
            found.append(PublishedFigure(f"{row} {column}", row[column], planned, is_fitted))
    return found


def training_seconds() -> list[PublishedFigure]:
    """Compare with NVIDIA's step times on H100."""
    table = TABLES["dgx_cloud"]
    device, length = DEVICES[table["device"]], table["length"]
    found = []
    for number, row in enumerate(rows("dgx_cloud")):
        replicas = row["gpus"] // (row["tensor"] * row["pipeline"])
        layout = ParallelConfig(
            tensor_model_parallel_size=row["tensor"],
            pipeline_model_parallel_size=row["pipeline"],
            virtual_pipeline_model_parallel_size=row["chunks"],
            data_parallel_size=replicas,  # context-parallel ranks reduce gradients with the others
            sequence_parallel=row["tensor"] > 1,
        )
        count = row["batch"] * row["context"] // replicas
        load = even_load(count, length, count, ranks=row["context"])
        network = StoredLogitsNetwork(SHAPES[row["model"]], layout)
        terms = seconds(network, device, load, TRAINING)
        is_fitted = table["fitted"]["row"] == number
        found.append(PublishedFigure(str(row), row["seconds"], sum(terms.values()), is_fitted))
    return found
