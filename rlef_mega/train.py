"""THE LOOP: roll out, pack, score, targets, update, publish, evaluate, record, save.

Theory of operation: SPMD under torchrun or srun; every rank runs this file. A rank runs its share
of the dialogues before each step or, in async mode, during training (dialogues/batches.py); then
every rank has all episodes of the step. Every rank computes the same packing, targets and metrics,
and the learner splits its work by its layout. Rank 0 writes the run directory. Checkpoints are
written in the background. A killed run resumes from its newest checkpoint; in sync mode it then
ends with the same numbers as an uninterrupted run.

What ends it: the last step; a request to stop (SIGINT, SIGTERM, SIGUSR1 or a file `stop` in the run
directory), which all ranks see together at the end of a step, and which is followed by a
checkpoint; the loss of the last engine or of too many dialogues, after a checkpoint of what was
learned; another guard; or a loss or gradient that is not finite.
"""

from collections.abc import Iterable
from contextlib import ExitStack, closing
from typing import Any

from rlef_mega import metrics
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.dialogues.batches import Rollouts, open_rollouts
from rlef_mega.dialogues.records import episode_records
from rlef_mega.dialogues.rollout import derive_seed
from rlef_mega.engines import EngineLostError
from rlef_mega.engines.publish import publish
from rlef_mega.megatron import parallel
from rlef_mega.packing import pack, shuffled
from rlef_mega.parts import Parts, rest
from rlef_mega.run.directory import Clock
from rlef_mega.run.guards import GuardError, kinds_of
from rlef_mega.run.launch import collect_garbage, return_freed_memory, worker_main
from rlef_mega.run.profiler import profiled
from rlef_mega.run.ranks import any_rank
from rlef_mega.targets import targets_of


def train(config: TrainConfig) -> int:
    """Start or resume a run.

    Returns 0 when all steps are finished, STOPPED when the run was asked to stop before.
    """
    with ExitStack() as stack:
        parts = Parts(config, stack)
        publish_weights(parts, parts.done)
        if parts.done == 0:
            parts.evaluator.full("before", version=0)
        with open_rollouts(
            parts.dialogues, config, version=parts.done, state=parts.position
        ) as rollouts:
            steps = range(parts.done + 1, config.run.steps + 1)
            traces, rank = parts.run.path / "profile", parts.ranks.rank
            try:
                with closing(profiled(steps, config.profile, traces, rank=rank)) as profiled_steps:
                    finished = all_steps(parts, rollouts, profiled_steps)
            except (GuardError, FloatingPointError):  # raised on all ranks
                parts.checkpoints.finish()  # of the steps before the fault
                raise
            if finished:
                parts.checkpoints.finish()
                parts.evaluator.full("after", version=max(parts.done, config.run.steps))
                parts.checkpoints.require_saved()
    # Only now, when the writer has closed everything, do all ranks leave together: Slurm and
    # torchrun kill the remaining ranks some time after the first have left.
    parallel.shutdown(parts.ranks)
    return 0 if finished else parts.stop.obeyed(writer=parts.ranks.is_writer)


