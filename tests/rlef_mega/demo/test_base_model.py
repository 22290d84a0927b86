"""The supervised stage learns, survives a kill, and leaves a model that transformers loads."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlef_mega import cli
from tests.rlef_mega.distributed import Ranks, run_command
from tests.rlef_mega.test_train import wait_for

SETTINGS = [
    "steps=60",
    "optimizer.warmup_updates=5",
    "checkpoint_every=20",
    "dialogues_per_step=16",
    "hidden_size=32",
    "num_layers=2",
    "ffn_hidden_size=64",
]


def sft(folder: Path, meanwhile: Callable[[Ranks], object] = lambda ranks: None) -> list:
    """Run or resume `rlef sft`. Returns the exit codes of its ranks."""
    settings = [f"dir={json.dumps(str(folder))}", *SETTINGS]
    return run_command(lambda: cli.sft("demo_base", settings), meanwhile)[0]


def losses(folder: Path) -> list[float]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "base"
    assert sft(folder) == [0, 0]
    return folder


def test_the_loss_starts_at_chance_and_falls(base):
    first, *_, last = losses(base)
    assert first == pytest.approx(math.log(720), rel=0.05)  # the head starts small
    assert last < first / 3


def test_a_killed_stage_resumes_with_the_same_losses(base, tmp_path):
    folder = tmp_path / "killed"

    def kill(ranks: Ranks) -> None:
        wait_for(lambda: len(losses(folder)) >= 30, ranks)
        ranks.kill()

    sft(folder, kill)
    assert 30 <= len(losses(folder)) < 60
    assert sft(folder) == [0, 0]
    assert losses(folder) == losses(base)


def test_transformers_loads_the_result(base):
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    assert model.config.num_key_value_heads == 2
    assert len(tokenizer) == model.config.vocab_size == 720
    assert tokenizer.chat_template
