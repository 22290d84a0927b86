"""The parts of a training run, built from its recipe: opened together, closed together.

Theory of operation: all ranks make the `Parts` of the same run, each with its share of the
networks. Closing their stack closes trackers, progress display, grader and engine; the networks
live as long as the process.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Subset

from rlef_mega import metrics
from rlef_mega.config import TrainConfig
from rlef_mega.dialogues.batches import NumberedDialogues
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Grader, Judge, open_grader
from rlef_mega.dialogues.rollout import DialogueLoop, Rules
from rlef_mega.engines import Engine
from rlef_mega.engines.local import LocalEngine
from rlef_mega.engines.sglang.serve import server_logs
from rlef_mega.evaluation.during_training import Evaluator
from rlef_mega.megatron import parallel
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.network import accelerations
from rlef_mega.problems import load_problems
from rlef_mega.run.directory import Clock, RunDirectory
from rlef_mega.run.guards import Guards
from rlef_mega.run.hub import find_model
from rlef_mega.run.inputs import read_left_out
from rlef_mega.run.launch import StopRequest
from rlef_mega.run.manifest import describe
from rlef_mega.run.progress import StepProgress, training_line
from rlef_mega.run.ranks import any_rank, from_rank_0, gather, rank_0_first
from rlef_mega.run.trackers import Trackers
from rlef_mega.types import Problem, Sampling


class Parts:
    """One rank's parts, opened on `stack`. The networks have trained for `done` steps, and
    `position` is the state of the rollouts in their checkpoint; 0 and {} in a new run. Collective.
    """

    def __init__(self, config: TrainConfig, stack: ExitStack) -> None:
        self.config = config
        self.run = run = RunDirectory(Path(config.run.dir))
        self.stop = StopRequest(run.stop_request)
        self.ranks = ranks = parallel.initialize(
            config.parallel, critic=config.critic_parallel, seed=config.run.seed
        )
        writer = ranks.is_writer
        if writer:
            run.lock()
            accelerations.announce(ranks.device, getattr(torch, config.model.dtype))
        self.problems = training_problems(config)
        model = find_model(config.model.path)
        self.chat = ChatFormat.from_folder(model)
        shares = config.rollout.servers.release_memory  # servers then free their memory first
        engine = stack.enter_context(open_engine(config, model, ranks, run)) if shares else None
        self.learner = make_learner(config, model, ranks)
        self.checkpoints = Checkpoints(
            run.checkpoints,
            self.learner,
            keep=config.run.keep_checkpoints,
            keep_best=config.run.keep_best,
            asynchronous=config.run.checkpoint_async,
        )
        self.done, self.position = resume(run, self.checkpoints, writer=writer)
        grader = stack.enter_context(open_grader(config.judge))
        self.engine = engine or stack.enter_context(open_engine(config, model, ranks, run))
        self.progress = stack.enter_context(
            StepProgress("RLEF", done=self.done, total=config.run.steps, shown=writer)
        )
        self.trackers = stack.enter_context(Trackers(config, done=self.done, writer=writer))
        loop = DialogueLoop(
            self.engine, Judge(grader), self.chat, dialogue_rules(config, self.chat)
        )
        self.dialogues = NumberedDialogues(self.problems, loop, config)
        self.evaluator = Evaluator(config, run, loop, writer=writer, say=self.progress.say)
        self.guards = Guards(
            config.guard,
            max_drop_fraction=config.rollout.max_drop_fraction,
            max_staleness=config.rollout.staleness,
        )
        if writer:
            run.write_json("manifest.json", run_manifest(config, grader, ranks.device))

    def note_phase(self, text: str) -> None:
        """Show the current phase to the watchdog and on the terminal."""
        if self.ranks.is_writer:
            self.run.note_progress(text)
            self.progress.phase(text.removesuffix(" begins").replace(" ended", " done"))

    def write_record(self, record: dict[str, Any], clock: Clock) -> None:
        """Write a step's line of metrics.jsonl and of the terminal. Time spent after this counts
        for the next step. Collective."""
        learner_times = self.learner.clock.lap()
        del learner_times["step"]
        counts = metrics.total_counts(gather(self.engine.take_counts()))
        times = clock.lap()
        servers = len(self.config.rollout.servers.addresses)  # the embedded engine uses none
        if self.ranks.is_writer:
            line = {
                **record,
                **({"servers": counts} if counts else {}),
                "time": times,
                "learner_time": learner_times,
                "idle_time": metrics.idle_shares(times, counts, servers=servers),
            }
            self.run.append_metrics(line)
            self.trackers.log(line)
        self.progress.step(training_line(record, times))
        for alarm in record["alarms"]:
            self.progress.say(f"ALARM at step {record['step']}: {alarm}")


def training_problems(config: TrainConfig) -> Sequence[Problem]:
    """Return the problems of data.train, without those that the run leaves out."""
    with rank_0_first():  # it writes a data set's store, if the checks before the run did not
        problems = load_problems(config.data.train)
    left_out = frozenset(read_left_out(Path(config.run.dir)) or ())
    if not left_out:
        return problems
    kept = [number for number in range(len(problems)) if number not in left_out]
    return cast("Sequence[Problem]", Subset(cast("Dataset[Problem]", problems), kept))


@contextmanager
def open_engine(
    config: TrainConfig, model: Path, ranks: parallel.Ranks, run: RunDirectory
) -> Iterator[Engine]:
    """Open the engine of this process, or a client of the servers. Only rank 0 publishes to the
    servers and asks for their settings, which it sends to the other ranks. Servers on the trainer's
    devices release their memory. Collective."""
    if config.rollout.engine == "local":
        yield LocalEngine(
            model,
            dtype=config.model.dtype,
            device=ranks.device,
            weights_from_folder=config.model.weights is None,  # else the first publication has them
        )
        return
    # imported here, because only the extra `serve` installs aiohttp
    from rlef_mega.engines.sglang.engine import SGLangEngine

    with SGLangEngine(
        config.rollout.servers,
        model,
        weights_folder=run.path / "weights" if ranks.is_writer else None,
        logs=server_logs(config),
        take_over=True,  # servers that this run used when it was killed
        infos=() if ranks.is_writer else from_rank_0([]),
    ) as engine:
        if ranks.is_writer:
            from_rank_0(engine.infos)
        rest(config, engine)
        yield engine


def rest(config: TrainConfig, engine: Engine) -> None:
    """Let servers on the trainer's devices free their memory; returns on all ranks afterwards."""
    engine.rest()
    if config.rollout.servers.release_memory:
        any_rank(False)  # rank 0 asks all servers


