"""One rehearsed rank: `python -m rlef_mega.rehearse.rank FOLDER`, on the null GPU.

Theory of operation. RANK and WORLD_SIZE say which rank of the recipe's layout this process is; no
other rank exists. `stand_in` replaces what would need one: the world's process group does nothing
(each collective returns at once, and is counted), pipeline stages take the shapes of tensors from
the rehearsal instead of a message, and weights are not read. Everything else is the trainer's code.
All sequences have one length and all micro-batches are full, so that memory reaches the most that
`learner.microbatch_tokens` allows. The step is run twice: the first one compiles the kernels and
makes the optimizer's state, the second one is reported.
"""

import collections
import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rlef_mega.config import ParallelConfig, TrainConfig, load_config
from rlef_mega.megatron import learner, parallel, trained_model
from rlef_mega.megatron.checkpoints import writer
from rlef_mega.megatron.checkpoints.state import parts_of
from rlef_mega.megatron.offload import HostBuffer
from rlef_mega.packing import pack
from rlef_mega.parts import make_learner
from rlef_mega.rehearse.command import REQUEST, RESULT, Request
from rlef_mega.run.directory import write_atomically
from rlef_mega.run.launch import collect_garbage_by_hand
from rlef_mega.targets import targets_of
from rlef_mega.types import Batch, Completion, Episode, Turn, Verdict

GROUPS = ("mp", "intra_dist_opt", "embd", "pp", "dp", "tp")  # a group goes by the last of its names
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


class Recorder(TorchDispatchMode):
    """Measures phases: memory by PyTorch's allocator, launches and waits by the null GPU's
    counters; counts FLOPs of matrix products, and collectives with the bytes of their largest
    tensor."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names  # of Megatron's groups
        self.phases: dict[str, dict[str, Any]] = {}
        self.flops = 0
        self.calls: collections.Counter[str] = collections.Counter()  # by group and kind
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            leaves = pytree.tree_leaves((args, kwargs or {}))
            groups = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            group = dist.ProcessGroup.unbox(groups[0]).group_name if groups else ""
            kind = func._schema.name.removeprefix("c10d::").strip("_")
            name = f"{self.names.get(group, 'world')} {kind}"
            self.calls[name] += 1
            self.bytes[name] += max(
                (leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)), default=0
            )
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            left, right = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        launches, waits, _ = counters()
        self.flops, self.calls, self.bytes = 0, collections.Counter(), collections.Counter()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            wanted = str(error).partition(" If reserved")[0]
            raise RuntimeError(f"in '{name.replace('_', ' ')}': {wanted}") from None
        now_launches, now_waits, pinned = counters()
        host = psutil.Process().memory_info()
        self.phases[name] = {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "kept_bytes": torch.cuda.memory_allocated(),  # at its end
            "reserved_bytes": torch.cuda.max_memory_reserved(),  # by the allocator
            "pinned_bytes": pinned,
            "process_bytes": host.rss - host.shared,  # a null GPU's memory is shared
            "launches": now_launches - launches,
            "waits": now_waits - waits,
            "product_flops": self.flops,  # without attention and Triton's head
            "seconds": time.perf_counter() - begun,
            "collectives": dict(self.calls),
            "collective_bytes": dict(self.bytes),
        }


def counters() -> tuple[int, int, int]:
    """Return how many kernels were launched, how often the host waited for the device, and the
    bytes of pinned memory, all by the null GPU's own count."""
    library = ctypes.CDLL(None)
    library.null_gpu_counters.restype = ctypes.POINTER(ctypes.c_uint64 * 9)
    counted = library.null_gpu_counters().contents
    return counted[0], counted[2], counted[8]


def full_batch(request: Request, data_parallel_size: int) -> Batch:
    """Return an update's sequences, all of one length, that fill every rank's micro-batches."""
    read = request.responses
    completion = Completion((1,) * read, (-1.0,) * read, (0,) * read, "stop")
    verdict = Verdict((), public_passed=True, solved=True)
    turn = Turn((1,) * (request.dialogue - read), completion, "print(1)", verdict)
    count = data_parallel_size * request.microbatches * request.per_microbatch
    return pack([Episode("rehearsed", (turn,))] * count)


def stand_in(tokens: int) -> None:
    """Replace what needs other ranks, or weights: see the theory of operation."""

    def join_alone(world_size: int, *layouts: ParallelConfig) -> torch.device:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        rank = int(os.environ["RANK"])
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        return device

    def gather_own(everyone: list[Any], mine: Any, group: Any = None) -> None:
        everyone[:] = [mine] * len(everyone)

    def full_shapes(self: Any, *unused: Any) -> tuple[list[int], list[int]]:
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        shape = [tokens // shards, 1, self.config.hidden_size]
        return shape, shape

    parallel.join_world = join_alone
    learner.load_hf = lambda *unused: None
    # without its weights a model's losses and gradient norms are arbitrary: infinite, NaN, or the
    # root of a negative number
    trained_model.math = SimpleNamespace(isfinite=lambda value: True)  # type: ignore[assignment]
    trained_model.float = abs  # type: ignore[attr-defined]
    dist.all_gather_object = gather_own  # type: ignore[assignment]
    dist.gather_object = lambda *unused, **options: None
    trained_model.P2PCommunicator._communicate_shapes = full_shapes
    # rank 0 would check that the shards of all ranks together fill each tensor
    writer.MCoreSavePlanner.create_global_plan = lambda self, plans: (plans, None)


def main() -> None:
    folder = Path(sys.argv[1])
    collect_garbage_by_hand()
    config = load_config(folder / "config.toml", [], TrainConfig)
    request = Request(**json.loads((folder / REQUEST).read_text()))
    try:
        found: dict[str, Any] = {"phases": rehearse(config, request)}
    except RuntimeError as error:
        found = {"error": str(error)}
    write_atomically(folder / RESULT.format(os.environ["RANK"]), json.dumps(found))


def rehearse(config: TrainConfig, request: Request) -> dict[str, Any]:
    """Run this rank's step twice. Returns the phases of the second one, and that of the build."""
    stand_in(request.dialogue * request.per_microbatch)
    ranks = parallel.initialize(
        config.parallel, critic=config.critic_parallel, seed=config.run.seed
    )
    recorder = Recorder(
        {group.group_name: name for name in GROUPS if (group := getattr(ranks.groups, name))}
    )
    with recorder, recorder.phase("build"):
        learner = make_learner(config, Path(config.model.path), ranks)
        inner = learner.phase

        @contextmanager
        def phase(name: str, **residences: Any) -> Iterator[None]:
            with inner(name, **residences), recorder.phase(name):  # after state has moved
                yield

        learner.phase = phase  # type: ignore[method-assign]
    build, buffer = recorder.phases, HostBuffer()
    batch = full_batch(request, ranks.groups.dp.size())
    order = torch.arange(batch.num_sequences)
    for _ in range(2):
        recorder.phases = {}
        with recorder:
            scores = learner.score(batch)
            targets, _ = targets_of(batch, scores, config.ppo)
            learner.update(batch, targets, order)
            collections.deque(learner.policy_weights(), maxlen=0)  # keeps none of them
            with learner.whole():
                writer.take_snapshot(parts_of(learner.trained, owned=True), buffer)
    return build | recorder.phases


if __name__ == "__main__":
    main()
