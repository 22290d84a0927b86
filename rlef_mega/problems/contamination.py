"""Whether problems of an evaluation set stand in a training set: the same statement, but for case,
space and punctuation, or a large share of its runs of 13 words (the length that GPT-3's authors
took). A statement may be the same and the problem another one, where words say little and tests
the rest: so the tests are compared too."""

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
    """An evaluation problem, and the training problem that has the same statement, if one does: the
    one that has most of its tests."""

    id: str
    same_as: str | None
    tests_share: float  # of its tests, public and private, that are also tests of that problem
    words_share: float  # of its runs of words that stand somewhere in the training set

    @property
    def suspicious(self) -> bool:
        return self.same_as is not None or self.words_share >= SUSPICIOUS

    def words(self) -> str:
        if self.same_as is None:
            return f"{self.words_share:.0%} of its runs of words"
        tests = f"and {self.tests_share:.0%} of its tests" if self.tests_share else "other tests"
        return f"the statement of {self.same_as!r}, {tests}"


@dataclass(frozen=True)
class Report:
    """Of all evaluation problems, in order."""

    overlaps: tuple[Overlap, ...]

    def suspicious(self) -> list[Overlap]:
        """The same problems first, then those of the same words, then the similar ones."""
        found = [overlap for overlap in self.overlaps if overlap.suspicious]
        return sorted(found, key=lambda o: (o.same_as is None, -o.tests_share))

    def summary(self) -> str:
        found = self.suspicious()
        same = [overlap.tests_share for overlap in found if overlap.same_as is not None]
        return (
            f"of {len(self.overlaps)} problems {sum(share == 1 for share in same)} have a "
            f"statement of these and all its tests, {sum(0 < share < 1 for share in same)} a "
            f"statement and some of its tests, {sum(share == 0 for share in same)} a statement "
            f"but other tests, and {len(found) - len(same)} more share {SUSPICIOUS:.0%} of their "
            f"runs of {WORDS_A_RUN} words"
        )

    def lines(self) -> list[str]:
        return [f"- {overlap.id!r}: {overlap.words()}" for overlap in self.suspicious()]


def compare(train: Iterable[Problem], evaluation: Sequence[Problem]) -> Report:
    """One pass over the training problems; in memory are the evaluation set's runs, and digests of
    the tests of training problems with the same statements."""
    texts = [normalize(problem.statement) for problem in evaluation]
    runs = [runs_of(text) for text in texts]
    wanted = set().union(*runs)
    same: dict[str, list[tuple[str, set[bytes]]]] = {text: [] for text in texts}
    found: set[bytes] = set()
    for problem in train:
        text = normalize(problem.statement)
        if text in same:
            same[text].append((problem.id, digests_of_tests(problem)))
        found |= wanted & runs_of(text)
    overlaps = []
    for problem, text, own in zip(evaluation, texts, runs, strict=True):
        tests = digests_of_tests(problem)
        twins = [(len(tests & theirs) / len(tests), name) for name, theirs in same[text]]
        tests_share, name = max(twins, key=lambda twin: twin[0], default=(0.0, None))
        words_share = len(own & found) / len(own) if own else 0.0
        overlaps.append(Overlap(problem.id, name, tests_share, words_share))
    return Report(tuple(overlaps))


def digests_of_tests(problem: Problem) -> set[bytes]:
    tests = (*problem.public_tests, *problem.private_tests.tests)
    return {hashlib.blake2b(repr(test).encode(), digest_size=8).digest() for test in tests}


def normalize(statement: str) -> str:
    return " ".join(WORD.findall(statement.lower()))


def runs_of(text: str) -> set[bytes]:
    """Digests of the runs of words; a text shorter than one has none."""
    words = text.split(" ")
    return {
        hashlib.blake2b(" ".join(words[at : at + WORDS_A_RUN]).encode(), digest_size=8).digest()
        for at in range(len(words) - WORDS_A_RUN + 1)
    }
