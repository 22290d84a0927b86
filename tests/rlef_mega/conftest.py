"""Fixtures of the networks' tests."""

from collections.abc import Iterator

import pytest

from rlef_mega.config import ParallelConfig


@pytest.fixture(scope="module")
def ranks() -> Iterator:
    """Initialise Megatron with this process as its only rank."""
    from rlef_mega.megatron import parallel  # imports Megatron, which most tests do not need

    world = parallel.initialize(ParallelConfig(), seed=7)
    yield world
    parallel.shutdown(world)
