"""A package imports only from packages of lower levels (docs/design.md)."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Packages that only one folder may import (and the benchmarks).
ONLY_IN = {"megatron": "rlef_mega/megatron", "rlef_kernels": "rlef_mega/megatron"}
ALONE = {  # a standalone package, and what it may import besides the standard library
    "kernels/rlef_kernels": {"torch", "triton", "rlef_kernels"},
    "sandbox/rlef_sandbox": {"rlef_sandbox"},
}
# The one part of a standalone package that may import more; the rest must not import it.
SERVICE = "sandbox/rlef_sandbox/service"
SERVICE_ALLOWED = {"rlef_sandbox", "aiohttp"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def is_module(name: str) -> bool:
    path = name.replace(".", "/")
    bases = (ROOT, ROOT / "kernels", ROOT / "sandbox")
    return any((base / f"{path}.py").exists() or (base / path).is_dir() for base in bases)


def imported_modules(path: Path) -> set[str]:
    """Return a file's absolute imports; a relative one stays within its package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # a module of that package, or a name in it
                found.add(inner if is_module(inner) else node.module)
    return found


ROW = re.compile(r"\| (\d+) \| `(?:sandbox/|kernels/)?([\w/]+?)(?:\.py|/)` \|")
# The dotted name of each package in the design's table, and its level.
LEVELS = {
    name.replace("/", "."): int(level)
    for level, name in ROW.findall((ROOT / "docs/design.md").read_text())
}
FILES = {
    ".".join(path.relative_to(ROOT / base).with_suffix("").parts).removesuffix(".__init__"): path
    for folder, base in (
        ("rlef_mega", "."),
        ("kernels/rlef_kernels", "kernels"),
        ("sandbox/rlef_sandbox", "sandbox"),
    )
    for path in sources(folder)
}


EDGES = {name: (imported_modules(path) & FILES.keys()) - {name} for name, path in FILES.items()}


def package_of(module: str) -> str:
    """Return the longest package name of the table that the module's name begins with."""
    found = [name for name in LEVELS if f"{module}.".startswith(f"{name}.")]
    return max(found, key=len, default=module)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"rlef_mega"}))
def test_imports_come_from_lower_levels(name):
    own = package_of(name)
    assert own in LEVELS, f"{name}: docs/design.md has no row for it"
    for module in EDGES[name] - {"rlef_mega"}:
        other = package_of(module)
        assert other == own or LEVELS[other] < LEVELS[own], (
            f"{name} (level {LEVELS[own]}) imports {module} (level {LEVELS[other]})"
        )


def test_no_file_takes_part_in_an_import_cycle():
    graphlib.TopologicalSorter(EDGES).prepare()  # raises CycleError, which names the files


def test_the_package_has_at_most_twelve_modules_at_its_top():
    assert len(list((ROOT / "rlef_mega").glob("*.py"))) <= 12


def test_rollout_and_megatron_do_not_import_each_other():
    for path in sources("rlef_mega/megatron"):
        assert not any("rollout" in module for module in imported_modules(path)), path
    for module in imported_modules(ROOT / "rlef_mega/dialogues/rollout.py"):
        assert not module.startswith(("megatron", "rlef_mega.megatron"))


@pytest.mark.parametrize(("package", "home"), ONLY_IN.items())
def test_only_one_folder_imports(package, home):
    for path in sources("rlef_mega"):
        names = {module.split(".")[0] for module in imported_modules(path)}
        inside = str(path.relative_to(ROOT)).startswith((home, "rlef_mega/bench"))
        assert package not in names or inside, f"{path} imports {package}"


@pytest.mark.parametrize(("folder", "allowed"), ALONE.items())
def test_standalone_packages_import_nothing_else(folder, allowed):
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


def test_templates_never_sees_private_tests():
    tree = ast.parse((ROOT / "rlef_mega/dialogues/templates.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "PrivateTests" not in names and "Problem" not in names
    assert "private_tests" not in attributes


def test_no_package_shadows_a_hugging_face_one():
    """A package named `kernels` on sys.path shadows Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "sandbox/__init__.py").exists()
