"""Fixtures of the tests on the null GPU: `make test-null-gpu` starts them on two null GPUs."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def on_the_null_gpu() -> None:
    if "NULL_GPU_DEVICE" not in os.environ:
        pytest.skip("not on the null GPU: make test-null-gpu")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the tokenizer and random two-layer model that the supervised stage starts from."""
    from rlef_mega.config import SFTConfig, find_recipe, load_config
    from rlef_mega.demo.base_model import make_initial_model

    folder = tmp_path_factory.mktemp("model") / "base"
    shape = ["hidden_size=32", "num_layers=2", "ffn_hidden_size=64"]
    overrides = [f"dir={json.dumps(str(folder))}", *shape]
    make_initial_model(load_config(find_recipe("demo_base"), overrides, SFTConfig))
    return folder / "init"
