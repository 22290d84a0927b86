"""THE LOOP: problems to episodes to a batch to targets to an update, and the new weights back to
the engine.

Theory of operation: SPMD under torchrun or srun; every rank runs this file. A rank drives its share
of the dialogues, while the trainer waits or beside it (collect.py), then all ranks hold all
episodes of the step: packing, targets and metrics are computed alike everywhere, and the learner
splits its work by its layout. Rank 0 writes the run directory. When no engine is left, what was
learned is saved, and all ranks stop. A request to stop (SIGINT, SIGTERM, SIGUSR1, or a file `stop`
in the run directory) is seen by all ranks together at the end of a step, which is then saved. Other
checkpoints are written while training goes on. A run that was killed goes on from its newest one,
and in sync mode ends with the numbers of an undisturbed one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from rlef_mega import metrics, ppo
from rlef_mega.chat import ChatFormat
from rlef_mega.collect import Dialogues, Rollouts, open_rollouts
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.engines import Engine, EngineLostError
from rlef_mega.engines.local import LocalEngine
from rlef_mega.evaluate import Evaluator
from rlef_mega.guard import GuardError, Guards
from rlef_mega.judge import Grader, Judge, open_grader
from rlef_mega.launch import StopRequest, sandbox_token, worker_main
from rlef_mega.manifest import describe, versions
from rlef_mega.megatron import accelerations, parallel
from rlef_mega.megatron.checkpoint import Checkpoints
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.publish import publish
from rlef_mega.packing import pack
from rlef_mega.problems import load_problems
from rlef_mega.progress import StepProgress, training_line
from rlef_mega.record import Clock, RunDirectory, episode_record
from rlef_mega.rollout import Rules, derive_seed
from rlef_mega.serve import server_logs
from rlef_mega.shares import any_rank, gather
from rlef_mega.types import Batch, Episode, Problem, Sampling, Scores, Targets


def train(config: TrainConfig, *, grading_token: str | None = None) -> int:
    """Run or resume. Returns 0 when all steps are done and STOPPED when asked to stop before.
    `grading_token` is what `judge.servers` are shown."""
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
    first, state = resume(run, checkpoints, writer=ranks.is_writer)
    guards = Guards(
        config.guard,
        max_drop_fraction=config.rollout.max_drop_fraction,
        max_staleness=config.rollout.staleness,
    )
    with ExitStack() as stack:
        grader = stack.enter_context(open_grader(**config.judge.model_dump(), token=grading_token))
        engine = stack.enter_context(open_engine(config, ranks, run))
        progress = stack.enter_context(
            StepProgress("RLEF", done=first, total=config.run.steps, shown=ranks.is_writer)
        )
        judge = Judge(grader)
        evaluator = Evaluator(
            config, run, engine, judge, chat, rules, writer=ranks.is_writer, say=progress.say
        )
        if ranks.is_writer:
            run.write_json("manifest.json", run_manifest(config, grader, ranks.device))
        publish(learner, engine, version=first)
        if first == 0:
            evaluator.full("before")
        dialogues = Dialogues(
            problems,
            engine,
            judge,
            chat,
            rules,
            batch=config.rollout.episodes_per_batch,
            seed=config.run.seed,
        )
        rollouts = stack.enter_context(
            open_rollouts(
                dialogues, config.rollout, version=first, steps=config.run.steps, state=state
            )
        )
        clock = Clock(run.note_progress if ranks.is_writer else None)
        for step in range(first + 1, config.run.steps + 1):
            try:
                with clock("rollout"):
                    held = rollouts.batch(step)
            except EngineLostError:
                save_and_end(checkpoints, step - 1, position(config, step - 1, rollouts))
                raise
            guards.check_drops(held)
            engine.rest()
            batch = pack(
                held.episodes,
                invalid_code_penalty=invalid_code_penalty(config),
                penalize_invalid_last_turn=config.ppo.penalize_invalid_last_turn,
            )
            with clock("score"):
                scores = learner.score(batch)
            targets, target_metrics = make_targets(config, batch, scores)
            with clock("update"):
                order = shuffled(batch.num_sequences, derive_seed(config.run.seed, step))
                train_policy = step > config.ppo.critic_warmup_steps
                update_metrics = learner.update(batch, targets, order, train_policy=train_policy)
            record: dict[str, Any] = {
                "step": step,
                "updates": step * config.ppo.updates_per_batch,
                "episodes": len(held.episodes),
                "dropped": dict(held.drops),
                **metrics.episode_metrics(held.episodes),
                **target_metrics,
                **update_metrics,
                **metrics.logprob_gap(batch, scores, version=step - 1),
                **metrics.off_policy(batch, scores, version=step - 1),
                "checkpoint_failures": checkpoints.failures,
            }
            lost: EngineLostError | None = None
            try:
                with clock("publish"):
                    publish(learner, engine, version=step)
                    rollouts.published(step)
                with clock("evaluate"):
                    record |= evaluator.quick(step, rollouts)
            except EngineLostError as error:  # on all ranks
                lost = error
            stopping = any_rank(stop.requested())
            due = step % config.run.checkpoint_every == 0 or step == config.run.steps
            learner_times = learner.take_seconds()
            counts = total_counts(engine)
            times = clock.lap()  # what follows is counted in the next step
            record["alarms"] = guards.alarms(record)
            if ranks.is_writer:
                run.append_metrics(
                    {
                        **record,
                        **({"servers": counts} if counts else {}),
                        "time": times,
                        "learner_time": learner_times,
                        "idle_time": idle_shares(config, times, counts),
                    }
                )
                if due:
                    episodes = episode_records(held.episodes, problems, chat, targets, batch)
                    run.write_episodes(f"episodes/step_{step:06d}.jsonl.zst", episodes)
            progress.step(training_line(record, times))
            for alarm in record["alarms"]:
                progress.say(f"ALARM at step {step}: {alarm}")
            try:
                guards.check(record)
            except GuardError:
                checkpoints.finish()  # of steps before the fault
                raise
            with clock("checkpoint"):  # what training waits for
                checkpoints.poll()
                score, scored = record.get("valid_solved"), record.get("valid_step", step)
                if due or stopping or lost:
                    mine = score if scored == step else None
                    checkpoints.save(step, position(config, step, rollouts), score=mine)
                if score is not None and scored != step:
                    checkpoints.rate(scored, score)
            if lost:
                checkpoints.require_saved()
                raise lost
            if stopping:
                checkpoints.require_saved()
                return stop.obeyed(writer=ranks.is_writer)
        checkpoints.finish()
        evaluator.full("after")
        checkpoints.require_saved()
    parallel.shutdown(ranks)
    return 0


@contextmanager
def open_engine(config: TrainConfig, ranks: parallel.Ranks, run: RunDirectory) -> Iterator[Engine]:
    """One of this process; or the servers, which rank 0 brings the weights to."""
    if config.rollout.engine == "local":
        yield LocalEngine(
            Path(config.model.path),
            dtype=config.model.dtype,
            device=ranks.device,
            weights_from_folder=config.model.weights is None,  # else they come when published
        )
        return
    from rlef_mega.engines.sglang import SGLangEngine  # an extra: it needs aiohttp

    servers = config.rollout.servers
    with SGLangEngine(
        servers.addresses,
        Path(config.model.path),
        way=servers.publish if ranks.is_writer else None,
        weights_folder=run.path / "weights",
        logs=server_logs(config),
        concurrency=servers.concurrency,
        deadline_s=servers.deadline_s,
        lost_s=servers.lost_s,
        publish_s=servers.publish_s,
        release_memory=servers.release_memory,
    ) as engine:
        yield engine


def total_counts(engine: Engine) -> dict[str, float]:
    """Of all ranks, since the last step: what the servers answered, cached and failed. How long
    they were busy is what the rank says that kept them so the longest."""
    everyone = gather(engine.take_counts())
    total: dict[str, float] = dict(sum(map(Counter, everyone), Counter()))
    if "server_busy_s" in total:
        total["server_busy_s"] = max(mine.get("server_busy_s", 0.0) for mine in everyone)
    return total


def idle_shares(
    config: TrainConfig, times: dict[str, float], counts: dict[str, float]
) -> dict[str, float]:
    """Of a step's time: the trainer waits for episodes; a server has no request of ours."""
    shares = {"trainer": times["rollout"] / times["step"]}
    if "server_busy_s" in counts:
        servers_s = len(config.rollout.servers.addresses) * times["step"]
        shares["engines"] = max(0.0, 1 - counts["server_busy_s"] / servers_s)
    return shares


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


