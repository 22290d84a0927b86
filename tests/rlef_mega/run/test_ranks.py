"""A launch with a missing rank."""

import socket
from datetime import timedelta

import pytest

from rlef_mega.run.ranks import meet


@pytest.mark.parametrize(
    ("rank", "why"),
    [("0", r"ranks \[1\] did not connect"), ("1", "client socket has timed out")],
)
def test_a_rank_that_waits_in_vain_names_the_address_and_missing_ranks(rank, why, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"at 127.0.0.1:{port}: (?s:.*){why}.*unset WORLD_SIZE"):
        meet(timedelta(seconds=1))
