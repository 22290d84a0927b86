"""Experiment trackers: TensorBoard, W&B, MLflow and trackio receive the numbers of metrics.jsonl.

Theory of operation: in the process that writes the run directory, each tracker has a thread that
opens it and sends it each step's numbers from a queue. Training never waits for a tracker. One that
cannot be opened, or fails, is reported on stderr and dropped; at the end of a run all have
`CLOSE_S` seconds to empty their queues. The threads are daemons, so none keeps a process alive.
metrics.jsonl is the record: `send_recorded` sends it again.
"""

import contextlib
import json
import math
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, time
from types import TracebackType
from typing import Any

from rlef_mega.config import ConfigError, TrackConfig, TrainConfig, flatten

CLOSE_S = 60.0
SEND_S = 3600.0  # to send all steps of a run at once
MLFLOW_PARAMETERS = 100  # MLflow's limit for one request
MLFLOW_CHARACTERS = 500  # MLflow's limit for one parameter

Numbers = dict[str, float]
Log = Callable[[int, Numbers], None]


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers see it. `name` stays the same when the run resumes; steps after `done` are
    new."""

    path: Path
    name: str
    settings: dict[str, Any]  # the resolved recipe, by dotted keys
    done: int


@contextmanager
def tensorboard(run: TrackedRun, asked: TrackConfig) -> Iterator[Log]:
    """Write event files into the run's folder tensorboard/."""
    from torch.utils.tensorboard import SummaryWriter

    # hide what a killed run wrote after the checkpoint from which it resumes
    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=run.done + 1)

    def log(step: int, numbers: Numbers) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    try:
        if not run.done:
            writer.add_text("recipe", f"```\n{json.dumps(run.settings, indent=1)}\n```")
        yield log
    finally:
        writer.close()


@contextmanager
def wandb(run: TrackedRun, asked: TrackConfig) -> Iterator[Log]:
    """Log online, or into the run's folder wandb/ for `wandb sync`."""
    import wandb

    tracked = wandb.init(
        project=asked.wandb_project,
        id=run.name,
        name=run.path.resolve().name,
        dir=str(run.path),
        mode=asked.wandb_mode,
        resume="allow",
        config=run.settings,
        settings=wandb.Settings(console="off", silent=True),
    )
    # W&B's own step must not decrease, and that of a resumed run does
    tracked.define_metric("*", step_metric="step")
    try:
        yield lambda step, numbers: tracked.log({**numbers, "step": step})
    finally:
        tracked.finish()


@contextmanager
def mlflow(run: TrackedRun, asked: TrackConfig) -> Iterator[Log]:
    """Log to `mlflow_uri`, or to MLFLOW_TRACKING_URI."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(tracking_uri=asked.mlflow_uri)
    found = client.get_experiment_by_name(str(asked.mlflow_experiment))
    experiment = (
        found.experiment_id if found else client.create_experiment(str(asked.mlflow_experiment))
    )
    known = client.search_runs([experiment], f"tags.rlef_run = '{run.name}'")
    if known:
        run_id = known[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        name = run.path.resolve().name
        run_id = client.create_run(experiment, run_name=name).info.run_id
        client.log_batch(run_id, tags=[RunTag("rlef_run", run.name)])
        settings = [Param(k, str(v)[:MLFLOW_CHARACTERS]) for k, v in run.settings.items()]
        for start in range(0, len(settings), MLFLOW_PARAMETERS):
            client.log_batch(run_id, params=settings[start : start + MLFLOW_PARAMETERS])

    def log(step: int, numbers: Numbers) -> None:
        now = int(1000 * time())
        client.log_batch(run_id, [Metric(k, v, now, step) for k, v in numbers.items()])

    try:
        yield log
    finally:
        client.set_terminated(run_id)


@contextmanager
def trackio(run: TrackedRun, asked: TrackConfig) -> Iterator[Log]:
    """Log to trackio's local database, or to a Space of the Hub."""
    import trackio

    tracked = trackio.init(
        project=str(asked.trackio_project),
        name=run.name,
        space_id=asked.trackio_space,
        resume="allow",
        config=run.settings,
        embed=False,
    )
    try:
        yield lambda step, numbers: tracked.log(dict(numbers), step=step)
    finally:
        tracked.finish()


Opener = Callable[[TrackedRun, TrackConfig], AbstractContextManager[Log]]
OPENERS: dict[str, Opener] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}


def asked_for(asked: TrackConfig) -> list[str]:
    """Return the names of the trackers that a recipe asks for."""
    switches = {
        "tensorboard": asked.tensorboard,
        "wandb": asked.wandb_project,
        "mlflow": asked.mlflow_experiment,
        "trackio": asked.trackio_project,
    }
    return [name for name, switch in switches.items() if switch]


def check_trackers(asked: TrackConfig) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in asked_for(asked):
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
        path = Path(config.run.dir)
        names = asked_for(config.track) if writer else []
        self.followers: list[Follower] = []
        if names:
            run = TrackedRun(path, own_name(path), flatten(config.model_dump(), "."), done)
            self.followers = [Follower(name, openers[name], run, config.track) for name in names]

    def __enter__(self) -> "Trackers":
        for follower in self.followers:
            follower.thread.start()
        return self

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue the numbers of a line of metrics.jsonl."""
        for follower in self.followers:
            follower.waiting.put((record["step"], numbers_of(record)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = monotonic() + self.close_s
        for follower in self.followers:
            follower.waiting.put(None)
        for follower in self.followers:
            follower.thread.join(max(0.0, end - monotonic()))
            if follower.thread.is_alive():
                warn(follower.name, f"did not accept all numbers within {self.close_s:.0f} s")


class Follower:
    """The thread of one tracker."""

    def __init__(self, name: str, opener: Opener, run: TrackedRun, asked: TrackConfig) -> None:
        self.name, self.opener, self.run, self.asked = name, opener, run, asked
        self.waiting: queue.SimpleQueue[tuple[int, Numbers] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.follow, name=f"tracker {name}", daemon=True)
        self.done = False  # all numbers were sent

    def follow(self) -> None:
        try:
            with self.opener(self.run, self.asked) as log:
                while (numbers := self.waiting.get()) is not None:
                    log(*numbers)
            self.done = True
        except Exception as error:  # a tracker's package or service may raise anything
            warn(self.name, f"is dropped from now on: {type(error).__name__}: {error}")


def warn(name: str, what: str) -> None:
    print(
        f"WARNING: {name} {what}; metrics.jsonl has the numbers, `rlef track RUN` sends them again",
        file=sys.stderr,
        flush=True,
    )


def own_name(run: Path) -> str:
    """Return the run's unique name, which is made once and stored in its folder."""
    path = run / "tracked_as"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    name = f"{run.resolve().name[:80]}-{uuid.uuid4().hex[:8]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name + "\n")
    return name


def numbers_of(record: Mapping[str, Any]) -> Numbers:
    """Return a record's finite numbers by names such as "time/rollout", without the step."""
    return {
        name: float(value)
        for name, value in flatten(record, "/").items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def send_recorded(config: TrainConfig, records: list[dict[str, Any]], **options: Any) -> None:
    """Send all steps of a run to its trackers, again or for the first time.

    `options` are those of `Trackers`. Raises RuntimeError if a tracker did not accept them all.
    """
    with Trackers(config, done=0, **{"close_s": SEND_S, **options}) as trackers:
        for record in records:
            trackers.log(record)
    if missed := [follower.name for follower in trackers.followers if not follower.done]:
        raise RuntimeError(f"not all steps were sent to {', '.join(missed)}")
