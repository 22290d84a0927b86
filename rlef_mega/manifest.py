"""What a run or a benchmark was made with: versions, device, layout."""

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("rlef-mega", "torch", "megatron-core", "transformers", "triton", "flash-attn", "sglang")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The accelerator, or the processor by its model name."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"CPU {names[0]} x {len(names)}"
    except (OSError, IndexError):
        return f"CPU {platform.machine()}"


def describe(**more: Any) -> dict[str, Any]:
    """The part that is common to runs and benchmarks, and what the caller adds."""
    return {
        "versions": versions(),
        "device": device(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }
