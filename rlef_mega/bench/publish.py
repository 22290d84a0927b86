"""How weights reach SGLang servers: seconds and bytes a second of each way, verification included.

Two real servers of this machine serve a Llama with random weights, of a size at which copying
counts. Nothing is gathered: the weights are at hand, as in a trainer of one process. The recipe
says how servers are started (`rollout.servers`: device, Python, arguments).
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.config import ConfigError, TrainConfig, find_recipe, load_config
from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.engines.sglang.engine import WAYS, SGLangEngine
from rlef_mega.engines.sglang.processes import SPARE_TOKENS, ServerProcesses

REPEATS = 5
CONTEXT = 512
SHAPE: dict[str, Any] = {  # 82M parameters, 327 MB in fp32
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 9,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


def benchmark(recipe: str, shape: dict[str, Any] = SHAPE) -> Report:
    config = load_config(find_recipe(recipe), [], TrainConfig)
    asked = config.rollout.servers
    if config.rollout.engine != "sglang":
        raise ConfigError(
            f"recipe {recipe} has no SGLang servers; `rlef bench publish tiny_sglang_cpu` has"
        )
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:
        folder = Path(name)
        model = LlamaForCausalLM(
            LlamaConfig(**shape, max_position_embeddings=CONTEXT + SPARE_TOKENS)
        ).to(getattr(torch, config.model.dtype))
        model.save_pretrained(folder / "model")
        # a server does not start without one
        train_tokenizer(folder / "model", shape["vocab_size"])
        weights = model.state_dict()
        servers = ServerProcesses(
            asked.model_copy(update={"count": 2, "release_memory": False}),
            folder / "model",
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
        shape=shape,
        weights_bytes=size,
    )
    notes = ("hashing what is sent, and on the servers what arrived, is part of each publication",)
    return Report(f"rlef bench publish: {recipe}", about, tuple(figures), notes, pivoted=True)


def measure(
    way: str, urls: list[str], folder: Path, weights: dict[str, torch.Tensor]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each publication after the first, and in which servers stood still."""
    wall_s, paused_s = [], []
    with SGLangEngine(
        urls, folder / "model", way=way, weights_folder=folder / "weights", logs=folder / "logs"
    ) as engine:
        for version in range(1 + REPEATS):
            engine.take_counts()
            begun = time.perf_counter()
            engine.update_weights(weights.items(), version)
            wall_s.append(time.perf_counter() - begun)
            paused_s.append(engine.take_counts()["paused_s"])
    return tuple(wall_s[1:]), tuple(paused_s[1:])
