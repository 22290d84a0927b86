"""Profiler traces of the steps and ranks that a recipe chooses.

Open `profile/step_S_rank_R.json.gz` of the run directory in chrome://tracing or ui.perfetto.dev.
With `profile.memory` the trace includes allocations, and on a GPU a memory snapshot is written
beside it, `step_S_rank_R.pickle`, for pytorch.org/memory_viz. A profiled step is slower.
"""

from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch.profiler import profile

from rlef_mega.config import ProfileConfig

SNAPSHOT_EVENTS = 200_000  # allocations and frees that a memory snapshot keeps


def profiled(
    steps: Iterable[int], asked: ProfileConfig, folder: Path, *, rank: int
) -> Generator[int, None, None]:
    """Yield the steps, and trace the caller's work on each that the recipe chooses. The caller must
    close the generator, which writes the trace of a step that ended early."""
    for step in steps:
        if step not in asked.steps or rank not in asked.ranks:
            yield step
            continue
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step:06d}_rank_{rank}"
        snapshot = asked.memory and torch.cuda.is_available()
        if snapshot:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
        trace = profile(profile_memory=asked.memory, with_stack=asked.stacks)  # host, and any GPU
        try:
            with trace:
                yield step
        finally:  # also when the step fails, for example out of memory
            trace.export_chrome_trace(str(folder / f"{name}.json.gz"))
            if snapshot:
                torch.cuda.memory._dump_snapshot(str(folder / f"{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
