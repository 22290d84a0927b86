"""The inputs of a run, recorded in its inputs.json: digests of model, tokenizer, problems and the
checkpoint that it starts from, if any, and which training problems it leaves out.

The files at a recipe's paths may change between two starts of a run, which would silently change
the KL's reference or the problems; so a resumed run compares digests first.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlef_mega.config import ConfigError
from rlef_mega.run.directory import write_atomically

FILE = "inputs.json"
BLOCKS, BLOCK_BYTES = 64, 64 << 10  # read of a large file
DESCRIPTION_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, chat template


def digest_files(files: Iterable[Path]) -> str:
    """Return a digest of these files' names, sizes and content (`sampled`)."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(files):
        digest.update(repr((path.name, path.stat().st_size)).encode())
        for content in sampled(path):
            digest.update(content)
    return digest.hexdigest()


def sampled(path: Path) -> Iterator[bytes]:
    """Yield a file's content; of a file beyond 4 MiB only 64 evenly spaced blocks, since reading a
    whole 70B model would take minutes at each start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            yield file.read()
            return
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            yield file.read(BLOCK_BYTES)


def digest_model(folder: Path) -> dict[str, str]:
    """Return the digests of a Hugging Face folder's weights, and of its config and tokenizer."""
    described = [path for path in folder.iterdir() if path.suffix in DESCRIPTION_SUFFIXES]
    return {
        "weights of model.path": digest_files(folder.glob("*.safetensors")),
        "config and tokenizer of model.path": digest_files(described),
    }


def read_left_out(run_dir: Path) -> list[int] | None:
    """Return the indices in data.train of the problems that the run leaves out; None if there is no
    run yet."""
    path = run_dir / FILE
    return json.loads(path.read_text())["left_out"] if path.is_file() else None


def claim_inputs(run_dir: Path, digests: dict[str, str], left_out: Iterable[int]) -> None:
    """Record the inputs of a new run. Raises ConfigError if the directory holds a run that was
    started with others."""
    path = run_dir / FILE
    if path.is_file():
        before = json.loads(path.read_text())["digests"]
        if changed := [name for name in before if before[name] != digests.get(name)]:
            raise ConfigError(
                f"since the run in {run_dir} began, these have changed: {', '.join(changed)}. "
                "Restore them to resume it, or start anew with another run.dir"
            )
    record = {"digests": digests, "left_out": sorted(left_out)}
    write_atomically(path, json.dumps(record, indent=1) + "\n")
