"""What all tests share: each works in an empty folder of its own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def start_in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Change to an empty folder for the fixtures of modules, which run before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to an empty folder, so that nothing in a checkout, such as a demo's runs/, can affect
    a test."""
    monkeypatch.chdir(tmp_path)
