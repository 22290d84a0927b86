"""Where problems come from: a source string, checked before anything starts, to a sequence of
`Problem`.
"""

import logging
import random
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from urllib.parse import parse_qsl

from rlef_mega.problems import codecontests, curriculum, evalplus, functions, humaneval, jsonl
from rlef_mega.problems.rows import MALFORMED, Drop, Read, data_files
from rlef_mega.problems.store import ProblemStore, cache_folder, count_reasons, stored
from rlef_mega.types import Problem

logger = logging.getLogger(__name__)
SHOWN_DROPS = 5


def load_problems(source: str, cache: Path | None = None) -> Sequence[Problem]:
    """Problems of `curriculum:SPLIT`, `humaneval:SPLIT`, `functions:SPLIT`, of CodeContests
    (`codecontests:PLACE?OPTIONS`), of HumanEval+ or MBPP+ (`evalplus:FILE`) or of a file in our
    own JSONL.

    SPLIT is train, valid or test; PLACE a file, a folder, or a repository of the Hugging Face hub.
    What is read from data sets is kept in `cache` and read again from there. ValueError, with file,
    row, field and remedy, for whatever is wrong.
    """
    name, separator, rest = source.partition(":")
    if separator and name in BUNDLED:
        if rest not in curriculum.SPLITS:
            raise ValueError(
                f"problem source {source!r}: no split {rest!r}; "
                f"take one of {', '.join(curriculum.SPLITS)}"
            )
        return BUNDLED[name](rest)
    if is_data_set(source):
        store = read_data_set(source, cache)
        for reason, count in count_reasons(store.drops).items():
            logger.warning("%s: %d rows: %s", source, count, reason)
        refuse_malformed(source, store.drops)
        if not len(store):
            counts = dict(count_reasons(store.drops)) or "no rows"
            raise ValueError(f"{source}: holds no problem that can be graded ({counts})")
        return store
    return jsonl.read_jsonl(existing(source, source))


def is_data_set(source: str) -> bool:
    return source.startswith(("codecontests:", "evalplus:"))


def read_data_set(source: str, cache: Path | None = None) -> ProblemStore:
    """All that a source of a data set gives, malformed rows reported beside the others."""
    if source.startswith("evalplus:"):
        file = existing(source.partition(":")[2], source)
        return stored("evalplus", [file], lambda: evalplus.read([file]), cache or cache_folder())
    place, _, query = source.partition(":")[2].partition("?")
    options = parse_options(source, query)
    files = codecontests_files(source, place, options.split)

    def read() -> Iterator[Read]:
        return codecontests.read(files, options)

    key = f"codecontests {options}"
    return stored(key, files, read, cache or cache_folder())


def refuse_malformed(source: str, drops: Sequence[Drop]) -> None:
    wrong = [drop for drop in drops if drop.reason == MALFORMED]
    if not wrong:
        return
    lines = [f"{drop.place}: {drop.detail}" for drop in wrong[:SHOWN_DROPS]]
    raise ValueError(
        "; ".join(lines)
        + f" ({len(wrong)} malformed rows in all; `rlef data inspect {source}` lists them)"
    )


def parse_options(source: str, query: str) -> codecontests.Options:
    """`split=train&max_tests=50`: what the words say, in the types of the options."""
    known = {field.name: field.type for field in fields(codecontests.Options)}
    types = typing.get_type_hints(codecontests.Options)
    given: dict[str, typing.Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise ValueError(f"problem source {source!r}: no option {key!r}; {', '.join(known)}")
        if types[key] is int:
            if not text.isdigit():
                raise ValueError(f"problem source {source!r}: {key}={text!r} is no count")
            given[key] = int(text)
        elif types[key] is str:
            given[key] = text
        elif key == "enums":
            if text not in codecontests.SOURCES:
                raise ValueError(f"problem source {source!r}: enums is hub or proto, not {text!r}")
            given[key] = text
        else:
            given[key] = tuple(part for part in text.split(",") if part)
    return codecontests.Options(**given)


def codecontests_files(source: str, place: str, split: str) -> list[Path]:
    """Of a file, of a folder as published, or of the hub's copy, which is downloaded first."""
    path = Path(place)
    if not path.exists() and len(path.parts) == 2 and not path.suffix:
        path = download(source, place, split)
    if not path.exists():
        raise ValueError(
            f"problem source {source!r}: there is no file or folder {place!r}; give one, or "
            "codecontests:deepmind/code_contests?split=train to take the hub's copy; other sources "
            "are curriculum:SPLIT, humaneval:SPLIT and functions:SPLIT"
        )
    files = data_files(path, split)
    splits = {file.name.partition("-")[0] for file in files if file.name.endswith(".parquet")}
    if path.is_dir() and len(splits) > 1:
        raise ValueError(
            f"problem source {source!r}: {place} holds {', '.join(sorted(splits))}; "
            f"say which, as in {source}{'&' if '?' in source else '?'}split=train"
        )
    return files


def download(source: str, repository: str, split: str) -> Path:
    """The folder of a data set in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repository, repo_type="dataset", allow_patterns=f"data/{split}*.parquet"
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"problem source {source!r}: no folder {repository!r} here, and the hub gives none "
            f"({type(error).__name__}); download data/*.parquet and name their folder"
        ) from None
    return Path(found)


def load_humaneval(split: curriculum.Split) -> list[Problem]:
    problems, skipped = humaneval.read_humaneval(split)
    for task, reason in skipped.items():
        logger.info("skipped %s: %s", task, reason)
    return problems


BUNDLED: dict[str, Callable[[curriculum.Split], list[Problem]]] = {
    "curriculum": curriculum.problems,
    "humaneval": load_humaneval,
    "functions": functions.problems,
}


def existing(path: str, source: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    bundled = ", ".join(f"{name}:SPLIT" for name in BUNDLED)
    raise ValueError(
        f"problem source {source!r}: there is no file {path!r}; "
        f"give a JSONL file, codecontests:PLACE, evalplus:FILE, or one of {bundled} "
        "(SPLIT: train, valid, test)"
    )


def sample(problems: Sequence[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The `count` problems of rollout batch `step`: a fresh permutation an epoch, each problem once
    in it.

    A function of the step alone, so a resumed run and every rank draw the same.
    """
    if not problems:
        raise ValueError("there are no problems to sample from")
    permutations: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(problems))
        if epoch not in permutations:
            order = list(range(len(problems)))
            random.Random(f"epoch {seed} {epoch}").shuffle(order)
            permutations[epoch] = order
        chosen.append(problems[permutations[epoch][place]])
    return chosen
