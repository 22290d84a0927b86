"""A training run's evaluations, of an engine that says what a test tells it, on three problems: one
that it solves, one that it fails, and one whose prompt leaves no room for a response."""

import json

import pytest

from rlef_mega.config import TrainConfig, find_recipe, load_config
from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.dialogues.batches import NumberedDialogues, RolloutsOnDemand
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import EmbeddedGrader, Judge
from rlef_mega.dialogues.rollout import DialogueLoop
from rlef_mega.evaluation.during_training import Evaluator
from rlef_mega.problems.jsonl import to_row
from rlef_mega.run.directory import RunDirectory
from rlef_sandbox import Sandbox
from tests.rlef_mega.dialogues.test_rollout import GREET, RIGHT, RULES, WRONG, ScriptedEngine


@pytest.fixture
def evaluator(tmp_path) -> Evaluator:
    rows = [
        {**to_row(GREET), "id": name, "statement": text}
        for name, text in (("solved", "Greet."), ("failed", "Greet."), ("long", "Greet. " * 600))
    ]
    data = tmp_path / "three.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data.valid", "data.test"]
    overrides = [f"{word}={json.dumps(str(data))}" for word in words]
    config = load_config(find_recipe("demo"), [*overrides, "eval.turns=1"], TrainConfig)
    chat = ChatFormat.for_tokenizer(train_tokenizer(tmp_path / "tokenizer", 704))
    engine = ScriptedEngine(chat, [RIGHT] * 9, [WRONG] * 9, [])
    with Sandbox(workers=1) as sandbox:
        loop = DialogueLoop(engine, Judge(EmbeddedGrader(sandbox, workers=1)), chat, RULES)
        run = RunDirectory(tmp_path)
        yield Evaluator(config, run, loop, writer=True, say=lambda line: None)


def written(evaluator: Evaluator) -> dict:
    return json.loads((evaluator.run.path / "eval/after.json").read_text())


def test_a_problem_whose_prompt_is_too_long_counts_as_failed(evaluator):
    evaluator.full("after", version=30)
    for numbers in written(evaluator)["protocols"].values():
        assert numbers["outcomes"] == [1, 0, 0] and not numbers["dropped"]
        assert numbers["error_kinds"]["turn1"]["PROMPT_TOO_LONG"] == 1
    dialogues = NumberedDialogues(evaluator.valid, evaluator.loop, evaluator.config)
    found = evaluator.quick(10, RolloutsOnDemand(dialogues))
    assert found["valid_solved"] == pytest.approx(1 / 3) and found["valid_versions"] == [7, 7]


def test_the_weights_of_another_version_are_evaluated_again_and_the_same_are_not(evaluator):
    """As in a run that was finished, and then continues for more steps."""
    opened = []
    for version in (3, 3, 33):
        evaluator.full("after", version=version)
        assert written(evaluator)["model"].endswith(f", version {version}")
        opened.append(evaluator.loop.engine.opened)
    assert opened == [6, 6, 12]
