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
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rlef_mega.config import ConfigError, differences
from rlef_mega.megatron.checkpoints import files
from rlef_mega.megatron.checkpoints import state as state_of
from rlef_mega.megatron.checkpoints.files import META, NETWORKS
from rlef_mega.megatron.checkpoints.torch_dist import write_index
from rlef_mega.megatron.checkpoints.writer import Share, take_snapshot, write_share
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.offload import HostBuffer
from rlef_mega.run.directory import flush_to_disk, warn_if_disk_is_full
from rlef_mega.run.manifest import versions
from rlef_mega.run.ranks import any_rank, from_rank_0, gather

Updates = dict[str, int]  # of each network that a rank trains, as of the saved step


@dataclass
class Saving:
    """A save in flight. `work` is the current task of this rank's thread."""

    folder: Path  # with the suffix .tmp
    meta: dict[str, Any]
    metadata: Any  # of all ranks' boxes of tensors (`state_of`); None except on rank 0
    updates: Updates
    work: Future
    completing: bool = False  # all ranks have written, rank 0 writes the rest


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
        self.saving: Saving | None = None
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
        folder = files.step_folder(self.folder, step).with_suffix(".tmp")
        self.saving = Saving(
            folder,
            {"step": step, "score": score, "state": state, **self.about},
            snapshot.metadata,
            {name: model.updates for name, model in learner.trained.items()},
            self.thread.submit(write_share, folder, learner.ranks.rank, snapshot),
        )
        if not self.asynchronous:
            self.finish()

    def rate(self, step: int, score: float) -> None:
        """Add the score of a step's policy, which is known only later. Does nothing if the step has
        no checkpoint. Collective.
        """
        if self.saving is not None and self.saving.meta["step"] == step:
            self.finish()
        folder = files.step_folder(self.folder, step)
        if self.leads and folder.is_dir():
            with warn_if_disk_is_full(f"the score of {folder.name} is not recorded"):
                files.write_score(folder, score)

    def poll(self) -> None:
        """Advance the save in flight, without waiting; called at each step's end. Collective."""
        while self.saving is not None and not any_rank(not self.saving.work.done()):
            self.advance(self.saving)

    def finish(self) -> bool:
        """Wait for the save in flight. Returns whether the last save is on the disk. Collective."""
        while self.saving is not None:
            wait_for([self.saving.work])
            self.advance(self.saving)
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

    def advance(self, saving: Saving) -> None:
        """Start the next part of a save; all ranks have finished this one. Collective."""
        if saving.completing:
            self.conclude(saving)
            return
        try:
            report: Share | str = saving.work.result()
        except OSError as error:
            report = explain_disk_error(error, self.folder)
        reports: list[Any] | None = [None] * dist.get_world_size() if self.leads else None
        dist.gather_object((report, saving.updates), reports)  # world, to rank 0
        saving.completing = True
        saving.work = self.thread.submit(self.complete, saving, reports)

    def conclude(self, saving: Saving) -> None:
        """Broadcast whether rank 0's thread has completed the checkpoint. Collective."""
        self.fault = from_rank_0(saving.work.result())
        self.saving = None
        if self.fault is None:
            self.saved_last = saving.meta["step"]
        else:
            self.failures += 1
            if self.leads:
                name = saving.folder.with_suffix("").name
                warn(f"checkpoint {name} was NOT saved: {self.fault}. Older checkpoints are kept")

    def complete(
        self, saving: Saving, reports: list[tuple[Share | str, Updates]] | None
    ) -> str | None:
        """Complete the checkpoint, or remove it, on rank 0's thread. Returns the fault, if any."""
        if reports is None:  # another rank
            return None
        faults = [report for report, _ in reports if isinstance(report, str)]
        try:
            if not faults:
                shares = [share for share, _ in reports if isinstance(share, Share)]
                updates = {name: count for _, mine in reports for name, count in mine.items()}
                model = state_of.fingerprint(self.learner.config, self.learner.dtype)
                of_networks = {"updates": updates, "models": dict.fromkeys(updates, model)}
                write_checkpoint(saving, shares, saving.meta | of_networks)
        except OSError as error:
            faults = [explain_disk_error(error, self.folder)]
        if faults:
            shutil.rmtree(saving.folder, ignore_errors=True)
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


def write_checkpoint(saving: Saving, shares: list[Share], meta: dict[str, Any]) -> None:
    """Write all files but the shares, and rename the folder."""
    folder = saving.folder
    stored = {index: info for share in shares for index, info in share.stored.items()}
    names = write_index(folder / NETWORKS, saving.metadata, stored)
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
