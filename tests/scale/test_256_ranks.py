"""256 ranks ask little of what they share (tests/scale/ranks.py says what they run)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlef_mega import metrics
from tests.rlef_mega.distributed import keep_store
from tests.scale.ranks import EPISODES, PER_NODE, RANKS, all_episodes

ROOT = Path(__file__).parents[2]  # where `tests` is imported from
MOST_STORE_OPERATIONS = 4  # its node, all have connected; its own and the first rank's node
MOST_FILES = 16  # what Python and megatron-core's version need
MOST_GROUPS = 9  # the world, the rank itself, tp, pp, dp, tp-pp, tp-dp, all, ends of the pipeline


def run_ranks(folder: Path, placement: str) -> list[dict[str, Any]]:
    store = keep_store()
    words = ["-m", "tests.scale.ranks", str(folder), str(store.port), placement]
    subprocess.run([sys.executable, *words], cwd=ROOT, timeout=900, check=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_a_rank_imports_neither_plots_nor_a_compiler():
    """1,024 ranks import from one file system."""
    script = "import sys; import rlef_mega.train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    modules = set(done.stdout.split())
    assert "rlef_mega.train" in modules, done.stderr
    assert not modules & {"matplotlib", "torch._inductor.compile_fx", "networkx"}


@pytest.mark.slow
def test_a_launch_of_256_ranks_asks_little_of_each(tmp_path):
    found = run_ranks(tmp_path, "block")
    for rank, each in enumerate(found):
        most = MOST_STORE_OPERATIONS + (2 * RANKS if rank == 0 else 0)  # rank 0 may look for others
        assert 2 <= sum(each["operations"].values()) <= most, (rank, each)
        assert len(each["groups"]) <= MOST_GROUPS and each["groups"].count(1) <= 1, (rank, each)
        assert each["gathers"] == 1 and len(each["opened"]) <= MOST_FILES, (rank, each)
        first = rank // PER_NODE * PER_NODE
        assert each["tensor"] == list(range(first, first + PER_NODE))
        assert each["pipeline"] == list(range(rank % 64, RANKS, 64))
        assert each["ends"] == (rank < 64 or rank >= 192)
        assert each["metrics"] == found[0]["metrics"] and each["sequences"] == EPISODES
    assert found[0]["metrics"] == metrics.episode_metrics(all_episodes())


@pytest.mark.slow
def test_tensor_parallel_groups_that_are_spread_over_nodes_are_refused(tmp_path):
    """As with srun --distribution=cyclic."""
    found = run_ranks(tmp_path, "cyclic")
    for rank, each in enumerate(found):
        assert ("refused" in each) == (rank % 8 != 0), (rank, each)
    assert "--distribution=block" in found[1]["refused"]
