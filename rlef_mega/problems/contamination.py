"""Whether problems of an evaluation set stand in a training set: the same statement, but for case,
space and punctuation, or a large share of its runs of 13 words (the length that GPT-3's authors
took)."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlef_mega.types import Problem

WORDS_A_RUN = 13
SUSPICIOUS = 0.5  # of an evaluation statement's runs, in one or several training statements
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """An evaluation problem, and the training problem that has the same statement, if one does."""

    id: str
    same_as: str | None
    share: float  # of its runs of words that stand somewhere in the training set


@dataclass(frozen=True)
class Report:
    """Of all evaluation problems, in order."""

    overlaps: tuple[Overlap, ...]

    def suspicious(self) -> list[Overlap]:
        return [o for o in self.overlaps if o.same_as is not None or o.share >= SUSPICIOUS]

    def summary(self) -> str:
        same = sum(overlap.same_as is not None for overlap in self.overlaps)
        return (
            f"of {len(self.overlaps)} problems {same} have a statement of these, and "
            f"{len(self.suspicious()) - same} more share {SUSPICIOUS:.0%} of their runs of "
            f"{WORDS_A_RUN} words"
        )

    def lines(self) -> list[str]:
        return [
            f"- {o.id!r}: "
            + (f"the statement of {o.same_as!r}" if o.same_as is not None else f"{o.share:.0%}")
            for o in self.suspicious()
        ]


def compare(train: Iterable[Problem], evaluation: Sequence[Problem]) -> Report:
    """One pass over the training problems; in memory are the evaluation set's runs alone."""
    texts = [normalize(problem.statement) for problem in evaluation]
    runs = [runs_of(text) for text in texts]
    wanted = set().union(*runs)
    wanted_texts = set(texts)
    same: dict[str, str] = {}
    found: set[bytes] = set()
    for problem in train:
        text = normalize(problem.statement)
        if text in wanted_texts:
            same.setdefault(text, problem.id)
        found |= wanted & runs_of(text)
    return Report(
        tuple(
            Overlap(p.id, same.get(text), len(own & found) / len(own) if own else 0.0)
            for p, text, own in zip(evaluation, texts, runs, strict=True)
        )
    )


def normalize(statement: str) -> str:
    return " ".join(WORD.findall(statement.lower()))


def runs_of(text: str) -> set[bytes]:
    """Digests of the runs of words; a text shorter than one has none."""
    words = text.split(" ")
    return {
        hashlib.blake2b(" ".join(words[at : at + WORDS_A_RUN]).encode(), digest_size=8).digest()
        for at in range(len(words) - WORDS_A_RUN + 1)
    }