def all_steps(parts: Parts, rollouts: Rollouts, steps: Iterable[int]) -> bool:
    """Run the steps. Returns False, after a checkpoint, if a stop was requested before the end.

    Raises EngineLostError, after a checkpoint, if no engine is left, GuardError if a limit of
    `[guard]` is exceeded, and FloatingPointError if a loss or gradient is not finite.
    """
    config, learner = parts.config, parts.learner
    guards, checkpoints = parts.guards, parts.checkpoints
    clock = Clock(parts.note_phase)
    for step in steps:
        before = rollouts.state()
        try:
            with clock("rollout"):
                rollout = rollouts.batch(step)
            guards.check_drops(rollout.reasons, len(rollout.outcomes))
        except (EngineLostError, GuardError) as error:  # the weights are those of the step before
            parts.progress.say(f"step {step}: {error}")  # the save may fail, too
            checkpoints.finish()
            if checkpoints.saved_last != step - 1:
                rest(config, parts.engine)
                checkpoints.save(step - 1, before)
            checkpoints.require_saved()
            raise
        rest(config, parts.engine)
        batch = pack(rollout.episodes)
        with clock("score"):
            scores = learner.score(batch)
        single_turn = config.rollout.turns == 1
        targets, target_metrics = targets_of(batch, scores, config.ppo, single_turn=single_turn)
        with clock("update"):
            order = shuffled(batch.num_sequences, derive_seed(config.run.seed, step))
            train_policy = step > config.ppo.critic_warmup_steps
            update_metrics = learner.update(batch, targets, order, train_policy=train_policy)
        validation: dict[str, Any] = {}
        lost: EngineLostError | None = None
        try:
            with clock("publish"):
                publish_weights(parts, step)
                rollouts.published(step)
            with clock("evaluate"):
                validation = parts.evaluator.quick(step, rollouts)
        except EngineLostError as error:  # on all ranks; the step is recorded and saved first
            lost = error
        record = {
            "step": step,
            "updates": step * config.ppo.updates_per_batch,
            "episodes": len(rollout.episodes),
            "dropped": dict(kinds_of(rollout.reasons)),
            **metrics.episode_metrics(rollout.episodes),
            **target_metrics,
            **update_metrics,
            **metrics.logprob_gap(batch, scores, version=step - 1),
            **metrics.off_policy(batch, scores, version=step - 1),
            "checkpoint_failures": checkpoints.failures,
            **validation,
        }
        record["alarms"] = guards.alarms(record)
        stopping = any_rank(parts.stop.requested())
        saving = step % config.run.checkpoint_every == 0 or step == config.run.steps
        parts.write_record(record, clock)
        if saving and parts.ranks.is_writer:
            episodes = episode_records(
                rollout.episodes, parts.problems, parts.chat, batch, scores, targets
            )
            parts.run.write_episodes(f"episodes/step_{step:06d}.jsonl.zst", episodes)
        guards.check(record)
        with clock("checkpoint"):  # the time that training waits for it
            ending = stopping or lost is not None
            state = rollouts.state() if saving or ending else None
            save(parts, record, state, ending=ending)
        collect_garbage(step)
        return_freed_memory()
        if ending:
            checkpoints.require_saved()
        if lost:
            raise lost
        if stopping:
            return False
    return True


def publish_weights(parts: Parts, step: int) -> None:
    """Publish the weights after this step to the engine. If servers share the trainer's devices,
    the learner frees memory for them first."""
    if parts.config.rollout.servers.release_memory:
        parts.learner.make_room()
    publish(parts.learner.policy_weights, parts.engine, version=step)


def save(
    parts: Parts, record: dict[str, Any], state: dict[str, Any] | None, *, ending: bool
) -> None:
    """Begin a checkpoint of the step, if there is a `state` for it. Give the validation score to
    the checkpoint of its step, which may be an earlier one. Collective.

    A checkpoint brings optimizer states to the device. Servers on the same device free memory for
    it, and get their weights again unless the run is `ending`.
    """
    checkpoints, step = parts.checkpoints, record["step"]
    checkpoints.poll()
    score, scored_step = record.get("valid_solved"), record.get("valid_step", step)
    if state is not None:
        rest(parts.config, parts.engine)
        checkpoints.save(step, state, score=score if scored_step == step else None)
        if parts.config.rollout.servers.release_memory and not ending:
            try:
                publish_weights(parts, step)
            except EngineLostError:  # on all ranks
                checkpoints.require_saved()
                raise
    if score is not None and scored_step != step:
        checkpoints.rate(scored_step, score)


if __name__ == "__main__":
    worker_main(lambda run_dir: train(load_config(run_dir / "config.toml", [], TrainConfig)))
