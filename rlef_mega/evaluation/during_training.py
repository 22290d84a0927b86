"""Evaluations of a training run: the paper's protocols on a set of problems, on all ranks (RLEF 3.1
to 3.3). `rlef eval` (eval_command.py) goes further; the numbers of both are from summary.py.

Every turn counts as one sample: `1@3` is one dialogue of up to three turns, or one of three
independent responses, picked among those that pass the public tests. Random feedback answers each
wrong program with what happened to another problem's; if that costs nothing, the model was not
reading its feedback.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from rlef_mega import metrics
from rlef_mega.config import TrainConfig
from rlef_mega.dialogues.batches import Rollouts
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.records import episode_record
from rlef_mega.dialogues.rollout import (
    DialogueLoop,
    Distractor,
    Rollout,
    Rules,
    derive_seed,
    distractors_of,
    join_shares,
)
from rlef_mega.evaluation.behaviour import DialogueOutcomes
from rlef_mega.evaluation.numbers import FinishedDialogues, ProblemLabels, summarize
from rlef_mega.problems import load_problems
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.ranks import any_rank
from rlef_mega.types import Episode, Problem

PROTOCOLS = ("multi_turn", "independent", "random_feedback")


@dataclass(frozen=True)
class Evaluation:
    """Numbers to write as JSON, and the dialogues behind the multi-turn ones."""

    summary: dict[str, Any]
    episodes: tuple[Episode, ...]


def evaluate(
    problems: Sequence[Problem],
    loop: DialogueLoop,
    *,
    seed: int,
    protocols: Sequence[str] = PROTOCOLS,
    note: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Run the protocols. The loop's rules are those of the multi-turn dialogues; the rules of the
    other protocols follow from them. `note` is called with the name of each part as it begins."""
    unknown = set(protocols) - set(PROTOCOLS)
    if unknown:
        raise ValueError(f"unknown protocols {sorted(unknown)}; known: {', '.join(PROTOCOLS)}")

    def roll_out(problems: Sequence[Problem], rules: Rules, name: str) -> Rollout:
        note(f"evaluate {name} begins")
        return loop.under(rules).run_on_all_ranks(problems, derive_seed(seed, name))

    rules = loop.rules
    summary: dict[str, Any] = {}
    episodes: tuple[Episode, ...] = ()
    distractors: tuple[Distractor, ...] = ()
    about = [ProblemLabels.of(problem) for problem in problems]

    def numbers(rollout: Rollout, turns: int) -> dict[str, Any]:
        held = FinishedDialogues(
            turns, [DialogueOutcomes.of(e) for e in rollout.episodes], rollout.drops
        )
        return summarize(about, held, samples=rules.turns)

    if "multi_turn" in protocols:
        held = roll_out(problems, rules, "multi_turn")
        episodes = held.episodes
        summary["multi_turn"] = numbers(held, rules.turns)
    if "independent" in protocols or "random_feedback" in protocols:
        budget = [problem for problem in problems for _ in range(rules.turns)]
        held = roll_out(budget, replace(rules, turns=1, feedback="true"), "independent")
        summary["independent"] = numbers(held, 1)
        distractors = distractors_of(held.episodes)
    if "random_feedback" in protocols and distractors:
        misled = replace(rules, feedback="random", distractors=distractors)
        held = roll_out(problems, misled, "random_feedback")
        summary["random_feedback"] = numbers(held, rules.turns)
    return Evaluation(summary, episodes)


class Evaluator:
    """Evaluations of a training run: a quick one on some validation problems, a full one before and
    after."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        loop: DialogueLoop,
        *,
        writer: bool,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.run, self.writer, self.say = config, run, writer, say
        rules, asked = loop.rules, config.eval
        sampling = replace(rules.sampling, temperature=asked.temperature, top_p=asked.top_p)
        self.loop = loop.under(
            replace(rules, sampling=sampling, turns=asked.turns, feedback=asked.feedback)
        )
        self.under_way: tuple[int, Future[Rollout]] | None = None
        self.valid = (
            load_problems(config.data.valid)[: config.eval.problems] if config.data.valid else []
        )
        self.test = load_problems(config.data.test) if config.data.test else []

    def quick(self, step: int, rollouts: Rollouts) -> dict[str, Any]:
        """After each step: begins one dialogue on each of the validation problems, where that is
        due, and says what came of those that are done on all ranks. Waits for those still under way
        a step before the next are due, and at the last step. Collective.

        What it says: the solve rate, the step after which it began, and the first and last version
        of the weights that sampled it, for training may have gone on.
        """
        every, last = self.config.eval.every, step == self.config.run.steps
        if not (self.valid and every):
            return {}
        if step % every == 0:
            seed = derive_seed(self.config.run.seed, "valid", step)
            self.under_way = step, rollouts.begin(self.loop, self.valid, seed)
        return self.finished(wait=last or (step + 1) % every == 0)

    def finished(self, *, wait: bool) -> dict[str, Any]:
        if self.under_way is None or (not wait and any_rank(not self.under_way[1].done())):
            return {}
        step, held = self.under_way
        self.under_way = None
        episodes = join_shares(held.result).episodes
        versions = [
            v for e in episodes for turn in e.turns for v in turn.completion.weight_versions
        ]
        return {
            "valid_solved": metrics.episode_metrics(episodes)["solved"],
            "valid_step": step,
            "valid_versions": [min(versions), max(versions)] if versions else None,
        }

    def full(self, name: str, *, version: int) -> None:
        """All protocols on the test problems, written to eval/NAME.json unless it is there
        already."""
        if not self.test or (self.run.path / f"eval/{name}.json").exists():
            return
        self.say(
            f"evaluating {name} training, on {len(self.test)} problems of {self.config.data.test}"
        )
        seed = derive_seed(self.config.run.seed, "test")
        result = evaluate(
            self.test,
            self.loop,
            seed=seed,
            note=self.run.note_progress if self.writer else lambda _: None,
        )
        if self.writer:
            write_evaluation(
                self.run,
                name,
                result,
                self.test,
                self.loop.chat,
                model=f"{self.config.model.path}, version {version}",
                data=str(self.config.data.test),
                rules=self.loop.rules,
                seed=self.config.run.seed,
            )
        rates = {name: part["solve_rate"]["value"] for name, part in result.summary.items()}
        self.say("  " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))


def write_evaluation(
    run: RunDirectory,
    name: str,
    result: Evaluation,
    problems: Sequence[Problem],
    chat: ChatFormat,
    *,
    model: str,
    data: str,
    rules: Rules,
    seed: int,
) -> None:
    """eval/NAME_episodes.jsonl.zst first, then eval/NAME.json, whose presence says that both are
    whole."""
    by_id = {problem.id: problem for problem in problems}
    run.write_episodes(
        f"eval/{name}_episodes.jsonl.zst",
        [episode_record(e, chat, by_id[e.problem_id]) for e in result.episodes],
    )
    about = {
        "model": model,
        "data": data,
        "temperature": rules.sampling.temperature,
        "top_p": rules.sampling.top_p,
        "turns": rules.turns,
        "problems": len(problems),
        "seed": seed,
    }
    run.write_json(f"eval/{name}.json", {**about, "protocols": result.summary})
