"""Packages that a sandbox names become importable, and nothing else becomes readable."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlef_sandbox import Limits, Sandbox, Status, __main__, native, worker
from rlef_sandbox.packages import find_packages
from rlef_sandbox.worker import ZygoteLostError
from tests.sandbox.attacks.worlds import NO_LANDLOCK, NO_NAMESPACES
from tests.sandbox.conftest import ATTACK_LIMITS, ESCAPED


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder on `sys.path` that any user may enter."""
    folder = Path(tempfile.mkdtemp()) / "site-packages"
    folder.mkdir()
    folder.parent.chmod(0o755)
    monkeypatch.syspath_prepend(folder)
    yield folder
    shutil.rmtree(folder.parent)


def install(site: Path, name: str, text: str, *requires: str, single: bool = False) -> None:
    """Install a distribution as pip does: a package with a submodule, or a single module."""
    files = {f"{name}.py": text}
    if not single:
        files = {f"{name}/__init__.py": text, f"{name}/later.py": f"print('{name} later')"}
    about = "".join(f"Requires-Dist: {line}\n" for line in requires)
    folder = f"{name}_dist-1.5.dist-info"
    files[f"{folder}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.5\n{about}"
    files[f"{folder}/RECORD"] = "".join(f"{path},,\n" for path in files)
    for path, content in files.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(content)


@pytest.fixture
def installed(site: Path) -> Path:
    needs = ("below-dist>=1", "unseen-dist; extra == 'all'", "absent; sys_platform == 'win32'")
    install(site, "tiny", "import below", *needs)
    install(site, "below", "value = 5", single=True)
    install(site, "unseen", "value = 6")
    return site


@pytest.fixture(params=["native", "python"])
def supervisor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(native, "spawn_library", lambda: None)


def test_a_named_package_and_what_it_requires_can_be_imported(
    installed: Path, supervisor: None
) -> None:
    source = "import tiny, tiny.later, below; print(below.value)"
    with Sandbox(workers=1, packages=["tiny"]) as sandbox:
        assert sandbox.isolation["packages"] == ["below", "tiny"]
        assert sandbox.run(source).stdout == b"tiny later\n5\n"
        assert b"No module named 'unseen'" in sandbox.run("import unseen").stderr
    with Sandbox(workers=1) as sandbox:
        assert b"No module named 'tiny'" in sandbox.run(source).stderr


ATTACKS = [
    "print(open({site!r} + '/unseen/__init__.py').read(), 'ESCAPED')",
    "print(open({site!r} + '/unseen/../tiny/../unseen/__init__.py').read(), 'ESCAPED')",
    "import os; 'unseen' in os.listdir({site!r}) and print('ESCAPED')",
    "import os; os.listdir({site!r} + '/..') == ['site-packages'] or print('ESCAPED')",
    "import glob; glob.glob({site!r} + '/*.dist-info/*') and print('ESCAPED')",
    "import sys; sys.path.append({site!r}); import unseen; print('ESCAPED')",
    "open({site!r} + '/tiny/new.py', 'w').write('1'); print('ESCAPED')",
    "open({site!r} + '/tiny/later.py', 'r+').write('1'); print('ESCAPED')",
    "open({site!r} + '/new.py', 'w').write('1'); print('ESCAPED')",
    "import os; os.truncate({site!r} + '/below.py', 0); print('ESCAPED')",
    "import os; os.rename({site!r} + '/tiny', {site!r} + '/new'); print('ESCAPED')",
    "import os; os.symlink('/etc/passwd', {site!r} + '/tiny/link'); print('ESCAPED')",
    "import tiny; print(open(tiny.__path__[0] + '/../../../etc/passwd').read(), 'ESCAPED')",
    "open('/etc/passwd'); print('ESCAPED')",
]


@pytest.mark.parametrize("lacking", ["", NO_NAMESPACES, NO_LANDLOCK], ids=["all", "no_ns", "no_ll"])
@pytest.mark.parametrize("in_library", [False, True])
def test_named_packages_let_nothing_else_be_read_or_written(
    installed: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, in_library: bool
) -> None:
    modules = "import rlef_sandbox.zygote, rlef_sandbox.private_root, rlef_sandbox.confinement\n"
    if in_library:  # packages beneath the library, as without a virtual environment
        modules += f"sys.path.append({str(installed.parent)!r})\n"
    bootstrap = worker.BOOTSTRAP.replace("main()\n", modules + lacking + "main()\n")
    monkeypatch.setattr(worker, "COMMAND", [*worker.COMMAND[:-1], bootstrap])
    before = {path: path.stat().st_mtime_ns for path in installed.rglob("*")}
    with Sandbox(workers=1, packages=["tiny"]) as sandbox:
        for attack in ATTACKS:
            if in_library and ("listdir" in attack or "glob" in attack):
                continue  # Landlock lets all below the library be listed
            result = sandbox.run(attack.format(site=str(installed)), b"", ATTACK_LIMITS)
            assert ESCAPED not in result.stdout, (attack, result)
            assert result.status in (Status.OK, Status.RUNTIME_ERROR), (attack, result)
        assert sandbox.run("import tiny, tiny.later").stdout == b"tiny later\n"
    assert before == {path: path.stat().st_mtime_ns for path in installed.rglob("*")}


def test_numpy_works_within_the_limits(supervisor: None) -> None:
    pytest.importorskip("numpy")
    source = "import numpy as np; a = np.random.rand(300, 300); print((a @ np.linalg.inv(a)).shape)"
    in_threads = f"""
import threading
started = [threading.Thread(target=lambda: exec({source!r}, {{}})) for _ in range(3)]
[thread.start() for thread in started]
"""
    wants_much = "import numpy; numpy.ones(10**10)"
    limits = Limits(memory_bytes=256 << 20)
    with Sandbox(workers=1, packages=("numpy",)) as sandbox:
        results = [sandbox.run(text, b"", limits) for text in (source, in_threads, wants_much)]
        assert [result.status for result in results] == [Status.OK, Status.OK, Status.MEMORY_LIMIT]
        assert sys.prefix not in results[2].stderr.decode()
    with Sandbox(workers=1) as sandbox:
        assert b"ModuleNotFoundError" in sandbox.run(source).stderr


def test_an_empty_list_on_the_command_line_names_no_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlef_sandbox", "--packages", "", "doctor"])
    assert __main__.main() == 0
    assert not json.loads(capsys.readouterr().out).get("packages")


def test_what_cannot_be_imported_is_refused_at_the_start_by_name(
    installed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^package 'nowhere' is not installed in /"):
        find_packages(["tiny", "nowhere"])
    monkeypatch.setattr(sys, "argv", ["rlef_sandbox", "--packages", "tiny,nowhere", "doctor"])
    assert __main__.main() == 2 and "package 'nowhere'" in capsys.readouterr().err
    install(installed, "lacks", "import absent")
    thread = (
        "import threading as t, time\nt.Thread(target=time.sleep, args=[9], daemon=True).start()"
    )
    install(installed, "threads", thread)
    for name, words in (("lacks", "No module named 'absent'"), ("threads", "starts threads")):
        with pytest.raises(ZygoteLostError, match=f"package '{name}'.*{words}"):
            Sandbox(workers=1, packages=[name])