def make_learner(config: TrainConfig, model: Path, ranks: parallel.Ranks) -> Learner:
    return Learner(
        ranks,
        model,
        learner=config.learner,
        ppo=config.ppo,
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        recompute=config.model.recompute,
        weights=Path(config.model.weights) if config.model.weights else None,
    )


def run_manifest(config: TrainConfig, grader: Grader, device: torch.device) -> dict[str, Any]:
    return describe(
        layout=config.parallel.model_dump(),
        critic_layout=config.critic_parallel.model_dump() if config.critic_parallel else "policy's",
        accelerations=accelerations.report(device, getattr(torch, config.model.dtype)),
        isolation=grader.isolation,
    )


def resume(
    run: RunDirectory, checkpoints: Checkpoints, *, writer: bool
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint that is not damaged, and cut the run's files back to its step.
    Returns this step and the state of the rollouts; 0 and {} if there is none."""
    step, state = checkpoints.resume()
    if writer:
        run.resume(step)
        missing = step - len(run.read_metrics())
        if missing:  # after a power failure or a full disk
            print(f"WARNING: {run.metrics_path} lacks {missing} steps before {step}", flush=True)
    return step, state


def dialogue_rules(config: TrainConfig, chat: ChatFormat) -> Rules:
    """Return the rules of training dialogues: no top-p, no top-k (RLEF 3.1)."""
    return Rules(
        turns=config.rollout.turns,
        sampling=Sampling(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=tuple(chat.stop_token_ids),
        ),
        max_context=config.rollout.max_context,
        feedback=config.rollout.feedback,
        program=config.rollout.program,
        feedback_tokens=config.rollout.feedback_tokens,
        feedback_cut=config.rollout.feedback_cut,
    )
