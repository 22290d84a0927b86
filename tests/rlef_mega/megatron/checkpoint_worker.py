"""The processes of the checkpoint tests.

`run` is a training run without rollouts, large enough that a save can be killed in the middle. It
resumes from its newest checkpoint. `python -m ... FOLDER DISK` runs `faults` on two
ranks, with faults on one of them; the results are in FOLDER/RANK.json. DISK is a folder on a small
file system of its own, or empty.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlef_mega.config import ConfigError, ParallelConfig
from tests.rlef_mega.megatron.megatron_worker import make_batch, make_learner, one_batch

LARGE = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 2048}


def run(folder: Path, steps: int) -> None:
    from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
    from rlef_mega.megatron.parallel import initialize
    from rlef_mega.run.directory import RunDirectory

    torch.set_num_threads(1)
    directory = RunDirectory(folder)
    directory.lock()
    learner = make_learner(initialize(ParallelConfig(), seed=3), folder.parent / "large")
    checkpoints = Checkpoints(directory.checkpoints, learner, keep=1)
    first, _ = checkpoints.resume()
    directory.resume(first)
    batch = make_batch(4)
    for step in range(first + 1, steps + 1):
        stats = one_batch(learner, batch, seed=step)["stats"]
        directory.append_metrics({"step": step, **stats})
        checkpoints.poll()
        checkpoints.save(step, {})
    checkpoints.require_saved()
    os._exit(0)


def faults(folder: Path, disk: str) -> None:
    from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints, fault_for
    from rlef_mega.megatron.parallel import initialize

    parallel = ParallelConfig(data_parallel_size=2)
    ranks = initialize(parallel, seed=3)
    learner = make_learner(ranks, folder / "model")
    found: dict[str, Any] = {}

    def names(path: Path) -> list[str]:
        dist.barrier()
        return sorted(entry.name for entry in path.iterdir())

    def moments() -> float:
        return sum(
            float(state["exp_avg"].sum())
            for model in learner.trained.values()
            for state in model.optimizer.chained_optimizers[0].optimizer.state.values()
        )

    batch = make_batch(8)
    saves = folder / "saves"
    checkpoints = Checkpoints(saves, learner, keep=2)

    # one after the other: the second waits for the first
    one_batch(learner, batch, seed=1)
    found["moments"] = [moments()]
    checkpoints.save(1, {"at": 1}, score=0.5)
    one_batch(learner, batch, seed=2)
    checkpoints.save(2, {"at": 2}, score=0.75)
    checkpoints.save(3, {"at": 3}, score=0.25)
    found["saved"] = checkpoints.finish()
    found["kept"] = names(saves)
    # a save that is only polled ends as well
    checkpoints.save(4, {"at": 4})
    deadline = time.monotonic() + 60
    while checkpoints.saving is not None and time.monotonic() < deadline:
        checkpoints.poll()
    found["kept_best"] = names(saves)

    # rank 1 may write no large file: both cancel, no old one is deleted, the next one succeeds
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    checkpoints.save(5, {})
    found["saved_without_room"] = checkpoints.finish()
    found["fault"], found["failures"] = checkpoints.fault, checkpoints.failures
    found["after_fault"] = names(saves)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    checkpoints.save(6, {"at": 6})
    found["saved_with_room"], found["after_room"] = checkpoints.finish(), names(saves)

    # a file stands where the folder should be
    blocked = Checkpoints(folder / "blocked", learner, keep=1)
    if ranks.is_writer:
        (folder / "blocked").write_text("")
    dist.barrier()
    blocked.save(1, {})
    found["blocked"] = [blocked.finish(), blocked.fault]

    # two checkpoints, a byte of rank 1's file in the newer one is changed
    other = Checkpoints(folder / "flipped", learner, keep=2)
    start = moments()
    one_batch(learner, batch, seed=3)
    other.save(1, {"at": 1})
    found["moments"] = [start, moments()]
    one_batch(learner, batch, seed=4)
    other.save(2, {"at": 2})
    other.finish()
    if ranks.is_writer:
        file = folder / "flipped/step_000002/networks/__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    found["refusal"] = fault_for(folder / "flipped/step_000002", learner)
    found["resumed"] = other.resume()
    found["moments"].append(moments())
    found["updates"] = [model.updates for model in learner.trained.values()]
    found["set_aside"] = names(folder / "flipped")

    # no checkpoint is left to resume from
    if ranks.is_writer:
        (folder / "flipped/step_000001/networks/common.pt").unlink()
    dist.barrier()
    found["none"] = refusal(other.resume)

    # a run with another model
    wide = make_learner(ranks, folder / "wide")
    newest = saves / "step_000006"
    found["other_model"] = fault_for(newest, wide)

    if disk:
        found["disk"] = fill_disk(Path(disk), learner, ranks.is_writer, names)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def fill_disk(disk: Path, learner, writer: bool, names) -> dict[str, Any]:
    from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints

    checkpoints = Checkpoints(disk / "saves", learner, keep=1)
    checkpoints.save(1, {})
    found: dict[str, Any] = {"saved": [checkpoints.finish()]}
    filler = disk / "filler"
    if writer:
        free = os.statvfs(disk)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 100_000))
    dist.barrier()
    checkpoints.save(2, {})
    found["saved"].append(checkpoints.finish())
    found["fault"], found["full"] = checkpoints.fault, names(disk / "saves")
    if writer:
        filler.unlink()
    dist.barrier()
    checkpoints.save(3, {})
    found["saved"].append(checkpoints.finish())
    found["emptied"] = names(disk / "saves")
    return found


def refusal(load) -> str:
    try:
        load()
    except ConfigError as error:
        return str(error)
    return "not refused"


def main() -> None:
    torch.set_num_threads(1)
    folder, disk = sys.argv[1:]
    faults(Path(folder), disk)


if __name__ == "__main__":
    main()
