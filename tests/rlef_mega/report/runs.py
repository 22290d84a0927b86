"""A run directory as a finished run leaves it, drawn from a seed, to report on in tests."""

import json
import random
import re
from pathlib import Path
from typing import Any

import zstandard

FAMILIES = ("const", "greet", "parity", "pick", "sep", "unit")
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


def write_run(run: Path, *, seed: int = 0, steps: int = 40, problems: int = 120) -> Path:
    """The whole of it: config, manifest, metrics, evaluations and episodes of three stages."""
    random_source = random.Random(seed)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(CONFIG)
    (run / "manifest.json").write_text(json.dumps(MANIFEST))
    records = [metrics_of_step(step, steps, random_source) for step in range(1, steps + 1)]
    write_metrics(run, records)
    for stage, skill in (("before", 0.1), ("after", 0.65)):
        episodes = [make_episode(i, skill, random_source) for i in range(problems)]
        write_episodes(run / "eval" / f"{stage}_episodes.jsonl.zst", episodes)
        write_evaluation(run, stage, evaluation_of(episodes, random_source))
    training = [make_episode(i, 0.6, random_source, values=True) for i in range(30)]
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


def metrics_of_step(step: int, steps: int, source: random.Random) -> dict[str, Any]:
    progress = 1 / (1 + 2.718 ** (-10 * (step / steps - 0.4)))

    def around(value: float, spread: float = 0.02) -> float:
        return value + source.gauss(0, spread)

    record: dict[str, Any] = {
        "step": step,
        "updates": 4 * step,
        "episodes": 256,
        "dropped": 0,
        "solved": around(0.42 + 0.33 * progress),
        "solved_turn1": around(0.30 + 0.03 * progress),
        "repaired_turn2": around(0.10 + 0.42 * progress, 0.03),
        "repaired_turn3": around(0.08 + 0.30 * progress, 0.04),
        "invalid_fraction": abs(around(0.015, 0.005)),
        "turns_mean": around(2.2 - 0.4 * progress),
        "response_tokens_mean": around(16, 0.5),
        "tokens": 33_000 + source.randrange(2000),
        "reward": around(-0.2 + 0.7 * progress, 0.05),
        "return": around(-0.22 + 0.69 * progress, 0.05),
        "kl": abs(around(0.002 + 0.3 * progress, 0.01)),
        "entropy": around(0.5 - 0.2 * progress),
        "value_explained_variance": around(0.4 * progress, 0.05),
        "policy_loss": around(-0.01, 0.005),
        "value_loss": around(0.4 - 0.1 * progress),
        "clip_fraction": abs(around(0.05, 0.01)),
        "behaviour_factor": abs(around(0.99)),
        "value_clip_fraction": abs(around(0.1)),
        "policy_grad_norm": abs(around(0.4, 0.1)) + 0.01,
        "critic_grad_norm": abs(around(2.0, 0.5)) + 0.01,
        "logprob_gap_max": 10 ** around(-4.5, 0.2),
        "logprob_gap_mean": 10 ** around(-6, 0.1),
        "staleness_mean": around(1.0),
        "staleness_max": source.choice((1, 2)),
        "effective_sample_size": around(0.97, 0.01),
        "truncated_fraction": around(0.05, 0.01),
        "servers": {"requests": 40, "follow_up_cached_share": around(0.94, 0.01)},
        "idle_time": {"trainer": around(0.1), "engines": around(0.2)},
        "time": times_of_step(step, source),
    }
    if step % 10 == 0:
        record["valid_solved"] = around(0.4 + 0.35 * progress)
    return record


def times_of_step(step: int, source: random.Random) -> dict[str, float]:
    phases = {
        "rollout": source.gauss(2.0, 0.2),
        "score": source.gauss(1.2, 0.1),
        "update": source.gauss(4.1, 0.2),
        "publish": source.gauss(0.15, 0.01),
        "checkpoint": 0.4 if step % 10 == 0 else 0.0,
        "evaluate": 3.0 if step % 10 == 0 else 0.0,
    }
    return phases | {"step": 0.2 + sum(phases.values())}


def make_episode(
    number: int, skill: float, source: random.Random, *, values: bool = False
) -> dict[str, Any]:
    """A greeting to guess: right at turn 1 three times of ten, later with the chance `skill`."""
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


def evaluation_of(episodes: list[dict[str, Any]], source: random.Random) -> dict[str, Any]:
    """What an evaluation writes, computed from its episodes."""
    outcomes = [episode["solved"] for episode in episodes]
    guesses = [source.random() < 0.4 for _ in episodes]
    firsts = [episode for episode in episodes if len(episode["turns"]) > 1]
    multi_turn = {
        "solve_rate": with_interval(outcomes),
        "turn1": with_interval([len(episode["turns"]) == 1 for episode in episodes]),
        "by_family": grouped(episodes, lambda episode: episode["family"]),
        "by_kind": grouped(episodes, lambda episode: episode["tags"][0]),
        "repaired_turn2": sum(bool(e["turns"][1]["solved"]) for e in firsts) / len(firsts),
        "repaired_turn3": None,
        "invalid_fraction": 0.0213,
        "outcomes": outcomes,
        "error_kinds": {"turn1": {"WRONG_ANSWER": len(firsts), "RUNTIME_ERROR": 2}},
    }
    return {
        "model": "models/demo",
        "data": "curriculum:test",
        "temperature": 1.0,
        "top_p": 1.0,
        "turns": 3,
        "problems": len(episodes),
        "seed": 0,
        "protocols": {
            "multi_turn": multi_turn,
            "independent": {"solve_rate": with_interval(guesses), "outcomes": guesses},
            "random_feedback": {"solve_rate": with_interval(guesses[::-1])},
        },
    }


def grouped(episodes: list[dict[str, Any]], key: Any) -> dict[str, Any]:
    groups: dict[str, list[bool]] = {}
    for episode in episodes:
        groups.setdefault(key(episode), []).append(episode["solved"])
    return {name: with_interval(solved) for name, solved in groups.items()}


def with_interval(outcomes: list[bool]) -> dict[str, Any]:
    value, count = sum(outcomes) / len(outcomes), len(outcomes)
    half = 1.96 * (value * (1 - value) / count) ** 0.5
    low, high = max(0.0, value - half), min(1.0, value + half)
    return {"value": value, "low": low, "high": high, "problems": count}
