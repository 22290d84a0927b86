"""The sandbox where there is no C compiler: the same tests, with the zygote's loop in Python."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlef_sandbox import Sandbox, native
from tests.sandbox.test_attacks import *  # noqa: F403
from tests.sandbox.test_checks import *  # noqa: F403
from tests.sandbox.test_turns import *  # noqa: F403
from tests.sandbox.test_verdicts import *  # noqa: F403


@pytest.fixture(scope="module", autouse=True)
def no_compiler() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "spawn_library", lambda: None)
        yield


@pytest.fixture(scope="module")
def sandbox(no_compiler: None) -> Iterator[Sandbox]:
    with Sandbox(workers=1) as shared:
        assert shared.isolation["launcher"] == "python"
        yield shared


def test_it_runs_python_alone(sandbox: Sandbox) -> None:
    assert sandbox.languages == ("python",)
    with pytest.raises(ValueError, match=r"takes g\+\+ and a C compiler"):
        sandbox.run("int main() {}", language="cpp")
