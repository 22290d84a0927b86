"""Which megatron-core a run starts with."""

import tomllib
from pathlib import Path

import pytest

from rlef_mega import versions
from rlef_mega.config import ConfigError


@pytest.mark.parametrize("found", ["0.16.1", "0.17.1", "0.19.2", "0.19.2+local"])
def test_a_tested_megatron_core_is_accepted(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: found)
    versions.refuse_untested_megatron()


@pytest.mark.parametrize("found", ["0.15.3", "0.16.0", "0.20.0rc1", "0.20.0", "1.0"])
def test_an_untested_megatron_core_is_refused_by_name(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: found)
    with pytest.raises(ConfigError, match=rf"megatron-core {found} .* 'megatron-core>=0\.16\.1,<"):
        versions.refuse_untested_megatron()


def test_the_package_asks_for_what_was_tested():
    first, before = versions.MEGATRON_CORE
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"megatron-core>={first},<{before}" in project["dependencies"]
    versions.refuse_untested_megatron()  # the installed one, too
