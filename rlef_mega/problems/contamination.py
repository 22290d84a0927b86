"""Find problems of an evaluation set that are also in a training set.

The statement may be the same apart from case, space and punctuation, or share many of its 13-grams
(the length that GPT-3's authors used) with training statements. Two problems may have the
same short statement and differ in their tests, so the tests are compared too.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlef_mega.problems.jsonl import to_test
from rlef_mega.types import Problem

NGRAM_WORDS = 13
SUSPICIOUS = 0.5  # of an evaluation statement's n-grams, in one or several training statements
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """An evaluation problem, compared with a training set."""

    id: str
    # of the training problems with its statement, the one that shares most of its tests
    same_as: str | None
    tests_share: float  # of its tests, public and private, that are also tests of that problem
    words_share: float  # of its n-grams that are in training statements

    @property
    def suspicious(self) -> bool:
        return self.same_as is not None or self.words_share >= SUSPICIOUS

    def __str__(self) -> str:
        if self.same_as is None:
            return f"- {self.id!r}: {self.words_share:.0%} of its {NGRAM_WORDS}-grams"
        tests = f"and {self.tests_share:.0%} of its tests" if self.tests_share else "other tests"
        return f"- {self.id!r}: the statement of {self.same_as!r}, {tests}"


def describe(overlaps: Sequence[Overlap]) -> list[str]:
    """Return a summary, then a line for each suspicious problem, shared tests first."""
    found = [overlap for overlap in overlaps if overlap.suspicious]
    found.sort(key=lambda overlap: (overlap.same_as is None, -overlap.tests_share))
    same = [overlap.tests_share for overlap in found if overlap.same_as is not None]
    summary = (
        f"of {len(overlaps)} problems, {same.count(1)} have the same statement and tests as one of "
        f"these, {sum(0 < share < 1 for share in same)} the same statement and some of the tests, "
        f"{same.count(0)} the same statement but other tests; {len(found) - len(same)} more share "
        f"{SUSPICIOUS:.0%} or more of their {NGRAM_WORDS}-grams"
    )
    return [summary, *map(str, found)]


def compare(train: Iterable[Problem], evaluation: Sequence[Problem]) -> list[Overlap]:
    """Compare each evaluation problem with the training problems, which are read once.

    In memory are the evaluation set's n-grams, and digests of the tests of training problems with
    the same statements.
    """
    texts = [normalize(problem.statement) for problem in evaluation]
    ngrams = [ngrams_of(text) for text in texts]
    wanted = set().union(*ngrams)
    same: dict[str, list[tuple[str, set[bytes]]]] = {text: [] for text in texts}
    found: set[bytes] = set()
    for problem in train:
        text = normalize(problem.statement)
        if text in same:
            same[text].append((problem.id, digests_of_tests(problem)))
        found |= wanted & ngrams_of(text)
    overlaps = []
    for problem, text, own in zip(evaluation, texts, ngrams, strict=True):
        tests = digests_of_tests(problem)
        twins = [(len(tests & theirs) / len(tests), name) for name, theirs in same[text]]
        tests_share, name = max(twins, key=lambda twin: twin[0], default=(0.0, None))
        words_share = len(own & found) / len(own) if own else 0.0
        overlaps.append(Overlap(problem.id, name, tests_share, words_share))
    return overlaps


def digests_of_tests(problem: Problem) -> set[bytes]:
    tests = (*problem.public_tests, *problem.private_tests.tests)
    return {hashlib.blake2b(repr(to_test(test)).encode(), digest_size=8).digest() for test in tests}


def normalize(statement: str) -> str:
    return " ".join(WORD.findall(statement.lower()))


def ngrams_of(text: str) -> set[bytes]:
    """Return digests of the n-grams of a text; empty if it is shorter than one."""
    words = text.split(" ")
    return {
        hashlib.blake2b(" ".join(words[at : at + NGRAM_WORDS]).encode(), digest_size=8).digest()
        for at in range(len(words) - NGRAM_WORDS + 1)
    }
