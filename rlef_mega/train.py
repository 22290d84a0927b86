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
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any

from rlef_mega import metrics
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.dialogues.batches import Rollouts, open_rollouts
from rlef_mega.dialogues.records import episode_records
from rlef_mega.dialogues.rollout import derive_seed
from rlef_mega.engines import BUSY, EngineLostError, TrainingEngine
from rlef_mega.engines.publish import publish
from rlef_mega.megatron import parallel
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.packing import shuffled
from rlef_mega.parts import Parts, make_targets, open_parts, pack_episodes
from rlef_mega.run.directory import Clock
from rlef_mega.run.guards import GuardError
from rlef_mega.run.launch import collect_garbage, sandbox_token, worker_main
from rlef_mega.run.profiler import profiled
from rlef_mega.run.progress import training_line
from rlef_mega.run.ranks import any_rank, gather
from rlef_mega.types import Batch, Episode, Scores, Targets


def train(config: TrainConfig, *, grading_token: str | None = None) -> int:
    """Run or resume. Returns 0 when all steps are done and STOPPED when asked to stop before.
    `grading_token` is what `judge.servers` are shown."""
    with open_parts(config, grading_token=grading_token) as parts:
        give_weights(config, parts, parts.done)
        if parts.done == 0:
            parts.evaluator.full("before")
        with open_rollouts(
            parts.dialogues,
            config.rollout,
            version=parts.done,
            steps=config.run.steps,
            state=parts.position,
        ) as rollouts:
            steps = range(parts.done + 1, config.run.steps + 1)
            traces, rank = parts.run.path / "profile", parts.ranks.rank
            try:
                with closing(profiled(steps, config.profile, traces, rank=rank)) as profiled_steps:
                    done = all_steps(config, parts, rollouts, profiled_steps)
            except (GuardError, FloatingPointError):  # on all ranks
                parts.checkpoints.finish()  # of steps before the fault
                raise
            if done:
                parts.checkpoints.finish()
                parts.evaluator.full("after")
                parts.checkpoints.require_saved()
    # all of them together, after the writer has closed what it has: Slurm and torchrun kill who is
    # left when others have been gone for a while
    parallel.shutdown(parts.ranks)
    return 0 if done else parts.stop.obeyed(writer=parts.ranks.is_writer)


def all_steps(config: TrainConfig, parts: Parts, rollouts: Rollouts, steps: Iterable[int]) -> bool:
    """Whether all were done; else the run was asked to stop, and is saved. EngineLostError, once
    what was learned is saved, when no engine is left; GuardError when going on would be a waste."""
    learner, guards, checkpoints = parts.learner, parts.guards, parts.checkpoints
    clock = Clock(parts.note_phase)
    for step in steps:
        try:
            with clock("rollout"):
                held = rollouts.batch(step)
        except EngineLostError:
            save_and_end(checkpoints, step - 1, position(config, step - 1, rollouts))
            raise
        guards.check_drops(held.drops, len(held.outcomes))
        parts.engine.rest()
        batch = pack_episodes(config, held.episodes)
        with clock("score"):
            scores = learner.score(batch)
        targets, target_metrics = make_targets(config, batch, scores)
        with clock("update"):
            order = shuffled(batch.num_sequences, derive_seed(config.run.seed, step))
            train_policy = step > config.ppo.critic_warmup_steps
            update_metrics = learner.update(batch, targets, order, train_policy=train_policy)
        validation, lost = bring_weights_back(config, parts, rollouts, clock, step)
        stopping = any_rank(parts.stop.requested())
        saving = step % config.run.checkpoint_every == 0 or step == config.run.steps
        record = {
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
            **validation,
        }
        record["alarms"] = guards.alarms(record)
        write_down(config, parts, record, clock)
        if saving and parts.ranks.is_writer:
            write_episodes(parts, step, held.episodes, batch, scores, targets)
        guards.check(record)
        with clock("checkpoint"):  # what training waits for
            wanted = position(config, step, rollouts) if saving or stopping or lost else None
            save(config, parts, step, record, wanted, again=not (stopping or lost))
        collect_garbage(step)
        if stopping or lost:
            checkpoints.require_saved()
        if lost:
            raise lost
        if stopping:
            return False
    return True


def give_weights(config: TrainConfig, parts: Parts, step: int) -> None:
    """The weights after this step to the engine, whose servers may wait on our devices for room."""
    if config.rollout.servers.release_memory:
        parts.learner.make_room()
    publish(parts.learner.policy_weights, parts.engine, version=step)


