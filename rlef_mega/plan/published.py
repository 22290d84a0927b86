"""The rows of published.toml, and what the planner says of each."""

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rlef_mega.config import ParallelConfig
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, LLAMA_31_405B, LlamaShape, training_flops
from rlef_mega.plan.hardware import DEVICES, GIB
from rlef_mega.plan.memory import Network
from rlef_mega.plan.step_time import TRAINING, even_load, seconds

FILE = Path(__file__).parent / "published.toml"
SHAPES = {"8B": LLAMA_31_8B, "70B": LLAMA_31_70B, "405B": LLAMA_31_405B}
SIMUMAX_MICROBATCHES = (4, 8, 32)


@dataclass(frozen=True)
class Comparison:
    what: str
    published: float
    planned: float
    fitted: bool = False

    @property
    def error(self) -> float:
        """Of the plan, as a part of what was published."""
        return self.planned / self.published - 1


@cache
def tables() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text())


def rows(table: str) -> list[dict[str, Any]]:
    found = tables()[table]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


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
    return Network(shape, layout, head="logits")


def memory() -> list[Comparison]:
    """GiB, of the fullest rank."""
    length = tables()["simumax"]["length"]
    found = []
    for row in rows("simumax"):
        network = simumax_network(row)
        peaks = [network.peak(rank, length, microbatches=4) for rank in range(network.pipeline)]
        found.append(Comparison(words(row), row["alloc_gib"], max(peaks) / GIB))
    return found


def slice_seconds() -> list[Comparison]:
    """SimuMax's steps on B200."""
    table = tables()["simumax"]
    device, fitted = DEVICES[table["device"]], table["fitted"]
    found = []
    for number, row in enumerate(rows("simumax")):
        for count in SIMUMAX_MICROBATCHES:
            column = f"seconds_{count}"
            load = even_load(count, table["length"], count)
            terms = seconds(simumax_network(row), device, load, TRAINING)
            is_fitted = (fitted["row"], fitted["seconds"]) == (number, column)
            what = f"{words(row)}, {count} micro-batches"
            found.append(Comparison(what, row[column], sum(terms.values()), is_fitted))
    return found


def training_seconds() -> list[Comparison]:
    """NVIDIA's steps on H100."""
    table = tables()["dgx_cloud"]
    device, length = DEVICES[table["device"]], table["length"]
    found = []
    for number, row in enumerate(rows("dgx_cloud")):
        replicas = row["gpus"] // (row["tensor"] * row["pipeline"])
        layout = ParallelConfig(
            tensor_model_parallel_size=row["tensor"],
            pipeline_model_parallel_size=row["pipeline"],
            virtual_pipeline_model_parallel_size=row["chunks"],
            data_parallel_size=replicas // row["context"],
            sequence_parallel=row["tensor"] > 1,
        )
        count = row["batch"] // layout.data_parallel_size
        load = even_load(count, length, count).times(1 / row["context"])
        network = Network(SHAPES[row["model"]], layout, head="logits")
        terms = seconds(network, device, load, TRAINING, context_parallel=row["context"])
        what = f"{row['model']}, {row['gpus']:,} GPUs"
        is_fitted = table["fitted"]["row"] == number
        found.append(Comparison(what, row["seconds"], sum(terms.values()), is_fitted))
    return found


def flops_a_token() -> list[Comparison]:
    """TFLOPs."""
    length = tables()["flops_a_token"]["length"]
    found = []
    for row in rows("flops_a_token"):
        shape: LlamaShape = SHAPES[row["model"]]
        planned = training_flops(shape, [length]) / length
        if row["square"]:
            planned += 6 * shape.flops.attention * length
        published = row["teraflops"] / row["tokens_per_s"]
        found.append(Comparison(row["model"], published, planned / 1e12))
    return found


def words(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}, {row['layers']} layers, TP {row['tensor']} PP {row['pipeline']} "
        f"DP {row['data']}"
    )
