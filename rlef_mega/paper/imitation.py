"""`rlef imitate`: the paper's supervised ablation, which imitates solved dialogues.

The command runs the base model on the problems of an RLEF run, with as many dialogues, and keeps
the solved ones. It fine-tunes the base model on them, with the loss on the last response only, in
as many updates of as many sequences as RLEF, and writes `eval/after.json` and `model/`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import torch

from rlef_mega.config import TrainConfig, load_config
from rlef_mega.dialogues.batches import NumberedDialogues, RolloutsOnDemand
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge, open_grader
from rlef_mega.dialogues.rollout import DialogueLoop, derive_seed
from rlef_mega.engines.publish import publish
from rlef_mega.evaluation.during_training import Evaluator
from rlef_mega.megatron import parallel
from rlef_mega.megatron.hf_weights import export_hf
from rlef_mega.megatron.supervised import SupervisedLearner
from rlef_mega.packing import pack, shuffled
from rlef_mega.parts import dialogue_rules, open_engine, training_problems
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.hub import find_model
from rlef_mega.run.launch import StopRequest, worker_main
from rlef_mega.run.progress import StepProgress
from rlef_mega.run.ranks import any_rank
from rlef_mega.types import Episode


def imitate(config: TrainConfig) -> int:
    """Run the ablation on this rank. Returns 0, or STOPPED after a stop request; the next call
    then starts over. Raises RuntimeError if the base model solved nothing."""
    run = RunDirectory(Path(config.run.dir))
    stop = StopRequest(run.stop_request)
    ranks = parallel.initialize(config.parallel, seed=config.run.seed)
    if ranks.is_writer:
        run.lock()
        run.resume(0)
    model = find_model(config.model.path)
    chat = ChatFormat.from_folder(model)
    learner = SupervisedLearner(
        ranks,
        model,
        # its one network is never idle
        learner=config.learner.model_copy(update={"offload": "none"}),
        dtype=config.model.dtype,
        recompute=config.model.recompute,
        weights=Path(config.model.weights) if config.model.weights else None,
    )
    with ExitStack() as stack:
        grader = stack.enter_context(open_grader(config.judge))
        engine = stack.enter_context(open_engine(config, model, ranks, run))
        progress = stack.enter_context(
            StepProgress("imitation", done=0, total=config.run.steps, shown=ranks.is_writer)
        )
        loop = DialogueLoop(engine, Judge(grader), chat, dialogue_rules(config, chat))
        publish(learner.policy_weights, engine, version=0)
        dialogues = NumberedDialogues(training_problems(config), loop, config)
        solved = solved_dialogues(config, RolloutsOnDemand(dialogues), stop)
        if solved is None:
            return stop.obeyed(writer=ranks.is_writer)
        progress.say(f"{len(solved)} dialogues were solved")
        sequences = last_responses(solved, config.run.seed)
        size = config.rollout.episodes_per_batch // config.ppo.updates_per_batch
        for step in range(1, config.run.steps + 1):
            losses = [
                learner.supervised_update(pack(list(islice(sequences, size))))["loss"]
                for _ in range(config.ppo.updates_per_batch)
            ]
            if ranks.is_writer:
                run.append_metrics({"step": step, "loss": sum(losses) / len(losses)})
            progress.step(f"loss {losses[-1]:.3f}")
            if any_rank(stop.requested()):
                return stop.obeyed(writer=ranks.is_writer)
        publish(learner.policy_weights, engine, version=config.run.steps)
        export_hf(
            learner.policy_weights(),
            model,
            run.path / "model",
            getattr(torch, config.model.dtype),
            is_writer=ranks.is_writer,
        )
        Evaluator(config, run, loop, writer=ranks.is_writer, say=progress.say).full(
            "after", version=config.run.steps
        )
    parallel.shutdown(ranks)
    return 0


def solved_dialogues(
    config: TrainConfig, rollouts: RolloutsOnDemand, stop: StopRequest
) -> list[Episode] | None:
    """Sample the dialogues of a whole run. Returns the solved ones; None after a stop request.
    Raises RuntimeError if no dialogue was solved."""
    solved: list[Episode] = []
    for step in range(1, config.run.steps + 1):
        solved += [e for e in rollouts.batch(step).episodes if e.solved]
        if any_rank(stop.requested()):
            return None
    if not solved:
        sampled = config.run.steps * config.rollout.episodes_per_batch
        raise RuntimeError(
            f"the base model solved none of {sampled} dialogues, so there is nothing to imitate; "
            "use easier problems or a stronger base model"
        )
    return solved


def last_response(episode: Episode) -> Episode:
    """Return an episode of one turn, the last: all tokens before its response are its prompt."""
    turn = replace(episode.turns[-1], observed_ids=episode.context(len(episode.turns) - 1))
    return replace(episode, turns=(turn,))


def last_responses(solved: Sequence[Episode], seed: int) -> Iterator[Episode]:
    """Yield sequences without end, in a new order in each epoch; their actions are the tokens of
    the last response."""
    last = [last_response(episode) for episode in solved]
    for epoch in count():
        order = shuffled(len(last), derive_seed(seed, "imitation", epoch))
        yield from (last[index] for index in order.tolist())


if __name__ == "__main__":
    worker_main(lambda run_dir: imitate(load_config(run_dir / "config.toml", [], TrainConfig)))
