"""What a step spends its time and memory on: traces of chosen steps on chosen ranks.

`profile/step_S_rank_R.json.gz` in the run's folder is for chrome://tracing or ui.perfetto.dev. With
`profile.memory`, the trace has allocations, too, and on a GPU there is a memory snapshot beside it,
`step_S_rank_R.pickle`, for pytorch.org/memory_viz. A profiled step is slower than the others.
"""

from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rlef_mega.config import ProfileConfig

SNAPSHOT_EVENTS = 200_000  # allocations and frees that a memory snapshot keeps


def profiled(
    steps: Iterable[int], asked: ProfileConfig, folder: Path, *, rank: int
) -> Generator[int, None, None]:
    """The steps, one after the other; what is done until the next is asked for is traced, where the
    recipe says so. Close it: the trace of a step that was left is written then."""
    for step in steps:
        if step not in asked.steps or rank not in asked.ranks:
            yield step
            continue
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step:06d}_rank_{rank}"
        snapshot = asked.memory and torch.cuda.is_available()
        if snapshot:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        trace = profile(activities=activities, profile_memory=asked.memory, with_stack=asked.stacks)
        try:
            with trace:
                yield step
        finally:  # also of a step in which the run stops, or has no memory left
            trace.export_chrome_trace(str(folder / f"{name}.json.gz"))
            if snapshot:
                torch.cuda.memory._dump_snapshot(str(folder / f"{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
