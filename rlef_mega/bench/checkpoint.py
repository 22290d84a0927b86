"""What a checkpoint costs training: how long it waits, and how much slower it runs meanwhile.

Run as a module it is the worker: `rlef bench checkpoint` launches it on the recipe's ranks. The
second part stands alone: a loop of small products, as a stand-in for training, beside the same
writer on a thread and in a forked process.
"""

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega import ppo
from rlef_mega.bench.figures import Figure, Report
from rlef_mega.bench.workload import RESULT, Workload, random_episodes, workload
from rlef_mega.config import TrainConfig, dump_toml, load_config
from rlef_mega.megatron import parallel
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints, load_checkpoint
from rlef_mega.megatron.checkpoints.files import read_manifest, step_folder
from rlef_mega.megatron.checkpoints.writer import Snapshot, write_share
from rlef_mega.packing import pack, shuffled
from rlef_mega.parts import make_learner
from rlef_mega.preflight import model_shape
from rlef_mega.run.launch import worker_main

REPEATS = 5
EPISODES = 4  # of a step, so that a step lasts a few seconds on two cores
# where the recipe's model is not on this machine: large enough that a save takes a while
LARGE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
FORK = multiprocessing.get_context("fork")
TENSORS, TENSOR_SIZE = 48, 1 << 20  # numbers of four bytes: 192 MiB


def benchmark(recipe: str) -> Report:
    with workload(recipe) as work:
        work = enlarged(work)
        measured = work.run("rlef_mega.bench.checkpoint")
    about = work.about(
        tokens_a_step=measured["tokens"],
        checkpoint_MiB=round(measured["bytes"] / 2**20),
    )
    seconds = (
        ("training waits, asynchronous", "waits"),
        ("training waits, synchronous", "synchronous"),
        ("a step with nothing in flight", "steps_alone"),
        ("a step beside a save", "steps_beside"),
        ("resuming: checksums and reading", "resumed"),
    )
    figures = [Figure(name, "s", tuple(measured[key])) for name, key in seconds]
    return Report(f"rlef bench checkpoint: {recipe}", about, (*figures, *beside_writers()))


def enlarged(work: Workload) -> Workload:
    """With a model whose saves take a while, where the recipe's own is not here."""
    if not work.model.startswith("random weights"):
        return work
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LARGE)).save_pretrained(work.folder / "large")
    path = json.dumps(str(work.folder / "large"))
    config = load_config(work.folder / "config.toml", [f"model.path={path}"], TrainConfig)
    (work.folder / "config.toml").write_text(dump_toml(config))
    size = f"{LARGE['num_hidden_layers']} layers of {LARGE['hidden_size']}"
    return Workload(work.folder, config, f"random weights, {size}")


def work(folder: Path) -> int:
    config = load_config(folder / "config.toml", [], TrainConfig)
    ranks = parallel.initialize(config.parallel, seed=config.run.seed)
    learner = make_learner(config, ranks)
    episodes = random_episodes(config.rollout, model_shape(config)["vocab_size"], config.run.seed)
    batch = pack(episodes[:EPISODES])
    order = shuffled(batch.num_sequences, config.run.seed)

    def step() -> None:
        scores = learner.score(batch)
        targets, _ = ppo.targets(batch, scores, config.ppo)
        learner.update(batch, targets, order)

    checkpoints = Checkpoints(folder / "asynchronous", learner, keep=1)
    waiting = Checkpoints(folder / "synchronous", learner, keep=1, asynchronous=False)
    step()
    checkpoints.save(0, {})  # makes the host buffer
    checkpoints.require_saved()
    waiting.save(0, {})
    measured: dict[str, Any] = {"tokens": batch.num_tokens}
    for number in range(1, 1 + REPEATS):
        note(measured, "steps_alone", timed(step))
        waits = timed(partial(checkpoints.save, number, {}))
        note(measured, "steps_beside", timed(step))
        while checkpoints.saving is not None:
            waits += timed(checkpoints.poll)
            time.sleep(0.001)
        note(measured, "waits", waits)
        note(measured, "synchronous", timed(partial(waiting.save, number, {})))
        newest = step_folder(folder / "asynchronous", number)
        note(measured, "resumed", timed(partial(load_checkpoint, newest, learner)))
    measured["bytes"] = sum(entry["bytes"] for entry in read_manifest(newest).values())
    if ranks.is_writer:
        (folder / RESULT).write_text(json.dumps(measured))
    parallel.shutdown(ranks)
    return 0


def note(measured: dict[str, Any], name: str, seconds: float) -> None:
    measured.setdefault(name, []).append(seconds)


def timed(action: Callable[[], object]) -> float:
    dist.barrier()  # all ranks begin together
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


# ------------------------------------------------------------------------- thread or process


def beside_writers() -> list[Figure]:
    """A loop of small products beside nothing, beside our writer on a thread, and beside the same
    in a forked process: products a second, and the longest pause between two.
    """
    copies = [torch.randn(TENSOR_SIZE) for _ in range(TENSORS)]
    items: list[Any] = [SimpleNamespace(index=number) for number in range(TENSORS)]
    snapshot = Snapshot(items, copies, None)
    rates: dict[str, list[float]] = {}
    pauses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:

        def write() -> None:
            write_share(Path(name), 0, snapshot)

        for _ in range(REPEATS):
            for kind, start in (
                ("nothing", lambda: threading.Thread(target=time.sleep, args=[1.0])),
                ("a thread that writes", lambda: threading.Thread(target=write)),
                ("a forked process that writes", lambda: FORK.Process(target=write)),
            ):
                rate, pause = products_until_done(start())
                rates.setdefault(kind, []).append(rate)
                pauses.setdefault(kind, []).append(pause * 1000)
    return [
        *(Figure(f"products beside {kind}", "products/s", tuple(v)) for kind, v in rates.items()),
        *(Figure(f"longest pause beside {kind}", "ms", tuple(v)) for kind, v in pauses.items()),
    ]


def products_until_done(writer: Any) -> tuple[float, float]:
    """(products a second, seconds of the longest pause) while the writer runs."""
    matrix = torch.randn(256, 256)
    count, longest = 0, 0.0
    writer.start()
    begun = last = time.perf_counter()
    while writer.is_alive():
        torch.mm(matrix, matrix)
        now = time.perf_counter()
        count, longest, last = count + 1, max(longest, now - last), now
    writer.join()
    return count / (last - begun), longest


if __name__ == "__main__":
    worker_main(work)
