"""The page generated from code is up to date, and the README's example runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from rlef_sandbox import Sandbox, Status
from rlef_sandbox.service.command import NUMBERS
from tests.sandbox import syscall_page

ROOT = Path(__file__).parents[2]


def test_the_page_of_system_calls_is_the_policy() -> None:
    remedy = "run python -m tests.sandbox.syscall_page > sandbox/SYSCALLS.md"
    assert (ROOT / "sandbox/SYSCALLS.md").read_text() == syscall_page.page(), remedy


def test_the_page_of_the_service_has_the_defaults_of_its_command() -> None:
    page = (ROOT / "docs/sandbox_service.md").read_text()
    rows = re.findall(r"^\| (`--.+?) \| (.+?) \|", page, re.MULTILINE)
    pairs = [
        pair
        for names, values in rows
        for pair in zip(names.split(", "), values.split(", "), strict=True)
    ]
    told = {name.strip("`-"): value for name, value in pairs}
    numbers = {name: f"{default:g}" for name, default, *_ in NUMBERS if name != "workers"}
    assert numbers.items() <= told.items()


@pytest.mark.skipif(not shutil.which("g++"), reason="an example in C++ needs g++")
def test_the_example_runs_as_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = (ROOT / "sandbox/README.md").read_text().partition("```python")[2].partition("```")[0]
    results = []
    grade = Sandbox.grade

    def kept(*arguments: object, **keywords: object) -> list:
        results.append(grade(*arguments, **keywords))  # type: ignore[arg-type]
        return results[-1]

    monkeypatch.setattr(Sandbox, "grade", kept)
    exec(example, {})
    assert capsys.readouterr().out.split("\n")[1] == "TIME_LIMIT"
    assert [r.status for graded in results for r in graded] == [Status.OK] * 5
