"""The page generated from code is up to date, and the README's example runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlef_sandbox import Sandbox, Status
from tests.sandbox import syscall_page

ROOT = Path(__file__).parents[2]


def test_the_page_of_system_calls_is_the_policy() -> None:
    remedy = "run python -m tests.sandbox.syscall_page > sandbox/SYSCALLS.md"
    assert (ROOT / "sandbox/SYSCALLS.md").read_text() == syscall_page.page(), remedy


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
