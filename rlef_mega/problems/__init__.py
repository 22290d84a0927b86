"""Where problems come from: a source string, checked before anything starts, to a sequence of
`Problem`.
"""

import logging
import random
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from urllib.parse import parse_qsl

from rlef_mega.problems import (
    codecontests,
    curriculum,
    evalplus,
    functions,
    humaneval,
    jsonl,
    livecodebench,
    mbpp,
)
from rlef_mega.problems.rows import MALFORMED, Drop, Read, data_files
from rlef_mega.problems.store import ProblemStore, cache_folder, count_reasons, stored
from rlef_mega.types import Problem

logger = logging.getLogger(__name__)
SHOWN_DROPS = 5


def load_problems(source: str, cache: Path | None = None) -> Sequence[Problem]:
    """Problems of `curriculum:SPLIT`, `humaneval:SPLIT`, `functions:SPLIT`, of CodeContests
    (`codecontests:PLACE?OPTIONS`), of HumanEval+ or MBPP+ (`evalplus:FILE`), of MBPP
    (`mbpp:FILE?OPTIONS`), of LiveCodeBench (`livecodebench:PLACE?OPTIONS`) or of a file in our own
    JSONL.

    SPLIT is train, valid or test; PLACE a file, a folder or, for CodeContests, a repository of the
    Hugging Face hub. What is read from data sets is kept in `cache` and read again from there.
    ValueError, with file, row, field and remedy, for whatever is wrong.
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


@dataclass(frozen=True)
class DataSet:
    """How rows that others published become problems: by options, out of files."""

    options: type
    files: Callable[[str, str, typing.Any], list[Path]]  # of source, place and options
    read: Callable[[Sequence[Path], typing.Any], Iterator[Read]]


def is_data_set(source: str) -> bool:
    name, separator, _ = source.partition(":")
    return bool(separator) and name in DATA_SETS


def read_data_set(source: str, cache: Path | None = None) -> ProblemStore:
    """All that a source of a data set gives, malformed rows reported beside the others."""
    name, _, rest = source.partition(":")
    place, _, query = rest.partition("?")
    data_set = DATA_SETS[name]
    options = parse_options(source, query, data_set.options)
    files = data_set.files(source, place, options)
    return stored(
        f"{name} {options}",
        files,
        lambda: data_set.read(files, options),
        cache or cache_folder(),
    )


def refuse_malformed(source: str, drops: Sequence[Drop]) -> None:
    wrong = [drop for drop in drops if drop.reason == MALFORMED]
    if not wrong:
        return
    lines = [f"{drop.place}: {drop.detail}" for drop in wrong[:SHOWN_DROPS]]
    raise ValueError(
        "; ".join(lines)
        + f" ({len(wrong)} malformed rows in all; `rlef data inspect {source}` lists them)"
    )


def parse_options(source: str, query: str, options: type) -> typing.Any:
    """`split=train&max_tests=50`: what the words say, in the types of the options."""
    types = typing.get_type_hints(options)
    given: dict[str, typing.Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in types:
            known = ", ".join(types) or "it takes none"
            raise ValueError(f"problem source {source!r}: no option {key!r}; {known}")
        try:
            given[key] = parse_option(text, types[key])
        except ValueError as error:
            raise ValueError(f"problem source {source!r}: {key}={text!r} is {error}") from None
    return options(**given)


def parse_option(text: str, kind: typing.Any) -> typing.Any:
    if kind is str:
        return text
    if kind is int:
        if not text.isdigit():
            raise ValueError("no count")
        return int(text)
    if kind is date:
        try:
            return date.fromisoformat(text)
        except ValueError:
            raise ValueError("no date like 2024-08-01") from None
    if typing.get_origin(kind) is typing.Literal:
        allowed = [value for value in typing.get_args(kind) if value]
        if text not in allowed:
            raise ValueError(f"none of {', '.join(allowed)}")
        return text
    return tuple(part for part in text.split(",") if part)


def one_file(source: str, place: str, _: object) -> list[Path]:
    return [existing(place, source)]


def livecodebench_files(source: str, place: str, options: livecodebench.Options) -> list[Path]:
    path = Path(place)
    if not path.exists():
        raise ValueError(
            f"problem source {source!r}: there is no file or folder {place!r}; download "
            "test*.jsonl of livecodebench/code_generation_lite and name one, or their folder"
        )
    return data_files(path, options.split)


def codecontests_files(source: str, place: str, options: codecontests.Options) -> list[Path]:
    """Of a file, of a folder as published, or of the hub's copy, which is downloaded first."""
    path, split = Path(place), options.split
    if not path.exists() and len(path.parts) == 2 and not path.suffix:
        path = download(source, place, split)
    if not path.exists():
        raise ValueError(
            f"problem source {source!r}: there is no file or folder {place!r}; give one, or "
            "codecontests:deepmind/code_contests?split=train to take the hub's copy; other sources "
            "are curriculum:SPLIT, humaneval:SPLIT and functions:SPLIT"
        )
    files = data_files(path, split)
    splits = {name for name in curriculum.SPLITS for file in files if file.name.startswith(name)}
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


DATA_SETS = {
    "codecontests": DataSet(codecontests.Options, codecontests_files, codecontests.read),
    "evalplus": DataSet(evalplus.Options, one_file, evalplus.read),
    "mbpp": DataSet(mbpp.Options, one_file, mbpp.read),
    "livecodebench": DataSet(livecodebench.Options, livecodebench_files, livecodebench.read),
}
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
        f"give a JSONL file, codecontests:PLACE, evalplus:FILE, mbpp:FILE, livecodebench:PLACE, "
        f"or one of {bundled} "
        "(SPLIT: train, valid, test)"
    )


def named(problems: Sequence[Problem], ids: Collection[str]) -> dict[str, Problem]:
    """The problems of these ids; of a store no others are read."""
    if isinstance(problems, ProblemStore):
        return {name: problems[problems.number_of[name]] for name in set(ids)}
    return {problem.id: problem for problem in problems if problem.id in ids}


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
