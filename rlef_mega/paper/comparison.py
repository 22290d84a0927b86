"""`rlef reproduce`: run the paper's comparison on one base model and budget, and print its table
beside the paper's numbers.

Every run is an `rlef` command in a folder of its own under OUT. A finished run is not repeated, so
the same command resumes the comparison. All runs share the base model, the problems and the number
of updates. Seeds differ in the problems drawn, in sampling and in the critic's head.

    OUT/asked.json           the settings of all runs; a command with others is refused
    OUT/RUN-SEED/            the runs
    OUT/eval/                the evaluations of longer dialogues, for the turn budgets
    OUT/reproduce.json       rates of every seed, and the table's means with their intervals
    OUT/reproduce.md, .png   the table; a plot of the turn budgets

Intervals resample seeds and problems. With one seed they cover other problems, but not other runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from rlef_mega.config import (
    ConfigError,
    TrainConfig,
    differences,
    find_recipe,
    flatten,
    load_config,
)
from rlef_mega.preflight import check_imitation
from rlef_mega.report.intervals import interval_over_seeds
from rlef_mega.report.plots import PALETTE, STYLE
from rlef_mega.run.directory import write_atomically
from rlef_mega.run.launch import stage
from rlef_mega.run.manifest import describe

TURNS = 5  # of each dialogue for the turn budgets, which are computed from its first turns
PROTOCOLS = ("multi_turn", "independent", "random_feedback")
RUNS: dict[str, tuple[str, ...]] = {  # by `rlef train`, with these settings
    "rlef": (),
    "no_feedback": ("rollout.feedback=none", "eval.feedback=none"),
    "token_value": ("ppo.token_level_value=true",),
    "single_turn": ("rollout.turns=1",),
    # not the paper's: the same number of dialogues, eight of each problem, and no critic
    "rloo": ("ppo.advantage=rloo", "rollout.samples_per_problem=8"),
    "grpo": ("ppo.advantage=grpo", "rollout.samples_per_problem=8"),
}
IMITATION = "imitation"  # by `rlef imitate`
BUDGETS = ("base", "rlef")  # whose turn budgets are drawn


# name, run, its evaluation, and the paper's 1@3 of the 8B model on valid and test (tables 1 and 2)
ROWS = (
    ("base", "rlef", "before", "8.9 / 10.5"),
    ("SFT on solved dialogues", IMITATION, "after", "10.3 / 10.0"),
    ("single-turn RL", "single_turn", "after", "10.2 / 10.9"),
    ("RLEF", "rlef", "after", "17.2 / 16.1"),
    ("RLEF, no feedback", "no_feedback", "after", "12.2 / 10.9"),
    ("RLEF, one value per token", "token_value", "after", "13.1 / 13.7"),
    ("RLOO instead of the critic", "rloo", "after", ""),
    ("GRPO instead of the critic", "grpo", "after", ""),
)


def reproduce(
    recipe: str,
    out: Path,
    *,
    seeds: Sequence[int],
    overrides: Sequence[str],
    only: Sequence[str] = (),
) -> None:
    """Run what is missing of all runs, or of those named in `only`, then write and print the table.
    If a run fails, exit with its code."""
    runs = [name for name in (*RUNS, IMITATION) if name in only or not only]
    if unknown := set(only).difference(runs):
        known = ", ".join((*RUNS, IMITATION))
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: the runs are {known}")
    config = load_config(find_recipe(recipe), overrides, TrainConfig)
    for name in runs:  # refused now rather than after the other runs
        try:
            load_config(find_recipe(recipe), [*overrides, *RUNS.get(name, ())], TrainConfig)
        except ConfigError as error:
            raise ConfigError(f"the run {name}: {error}") from None
    if not config.data.test:
        raise ConfigError("rlef reproduce compares solve rates on data.test; set it")
    if IMITATION in runs:
        check_imitation(config)
    refuse_another(out / "asked.json", config)
    if recipe == "demo" and not (Path(config.model.path) / "config.json").is_file():
        stage("base model", "sft", "demo_base")
    sets = [word for override in overrides for word in ("--set", override)]
    for seed in seeds:
        for name in runs:
            run_once(recipe, out / f"{name}-{seed}", name, seed, sets)
        for name in BUDGETS if "rlef" in runs else ():
            base = config.model.weights or config.model.path
            model = base if name == "base" else str(out / f"rlef-{seed}")
            run_long_dialogues(config, model, out, f"{name}-{seed}", seed)
    results = collect(out, seeds, runs)
    chosen = [word for name in only for word in ("--only", name)]
    command = " ".join(["rlef reproduce", recipe, f"--seeds {len(seeds)}", *chosen, *sets])
    about = describe(
        command=command,
        recipe=recipe,
        overrides=list(overrides),
        seeds=list(seeds),
        updates=config.run.steps * config.ppo.updates_per_batch,
        dialogues=config.run.steps * config.rollout.episodes_per_batch,
        test=config.data.test,
        turn_budget_problems=config.eval.problems,
    )
    write_atomically(out / "reproduce.json", json.dumps({**about, **results}, indent=1) + "\n")
    write_atomically(out / "reproduce.md", markdown(results))
    if results["turn_budget"]:
        save_turn_budgets(results["turn_budget"], out / "reproduce.png")
    Console().print(Markdown(markdown(results)))
    print(f"the table is in {out / 'reproduce.md'}, all numbers are in reproduce.json")


def refuse_another(path: Path, config: TrainConfig) -> None:
    """Raise ConfigError if OUT contains runs with other settings."""
    asked = config.model_dump(mode="json", exclude={"run": {"dir", "seed"}, "guard": True})
    if not path.exists():
        write_atomically(path, json.dumps(asked, indent=1) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if other := differences(flatten(found), flatten(asked)):
        raise ConfigError(
            f"{path.parent} has runs of other settings ({other}); choose another --out or remove it"
        )


def run_once(recipe: str, run: Path, name: str, seed: int, sets: Sequence[str]) -> None:
    if (run / "eval/after.json").is_file():
        return
    command = "imitate" if name == IMITATION else "train"
    own = (f"run.dir={json.dumps(str(run))}", f"run.seed={seed}", *RUNS.get(name, ()))
    words = [word for setting in own for word in ("--set", setting)]
    stage(f"{name}, seed {seed}", command, recipe, *sets, *words)


def run_long_dialogues(config: TrainConfig, model: str, out: Path, name: str, seed: int) -> None:
    """Evaluate a model for the turn budgets, on the first `eval.problems` test problems."""
    if (out / f"eval/{name}.json").is_file():
        return
    rollout, evaluation = config.rollout, config.eval
    stage(
        f"turn budgets, {name}",
        *("eval", model, "--data", str(config.data.test), "--out", str(out), "--name", name),
        # as many dialogues as the budget of one turn draws: TURNS, each with one sample
        *("--turns", str(TURNS), "--n-at-k", f"1@{TURNS}", "--rollouts", str(TURNS)),
        *("--problems", str(evaluation.problems)),
        *("--feedback", "true", "--temperature", str(evaluation.temperature)),
        *("--top-p", str(evaluation.top_p), "--max-new-tokens", str(rollout.max_new_tokens)),
        *("--max-context", str(rollout.max_context), "--dtype", config.model.dtype),
        *("--program", rollout.program, "--feedback-cut", rollout.feedback_cut),
        *(("--feedback-tokens", str(rollout.feedback_tokens)) if rollout.feedback_tokens else ()),
        *(word for server in config.judge.servers for word in ("--server", server)),
        *(word for package in config.judge.packages for word in ("--package", package)),
        *("--isolation", config.judge.isolation, "--seed", str(seed)),
    )


def collect(out: Path, seeds: Sequence[int], runs: Sequence[str]) -> dict[str, Any]:
    """Read the rates of every row from the evaluations of the runs."""
    rows = {}
    for name, run, evaluation, paper in ROWS:
        if run not in runs:
            continue
        of_seeds = [
            json.loads((out / f"{run}-{seed}/eval/{evaluation}.json").read_text()) for seed in seeds
        ]
        rows[name] = {
            "paper": paper,
            **{
                protocol: interval([one["protocols"][protocol]["outcomes"] for one in of_seeds])
                for protocol in PROTOCOLS
                if all(protocol in one["protocols"] for one in of_seeds)
            },
        }
    return {
        "rows": rows,
        "turn_budget": {name: budgets(out, name, seeds) for name in BUDGETS if "rlef" in runs},
    }


def budgets(out: Path, name: str, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Return each seed's 1@TURNS by the maximum number of turns of a dialogue."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        content = json.loads((out / f"eval/{name}-{seed}.json").read_text())
        curve = content["protocols"]["multi_turn"]["turn_budget"][f"1@{TURNS}"]
        for turns, rate in curve.items():
            found.setdefault(turns, []).append(rate["value"])
    return found


def interval(outcomes: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Return the interval over seeds (one list each) and problems, and each seed's mean."""
    known = [[outcome for outcome in one if outcome is not None] for one in outcomes]
    return interval_over_seeds(outcomes) | {"seeds": [round(mean(one), 4) for one in known]}


HEADINGS = (
    "solved, %",
    "1@3 dialogues",
    "1@3 independent",
    "random feedback",
    "paper, 8B: valid / test",
)


def markdown(results: dict[str, Any]) -> str:
    """Return the comparison as a Markdown table, with rates in percent."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for name, row in results["rows"].items():
        rates = [
            f"{100 * r['value']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" if r else ""
            for r in map(row.get, PROTOCOLS)
        ]
        lines.append(f"| {' | '.join([name, *rates, row['paper'] or '-'])} |")
    return "\n".join(lines) + "\n"


def save_turn_budgets(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, curve), color in zip(curves.items(), PALETTE, strict=False):
            turns = [int(count) for count in curve]
            values = np.asarray(list(curve.values()))  # turns x seeds
            axes.plot(turns, 100 * values.mean(1), "o-", color=color, label=name)
            axes.fill_between(
                turns, 100 * values.min(1), 100 * values.max(1), color=color, alpha=0.2, lw=0
            )
        axes.set_xlabel(f"maximum turns of a dialogue, {TURNS} samples in all")
        axes.set_xticks(range(1, TURNS + 1))
        axes.set_ylabel(f"1@{TURNS}, % solved")
        axes.set_ylim(0, 100)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
