"""Checkpoints: a run can be killed at any moment and resumes with the same numbers.

Theory of operation. All ranks call `save`, `poll`, `finish` and `resume` together, between steps.

- `save` copies every rank's share to host memory (`writer`), starts the rank's thread and returns;
  training continues. At most one save is in flight: the next one waits for it.
- `poll`, called at each step's end, asks whether all ranks' threads have finished (one flag is
  reduced, and only while a save is in flight). If so, rank 0 gathers what each rank wrote. Its
  thread then writes index, meta and, last, the manifest, renames the folder, and deletes old
  checkpoints. A later `poll` broadcasts the result to all ranks.
- `finish` waits until nothing is in flight: before a save, at a stop, and at the end of the run.
- If a save fails on any rank (disk full, no permission), all ranks cancel it: its folder is
  removed, nothing older is deleted, the failure is counted and reported, and training continues.

`files` describes what a kill may leave on the disk. A finished checkpoint has these files:

    step_000010/manifest.json  meta.json  networks/
"""

import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import Metadata

from rlef_mega.config import ConfigError, differences
from rlef_mega.megatron.checkpoints import files
from rlef_mega.megatron.checkpoints import state as state_of
from rlef_mega.megatron.checkpoints.files import META, NETWORKS
from rlef_mega.megatron.checkpoints.torch_dist import write_index
from rlef_mega.megatron.checkpoints.writer import Share, Snapshot, take_snapshot, write_share
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.offload import HostBuffer
from rlef_mega.run.directory import flush_to_disk, warn_if_disk_is_full
from rlef_mega.run.manifest import versions
from rlef_mega.run.ranks import any_rank, from_rank_0, gather

Updates = dict[str, int]  # of each network that a rank trains, as of the saved step


