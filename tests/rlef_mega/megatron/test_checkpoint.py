"""Checkpoints survive kill -9 at any moment of a save, disk faults on one rank, and damaged or
foreign folders. test_layouts.py tests that they are exact, in the same layout and in others, and
test_train.py tests it for the whole loop.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlef_mega.config import ParallelConfig
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.checkpoints.files import (
    best_checkpoint,
    describe_file,
    fault_in,
    latest_checkpoint,
    prune,
    read_manifest,
    read_score,
    remove_leftovers,
    steps_in,
    write_score,
)
from tests.rlef_mega.distributed import launch, start_process
from tests.rlef_mega.megatron import checkpoint_worker
from tests.rlef_mega.megatron.megatron_worker import make_model
from tests.rlef_mega.megatron.small_disk import small_disk

WORKER = "tests.rlef_mega.megatron.checkpoint_worker"
STEPS = 14


# ------------------------------------------------------------------------------------ folders


def checkpoint(folder: Path, step: int, score: float | None = None) -> Path:
    """Make a folder that is a checkpoint by its manifest."""
    path = folder / f"step_{step:06d}"
    (path / "networks").mkdir(parents=True)
    (path / "networks/.metadata").write_text("index")
    (path / "networks/__0_0.distcp").write_bytes(bytes(1000))
    (path / "meta.json").write_text(json.dumps({"step": step, "score": score}))
    files = ("networks/.metadata", "networks/__0_0.distcp", "meta.json")
    manifest = {name: describe_file(path / name) for name in files}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in steps_in(folder)]


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.4), (4, None), (5, 0.9), (6, 0.1)):
        checkpoint(tmp_path, step, score)
    assert best_checkpoint(tmp_path) == tmp_path / "step_000005"  # the newer of equals
    prune(tmp_path, keep=1, keep_best=True)
    assert steps(tmp_path) == [5, 6]
    prune(tmp_path, keep=1, keep_best=False)
    assert steps(tmp_path) == [6]


def test_a_score_that_comes_late_counts_and_changes_nothing_that_was_sealed(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 1, 0.2), checkpoint(tmp_path, 2)
    write_score(second, 0.7)
    assert best_checkpoint(tmp_path) == second and fault_in(second) is None
    assert read_score(first) == 0.2 and read_score(second) == 0.7


def test_a_late_score_that_a_full_disk_does_not_take_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path, 2)
    (folder / "score.json.partial").symlink_to("/dev/full")
    ranks = SimpleNamespace(is_writer=True, layout=ParallelConfig())
    learner = SimpleNamespace(ranks=ranks)
    Checkpoints(tmp_path, learner, keep=1).rate(2, 0.7)
    said = capsys.readouterr().err
    assert "No space left on device: the score of step_000002 is not recorded" in said
    assert read_score(folder) is None and fault_in(folder) is None


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    with (tmp_path / "step_000003/networks/__0_0.distcp").open("r+b") as file:
        file.truncate(999)
    prune(tmp_path, keep=2, keep_best=True)
    assert steps(tmp_path) == [2, 3, 4]  # 2 and 4 are the newest good ones; 3 is not touched
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000004"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "networks/__0_0.distcp").unlink(), "__0_0.distcp: it is missing"),
        (lambda path: os.truncate(path / "networks/.metadata", 2), "2 bytes, not 5"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: it is missing"),
        (
            lambda path: os.truncate(path / "manifest.json", 30),
            "manifest.json: it is missing, trun",
        ),
        (
            lambda path: (path / "manifest.json").write_text("[]"),
            "manifest.json: it is missing, tr",
        ),
        (lambda path: (path / "meta.json").write_text("{"), "meta.json: it is missing, truncated"),
    ],
)
def test_a_damaged_file_is_named_and_its_checkpoint_skipped(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    good, bad = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert fault_in(bad) is None
    damage(bad)
    assert message in (fault_in(bad) or "")
    assert latest_checkpoint(tmp_path) == good


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 3).rename(tmp_path / "step_000003.tmp")  # just before its final rename
    checkpoint(tmp_path, 1).rename(tmp_path / "step_000001.deleted")  # in the middle of pruning
    aside = checkpoint(tmp_path, 4).rename(tmp_path / "step_000004.refused")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [good, aside]


# ------------------------------------------------------------------------------------ kill -9


def killed(run: Path, moment: Callable[[Path], bool]) -> bool:
    """Resume the run and kill it once `moment` holds. Returns whether it did."""
    process, before = start_process(checkpoint_worker.run, run, STEPS), names_in(run)
    while process.is_alive():
        if names_in(run) - before and moment(run / "checkpoints"):
            process.kill()
            process.join()
            return True
        time.sleep(0.0002)  # leave the processor to the run, and see moments of a millisecond
    return False


def names_in(run: Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {path.name for path in (run / "checkpoints").iterdir()}
    return set()


def being_written(checkpoints: Path) -> bool:
    """Return whether a rank's file has grown beyond its first megabyte."""
    for file in checkpoints.glob("*.tmp/networks/__0_0.distcp"):
        with contextlib.suppress(OSError):
            return file.stat().st_size > 1 << 20
    return False


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "a share is being written": being_written,
    "the index is there, the manifest is not": lambda c: any(c.glob("*.tmp/networks/.metadata")),
    "it has its name, the older one is not deleted yet": lambda c: len(steps_in(c)) > 1,
    "the folder is new and empty": lambda c: any(c.glob("*.tmp")),
}


