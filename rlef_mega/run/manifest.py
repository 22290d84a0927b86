"""The versions and device that runs and benchmarks record, and the megatron-core they accept."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from rlef_mega.config import ConfigError

PACKAGES = ("rlef-mega", "torch", "megatron-core", "transformers", "triton", "flash-attn", "sglang")


def versions() -> dict[str, str]:
    """Return the versions of Python and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """Return the name of the GPUs, or of the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"CPU {names[0]} x {len(names)}"
    except (OSError, IndexError):
        return f"CPU {platform.machine()}"


def describe(**more: Any) -> dict[str, Any]:
    """Return the record that runs and benchmarks share, with the caller's additions."""
    return {
        "versions": versions(),
        "device": device(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


MEGATRON_CORE = ">=0.16.1,<0.20"  # as in pyproject.toml


def refuse_untested_megatron() -> None:
    """Raise ConfigError if megatron-core is missing, of an untested minor version (its interfaces
    change with each), or hidden by another `megatron` on Python's path."""
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise ConfigError(
            f"megatron-core is not installed; pip install 'megatron-core{MEGATRON_CORE}'"
        ) from None
    # by PEP 440 a release candidate of the upper bound is not below it
    if not SpecifierSet(MEGATRON_CORE).contains(found, prereleases=True):
        raise ConfigError(
            f"megatron-core {found} was not tested with this version of rlef-mega; "
            f"pip install 'megatron-core{MEGATRON_CORE}' (from 0.17 on it needs Python 3.12)"
        )
    # an editable installation has no file there, and nothing to compare with
    installed = Path(str(distribution("megatron-core").locate_file("megatron/core/__init__.py")))
    spec = find_spec("megatron.core")
    imported = Path(spec.origin) if spec and spec.origin else None
    asked = os.environ.get("RLEF_FOREIGN_MEGATRON") == "1"
    if installed.exists() and not asked and not (imported and imported.samefile(installed)):
        raise ConfigError(
            f"Python would import megatron.core from {imported}, not the installed megatron-core "
            f"{found} ({installed}); remove its folder from PYTHONPATH and the working directory, "
            "or set RLEF_FOREIGN_MEGATRON=1 to use it untested"
        )
