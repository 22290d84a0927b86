"""Write the run directory of a finished run, generated from a seed, for the report's tests."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import zstandard

from rlef_mega.evaluation.behaviour import NO_VALID_CODE, SOLVED, DialogueOutcomes
from rlef_mega.evaluation.numbers import FinishedDialogues, summarize
from rlef_mega.report.curves import PANELS, Panel
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Test

FAMILIES = ("const", "greet", "parity", "pick", "sep", "unit")
FEW_PANELS = [panel for panel in PANELS if panel.title in ("Solved", "Gradient norm")]
GREETINGS = ("Hello", "Hi", "Dear", "Welcome")
CONFIG = """[run]
dir = "runs/demo"
seed = 7
steps = 40

[model]
path = "models/demo-base"

[data]
train = "curriculum:train"
"""
MANIFEST = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1"},
    "device": "CPU, 2 cores",
    "layout": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "sequence_parallel": False,
    },
    "started": "2026-11-22T10:00:00",
    "accelerations": {"kernels": "PyTorch reference"},
    "isolation": {"seccomp": True, "landlock": False},
}


def write_run(
    run: Path,
    *,
    seed: int = 0,
    steps: int = 40,
    problems: int = 60,
    panels: Sequence[Panel] = PANELS,
) -> Path:
    """Write config, manifest, metrics, evaluations, and episodes of three stages. Each panel takes
    time to draw, so most tests ask for few."""
    source = random.Random(seed)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(CONFIG)
    (run / "manifest.json").write_text(json.dumps(MANIFEST))
    write_metrics(run, [metrics_of_step(step, source, panels) for step in range(1, steps + 1)])
    for stage, skill in (("before", 0.1), ("after", 0.65)):
        episodes = [make_episode(i, skill, source) for i in range(problems)]
        write_episodes(run / "eval" / f"{stage}_episodes.jsonl.zst", episodes)
        write_evaluation(run, stage, evaluation_of(episodes))
    training = [make_episode(i, 0.6, source, values=True) for i in range(30)]
    write_episodes(run / "episodes" / f"step_{steps:06d}.jsonl.zst", training)
    return run


def write_metrics(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_evaluation(run: Path, stage: str, evaluation: dict[str, Any]) -> None:
    path = run / "eval" / f"{stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evaluation))


def write_episodes(path: Path, episodes: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(episode) + "\n" for episode in episodes)
    path.write_bytes(zstandard.compress(lines.encode()))


def metrics_of_step(
    step: int, source: random.Random, panels: Sequence[Panel] = PANELS
) -> dict[str, Any]:
    """Return a value of every curve of the panels, and times; validation every ten steps."""
    phases = {"rollout": 2.0, "score": 1.2, "update": 4.1, "publish": 0.15}
    record: dict[str, Any] = {
        "step": step,
        "episodes": 256,
        "tokens": 33_000 + step,
        "time": phases | {"step": 0.2 + sum(phases.values())},
    }
    for key in (key for panel in panels for key in panel.curves.values()):
        *groups, name = key.split(".")
        table = record
        for group in groups:
            table = table.setdefault(group, {})
        if not key.startswith("valid") or step % 10 == 0:
            table[name] = abs(source.gauss(0.4, 0.05))
    return record


def make_episode(
    number: int, skill: float, source: random.Random, *, values: bool = False
) -> dict[str, Any]:
    """Make a dialogue that guesses a greeting: solved at turn 1 with probability 0.3, later with
    probability `skill`."""
    wanted = source.choice(GREETINGS)
    observation = (
        "Provide a Python solution for the following competitive programming question: Greet the "
        "person whose name is given. Use the backticks for your code only."
    )
    turns: list[dict[str, Any]] = []
    while len(turns) < 3 and not (turns and turns[-1]["solved"]):
        right = source.random() < (skill if turns else 0.3)
        valid = right or source.random() > 0.05
        word = wanted if right else source.choice([w for w in GREETINGS if w != wanted])
        turns.append(make_turn(observation, word, wanted, valid=valid, last=len(turns) == 2))
        if values:
            value = source.uniform(-1, 1)
            references = [logprob - 40 * (n % 9) for n, logprob in enumerate(turns[-1]["logprobs"])]
            turns[-1] |= {"value": value, "return": 1.0, "advantage": 1.0 - value}
            turns[-1] |= {"ref_logprobs": references}
        observation = (
            f"Your code failed the following tests:\n- input 'Bob' failed:\nExpected output "
            f"'{wanted} Bob' but got '{word} Bob'\nGive it another try."
        )
    return {
        "problem_id": f"greet-{number:04d}",
        "family": FAMILIES[number % len(FAMILIES)],
        "tags": [("vague", "word", "example")[number % 3]],
        "solved": bool(turns[-1]["solved"]),
        "turns": turns,
    }


def make_turn(
    observation: str, word: str, wanted: str, *, valid: bool, last: bool
) -> dict[str, Any]:
    program = f"# greet\nname = input()\nprint('{word}', name)\n"
    passed = valid and word == wanted
    outcome = {
        "input": "Bob\n",
        "expected": f"{wanted} Bob",
        "observed": f"{word} Bob",
        "status": "OK" if passed else "WRONG_ANSWER",
        "stderr": "",
    }
    response = f"```python\n{program}```" if valid else "I would greet Bob."
    pieces = [len(piece) for piece in re.findall(r"\w+|\W", response)]
    return {
        "observation": observation,
        "response": response,
        "program": program if valid else None,
        "public": [outcome] if valid else [],
        "public_passed": passed,
        "private": {"tests": 4, "run": 4, "passed": 4} if passed else None,
        "solved": passed if passed or last else None,
        "tokens": len(pieces) + 1,
        "pieces": [*pieces, 0],
        "logprobs": [-(37 * n % 900) - 900 * (n % 7 == 3) for n in range(len(pieces) + 1)],
        "versions": [[4, 5], [5, len(pieces) - 4]],
        "logprob_mean": -0.31,
        "value": None,
        "return": None,
        "advantage": None,
    }


def evaluation_of(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what an evaluation writes, computed from its episodes by the product's own code."""
    tests = PrivateTests((Test("", ""),))
    problems = [
        Problem(e["problem_id"], "", (), tests, family=e["family"], tags=tuple(e["tags"]))
        for e in episodes
    ]
    multi = [
        DialogueOutcomes(
            episode["problem_id"],
            tuple(outcome_of_turn(turn) for turn in episode["turns"]),
            tuple(turn["program"] for turn in episode["turns"]),
        )
        for episode in episodes
    ]
    single = [replace(d, outcomes=d.outcomes[:1], programs=d.programs[:1]) for d in multi]
    finished = {"multi_turn": FinishedDialogues(3, multi)}
    finished["independent"] = FinishedDialogues(1, single * 3)
    finished["random_feedback"] = FinishedDialogues(3, multi[1:])
    return {
        "model": "models/demo",
        "data": "curriculum:test",
        "temperature": 1.0,
        "top_p": 1.0,
        "turns": 3,
        "problems": len(episodes),
        "seed": 0,
        "protocols": {name: summarize(problems, one, samples=3) for name, one in finished.items()},
    }


def outcome_of_turn(turn: dict[str, Any]) -> str:
    if turn["program"] is None:
        return NO_VALID_CODE
    return SOLVED if turn["public_passed"] else "WRONG_ANSWER"