def run_manifest(config: TrainConfig, grader: Grader, device: torch.device) -> dict[str, Any]:
    return describe(
        layout=config.parallel.model_dump(),
        critic_layout=config.critic_parallel.model_dump() if config.critic_parallel else "policy's",
        accelerations=accelerations.report(device, *kernels_for(config)),
        isolation=grader.isolation,
    )


def kernels_for(config: TrainConfig) -> tuple[torch.dtype, accelerations.Layers]:
    """What the choice of kernels depends on, besides the machine."""
    return getattr(torch, config.model.dtype), config.model.layers


def make_checkpoints(config: TrainConfig, run: RunDirectory, learner: Learner) -> Checkpoints:
    return Checkpoints(
        run.checkpoints,
        learner,
        keep=config.run.keep_checkpoints,
        keep_best=config.run.keep_best,
        asynchronous=config.run.checkpoint_async,
        about={"versions": versions(), "layout": config.parallel.model_dump()},
    )


def position(config: TrainConfig, step: int, rollouts: Rollouts) -> dict[str, Any]:
    """Where a run stands after a step, beside its networks: the engine's weights carry the step as
    their version, metrics.jsonl has a line a step, and dialogues have numbers."""
    return {
        "seed": config.run.seed,
        "problems_drawn": step * config.rollout.episodes_per_batch,
        "weight_version": step,
        "metrics_lines": step,
        **rollouts.state(),
    }


