"""Evaluation: the paper's protocols on a set of problems, with 95% bootstrap intervals (RLEF 3.1 to
3.3, B.1).

Every turn counts as one sample: `1@3` is one dialogue of up to three turns, or one of three
independent responses, picked among those that pass the public tests. Random feedback answers each
wrong program with what happened to another problem's; if that costs nothing, the model was not
reading its feedback.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import comb
from typing import Any

from rlef_mega import metrics
from rlef_mega.chat import ChatFormat
from rlef_mega.collect import Rollouts
from rlef_mega.config import TrainConfig
from rlef_mega.engines import Engine
from rlef_mega.episode_records import episode_record
from rlef_mega.judge import Judge
from rlef_mega.problems import load_problems
from rlef_mega.record import RunDirectory
from rlef_mega.rollout import (
    Distractor,
    Rollout,
    Rules,
    derive_seed,
    distractors_of,
    join_shares,
    roll_out_on_all_ranks,
)
from rlef_mega.shares import any_rank
from rlef_mega.types import Episode, Problem

PROTOCOLS = ("multi_turn", "independent", "random_feedback")


@dataclass(frozen=True)
class Evaluation:
    """Numbers to write as JSON, and the dialogues behind the multi-turn ones."""

    summary: dict[str, Any]
    episodes: tuple[Episode, ...]


def evaluate(
    problems: Sequence[Problem],
    engine: Engine,
    judge: Judge,
    chat: ChatFormat,
    rules: Rules,
    *,
    seed: int,
    protocols: Sequence[str] = PROTOCOLS,
) -> Evaluation:
    """Run the protocols. `rules` are those of the multi-turn dialogues; the others follow from
    them."""
    unknown = set(protocols) - set(PROTOCOLS)
    if unknown:
        raise ValueError(f"unknown protocols {sorted(unknown)}; known: {', '.join(PROTOCOLS)}")

    def roll_out(problems: Sequence[Problem], rules: Rules, name: str) -> Rollout:
        return roll_out_on_all_ranks(problems, engine, judge, chat, rules, derive_seed(seed, name))

    summary: dict[str, Any] = {}
    episodes: tuple[Episode, ...] = ()
    distractors: tuple[Distractor, ...] = ()
    if "multi_turn" in protocols:
        held = roll_out(problems, rules, "multi_turn")
        episodes = held.episodes
        summary["multi_turn"] = dialogue_summary(problems, held)
    if "independent" in protocols or "random_feedback" in protocols:
        budget = [problem for problem in problems for _ in range(rules.turns)]
        held = roll_out(budget, replace(rules, turns=1, feedback="true"), "independent")
        summary["independent"] = independent_summary(problems, held)
        distractors = distractors_of(held.episodes)
    if "random_feedback" in protocols and distractors:
        misled = replace(rules, feedback="random", distractors=distractors)
        summary["random_feedback"] = dialogue_summary(
            problems, roll_out(problems, misled, "random_feedback")
        )
    return Evaluation(summary, episodes)


class Evaluator:
    """Evaluations of a training run: a quick one on some validation problems, a full one before and
    after."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        engine: Engine,
        judge: Judge,
        chat: ChatFormat,
        rules: Rules,
        *,
        writer: bool,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.run, self.writer, self.say = config, run, writer, say
        self.engine, self.judge, self.chat = engine, judge, chat
        sampling = replace(
            rules.sampling, temperature=config.eval.temperature, top_p=config.eval.top_p
        )
        self.rules = replace(rules, sampling=sampling, turns=config.eval.turns, feedback="true")
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
            self.under_way = step, rollouts.begin(self.valid, self.rules, seed)
        return self.finished(wait=last or (step + 1) % every == 0)

    def finished(self, *, wait: bool) -> dict[str, Any]:
        if self.under_way is None or (not wait and any_rank(not self.under_way[1].done())):
            return {}
        step, held = self.under_way
        self.under_way = None
        episodes = join_shares(held.result).episodes
        versions = [v for e in episodes for turn in e.turns for v in turn.weight_versions]
        return {
            "valid_solved": metrics.episode_metrics(episodes)["solved"],
            "valid_step": step,
            "valid_versions": [min(versions), max(versions)] if versions else None,
        }

    def full(self, name: str) -> None:
        """All protocols on the test problems, written to eval/NAME.json unless it is there
        already."""
        if not self.test or (self.run.path / f"eval/{name}.json").exists():
            return
        self.say(
            f"evaluating {name} training, on {len(self.test)} problems of {self.config.data.test}"
        )
        seed = derive_seed(self.config.run.seed, "test")
        result = evaluate(self.test, self.engine, self.judge, self.chat, self.rules, seed=seed)
        if self.writer:
            write_evaluation(
                self.run,
                name,
                result,
                self.test,
                self.chat,
                model=f"{self.config.model.path}, version {self.engine.weight_version}",
                data=str(self.config.data.test),
                rules=self.rules,
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


def dialogue_summary(problems: Sequence[Problem], held: Rollout) -> dict[str, Any]:
    """1@k of one dialogue of k turns a problem, and what its turns did."""
    rates = metrics.episode_metrics(held.episodes)
    solved = {episode.problem_id: float(episode.solved) for episode in held.episodes}
    first = [metrics.solved_at(episode, 0) for episode in held.episodes]
    return {
        **breakdown(problems, solved),
        "turn1": metrics.bootstrap_interval(first),
        "repaired_turn2": rates["repaired_turn2"],
        "repaired_turn3": rates["repaired_turn3"],
        "invalid_fraction": rates["invalid_fraction"],
        "error_kinds": {
            f"turn{turn + 1}": metrics.error_kinds(held.episodes, turn) for turn in range(3)
        },
        "dropped": dict(held.drops),
    }


def independent_summary(problems: Sequence[Problem], held: Rollout) -> dict[str, Any]:
    """1@k of k independent responses a problem, one of them picked."""
    samples: dict[str, list[tuple[bool, bool]]] = {}
    for episode in held.episodes:
        passed = episode.turns[0].verdict.public_passed
        samples.setdefault(episode.problem_id, []).append((passed, episode.solved))
    picked = {name: n_at_k(drawn, 1) for name, drawn in samples.items()}
    first = [episode.solved for episode in held.episodes]
    return {
        **breakdown(problems, picked),
        "turn1": metrics.bootstrap_interval(first),
        "invalid_fraction": metrics.episode_metrics(held.episodes)["invalid_fraction"],
        "dropped": dict(held.drops),
    }


def n_at_k(samples: Sequence[tuple[bool, bool]], n: int) -> float:
    """Probability that one of n selected samples is correct; `samples` are (public passed,
    correct).

    Selection is uniform without replacement among samples that pass the public tests, and goes on
    to the others only when there are fewer than n of those (AlphaCode's filtering; RLEF 3.1). A
    sample that fails a public test is not correct, so the others add nothing.
    """
    passing = [correct for passed, correct in samples if passed]
    chosen = min(n, len(passing))
    wrong = passing.count(False)
    return 1 - comb(wrong, chosen) / comb(len(passing), chosen) if chosen else 0.0


def breakdown(problems: Sequence[Problem], solved: dict[str, float]) -> dict[str, Any]:
    """Solve rate over all problems, by family and by tag. Problems whose dialogue was dropped are
    left out."""
    groups: dict[str, dict[str, list[float]]] = {"by_family": {}, "by_kind": {}}
    outcomes = []
    for problem in problems:
        if problem.id not in solved:
            continue
        outcome = solved[problem.id]
        outcomes.append(outcome)
        groups["by_family"].setdefault(problem.family or "all", []).append(outcome)
        for tag in problem.tags:
            groups["by_kind"].setdefault(tag, []).append(outcome)
    if not outcomes:
        raise RuntimeError("every dialogue of the evaluation was dropped; see the engine's log")
    return {
        "solve_rate": metrics.bootstrap_interval(outcomes),
        "outcomes": outcomes,
        **{
            name: {
                member: {**metrics.bootstrap_interval(values), "problems": len(values)}
                for member, values in sorted(group.items())
            }
            for name, group in groups.items()
        },
    }