def test_a_run_killed_at_any_moment_of_a_save_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """One run is killed repeatedly; metrics and final state are equal bit for bit."""
    make_model(tmp_path / "large", **checkpoint_worker.LARGE)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    alone = start_process(checkpoint_worker.run, undisturbed, STEPS)
    hits = [name for name, moment in MOMENTS.items() if killed(disturbed, moment)]
    # the other moments are sometimes shorter than a millisecond; the tests above create the folders
    # that they leave
    assert "a share is being written" in hits and len(hits) >= 3, hits
    for process in (start_process(checkpoint_worker.run, disturbed, STEPS), alone):
        process.join(200)
        assert process.exitcode == 0
    lines = [(run / "metrics.jsonl").read_text() for run in (undisturbed, disturbed)]
    assert lines[0] == lines[1] and lines[0].count("\n") == STEPS
    manifests = [
        read_manifest(run / "checkpoints" / f"step_{STEPS:06d}") for run in (undisturbed, disturbed)
    ]
    name = "networks/__0_0.distcp"
    assert manifests[0][name] == manifests[1][name]
    assert steps(disturbed / "checkpoints") == [STEPS]
    assert len(names_in(disturbed)) == 1  # nothing is left over


# ------------------------------------------------------------------------------------ faults


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return the results of two ranks."""
    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "model")
    make_model(folder / "wide", hidden_size=64)
    with small_disk(folder / "disk", "4M") as disk:
        launch(WORKER, str(folder), str(disk or ""), processes=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_a_second_save_waits_for_the_first_and_retention_follows(found: list[dict]) -> None:
    for rank in found:
        assert rank["saved"]
        assert rank["kept"] == ["step_000002", "step_000003"]
        assert rank["kept_best"] == ["step_000002", "step_000003", "step_000004"]


def test_a_fault_on_one_rank_cancels_the_save_on_all_and_keeps_old_checkpoints(
    found: list[dict],
) -> None:
    for rank in found:
        assert not rank["saved_without_room"] and rank["failures"] == 1
        assert "File too large" in rank["fault"] and "MiB free" in rank["fault"]
        assert rank["after_fault"] == rank["kept_best"]
        assert rank["saved_with_room"] and "step_000006" in rank["after_room"]
        assert rank["blocked"][0] is False and "blocked" in rank["blocked"][1]


def test_a_full_disk_deletes_nothing_and_is_tried_again(found: list[dict]) -> None:
    if "disk" not in found[0]:
        pytest.skip("mounting a small tmpfs needs root; the fault above stands in for it")
    for rank in found:
        assert rank["disk"]["saved"] == [True, False, True]
        assert "No space left on device" in rank["disk"]["fault"]
        assert rank["disk"]["full"] == ["step_000001"]
        assert rank["disk"]["emptied"] == ["step_000003"]


def test_a_wrong_checksum_makes_all_ranks_fall_back_together(found: list[dict]) -> None:
    for rank in found:
        assert "__1_0.distcp: its checksum differs" in rank["refusal"]
        assert rank["resumed"] == [1, {"at": 1}]
        before, saved, loaded = rank["moments"]
        assert loaded == saved != before
        assert rank["set_aside"] == ["step_000001", "step_000002.refused"]
        assert "common.pt: it is missing" in rank["none"]
        assert "starts from its first step" in rank["none"]


def test_another_model_is_refused_with_what_differs(found: list[dict]) -> None:
    for rank in found:
        assert "of another model" in rank["other_model"]
        assert "hidden_size = 32 there, 64 here" in rank["other_model"]
