"""`rlef bench publish`: time and throughput of each way to send weights to SGLang servers,
verification included.

Two real servers on this machine serve a Llama with random weights, large enough that copying
dominates. Nothing is gathered: one process has all weights, as in a trainer with one rank. The
recipe says how servers are started (`rollout.servers`: device, Python, arguments).
"""

import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlef_mega.bench.random_model import write_model
from rlef_mega.bench.results import Figure, Results, describe_benchmark
from rlef_mega.config import ConfigError, ServersConfig, TrainConfig, find_recipe, load_config
from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.engines.sglang.engine import SGLangEngine
from rlef_mega.engines.sglang.processes import SPARE_TOKENS, ServerProcesses
from rlef_mega.flops import LlamaShape

WAYS = ("disk", "distributed", "tensor")
REPEATS = 5
CONTEXT = 512
SHAPE = LlamaShape(9, 768, 2048, 12, 4, 64, vocabulary=16384)  # 82M parameters, 327 MB in fp32


def benchmark(recipe: str, shape: LlamaShape = SHAPE) -> Results:
    config = load_config(find_recipe(recipe), [], TrainConfig)
    asked = config.rollout.servers
    if config.rollout.engine != "sglang":
        raise ConfigError(
            f"recipe {recipe} has no SGLang servers; try `rlef bench publish tiny_sglang_cpu`"
        )
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:
        folder = Path(name)
        model, dtype = folder / "model", getattr(torch, config.model.dtype)
        write_model(model, shape, dtype, max_position_embeddings=CONTEXT + SPARE_TOKENS)
        train_tokenizer(model, shape.vocabulary)  # a server does not start without one
        weights = load_file(model / "model.safetensors")
        servers = ServerProcesses(
            asked.model_copy(update={"count": 2, "release_memory": False}),
            model,
            dtype=config.model.dtype,
            context_length=CONTEXT,
            logs=folder / "logs",
        )
        with servers:
            measured = {way: measure(way, servers.urls, folder, weights) for way in WAYS}
    size = sum(tensor.nbytes for tensor in weights.values())
    figures = []
    for way, (wall_s, paused_s) in measured.items():
        rate = tuple(size / 1e9 / seconds for seconds in wall_s)
        figures += [
            Figure(f"{way} | publication", "s", wall_s),
            Figure(f"{way} | of this, servers paused", "s", paused_s),
            Figure(f"{way} | to each server", "GB/s", rate),
        ]
    about = describe_benchmark(
        servers=len(servers.urls),
        server_settings=asked.model_dump(include={"device", "tensor_parallel_size", "arguments"}),
        dtype=config.model.dtype,
        shape=vars(shape),
        weights_bytes=size,
    )
    notes = ("each publication includes hashing the weights, by the trainer and by the servers",)
    return Results(f"rlef bench publish: {recipe}", about, tuple(figures), notes)


def measure(
    way: str, urls: list[str], folder: Path, weights: dict[str, torch.Tensor]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the durations of all publications but the first, and of the pauses in them."""
    wall_s, paused_s = [], []
    servers = ServersConfig(urls=urls, publish=way)
    with SGLangEngine(
        servers, folder / "model", weights_folder=folder / "weights", logs=folder / "logs"
    ) as engine:
        for version in range(1 + REPEATS):
            engine.take_counts()
            begun = time.perf_counter()
            engine.update_weights(weights.items(), version)
            wall_s.append(time.perf_counter() - begun)
            paused_s.append(engine.take_counts()["paused_s"])
    return tuple(wall_s[1:]), tuple(paused_s[1:])
