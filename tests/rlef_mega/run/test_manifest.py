"""Which versions of megatron-core a run accepts."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlef_mega.config import ConfigError
from rlef_mega.run import manifest


@pytest.mark.parametrize("found", ["0.16.1", "0.17.1", "0.19.2", "0.19.2+local"])
def test_a_tested_megatron_core_is_accepted(found, monkeypatch):
    monkeypatch.setattr(manifest, "version", lambda package: found)
    manifest.refuse_untested_megatron()


@pytest.mark.parametrize("found", ["0.15.3", "0.16.0", "0.20.0rc1", "0.20.0", "1.0"])
def test_an_untested_megatron_core_is_refused_by_name(found, monkeypatch):
    monkeypatch.setattr(manifest, "version", lambda package: found)
    with pytest.raises(ConfigError, match=rf"megatron-core {found} .* 'megatron-core>=0\.16\.1,<"):
        manifest.refuse_untested_megatron()


def test_the_package_requires_the_tested_versions():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert f"megatron-core{manifest.MEGATRON_CORE}" in project["dependencies"]
    manifest.refuse_untested_megatron()  # the installed one, too


def test_another_megatron_on_the_path_is_refused_unless_asked_for(tmp_path):
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").touch()
    check = "from rlef_mega.run.manifest import refuse_untested_megatron as r; r()"

    def checked(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-c", check],
            env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), *sys.path]), **more},
            capture_output=True,
            text=True,
        )

    assert f"import megatron.core from {tmp_path}/megatron/core" in checked().stderr
    assert checked(RLEF_FOREIGN_MEGATRON="1").returncode == 0
