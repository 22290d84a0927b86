"""The folders of a run's checkpoints: which are whole, which is the best, which may be deleted.

A checkpoint is written under `step_000010.tmp`. Its manifest, the list of its files with sizes and
checksums, is the last file; then the folder is renamed. So a folder without a suffix is complete,
unless it was damaged afterwards, which the manifest shows. A kill may leave folders with a suffix:
`.tmp` (not finished) and `.deleted` (not yet deleted); the next start removes both. `.refused` is a
checkpoint that could not be resumed from: it was moved aside, is never deleted and never counted.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from rlef_mega.config import ConfigError
from rlef_mega.run.directory import flush_to_disk, write_atomically

MANIFEST, META, NETWORKS = "manifest.json", "meta.json", "networks"
LATE_SCORE = "score.json"  # of an evaluation that finished after the save
STEP_FOLDER = re.compile(r"step_(\d+)")
LEFTOVER = re.compile(r"step_\d+\.(tmp|deleted)")
Manifest = dict[str, dict[str, Any]]  # file to {"bytes": ..., "sha256": ...}


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def steps_in(folder: Path) -> list[Path]:
    """List the checkpoint folders, oldest first; some may be damaged."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint whose files all exist in their full sizes, or None. Checksums are
    not verified: that takes reading all files.
    """
    return next((path for path in reversed(steps_in(folder)) if fault_in(path) is None), None)


def best_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint with the highest score on the validation problems, the newer of equals;
    None if none has a score.
    """
    scored = [(read_score(path), path) for path in whole_checkpoints(folder)]
    ranked = [(score, path) for score, path in scored if score is not None]
    return max(ranked, key=lambda pair: (pair[0], pair[1].name))[1] if ranked else None


def whole_checkpoints(folder: Path) -> list[Path]:
    return [path for path in steps_in(folder) if fault_in(path) is None]


def prune(folder: Path, *, keep: int, keep_best: bool) -> None:
    """Delete all whole checkpoints but the newest `keep` and the best one. Damaged ones are neither
    counted nor deleted.
    """
    whole = whole_checkpoints(folder)
    kept = {*whole[-keep:], best_checkpoint(folder) if keep_best else None}
    for path in whole:
        if path not in kept:
            delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint. A kill during this leaves no part of it under its name."""
    doomed = path.with_suffix(".deleted")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of a kill during a save or a deletion."""
    if folder.is_dir():
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Rename a refused checkpoint, so that the run can save that step again."""
    aside = path.with_suffix(".refused")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_suffix(f".refused{number}")
    return path.rename(aside)


# ------------------------------------------------------------------------------------ one folder


def seal(folder: Path, files: Manifest) -> None:
    """Write the manifest, flush it and the folders' entries to the disk, and give `folder` its name
    without the suffix.
    """
    write_manifest(folder, files)
    for path in (folder / MANIFEST, folder / NETWORKS, folder):
        flush_to_disk(path)
    folder.rename(folder.with_suffix(""))
    flush_to_disk(folder.parent)


def write_manifest(folder: Path, files: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(dict(sorted(files.items())), indent=1) + "\n")


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": checksum}


def read_manifest(path: Path) -> Manifest:
    """Read the manifest. Raises ConfigError if it is missing or damaged."""
    if not path.is_dir():
        raise ConfigError(f"no checkpoint {path}; name a step_* folder of the run's checkpoints")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for entry in manifest.values():
            int(entry["bytes"]), str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(damaged(path, MANIFEST, "it is missing, truncated or changed")) from None
    return manifest


def read_meta(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / META).read_text())
    except (OSError, ValueError):
        raise ConfigError(damaged(path, META, "it is missing, truncated or changed")) from None


def read_score(path: Path) -> float | None:
    """Return the policy's score: that of `write_score` if there is one, else that of the save."""
    try:
        return json.loads((path / LATE_SCORE).read_text())["score"]
    except (OSError, ValueError, KeyError):
        return read_meta(path).get("score")


def write_score(path: Path, score: float) -> None:
    """Write a score beside the files of the manifest, which never change."""
    write_atomically(path / LATE_SCORE, json.dumps({"score": score}) + "\n")


def networks_in(path: Path) -> set[str]:
    """Return the names of the networks whose weights a checkpoint holds."""
    return set(read_meta(path).get("models", ()))


def fault_in(path: Path) -> str | None:
    """Check the names and sizes of a checkpoint's files. Returns the first fault, or None."""
    try:
        manifest = read_manifest(path)
        read_meta(path)
        for file, expected in manifest.items():
            if not (path / file).is_file():
                return damaged(path, file, "it is missing")
            size = (path / file).stat().st_size
            if size != expected["bytes"]:
                return damaged(path, file, f"{size} bytes, not {expected['bytes']}")
    except (ConfigError, OSError) as error:
        return str(error)
    return None


def wrong_checksum(path: Path, manifest: Manifest, files: list[str]) -> str | None:
    """Check the checksums of these files. Returns the first fault, or None."""
    for file in files:
        try:
            if describe_file(path / file) != manifest[file]:
                return damaged(path, file, "its checksum differs from the manifest's")
        except OSError as error:
            return damaged(path, file, f"it cannot be read ({error})")
    return None


def damaged(path: Path, file: str, what: str) -> str:
    return f"checkpoint {path} is damaged at {file}: {what}"
