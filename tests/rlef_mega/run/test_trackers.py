"""Trackers get what metrics.jsonl gets, and a run goes on when they fail."""

import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlef_mega.config import ConfigError, TrackConfig, TrainConfig, load_config
from rlef_mega.run import trackers
from rlef_mega.run.trackers import (
    OPENERS,
    Trackers,
    asked_for,
    check_trackers,
    numbers_of,
    own_name,
)

RECIPE = Path(trackers.__file__).parents[1] / "recipes" / "demo.toml"
RECORDS: list[dict[str, Any]] = [
    {"step": step, "solved": step / 4, "time": {"step": 2.0 + step}, "alarms": [], "kl": None}
    for step in (1, 2, 3)
]


def config(run: Path, *overrides: str) -> TrainConfig:
    return load_config(RECIPE, [f"run.dir={run}", *overrides], TrainConfig)


def send(asked: TrainConfig, records: list[dict[str, Any]], done: int = 0, openers=OPENERS) -> None:
    with Trackers(asked, done=done, openers=openers) as following:
        for record in records:
            following.log(record)


def test_only_finite_numbers_are_sent():
    record = {"step": 3, "time": {"step": 1, "a": {"b": 2.5}}, "nan": float("nan"), "flag": True}
    record |= {"alarms": ["x"], "text": "y", "none": None}
    assert numbers_of(record) == {"time/step": 1.0, "time/a/b": 2.5}


def test_a_tracker_that_fails_is_named_and_left_out_and_the_others_go_on(tmp_path, capsys):
    got = []

    @contextmanager
    def good(config, done):
        yield lambda step, numbers: got.append((step, numbers["solved"]))

    @contextmanager
    def failing(config, done):
        def log(step, numbers):
            raise OSError(f"no network at step {step}")

        yield log

    @contextmanager
    def closed(config, done):
        raise RuntimeError("not logged in")
        yield

    asked = config(tmp_path, "track.tensorboard=true", "track.wandb_project=p")
    for broken, error in ((failing, "OSError: no network at step 1"), (closed, "not logged in")):
        send(asked, RECORDS, openers={"tensorboard": good, "wandb": broken})
        said = capsys.readouterr().err
        assert said.count("WARNING") == 1 and "wandb is dropped" in said and error in said
    assert got == 2 * [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_training_never_waits_for_a_tracker_and_its_end_waits_at_most_close_s(tmp_path, capsys):
    free = threading.Event()

    @contextmanager
    def hanging(config, done):
        free.wait(30)
        yield lambda step, numbers: None

    asked = config(tmp_path, "track.tensorboard=true")
    openers = {"tensorboard": hanging}
    with Trackers(asked, done=0, close_s=0.1, openers=openers) as following:
        for record in RECORDS:
            following.log(record)  # returns at once
    assert "tensorboard did not accept all numbers within 0 s" in capsys.readouterr().err
    free.set()


def test_only_the_process_that_writes_the_run_directory_has_trackers(tmp_path):
    asked = config(tmp_path, "track.tensorboard=true")
    assert Trackers(asked, done=0, writer=False).followers == []
    assert Trackers(config(tmp_path), done=0).followers == []
    assert not (tmp_path / "tracked_as").exists()


def test_a_run_keeps_its_name_and_another_has_its_own(tmp_path):
    (tmp_path / "other").mkdir()
    first = own_name(tmp_path / "run")
    assert own_name(tmp_path / "run") == first and first.startswith("run-")
    assert own_name(tmp_path / "other" / "run") != first


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rlef-mega\[wandb\]'"):
        check_trackers(TrackConfig(wandb_project="p"))
    check_trackers(TrackConfig())


def test_an_unknown_switch_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"'track.wandb'; known there: tensorboard, wandb_proj"):
        config(tmp_path, "track.wandb=true")
    assert asked_for(config(tmp_path, "track.wandb_project=p").track) == ["wandb"]


def test_tensorboard_has_the_numbers_and_forgets_what_came_after_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = config(tmp_path, "track.tensorboard=true")
    send(asked, RECORDS)
    send(asked, [{**RECORDS[2], "solved": 0.875}], done=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("solved")]
    assert found == [(1, 0.25), (2, 0.5), (3, 0.875)]
    assert [event.value for event in events.Scalars("time/step")][:2] == [3.0, 4.0]
    assert "curriculum:train" in str(events.Tensors("recipe/text_summary"))


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's file without its header: a LevelDB log, whose blocks of 32 KiB
    start at the header. A record: checksum, length, kind (whole, first, middle, last) and data."""
    at, whole = 7, b""
    log = bytes(7) + log
    while at + 7 <= len(log):
        if 0x8000 - at % 0x8000 < 7:
            at += 0x8000 - at % 0x8000
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_offline_has_the_numbers_in_the_run_directory(tmp_path, capsys):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    send(config(tmp_path, "track.wandb_project=p", "track.wandb_mode=offline"), RECORDS)
    assert capsys.readouterr().err == ""
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, runs = [], []
    for data in leveldb_records(path.read_bytes()[7:]):
        record = Record.FromString(data)
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            items = record.history.item
            history.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    assert runs[0].run_id == (tmp_path / "tracked_as").read_text().strip()
    assert [(row["step"], row["solved"]) for row in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [row["time/step"] for row in history] == [3.0, 4.0, 5.0]
