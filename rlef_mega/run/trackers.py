"""Experiment trackers: TensorBoard and W&B receive the numbers of metrics.jsonl.

Theory of operation: in the process that writes the run directory, each tracker has a thread that
opens it and sends it each step's numbers from a queue. Training never waits for a tracker. One that
cannot be opened, or fails, is reported on stderr and dropped; at the end of a run all have
`CLOSE_S` seconds to empty their queues. The threads are daemons, so none keeps a process alive.
metrics.jsonl is the record.
"""

import json
import math
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

from rlef_mega.config import ConfigError, TrackConfig, TrainConfig, flatten

CLOSE_S = 60.0

Log = Callable[[int, dict[str, float]], None]
Opener = Callable[[TrainConfig, int], AbstractContextManager[Log]]


@contextmanager
def tensorboard(config: TrainConfig, done: int) -> Iterator[Log]:
    """Write event files into the run's folder tensorboard/."""
    from torch.utils.tensorboard import SummaryWriter

    # hide what a killed run wrote after the checkpoint from which it resumes
    with SummaryWriter(str(Path(config.run.dir, "tensorboard")), purge_step=done + 1) as writer:

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
            writer.flush()

        if not done:
            recipe = json.dumps(flatten(config.model_dump()), indent=1)
            writer.add_text("recipe", f"```\n{recipe}\n```")
        yield log


@contextmanager
def wandb(config: TrainConfig, done: int) -> Iterator[Log]:
    """Log online, or into the run's folder wandb/ for `wandb sync`."""
    import wandb

    path = Path(config.run.dir)
    tracked = wandb.init(
        project=config.track.wandb_project,
        id=own_name(path),
        name=path.resolve().name,
        dir=str(path),
        mode=config.track.wandb_mode,
        resume="allow",
        config=flatten(config.model_dump()),
        settings=wandb.Settings(console="off", silent=True),
    )
    # W&B's own step must not decrease, and that of a resumed run does
    tracked.define_metric("*", step_metric="step")
    try:
        yield lambda step, numbers: tracked.log({**numbers, "step": step})
    finally:
        tracked.finish()


OPENERS: dict[str, Opener] = {"tensorboard": tensorboard, "wandb": wandb}


def asked_for(track: TrackConfig) -> list[str]:
    """Return the names of the trackers that a recipe asks for."""
    switches = {"tensorboard": track.tensorboard, "wandb": track.wandb_project}
    return [name for name, switch in switches.items() if switch]


def check_trackers(track: TrackConfig) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in asked_for(track):
        if find_spec(name) is None:
            raise ConfigError(
                f"[track] asks for {name}, which is not installed: pip install 'rlef-mega[{name}]' "
                f"(or pip install {name}), or remove it from the recipe"
            )


class Trackers:
    """The trackers that the recipe asks for, in the process that writes the run directory; none in
    the others. A context manager."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        done: int,
        writer: bool = True,
        close_s: float = CLOSE_S,
        openers: Mapping[str, Opener] = OPENERS,
    ) -> None:
        self.close_s = close_s
        names = asked_for(config.track) if writer else []
        self.followers = [Follower(name, openers[name](config, done)) for name in names]

    def __enter__(self) -> "Trackers":
        for follower in self.followers:
            follower.thread.start()
        return self

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue the numbers of a line of metrics.jsonl."""
        for follower in self.followers:
            follower.waiting.put((record["step"], numbers_of(record)))

    def __exit__(self, *error: object) -> None:
        end = monotonic() + self.close_s
        for follower in self.followers:
            follower.waiting.put(None)
        for follower in self.followers:
            follower.thread.join(max(0.0, end - monotonic()))
            if follower.thread.is_alive():
                warn(follower.name, f"did not accept all numbers within {self.close_s:.0f} s")


class Follower:
    """The thread of one tracker."""

    def __init__(self, name: str, tracker: AbstractContextManager[Log]) -> None:
        self.name, self.tracker = name, tracker
        self.waiting: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.follow, name=f"tracker {name}", daemon=True)

    def follow(self) -> None:
        try:
            with self.tracker as log:
                while (numbers := self.waiting.get()) is not None:
                    log(*numbers)
        except Exception as error:  # a tracker's package or service may raise anything
            warn(self.name, f"is dropped from now on: {type(error).__name__}: {error}")


def warn(name: str, what: str) -> None:
    print(f"WARNING: {name} {what}; metrics.jsonl has the numbers", file=sys.stderr, flush=True)


def own_name(run: Path) -> str:
    """Return the run's unique name, which is made once and stored in its folder."""
    path = run / "tracked_as"
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    name = f"{run.resolve().name[:80]}-{uuid.uuid4().hex[:8]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name + "\n")
    return name


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's finite numbers under names such as "time/rollout", without the step."""
    return {
        name: float(value)
        for name, value in flatten(record, "/").items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
