"""Sources of problems: a source string becomes a sequence of `Problem`s, checked before a run
starts.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

from pydantic import ValidationError

from rlef_mega.config import explain
from rlef_mega.problems import (
    apps,
    codecontests,
    curriculum,
    evalplus,
    functions,
    humaneval,
    jsonl,
    livecodebench,
    mbpp,
)
from rlef_mega.problems.graded_rows import SOLUTION_FAILS
from rlef_mega.problems.rows import MALFORMED, Drop, Read, SourceOptions, data_files
from rlef_mega.problems.splits import SPLITS, Split
from rlef_mega.problems.store import ProblemStore, cache_folder, stored
from rlef_mega.types import Problem

logger = logging.getLogger(__name__)
SHOWN_DROPS = 5
KNOWN_SOURCES = (
    "sources are a JSONL file, curriculum:SPLIT, humaneval:SPLIT, functions:SPLIT (SPLIT: train, "
    "valid, test), codecontests:PATH, apps:PATH, taco:PATH, evalplus:FILE, mbpp:FILE and "
    "livecodebench:PATH"
)


def load_problems(source: str, cache: Path | None = None) -> Sequence[Problem]:
    """Return the problems of a source.

    A source is `curriculum:SPLIT`, `humaneval:SPLIT` or `functions:SPLIT` (SPLIT is train, valid or
    test), a data set (`evalplus:FILE`, or `NAME:PATH?OPTIONS` where NAME is codecontests, apps,
    taco, mbpp or livecodebench and PATH is a file, a folder or, for CodeContests, a repository of
    the Hugging Face hub), or a file in our own JSONL. Problems of data sets are stored in `cache`
    and read again from there.

    Raises ValueError with file, row, field and remedy if anything is wrong.
    """
    if is_data_set(source):
        store = read_data_set(source, cache)
        reasons = Counter(drop.reason for drop in store.drops)
        for reason, count in reasons.items():
            logger.warning("%s: %d rows: %s", source, count, reason)
        for drop in store.drops:
            if drop.reason == SOLUTION_FAILS:
                logger.warning("%s: left out %s: %s: %s", source, drop.id, drop.reason, drop.detail)
        refuse_malformed(source, store.drops)
        if not len(store):
            counts = dict(reasons) or "no rows"
            raise ValueError(f"{source}: holds no problem that can be graded ({counts})")
        return store
    if not files_of(source):
        name, _, split = source.partition(":")
        return BUNDLED[name](cast("Split", split))
    return jsonl.read_jsonl(source)


@dataclass(frozen=True)
class DataSet:
    """A published data set: its options, its reader, and where a user gets its files."""

    options: type[SourceOptions]
    read: Callable[[Sequence[Path], Any, Path], Iterator[Read]]  # files, options, journal
    remedy: str


SplitOptions = (
    codecontests.CodeContestsOptions | livecodebench.LiveCodeBenchOptions | apps.AppsOptions
)


def is_data_set(source: str) -> bool:
    name, separator, _ = source.partition(":")
    return bool(separator) and name in DATA_SETS


def read_data_set(source: str, cache: Path | None = None) -> ProblemStore:
    """Return all problems and drops of a data set, including malformed rows."""
    options, files = located(source)
    name = source.partition(":")[0]
    return stored(
        f"{name} {options}",
        files,
        lambda journal: DATA_SETS[name].read(files, options, journal),
        cache or cache_folder(),
    )


def files_of(source: str) -> list[Path]:
    """Return the files of a source, without reading them; none if it is bundled. Raises ValueError
    if the files or the split do not exist."""
    if is_data_set(source):
        return located(source)[1]
    name, separator, split = source.partition(":")
    if separator and name in BUNDLED:
        if split not in SPLITS:
            raise ValueError(
                f"problem source {source!r}: no split {split!r}; use one of {', '.join(SPLITS)}"
            )
        return []
    if not Path(source).is_file():
        raise ValueError(f"problem source {source!r}: there is no such file; {KNOWN_SOURCES}")
    return [Path(source)]


def located(source: str) -> tuple[SourceOptions, list[Path]]:
    """Return the options and the files of a data set. Raises ValueError if something is wrong."""
    name, _, rest = source.partition(":")
    location, _, query = rest.partition("?")
    data_set = DATA_SETS[name]
    options = parse_options(source, query, data_set.options)
    path, split = Path(location), ""
    if isinstance(options, SplitOptions):
        split = options.split
    if name == "codecontests" and not path.exists() and len(path.parts) == 2 and not path.suffix:
        path = codecontests.download(source, location, split)
    return options, data_files(source, path, split, f"{data_set.remedy}; {KNOWN_SOURCES}")


def refuse_malformed(source: str, drops: Sequence[Drop]) -> None:
    wrong = [drop for drop in drops if drop.reason == MALFORMED]
    if not wrong:
        return
    lines = [f"{drop.location}: {drop.detail}" for drop in wrong[:SHOWN_DROPS]]
    raise ValueError(
        "; ".join(lines)
        + f" ({len(wrong)} malformed rows in all; `rlef data inspect {source}` lists them)"
    )


def parse_options(source: str, query: str, options: type[SourceOptions]) -> SourceOptions:
    """Return the options of a query like `split=train&max_tests=50`."""
    try:
        return options.model_validate(dict(parse_qsl(query, keep_blank_values=True)))
    except ValidationError as error:
        faults = "; ".join(line.strip() for line in explain(error, options))
        raise ValueError(f"problem source {source!r}: {faults}") from None


DATA_SETS = {
    "codecontests": DataSet(
        codecontests.CodeContestsOptions,
        codecontests.read,
        "codecontests:deepmind/code_contests?split=train reads the hub's copy",
    ),
    "apps": DataSet(
        apps.AppsOptions, apps.read, "download train.jsonl or test.jsonl of codeparrot/apps"
    ),
    "taco": DataSet(apps.AppsOptions, apps.read, "download the Parquet files of BAAI/TACO"),
    "evalplus": DataSet(
        SourceOptions, evalplus.read, "download HumanEvalPlus.jsonl.gz or MbppPlus.jsonl.gz"
    ),
    "mbpp": DataSet(mbpp.MBPPOptions, mbpp.read, "download mbpp.jsonl or sanitized-mbpp.json"),
    "livecodebench": DataSet(
        livecodebench.LiveCodeBenchOptions,
        livecodebench.read,
        "download test*.jsonl of livecodebench/code_generation_lite",
    ),
}
BUNDLED: dict[str, Callable[[Split], list[Problem]]] = {
    "curriculum": curriculum.problems,
    "humaneval": humaneval.problems,
    "functions": functions.problems,
}


def named(problems: Sequence[Problem], ids: Collection[str]) -> dict[str, Problem]:
    """Return the problems with these ids; of a store, no others are read."""
    problems = getattr(problems, "dataset", problems)  # a Subset's, whose store reads single ones
    if isinstance(problems, ProblemStore):
        return {name: problems[problems.number_of[name]] for name in set(ids)}
    return {problem.id: problem for problem in problems if problem.id in ids}


def sample(problems: Sequence[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """Return the `count` problems of rollout batch `step`. Each epoch is a new permutation.

    The result depends on the arguments alone, so a resumed run and every rank draw the same.
    """
    if not problems:
        raise ValueError("there are no problems to sample from")
    permutations: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(problems))
        if epoch not in permutations:
            order = list(range(len(problems)))
            random.Random(f"epoch {seed} {epoch}").shuffle(order)
            permutations[epoch] = order
        chosen.append(problems[permutations[epoch][index]])
    return chosen
