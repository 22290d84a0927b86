"""What a training run is made of, by its recipe: opened together, closed together.

Theory of operation: all ranks call `open_parts` and get the same parts of one run, each with its
share of the networks. Closing them, by leaving the `with` block, ends grader and engine; the
networks go with the process.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlef_mega import ppo
from rlef_mega.config import TrainConfig
from rlef_mega.dialogues.batches import Dialogues
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.distractors import collect_distractors
from rlef_mega.dialogues.judge import Grader, Judge, open_grader
from rlef_mega.dialogues.rollout import Rules
from rlef_mega.engines import TrainingEngine
from rlef_mega.engines.local import LocalEngine
from rlef_mega.engines.sglang.serve import server_logs
from rlef_mega.evaluation.during_training import Evaluator
from rlef_mega.megatron import parallel
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.network import accelerations
from rlef_mega.packing import pack
from rlef_mega.problems import load_problems
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.guards import Guards
from rlef_mega.run.launch import StopRequest
from rlef_mega.run.manifest import describe, versions
from rlef_mega.run.progress import StepProgress
from rlef_mega.run.trackers import Trackers
from rlef_mega.types import Batch, Episode, Problem, Sampling, Scores, Targets


@dataclass(frozen=True)
class Parts:
    """Of one rank. `done` steps stand behind the networks, and `position` is what their checkpoint
    kept of where the run stood; 0 and nothing for a new run."""

    run: RunDirectory
    stop: StopRequest
    ranks: parallel.Ranks
    problems: Sequence[Problem]
    chat: ChatFormat
    learner: Learner
    checkpoints: Checkpoints
    done: int
    position: dict[str, Any]
    guards: Guards
    engine: TrainingEngine
    dialogues: Dialogues
    evaluator: Evaluator
    progress: StepProgress
    trackers: Trackers

    def note_phase(self, text: str) -> None:
        """What the run does now, for a watchdog and for a person."""
        if self.ranks.is_writer:
            self.run.note_progress(text)
            self.progress.phase(text.removesuffix(" begins").replace(" ended", " done"))


@contextmanager
def open_parts(config: TrainConfig, *, grading_token: str | None) -> Iterator[Parts]:
    """`grading_token` is what `judge.servers` are shown. Collective."""
    run = RunDirectory(Path(config.run.dir))
    stop = StopRequest(run.stop_request)
    ranks = parallel.initialize(
        config.parallel, critic=config.critic_parallel, seed=config.run.seed
    )
    if ranks.is_writer:
        run.lock()
        accelerations.announce(ranks.device, *kernels_for(config))
    problems = load_problems(config.data.train)
    chat = ChatFormat.from_folder(Path(config.model.path), config.model.chat_format)
    rules = dialogue_rules(config, chat)
    learner = make_learner(config, ranks)
    checkpoints = make_checkpoints(config, run, learner)
    done, position = resume(run, checkpoints, writer=ranks.is_writer)
    with ExitStack() as stack:
        grader = stack.enter_context(open_grader(**config.judge.model_dump(), token=grading_token))
        engine = stack.enter_context(open_engine(config, ranks, run))
        progress = stack.enter_context(
            StepProgress("RLEF", done=done, total=config.run.steps, shown=ranks.is_writer)
        )
        trackers = stack.enter_context(Trackers(config, done=done, writer=ranks.is_writer))
        judge = Judge(grader)
        if rules.feedback == "random":
            found = collect_distractors(problems, config.data.train, judge, seed=config.run.seed)
            rules = replace(rules, distractors=found)
        if ranks.is_writer:
            run.write_json("manifest.json", run_manifest(config, grader, ranks.device))
        yield Parts(
            run=run,
            stop=stop,
            ranks=ranks,
            problems=problems,
            chat=chat,
            learner=learner,
            checkpoints=checkpoints,
            done=done,
            position=position,
            guards=Guards(
                config.guard,
                max_drop_fraction=config.rollout.max_drop_fraction,
                max_staleness=config.rollout.staleness,
            ),
            engine=engine,
            dialogues=Dialogues(
                problems,
                engine,
                judge,
                chat,
                rules,
                batch=config.rollout.episodes_per_batch,
                seed=config.run.seed,
            ),
            evaluator=Evaluator(
                config, run, engine, judge, chat, rules, writer=ranks.is_writer, say=progress.say
            ),
            progress=progress,
            trackers=trackers,
        )


@contextmanager
def open_engine(
    config: TrainConfig, ranks: parallel.Ranks, run: RunDirectory
) -> Iterator[TrainingEngine]:
    """One of this process; or the servers, which rank 0 brings the weights to."""
    if config.rollout.engine == "local":
        yield LocalEngine(
            Path(config.model.path),
            dtype=config.model.dtype,
            device=ranks.device,
            weights_from_folder=config.model.weights is None,  # else they come when published
        )
        return
    from rlef_mega.engines.sglang.engine import Limits, SGLangEngine  # an extra: it needs aiohttp

    servers = config.rollout.servers
    with SGLangEngine(
        servers.addresses,
        Path(config.model.path),
        Limits(servers.concurrency, servers.deadline_s, servers.lost_s, servers.publish_s),
        way=servers.publish if ranks.is_writer else None,
        weights_folder=run.path / "weights",
        logs=server_logs(config),
        release_memory=servers.release_memory,
        take_over=True,  # what this run held when it was killed
    ) as engine:
        yield engine


def make_learner(config: TrainConfig, ranks: parallel.Ranks) -> Learner:
    return Learner(
        ranks,
        Path(config.model.path),
        learner=config.learner,
        ppo=config.ppo,
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        recompute=config.model.recompute,
        layers=config.model.layers,
        weights=Path(config.model.weights) if config.model.weights else None,
    )


def kernels_for(config: TrainConfig) -> tuple[torch.dtype, accelerations.Layers]:
    """What the choice of kernels depends on, besides the machine."""
    return getattr(torch, config.model.dtype), config.model.layers


def run_manifest(config: TrainConfig, grader: Grader, device: torch.device) -> dict[str, Any]:
    return describe(
        layout=config.parallel.model_dump(),
        critic_layout=config.critic_parallel.model_dump() if config.critic_parallel else "policy's",
        accelerations=accelerations.report(device, *kernels_for(config)),
        isolation=grader.isolation,
    )


def make_checkpoints(config: TrainConfig, run: RunDirectory, learner: Learner) -> Checkpoints:
    return Checkpoints(
        run.checkpoints,
        learner,
        keep=config.run.keep_checkpoints,
        keep_best=config.run.keep_best,
        asynchronous=config.run.checkpoint_async,
        about={"versions": versions(), "layout": config.parallel.model_dump()},
    )


def resume(
    run: RunDirectory, checkpoints: Checkpoints, *, writer: bool
) -> tuple[int, dict[str, Any]]:
    """Load the newest good checkpoint, if any, and forget what was recorded after it. Returns its
    step and position, or 0 and none."""
    step, state = checkpoints.resume() or (0, {})
    if writer:
        run.resume(step)
        missing = step - len(run.read_metrics())
        if missing:  # a machine that lost its power, or a disk that was full
            print(f"WARNING: {run.metrics_path} lacks {missing} steps before {step}", flush=True)
    return step, state


def dialogue_rules(config: TrainConfig, chat: ChatFormat) -> Rules:
    """How training samples: no top-p, no top-k (RLEF 3.1)."""
    return Rules(
        turns=config.rollout.turns,
        sampling=Sampling(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=tuple(chat.stop_token_ids),
        ),
        max_context=config.rollout.max_context,
        feedback=config.rollout.feedback,
    )


def pack_episodes(config: TrainConfig, episodes: Sequence[Episode]) -> Batch:
    """With the paper's penalty for invalid code, which its single-turn training leaves out (RLEF
    2.2)."""
    return pack(
        episodes,
        invalid_code_penalty=config.ppo.invalid_code_penalty if config.rollout.turns > 1 else 0.0,
        penalize_invalid_last_turn=config.ppo.penalize_invalid_last_turn,
    )


def make_targets(
    config: TrainConfig, batch: Batch, scores: Scores
) -> tuple[Targets, dict[str, float]]:
    """`ppo.targets` with the recipe's settings."""
    return ppo.targets(
        batch,
        scores,
        beta=config.ppo.beta,
        gamma=config.ppo.gamma,
        normalize=config.ppo.normalize_advantages,
        token_level_value=config.ppo.token_level_value,
    )
