"""What all tests share: each works in an empty folder of its own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def start_in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For fixtures of modules and classes, which run before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a checkout holds, such as the runs/ of a demo, can change a test's outcome."""
    monkeypatch.chdir(tmp_path)