class Checkpoints:
    """A run's checkpoints: saving, resuming, retention."""

    def __init__(
        self,
        folder: Path,
        learner: Learner,
        *,
        keep: int,
        keep_best: bool = True,
        asynchronous: bool = True,
    ) -> None:
        self.folder, self.learner, self.leads = folder, learner, learner.ranks.is_writer
        self.about = {"versions": versions(), "layout": learner.ranks.layout.model_dump()}
        self.keep, self.keep_best, self.asynchronous = keep, keep_best, asynchronous
        self.buffer = HostBuffer()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.begun: int | None = None  # the step of the last save
        self.tasks: Iterator[Future] = iter(())  # that save's, on this rank's thread
        self.saving: Future | None = None  # the current task, while the save is in flight
        self.failures = 0  # saves that were cancelled
        self.fault: str | None = None  # why the last save was cancelled
        self.saved_last: int | None = None  # the step last saved or resumed from

    def save(self, step: int, state: dict[str, Any], *, score: float | None = None) -> None:
        """Start to write a checkpoint of this step. `state` is small and JSON, and is returned by
        `resume`; `score` rates the policy. Collective.
        """
        self.finish()
        learner = self.learner
        with learner.whole():
            snapshot = take_snapshot(state_of.parts_of(learner.trained, owned=True), self.buffer)
        updates = {name: model.updates for name, model in learner.trained.items()}
        meta = {"step": step, "score": score, "state": state, **self.about}
        self.begun, self.tasks = step, self.save_in_parts(snapshot, updates, meta)
        self.saving = next(self.tasks)
        if not self.asynchronous:
            self.finish()

    def rate(self, step: int, score: float) -> None:
        """Add the score of a step's policy, which is known only later. Does nothing if the step has
        no checkpoint. Collective.
        """
        if self.begun == step:
            self.finish()
        folder = files.step_folder(self.folder, step)
        if self.leads and folder.is_dir():
            with warn_if_disk_is_full(f"the score of {folder.name} is not recorded"):
                files.write_score(folder, score)

    def poll(self) -> None:
        """Advance the save in flight, without waiting; called at each step's end. Collective."""
        while self.saving is not None and not any_rank(not self.saving.done()):
            self.saving = next(self.tasks, None)

    def finish(self) -> bool:
        """Wait for the save in flight. Returns whether the last save is on the disk. Collective."""
        while self.saving is not None:
            wait_for([self.saving])
            self.saving = next(self.tasks, None)
        return self.fault is None

    def require_saved(self) -> None:
        """Wait for the last save, before the process ends. Raises RuntimeError, on every rank,
        unless it is on the disk. Collective.
        """
        if not self.finish():
            newest = files.latest_checkpoint(self.folder)
            raise RuntimeError(
                f"the last step could not be saved ({self.fault}); the newest checkpoint is "
                f"{newest.name if newest else 'none'}. Free space, then resume from it"
            )

    def save_in_parts(
        self, snapshot: Snapshot, updates: Updates, meta: dict[str, Any]
    ) -> Iterator[Future]:
        """Yield the two tasks of a save: all ranks write, then rank 0 completes the checkpoint.
        Continue only when all ranks have finished the task that they got. Collective."""
        final = files.step_folder(self.folder, meta["step"])
        folder = final.with_suffix(".tmp")
        writing = self.thread.submit(write_share, folder, self.learner.ranks.rank, snapshot)
        yield writing
        try:
            report: Share | str = writing.result()
        except OSError as error:
            report = explain_disk_error(error, self.folder)
        del writing  # a cycle: its error's traceback holds this frame and so the snapshot
        reports: list[Any] | None = [None] * dist.get_world_size() if self.leads else None
        dist.gather_object((report, updates), reports)  # world, to rank 0
        completing = self.thread.submit(self.complete, folder, meta, snapshot.metadata, reports)
        yield completing
        self.fault = from_rank_0(completing.result())
        if self.fault is None:
            self.saved_last = meta["step"]
            return
        self.failures += 1
        if self.leads:
            warn(f"checkpoint {final.name} was NOT saved: {self.fault}. Older checkpoints are kept")

    def complete(
        self,
        folder: Path,
        meta: dict[str, Any],
        metadata: Metadata | None,
        reports: list[tuple[Share | str, Updates]] | None,
    ) -> str | None:
        """Complete the checkpoint, or remove it, on rank 0's thread. Returns the fault, if any."""
        if reports is None:  # another rank
            return None
        assert metadata is not None
        faults = [report for report, _ in reports if isinstance(report, str)]
        try:
            if not faults:
                shares = [share for share, _ in reports if isinstance(share, Share)]
                updates = {name: count for _, mine in reports for name, count in mine.items()}
                model = state_of.fingerprint(self.learner.config, self.learner.dtype)
                meta |= {"updates": updates, "models": dict.fromkeys(updates, model)}
                write_checkpoint(folder, meta, metadata, shares)
        except OSError as error:
            faults = [explain_disk_error(error, self.folder)]
        if faults:
            shutil.rmtree(folder, ignore_errors=True)
            return faults[0]
        try:
            files.prune(self.folder, keep=self.keep, keep_best=self.keep_best)
        except (OSError, ConfigError) as error:
            warn(f"old checkpoints in {self.folder} could not be deleted: {error}")
        return None

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest good checkpoint into the learner. Returns (step, state); (0, {}) if there
        is no checkpoint. Newer ones that are refused are reported and moved aside. Collective.

        Raises ConfigError, on every rank, if there are checkpoints but no good one.
        """
        if self.leads:
            files.remove_leftovers(self.folder)
        faults: dict[Path, str] = {}
        for path in reversed(from_rank_0(files.steps_in(self.folder))):  # one listing for all
            fault = fault_for(path, self.learner)
            if fault is None:
                resumed = read_checkpoint(path, self.learner)
                self.saved_last = resumed[0]
                if self.leads:
                    for old, why in faults.items():
                        warn(f"{why}. It is now {files.set_aside(old)}; falling back to {path}")
                return resumed
            faults[path] = fault
        if faults:
            raise ConfigError(
                f"no checkpoint in {self.folder} can be resumed from: "
                f"{'; '.join(faults.values())}. "
                "Repair or remove them; without any, the run starts from its first step"
            )
        return 0, {}


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def explain_disk_error(error: OSError, folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return f"{error} ({folder} has {free / 2**20:,.0f} MiB free)"


# ------------------------------------------------------------------------------------ one folder


def write_checkpoint(
    folder: Path, meta: dict[str, Any], metadata: Metadata, shares: list[Share]
) -> None:
    """Write all files but the shares, and rename the folder."""
    stored = {index: info for share in shares for index, info in share.stored.items()}
    names = write_index(folder / NETWORKS, metadata, stored)
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")
    manifest = {name: entry for share in shares for name, entry in share.files.items()}
    for name in (*(f"{NETWORKS}/{name}" for name in names), META):
        flush_to_disk(folder / name)
        manifest[name] = files.describe_file(folder / name)
    files.seal(folder, manifest)


def fault_for(path: Path, learner: Learner) -> str | None:
    """Find out why this learner cannot resume from a checkpoint; None if it can. Checks sizes and
    model first, then reads all files, each rank its share. Every rank returns the same. Collective.
    """
    model = state_of.fingerprint(learner.config, learner.dtype)
    ours = {name: model for names in gather([*learner.trained]) for name in names}
    found = from_rank_0(files.fault_in(path) or misfit(path, ours))
    if found is not None:
        return found
    try:
        manifest = files.read_manifest(path)
        mine = sorted(manifest)[learner.ranks.rank :: learner.ranks.world_size]
        fault = files.wrong_checksum(path, manifest, mine)
    except ConfigError as error:
        fault = str(error)
    return next((fault for fault in gather(fault) if fault is not None), None)


def misfit(path: Path, ours: dict[str, dict[str, Any]]) -> str | None:
    """Describe how the checkpoint's networks differ from this run's; None if they do not."""
    theirs = files.read_meta(path).get("models", {})
    if theirs.keys() != ours.keys():
        return f"checkpoint {path} holds {sorted(theirs)}, this run trains {sorted(ours)}"
    for name, model in ours.items():
        if other := differences(theirs[name], dict.fromkeys(theirs[name]) | model):
            return f"checkpoint {path} is of another model: its {name} has {other}"
    return None


def read_checkpoint(path: Path, learner: Learner) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint in which `fault_for` found no fault."""
    meta = files.read_meta(path)
    with learner.whole():
        state_of.fill(path, state_of.parts_of(learner.trained, owned=False))
        for name, model in learner.trained.items():
            state_of.set_updates(model, meta["updates"][name])
    return meta["step"], meta["state"]