def bring_weights_back(
    config: TrainConfig, parts: Parts, rollouts: Rollouts, clock: Clock, step: int
) -> tuple[dict[str, Any], EngineLostError | None]:
    """Publish the step's weights to the engine and evaluate it where that is due: the evaluation's
    numbers. When no engine is left that is returned, on all ranks, for the step is not lost."""
    try:
        with clock("publish"):
            give_weights(config, parts, step)
            rollouts.published(step)
        with clock("evaluate"):
            return parts.evaluator.quick(step, rollouts), None
    except EngineLostError as error:
        return {}, error


def write_down(config: TrainConfig, parts: Parts, record: dict[str, Any], clock: Clock) -> None:
    """The step's line in metrics.jsonl and on the terminal; what follows is timed in the next.
    Collective."""
    learner_times = parts.learner.take_seconds()
    counts = total_counts(parts.engine)
    times = clock.lap()
    if parts.ranks.is_writer:
        line = {
            **record,
            **({"servers": counts} if counts else {}),
            "time": times,
            "learner_time": learner_times,
            "idle_time": idle_shares(config, times, counts),
        }
        parts.run.append_metrics(line)
        parts.trackers.log(line)
    parts.progress.step(training_line(record, times))
    for alarm in record["alarms"]:
        parts.progress.say(f"ALARM at step {record['step']}: {alarm}")


def write_episodes(
    parts: Parts,
    step: int,
    episodes: Sequence[Episode],
    batch: Batch,
    scores: Scores,
    targets: Targets,
) -> None:
    """The step's dialogues with what was made of them, for `rlef view`."""
    records = episode_records(episodes, parts.problems, parts.chat, batch, scores, targets)
    parts.run.write_episodes(f"episodes/step_{step:06d}.jsonl.zst", records)


def total_counts(engine: TrainingEngine) -> dict[str, float]:
    """Of all ranks, since the last step: what the servers answered, cached and failed. A server was
    busy (`server_busy_s`, added up over them) for at least as long as the rank says that kept it so
    the longest."""
    return add_up(gather(engine.take_counts()))


def add_up(everyone: Sequence[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = dict(sum(map(Counter, everyone), Counter()))
    servers = [name for name in total if name.startswith(BUSY)]
    for name in servers:
        del total[name]
    if servers:
        busiest = (max(mine.get(name, 0.0) for mine in everyone) for name in servers)
        total["server_busy_s"] = sum(busiest)
    if "follow_up_tokens" in total:
        cached = total.get("follow_up_cached_tokens", 0.0)
        total["follow_up_cached_share"] = cached / total["follow_up_tokens"]
    return total


def idle_shares(
    config: TrainConfig, times: dict[str, float], counts: dict[str, float]
) -> dict[str, float]:
    """Of a step's time: how long the trainer waits for episodes; and servers, at most, for a
    request of ours."""
    shares = {"trainer": times["rollout"] / times["step"]}
    if "server_busy_s" in counts:
        servers_s = len(config.rollout.servers.addresses) * times["step"]
        shares["engines"] = max(0.0, 1 - counts["server_busy_s"] / servers_s)
    return shares


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


def save(
    config: TrainConfig,
    parts: Parts,
    step: int,
    record: dict[str, Any],
    state: dict[str, Any] | None,
    *,
    again: bool,
) -> None:
    """Begin a checkpoint of this step if there is a `state` to keep with it, and give a checkpoint
    the score that its validation has come to, which may be an earlier one's. Collective.

    Optimizer states come to the device for it: servers on the same one make room, and get their
    weights `again` where the run goes on.
    """
    checkpoints = parts.checkpoints
    checkpoints.poll()
    score, scored = record.get("valid_solved"), record.get("valid_step", step)
    if state is not None:
        shared = config.rollout.servers.release_memory
        if shared:
            parts.engine.rest()
        checkpoints.save(step, state, score=score if scored == step else None)
        if shared and again:
            give_weights(config, parts, step)
    if score is not None and scored != step:
        checkpoints.rate(scored, score)


def save_and_end(checkpoints: Checkpoints, step: int, state: dict[str, Any]) -> None:
    """What was learned until this step is on the disk afterwards, or RuntimeError. Collective."""
    checkpoints.finish()
    if checkpoints.saved_last != step:
        checkpoints.save(step, state)
    checkpoints.require_saved()


if __name__ == "__main__":
    worker_main(
        lambda run_dir: train(
            load_config(run_dir / "config.toml", [], TrainConfig), grading_token=sandbox_token()
        )
    )
