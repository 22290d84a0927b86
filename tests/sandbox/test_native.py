"""Where the built C library is kept: in a folder that is ours alone, or nowhere."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from rlef_sandbox import Sandbox, native

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler here")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Return the user's cache and the temporary folder, both new."""
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    cache.mkdir(mode=0o700)
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return cache, temporary


def test_a_library_is_built_once_and_found_again(places: tuple[Path, Path]) -> None:
    built = native.spawn_library()
    assert built is not None and built.is_relative_to(places[0])
    first = built.stat().st_mtime_ns
    assert native.spawn_library() == built
    assert built.stat().st_mtime_ns == first
    assert os.listdir(places[0] / "rlef_sandbox") == [built.parent.name], "no scratch is left"


def test_a_folder_that_others_may_write_to_is_not_used(places: tuple[Path, Path]) -> None:
    (places[0] / "rlef_sandbox").mkdir()
    (places[0] / "rlef_sandbox").chmod(0o777)
    built = native.spawn_library()
    assert built is not None and built.is_relative_to(places[1])


def test_a_user_without_a_home_builds_among_the_temporary_files(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    built = native.spawn_library()
    assert built is not None and built.is_relative_to(places[1])


def test_without_a_cache_folder_the_supervisor_is_the_one_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: None)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.isolation["launcher"] == "python"
        assert sandbox.languages == ("python",)
        assert sandbox.run("print(1)").stdout == b"1\n"


def test_a_library_that_cannot_be_loaded_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "zygote.so"
    broken.write_bytes(b"of another machine")
    monkeypatch.setattr(native, "spawn_library", lambda: broken)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.isolation["launcher"] == "python"
        assert sandbox.languages == ("python",), "not C++, which would be taken for Python"
        assert sandbox.run("print(1)").stdout == b"1\n"
