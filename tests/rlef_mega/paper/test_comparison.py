"""`rlef reproduce`: its tables from finished runs, whose files are written by hand; and that it
does not repeat a finished run."""

import json

import pytest

from rlef_mega.config import ConfigError
from rlef_mega.paper import comparison
from rlef_mega.paper.comparison import BUDGETS, IMITATION, ROWS, RUNS, collect, save_turn_budgets
from rlef_mega.paper.comparison import markdown as table
from tests.rlef_mega.test_printed_commands import check_rlef

SEEDS = (3, 4)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def finished(tmp_path):
    """Write every run of both seeds; the n-th row's dialogues solve n of 10 problems."""
    for seed in SEEDS:
        for number, (_, run, evaluation, _) in enumerate(ROWS):
            outcomes = [float(n < number) for n in range(10)]
            protocols = {"multi_turn": {"outcomes": outcomes}}
            if run != IMITATION:
                protocols["independent"] = {"outcomes": outcomes}
            write(tmp_path / f"{run}-{seed}/eval/{evaluation}.json", {"protocols": protocols})
        for name in BUDGETS:
            curve = {"1": {"value": 0.1 * seed}, "5": {"value": 0.9}}
            content = {"protocols": {"multi_turn": {"turn_budget": {"1@5": curve}}}}
            write(tmp_path / f"eval/{name}-{seed}.json", content)
    return tmp_path


def test_the_table_has_a_row_of_the_paper_beside_each_of_ours(finished):
    results = collect(finished, SEEDS, (*RUNS, IMITATION))
    assert [row["multi_turn"]["value"] for row in results["rows"].values()] == [
        pytest.approx(number / 10) for number in range(len(ROWS))
    ]
    assert set(results["rows"]["SFT on solved dialogues"]) == {"paper", "multi_turn"}
    assert results["turn_budget"]["rlef"] == {"1": [pytest.approx(0.3), 0.4], "5": [0.9, 0.9]}
    lines = table(results).splitlines()
    assert len(lines) == len(ROWS) + 2
    assert len({line.count("|") for line in lines}) == 1
    rlef = next(line for line in lines if line.startswith("| RLEF |"))
    assert "30.0 [" in rlef and rlef.endswith("17.2 / 16.1 |")


def test_turn_budgets_are_drawn(finished):
    save_turn_budgets(collect(finished, SEEDS, ["rlef"])["turn_budget"], finished / "budgets.png")
    assert (finished / "budgets.png").stat().st_size > 5000


@pytest.fixture
def commands(monkeypatch):
    """Collect the commands, the first of which fails."""
    found = []

    def record(title, *words):
        found.append(words)
        raise SystemExit

    monkeypatch.setattr(comparison, "stage", record)
    return found


def test_finished_runs_are_not_repeated(finished, commands):
    """Only imitation of the second seed is missing: only it is run, with its seed and folder."""
    (finished / f"{IMITATION}-4/eval/after.json").unlink()
    for seed in SEEDS:
        for name in RUNS:
            write(finished / f"{name}-{seed}/eval/after.json", {"protocols": {}})
    model = finished / "base"
    write(model / "config.json", {})
    with pytest.raises(SystemExit):
        comparison.reproduce("demo", finished, seeds=SEEDS, overrides=[f"model.path={model}"])
    (words,) = commands
    asked = [f"model.path={model}", "run.steps=3"]
    with pytest.raises(ConfigError, match=r"run.steps = 30 there, 3 here.*choose another --out"):
        comparison.reproduce("demo", finished, seeds=SEEDS, overrides=asked)
    assert len(commands) == 1
    assert words[0] == "imitate" and "run.seed=4" in words
    assert f'run.dir="{finished / "imitation-4"}"' in words


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.test=''", "data.test; set it"),
        ("rollout.engine=sglang", "rlef imitate samples with the embedded engine"),
        ("ppo.lam=0.9", r"the run token_value: (?s:.*)ppo.lam = 0.9 needs one value per turn"),
    ],
)
def test_a_run_that_would_fail_is_refused_before_the_first_one_starts(
    tmp_path, commands, override, message
):
    with pytest.raises(ConfigError, match=message):
        comparison.reproduce("demo", tmp_path / "out", seeds=SEEDS, overrides=[override])
    assert not commands and not (tmp_path / "out").exists()


def test_turn_budgets_follow_the_recipes_rules_and_grading_from_its_own_weights(finished, commands):
    write(finished / "base/config.json", {})
    (finished / "eval/base-3.json").unlink()
    write(finished / "rlef-3/eval/after.json", {})
    asked = {
        "--program": ("rollout.program", ["last"]),
        "--feedback-cut": ("rollout.feedback_cut", ["right"]),
        "--feedback-tokens": ("rollout.feedback_tokens", ["100"]),
        "--server": ("judge.servers", ["http://a:1", "http://b:1"]),
        "--package": ("judge.packages", ["numpy", "sympy"]),
        "--isolation": ("judge.isolation", ["minimal"]),
    }
    sets = [f"model.path={finished / 'base'}", "model.weights=checkpoint"]
    for key, values in asked.values():
        sets.append(f"{key}={json.dumps(values) if len(values) > 1 else values[0]}")
    with pytest.raises(SystemExit):
        comparison.reproduce("demo", finished, seeds=SEEDS, overrides=sets, only=["rlef"])
    (words,) = commands
    assert words[:2] == ("eval", "checkpoint")
    options = [(word, words[n + 1]) for n, word in enumerate(words) if word in asked]
    assert sorted(options) == sorted((o, v) for o, (_, values) in asked.items() for v in values)
    check_rlef(list(words), inline=False)
