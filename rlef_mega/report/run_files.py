"""Read the files of a run directory, at any point of the run.

A run can be killed at any moment, so any file may be missing and the last line of a file may be
truncated. Missing files are left out. Files that cannot be read are named in `RunFiles.notes`,
which the report shows.
"""

import io
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import zstandard

Json = dict[str, Any]
NOT_DIALOGUES = {"rlef_eval", "session", "released", "dropped"}  # of other lines (dialogue_file.py)
STEPS_SHOWN = 20  # at most, of the training steps with recorded episodes


@dataclass(frozen=True)
class RunFiles:
    path: Path
    config_text: str
    config: Json
    manifest: Json
    metrics: tuple[Json, ...]  # one per step, in order; the later of two records of a step
    evaluations: dict[str, Json]  # file stem -> content, "before" first and "after" last
    episode_files: dict[str, Path]  # "before", "after", other evaluations, "step N"
    notes: tuple[str, ...]


def read_run(run: Path) -> RunFiles:
    """Read a run directory. Raises ValueError if `run` is not a directory."""
    if not run.is_dir():
        raise ValueError(f"{run} is not a run directory; give the folder that holds metrics.jsonl")
    notes: list[str] = []
    config = run / "config.toml"
    return RunFiles(
        path=run,
        config_text=read_text(config) if config.is_file() else "",
        config=read_tree(config, tomllib.loads, notes),
        manifest=read_tree(run / "manifest.json", json.loads, notes),
        metrics=read_metrics(run / "metrics.jsonl", notes),
        evaluations=read_evaluations(run, notes),
        episode_files=find_episode_files(run),
        notes=tuple(notes),
    )


def read_runs(runs: Sequence[Path]) -> dict[str, RunFiles]:
    """Read several run directories, by their labels. Raises ValueError if one is not a directory or
    is given twice."""
    return dict(zip(label_runs(runs), map(read_run, runs), strict=True))


def label_runs(runs: Sequence[Path]) -> list[str]:
    """Return an empty label for a single run, else the shortest path suffixes that differ."""
    if len(runs) == 1:
        return [""]
    parts = [run.resolve().parts for run in runs]
    if twice := [run for n, run in enumerate(runs) if parts[n] in parts[:n]]:
        raise ValueError(f"{twice[0]} is given twice; give different run directories")
    depth = next(d for d in count(1) if len({part[-d:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def named(label: str, name: str) -> str:
    return f"{label}: {name}" if label else name


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def read_tree(path: Path, parse: Callable[[str], Any], notes: list[str]) -> Json:
    """Return the content of a JSON or TOML file; nothing if it is missing or, with a note, if it is
    damaged."""
    if not path.is_file():
        return {}
    try:
        content = parse(read_text(path))
    except (ValueError, RecursionError) as error:  # both formats' errors are ValueErrors
        notes.append(f"{path.name}: left out, {error}")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name}: left out, not a JSON object")
        return {}
    return content


def read_metrics(path: Path, notes: list[str]) -> tuple[Json, ...]:
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8", errors="replace") as lines:
        records = list(json_lines(lines, path.name, notes))
    by_step = {record["step"]: record for record in records if number(record, "step") is not None}
    if any(number(record, "step") is None for record in records):
        notes.append(f"{path.name}: left out the lines without a step")
    return tuple(by_step[step] for step in sorted(by_step))


def read_evaluations(run: Path, notes: list[str]) -> dict[str, Json]:
    paths = sorted(run.glob("eval/*.json"))
    found = {path.stem: read_tree(path, json.loads, notes) for path in paths}
    order = sorted(found, key=lambda name: (name != "before", name == "after", name))
    return {name: found[name] for name in order if found[name]}


def find_episode_files(run: Path) -> dict[str, Path]:
    """Return the episode files of evaluations, then those of training steps: the newest step first,
    then others spread evenly over the run."""
    evaluated = {
        path.name.removesuffix(ending): path
        for ending in ("_episodes.jsonl.zst", ".dialogues.jsonl")
        for path in sorted(run.glob(f"eval/*{ending}"))
    }
    order = sorted(evaluated, key=lambda name: (name != "before", name != "after", name))
    recorded = {
        int(match[1]): path
        for path in run.glob("episodes/step_*.jsonl.zst")
        if (match := re.fullmatch(r"step_(\d+)\.jsonl\.zst", path.name))
    }
    steps = sorted(recorded, reverse=True)
    if len(steps) > STEPS_SHOWN:
        last = len(steps) - 1
        steps = [steps[round(n * last / (STEPS_SHOWN - 1))] for n in range(STEPS_SHOWN)]
    return {name: evaluated[name] for name in order} | {f"step {n}": recorded[n] for n in steps}


def iterate_episodes(path: Path, notes: list[str]) -> Iterator[Json]:
    """Yield a file's episodes one at a time, because it may not fit in memory. Damage is described
    in `notes`."""
    with path.open("rb") as file:
        plain: Any = file
        if path.suffix == ".zst":
            plain = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        lines = io.TextIOWrapper(plain, encoding="utf-8", errors="replace", newline="\n")
        try:
            records = json_lines(lines, path.name, notes)
            yield from (record for record in records if not record.keys() & NOT_DIALOGUES)
        except zstandard.ZstdError as error:
            notes.append(f"{path.name}: damaged, read in part ({error})")


def json_lines(lines: Iterable[str], name: str, notes: list[str]) -> Iterator[Json]:
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
        else:
            notes.append(f"{name}, line {line_number}: left out, not a complete JSON object")


def lookup(record: Any, *keys: str) -> Any:
    """Return the entry at a path of keys; None if any part of the path is missing."""
    for key in keys:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def number(record: Any, *keys: str) -> float | None:
    """Return the finite number at a path of keys, else None."""
    value = lookup(record, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def table(record: Any, *keys: str) -> Json:
    """Return the JSON object at a path of keys; an empty one if there is none."""
    value = lookup(record, *keys)
    return value if isinstance(value, dict) else {}


def rows(record: Any, *keys: str) -> list[Json]:
    """Return the objects of the list at a path of keys, else an empty list."""
    value = lookup(record, *keys)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def text(record: Any, *keys: str) -> str:
    """Return the entry at a path of keys as text, empty if it is missing."""
    value = lookup(record, *keys)
    return "" if value is None else str(value)


def series(metrics: tuple[Json, ...], *keys: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one metric, over the steps that have it."""
    points = [(number(record, "step"), number(record, *keys)) for record in metrics]
    present = [(step, value) for step, value in points if step is not None and value is not None]
    return [step for step, _ in present], [value for _, value in present]
