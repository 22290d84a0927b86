"""Imports go one way: a package imports only from levels below its own (docs/design.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Level of each module of rlef_mega; a folder stands for all in it.
LEVELS = {
    "types": 1,
    "config": 1,
    "flops": 1,
    "loop_thread": 1,
    "problems": 2,
    "versions": 2,
    "dialog": 2,
    "chat": 2,
    "packing": 2,
    "ppo": 2,
    "metrics": 2,
    "estimators": 2,
    "behaviour": 2,
    "judge": 3,
    "engines": 3,
    "megatron": 3,
    "shares": 3,
    "rollout": 4,
    "stream": 4,
}
TOP = 5  # everything else: the loop, commands, reports
# Packages that only one place may import.
ONLY_IN = {"megatron": "rlef_mega/megatron", "rlef_kernels": "rlef_mega/megatron"}
ALONE = {  # a package at level 0, and all that it may import beside the standard library
    "kernels/rlef_kernels": {"torch", "triton", "rlef_kernels"},
    "sandbox/rlef_sandbox": {"rlef_sandbox"},
}
# The one part of a package at level 0 that may import more, which the rest must not import.
SERVICE = "sandbox/rlef_sandbox/service"
SERVICE_ALLOWED = {"rlef_sandbox", "aiohttp"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute imports; a relative one stays within its package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "rlef_mega" and len(parts) > 1 else None


def level(name: str) -> int:
    return LEVELS.get(name, TOP)


@pytest.mark.parametrize("path", sources("rlef_mega"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_come_from_levels_below(path):
    parts = path.relative_to(ROOT / "rlef_mega").with_suffix("").parts
    own = parts[0]
    rooms = {p.stem for p in (ROOT / "rlef_mega").iterdir()}
    for module in imported_modules(path):
        other = room(module)
        if other is None or other == own or other not in rooms:
            continue
        # within a level modules may know each other, but not in a circle (Python would refuse that)
        assert level(other) <= level(own), f"{path.name} (level {level(own)}) imports {module}"


def test_rollout_and_megatron_meet_only_in_types():
    for path in sources("rlef_mega/megatron"):
        assert not any("rollout" in module for module in imported_modules(path)), path
    for module in imported_modules(ROOT / "rlef_mega/rollout.py"):
        assert not module.startswith(("megatron", "rlef_mega.megatron"))


@pytest.mark.parametrize(("package", "home"), ONLY_IN.items())
def test_one_place_imports(package, home):
    for path in sources("rlef_mega"):
        names = {module.split(".")[0] for module in imported_modules(path)}
        inside = str(path.relative_to(ROOT)).startswith((home, "rlef_mega/bench"))
        assert package not in names or inside, f"{path} imports {package}"


@pytest.mark.parametrize(("folder", "allowed"), ALONE.items())
def test_level_zero_packages_stand_alone(folder, allowed):
    for path in sources(folder):
        may = SERVICE_ALLOWED if path.is_relative_to(ROOT / SERVICE) else allowed
        names = {module.split(".")[0] for module in imported_modules(path)}
        foreign = names - may - set(sys.stdlib_module_names)
        assert not foreign, f"{path} imports {foreign}"


def test_the_sandbox_and_its_command_line_need_no_aiohttp():
    script = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "import rlef_sandbox, rlef_sandbox.__main__ as command\n"
        "sys.argv = ['rlef_sandbox', 'serve']; sys.exit(command.main())"
    )
    environment = {"PYTHONPATH": str(ROOT / "sandbox")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "serve needs aiohttp" in done.stderr, done.stderr


def test_dialog_never_sees_private_tests():
    tree = ast.parse((ROOT / "rlef_mega/dialog.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "PrivateTests" not in names and "Problem" not in names
    assert "private_tests" not in attributes


def test_no_package_shadows_a_hugging_face_one():
    """A package named `kernels` on sys.path shadows Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "sandbox/__init__.py").exists()
