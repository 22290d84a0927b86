"""`rlef doctor` names what is missing, each with a command that exists."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlef_mega.check_gpu import doctor
from rlef_mega.megatron.network import accelerations

ROOT = Path(__file__).parents[3]


def test_a_bare_machine_lacks_a_compiler_servers_and_a_hub(tmp_path: Path) -> None:
    """In an empty folder, without programs or a library compiled before."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "sandbox"))
    bare = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "rlef_mega.cli", "doctor"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | bare | {"PYTHONPATH": paths}, capture_output=True
    )
    printed = ended.stdout.decode()
    assert ended.returncode == 0, ended.stderr
    commands = dict(re.findall(r"^missing: (.+?) \(.*\)\n    (.+)$", printed, re.MULTILINE))
    assert commands["g++"] == "apt-get install g++"
    assert commands["SGLang"].startswith("make setup-sglang")
    assert commands["the Hugging Face hub"] == "unset HF_HUB_OFFLINE"


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_every_missing_piece_has_a_command_that_exists(monkeypatch, tmp_path, cuda) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.torch.version, "cuda", cuda)
    monkeypatch.setattr(accelerations, "fault", lambda package: accelerations.NOT_INSTALLED)
    monkeypatch.setattr(
        doctor, "is_installed", lambda package: package not in ("aiohttp", "pyarrow", "pytest")
    )
    pieces = {
        name: (purpose, command)
        for name, purpose, command in doctor.missing_pieces(
            "this machine lacks seccomp", {"launcher": "python"}
        )
    }
    torch = "a GPU" if cuda else "a CUDA build of PyTorch"
    assert {"isolation", "g++", torch, "triton", "flash_attn", "SGLang"} < pieces.keys()
    assert {accelerations.WEIGHT_GRADIENTS, "aiohttp"} < pieces.keys()
    assert "seccomp" in pieces["isolation"][0]
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for _, command in pieces.values():
        if target := re.match(r"make ([\w-]+)", command):
            assert f"\n{target[1]}:" in makefile, command
        if extra := re.search(r"rlef-mega\[(\w+)\]", command):
            assert f"\n{extra[1]} = " in project, command


def test_images_install_what_make_does() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for file in ("Dockerfile", "apptainer.def"):
        made = re.findall(r"make ([\w-]+)", (ROOT / file).read_text())
        assert [m for m in made if m in targets] == ["setup-gpu", "setup-sglang-gpu"], file


@pytest.mark.parametrize(
    ("file", "python"),
    [
        ("requirements-cpu.txt", "3.11"),
        ("requirements-cpu.txt", "3.12"),
        ("requirements-gpu.txt", "3.12"),
    ],
)
def test_a_lock_file_has_one_exact_version_of_everything_needed(file: str, python: str) -> None:
    """Also of what the tests need; megatron-core's depends on Python's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], "triton>=3.6"]
    needed += [words for name in ("serve", "smollm2", "data", "dev") for words in extras[name]]
    locked: dict[str, list[Requirement]] = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                locked.setdefault(canonicalize_name(pin.name), []).append(pin)
    for wanted in map(Requirement, needed):
        (pin,) = locked[canonicalize_name(wanted.name)]
        (exact,) = pin.specifier
        assert exact.operator == "==" and wanted.specifier.contains(exact.version), wanted.name
