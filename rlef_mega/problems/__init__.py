"""Where problems come from: a source string, checked before anything starts, to a list of
`Problem`.
"""

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from rlef_mega.problems import codecontests, curriculum, functions, humaneval, jsonl
from rlef_mega.types import Problem

logger = logging.getLogger(__name__)


def load_problems(source: str) -> list[Problem]:
    """Problems of `curriculum:SPLIT`, `humaneval:SPLIT`, `codecontests:FILE` or of a file in our
    own JSONL.

    SPLIT is train, valid or test. ValueError, with file, line, field and remedy, for whatever is
    wrong.
    """
    name, separator, rest = source.partition(":")
    if separator and name in BUNDLED:
        if rest not in curriculum.SPLITS:
            raise ValueError(
                f"problem source {source!r}: no split {rest!r}; "
                f"take one of {', '.join(curriculum.SPLITS)}"
            )
        return BUNDLED[name](rest)
    if separator and name == "codecontests":
        problems, drops = codecontests.read_codecontests(existing(rest, source))
        for reason, count in drops.items():
            logger.warning("%s: dropped %d problems: %s", source, count, reason)
        return problems
    return jsonl.read_jsonl(existing(source, source))


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
        f"give a JSONL file, codecontests:FILE, or one of {bundled} (SPLIT: train, valid, test)"
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
