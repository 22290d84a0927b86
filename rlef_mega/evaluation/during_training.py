"""Evaluate the policy during training, on all ranks: validation problems every few steps, and the
paper's protocols on the test problems before and after (RLEF 3.1 to 3.3). `rlef eval` (command.py)
offers more protocols; numbers.py computes the numbers of both.

Every turn counts as one sample: `1@3` is one dialogue of up to three turns, or one of three
independent responses, selected among those that pass the public tests. Random feedback answers each
wrong program with the failures of another problem's program. If that does not lower the solve rate,
the model does not read its feedback.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from rlef_mega import metrics
from rlef_mega.config import TrainConfig, read_json
from rlef_mega.dialogues.batches import Rollouts
from rlef_mega.dialogues.records import episode_record
from rlef_mega.dialogues.rollout import (
    TOO_LONG,
    DialogueLoop,
    Rollout,
    Rules,
    derive_seed,
    distractors_of,
    join_shares,
)
from rlef_mega.evaluation.behaviour import DialogueOutcomes
from rlef_mega.evaluation.numbers import FinishedDialogues, summarize
from rlef_mega.problems import load_problems
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.ranks import any_rank
from rlef_mega.types import Episode, Problem


class Evaluator:
    """The evaluations of a training run: a quick one on validation problems, and a full one on the
    test problems."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        loop: DialogueLoop,
        *,
        writer: bool,
        say: Callable[[str], None],
    ) -> None:
        """Read the problems. Dialogues follow the loop's rules, except for `config.eval`; `say`
        prints a line."""
        self.config, self.run, self.writer, self.say = config, run, writer, say
        rules, asked = loop.rules, config.eval
        sampling = replace(rules.sampling, temperature=asked.temperature, top_p=asked.top_p)
        self.loop = loop.under(
            replace(rules, sampling=sampling, turns=asked.turns, feedback=asked.feedback)
        )
        self.running: tuple[int, Future[Rollout]] | None = None
        self.valid = load_problems(config.data.valid)[: asked.problems] if config.data.valid else []
        self.test = load_problems(config.data.test) if config.data.test else []

    def quick(self, step: int, rollouts: Rollouts) -> dict[str, Any]:
        """Start an evaluation if one is due after this step, with one dialogue per validation
        problem. Wait for a running one at the step before the next is due, and at the last step.
        Collective: all ranks must call it.

        Returns the metrics of an evaluation that has finished on all ranks, else nothing: the solve
        rate, the step after which it started, and the first and last version of the weights that
        sampled it, because training may have continued meanwhile.
        """
        every = self.config.eval.every
        if not (self.valid and every):
            return {}
        if step % every == 0:
            seed = derive_seed(self.config.run.seed, "valid", step)
            self.running = step, rollouts.begin(self.loop, self.valid, seed)
        wait = step == self.config.run.steps or (step + 1) % every == 0
        if self.running is None or (not wait and any_rank(not self.running[1].done())):
            return {}
        started, rollout = self.running
        self.running = None
        finished = join_shares(rollout.result)
        episodes, too_long = finished.episodes, finished.reasons[TOO_LONG]
        turns = [turn for episode in episodes for turn in episode.turns]
        versions = [version for turn in turns for version in turn.completion.weight_versions]
        return {
            "valid_solved": metrics.mean([*(e.solved for e in episodes), *[False] * too_long]),
            "valid_step": started,
            "valid_versions": [min(versions), max(versions)] if versions else None,
        }

    def full(self, name: str, *, version: int) -> None:
        """Run all protocols on the test problems with the weights `version`, and write
        eval/NAME.json, unless it is there already and of this version."""
        path, model = self.run.path / f"eval/{name}.json", f", version {version}"
        if not self.test or (path.exists() and read_json(path)["model"].endswith(model)):
            return
        data = self.config.data.test
        self.say(f"evaluating {name} training, on {len(self.test)} problems of {data}")
        protocols, episodes = self.run_protocols()
        if self.writer:
            self.write(name, version, protocols, episodes)
        rates = {name: part["solve_rate"]["value"] for name, part in protocols.items()}
        self.say("  " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))

    def run_protocols(self) -> tuple[dict[str, Any], tuple[Episode, ...]]:
        """Return the numbers of each protocol, and the episodes of the multi-turn dialogues."""
        protocols: dict[str, Any] = {}
        rules = self.loop.rules

        def roll_out(name: str, problems: Sequence[Problem], rules: Rules) -> tuple[Episode, ...]:
            if self.writer:
                self.run.note_progress(f"evaluate {name} begins")
            seed = derive_seed(derive_seed(self.config.run.seed, "test"), name)
            rollout = self.loop.under(rules).run_on_all_ranks(problems, seed)
            ids = [problem.id for problem in problems]
            outcomes = list(map(DialogueOutcomes.of, ids, rollout.outcomes))
            finished = FinishedDialogues.of(rules.turns, outcomes)
            protocols[name] = summarize(self.test, finished, samples=self.loop.rules.turns)
            return rollout.episodes

        episodes = roll_out("multi_turn", self.test, rules)
        samples = [problem for problem in self.test for _ in range(rules.turns)]
        single = roll_out("independent", samples, replace(rules, turns=1, feedback="true"))
        if distractors := distractors_of(single):
            misled = replace(rules, feedback="random", distractors=distractors)
            roll_out("random_feedback", self.test, misled)
        return protocols, episodes

    def write(
        self, name: str, version: int, protocols: dict[str, Any], episodes: Sequence[Episode]
    ) -> None:
        """Write eval/NAME_episodes.jsonl.zst, then eval/NAME.json, whose presence means that both
        are complete."""
        problems = {problem.id: problem for problem in self.test}
        self.run.write_episodes(
            f"eval/{name}_episodes.jsonl.zst",
            [episode_record(e, self.loop.chat, problems[e.problem_id]) for e in episodes],
        )
        sampling = self.loop.rules.sampling
        content = {
            "model": f"{self.config.model.path}, version {version}",
            "data": str(self.config.data.test),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "turns": self.loop.rules.turns,
            "problems": len(self.test),
            "seed": self.config.run.seed,
            "protocols": protocols,
        }
        self.run.write_json(f"eval/{name}.json", content)
