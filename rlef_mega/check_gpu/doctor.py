"""`rlef doctor`: what this machine has, what a run would use, and the command that installs each
piece that is missing. Needs no GPU."""

import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions, requires
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from rlef_mega.config import ServersConfig
from rlef_mega.megatron.network import accelerations
from rlef_mega.run.manifest import device, versions
from rlef_sandbox import IsolationError, Sandbox

KERNEL = "a Linux kernel from 5.13; in a container: docker run --security-opt seccomp=unconfined"
SPEED = {  # what each package makes faster on a GPU
    "triton": "log-probs and losses in the output head",
    "flash_attn": "attention over packed sequences",
    accelerations.WEIGHT_GRADIENTS: "apex: weight gradients added directly to the main gradients",
}


def examine() -> bool:
    """Print what was found and what is missing. Returns whether the sandbox starts."""
    table = Table("what", "found")
    table.add_row("device", device())
    for package, number in versions().items():
        table.add_row(package, number)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for part, choice in accelerations.report(where, torch.bfloat16).items():
        table.add_row(part, choice)
    refused, layers = sandbox_layers()
    for layer, state in layers.items():
        table.add_row(f"sandbox {layer}", str(state))
    Console().print(table)
    for piece, purpose, command in missing_pieces(refused, layers):
        print(f"missing: {piece} ({purpose})\n    {command}")
    return refused is None


def sandbox_layers() -> tuple[str | None, Mapping[str, Any]]:
    """Return None and a sandbox's layers; if it does not start, why not, and a minimal one's."""
    try:
        with Sandbox(workers=1) as sandbox:
            return None, sandbox.isolation
    except IsolationError as error:
        with Sandbox(workers=1, isolation="minimal") as sandbox:
            return str(error), sandbox.isolation


def missing_pieces(
    refused: str | None, layers: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield each missing piece, what it is for, and the command that installs it."""
    if refused:
        yield "isolation", f"to grade programs: {refused}", KERNEL
    if layers["launcher"] != "native" or shutil.which("g++") is None:
        yield "g++", "to start programs fast, to grade C++, for Triton", "apt-get install g++"
    if torch.version.cuda is None:
        command = "make setup-gpu PYTHON=python3.12"
        yield "a CUDA build of PyTorch", "to train on GPUs, for rlef rehearse", command
    elif not torch.cuda.is_available():
        yield "a GPU", "PyTorch finds none; this command says if the driver does", "nvidia-smi"
    for package, purpose in SPEED.items():
        if (fault := accelerations.fault(package)) and "no NVIDIA GPU" not in fault:
            yield package, f"{purpose}; {fault}", accelerations.INSTALL[package]
    if not Path(ServersConfig().python).exists():
        kind = "-gpu PYTHON=python3.12" if torch.version.cuda else ""
        yield "SGLang", "to sample from servers", f"make setup-sglang{kind}"
    for extra, package in missing_extras():
        yield package, f"extra '{extra}'", f"pip install 'rlef-mega[{extra}]'"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield "the Hugging Face hub", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"


def missing_extras() -> Iterator[tuple[str, str]]:
    """Yield each missing package of an extra, with the extra; those of `gpu` are in SPEED."""
    if not is_installed("rlef-mega"):  # a checkout on Python's path
        return
    wanted = [Requirement(words) for words in requires("rlef-mega") or ()]
    for extra in ("serve", "smollm2", "data", "tensorboard", "wandb", "dev"):
        for each in wanted:
            belongs = each.marker and each.marker.evaluate({"extra": extra})
            if belongs and not is_installed(each.name):
                yield extra, each.name


def is_installed(package: str) -> bool:
    return any(distributions(name=package))
