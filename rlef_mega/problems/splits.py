"""Train, valid and test parts of the problems that come with the package."""

from collections.abc import Sequence
from typing import Literal, TypeVar

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Item = TypeVar("Item")


def part(shuffled: Sequence[Item], split: Split, *, test: int, valid: int) -> Sequence[Item]:
    """Return one split: `test` items come first, `valid` items next, the rest is for training."""
    cuts = {"test": (0, test), "valid": (test, test + valid), "train": (test + valid, None)}
    return shuffled[slice(*cuts[split])]