def save_and_end(checkpoints: Checkpoints, step: int, state: dict[str, Any]) -> None:
    """What was learned until this step is on the disk afterwards, or RuntimeError. Collective."""
    checkpoints.finish()
    if checkpoints.saved_last != step:
        checkpoints.save(step, state)
    checkpoints.require_saved()


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


def invalid_code_penalty(config: TrainConfig) -> float:
    """The paper's single-turn training drops the penalty (RLEF 2.2)."""
    return config.ppo.invalid_code_penalty if config.rollout.turns > 1 else 0.0


def shuffled(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def episode_records(
    episodes: Sequence[Episode],
    problems: Sequence[Problem],
    chat: ChatFormat,
    targets: Targets,
    batch: Batch,
) -> list[dict[str, Any]]:
    """A step's episodes to read, each turn with its value, return and advantage (its first token's,
    if by token)."""
    by_id = {problem.id: problem for problem in problems}
    of_turn = torch.arange(batch.num_turns)
    if targets.returns_N.numel() != batch.num_turns:
        of_turn = torch.searchsorted(batch.turn_index_T[batch.action_mask_T], of_turn)
    numbers = torch.stack([targets.old_values_N, targets.returns_N, targets.advantages_N])
    per_turn = numbers[:, of_turn].T.tolist()
    records = []
    for episode in episodes:
        mine, per_turn = per_turn[: len(episode.turns)], per_turn[len(episode.turns) :]
        records.append(episode_record(episode, chat, by_id[episode.problem_id], mine))
    return records


if __name__ == "__main__":
    worker_main(
        lambda run_dir: train(
            load_config(run_dir / "config.toml", [], TrainConfig), grading_token=sandbox_token()
        )
    )
