"""Deaths and ends where there is no C compiler: the same tests, the loop in Python."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlef_sandbox import native
from tests.sandbox.test_lifetime import *  # noqa: F403


@pytest.fixture(scope="module", autouse=True)
def no_compiler() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "spawn_library", lambda: None)
        yield
