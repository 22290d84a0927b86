"""The bundled curriculum: small problems in CodeContests shape whose statements withhold what their
tests show.

A family is one kind of program with hidden variants ("Greet the person whose name is given.": with
which word?). Its problems come in three wordings:

- `vague` leaves the variant open. The public test reveals it, but only as feedback: a first
  response can only guess, and a model that reads the feedback is right at the second.
- `word` names the variant.
- `example` is vague and quotes the public test: what feedback would show, within one turn.

No two variants print the same on a public input, so one test reveals the variant. Private tests
have other inputs and more than one output, so printing the public output solves nothing.

The splits share no (family, variant, public input), whatever the wording: no split shows a public
test of another. All problems are computed from `curriculum.json`, without running a program, and
are the same on every machine. To add a family, add an entry to that file:

- `vague`: two statements; `word`: a third, with {0}, {1} for the parts of the variant;
- `variants`: the hidden parts, a string or a list of strings each;
- `program`: the reference program, with {0}, {1} for the parts;
- `output`: what the program prints, as a Python expression of `text` (the input line) and
  `variant` (a tuple of strings);
- `public_inputs`, `private_inputs`: names of lists under `inputs`.
"""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from rlef_mega.problems.splits import Split, part
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Limits, Test

Wording = Literal["vague", "word", "example"]
Variant = tuple[str, ...]  # parts of the program that the statement may withhold

PRIVATE_TESTS = 4
HELD_OUT = {"test": 50, "valid": 30}  # public tests of each family; the rest is for training
LIMITS = Limits(cpu_s=2.0, memory_bytes=256 << 20)


@dataclass(frozen=True)
class ProgramFamily:
    """One kind of program. `word` and `program` are format strings over the parts of a variant."""

    name: str
    vague: tuple[str, ...]
    word: str
    variants: tuple[Variant, ...]
    program: str
    output: Callable[[str, Variant], str]  # what the program prints, without running it
    public_inputs: tuple[str, ...]
    private_inputs: tuple[str, ...]

    def source(self, variant: Variant) -> str:
        """Return the reference program of a variant."""
        return self.program.format(*variant)


def to_family(entry: dict[str, Any], inputs: dict[str, list[str]]) -> ProgramFamily:
    return ProgramFamily(
        name=entry["name"],
        vague=tuple(entry["vague"]),
        word=entry["word"],
        variants=tuple((v,) if isinstance(v, str) else tuple(v) for v in entry["variants"]),
        program=entry["program"],
        output=eval(f"lambda text, variant: {entry['output']}"),  # the package's own text
        public_inputs=tuple(inputs[entry["public_inputs"]]),
        private_inputs=tuple(inputs[entry["private_inputs"]]),
    )


DATA = json.loads((resources.files("rlef_mega.problems") / "curriculum.json").read_text())
FAMILIES = tuple(to_family(entry, DATA["inputs"]) for entry in DATA["families"])


@dataclass(frozen=True)
class Exercise:
    """A problem of the curriculum before it becomes a `Problem`."""

    family: ProgramFamily
    variant: int
    public_input: str
    wording: Wording
    phrase: int = 0  # which vague statement

    @property
    def id(self) -> str:
        test = f"{self.family.name}-{self.variant}-{self.public_input.replace(' ', '.')}"
        return f"{test}-{self.wording}{self.phrase if self.wording != 'word' else ''}"

    @property
    def statement(self) -> str:
        if self.wording == "word":
            return self.family.word.format(*self.family.variants[self.variant])
        statement = self.family.vague[self.phrase]
        if self.wording == "example":
            expected = self.output(self.public_input)
            statement += f" Example: input '{self.public_input}' Expected output '{expected}'."
        return statement

    @property
    def source(self) -> str:
        """Return the reference program of this variant."""
        return self.family.source(self.family.variants[self.variant])

    def output(self, text: str, variant: int | None = None) -> str:
        """Return what the reference program, or that of another variant, prints for an input."""
        chosen = self.family.variants[self.variant if variant is None else variant]
        return self.family.output(text, chosen)

    def test(self, text: str) -> Test:
        return Test(f"{text}\n".encode(), f"{self.output(text)}\n".encode())


def to_problem(exercise: Exercise) -> Problem:
    """Return the exercise as a `Problem`, with one public and `PRIVATE_TESTS` private tests."""
    return Problem(
        id=exercise.id,
        statement=exercise.statement,
        public_tests=(exercise.test(exercise.public_input),),
        private_tests=PrivateTests(tuple(map(exercise.test, private_inputs(exercise)))),
        limits=LIMITS,
        template="curriculum",
        family=exercise.family.name,
        tags=(exercise.wording,),
    )


def private_inputs(exercise: Exercise) -> list[str]:
    """Draw inputs, by the exercise's id, that differ from the public one.

    The output differs from the public one for at least one of them.
    """
    generator = random.Random(exercise.id)
    pool = [text for text in exercise.family.private_inputs if text != exercise.public_input]
    public_output = exercise.output(exercise.public_input)
    while True:
        chosen = generator.sample(pool, PRIVATE_TESTS)
        if any(exercise.output(text) != public_output for text in chosen):
            return chosen


def public_tests(family: ProgramFamily, split: Split) -> Sequence[tuple[int, str]]:
    """Return the (variant, public input) pairs of a split, cut from one shuffle of all."""
    every = list(itertools.product(range(len(family.variants)), family.public_inputs))
    random.Random(f"curriculum {family.name}").shuffle(every)
    return part(every, split, **HELD_OUT)


def exercises(split: Split) -> list[Exercise]:
    """Return all exercises of a split: 80% vague, 10% word, 10% example.

    Families take turns, so any prefix of the list has all of them.
    """
    wordings = training_wordings if split == "train" else held_out_wordings
    columns = [
        [
            Exercise(family, variant, text, wording, phrase)
            for number, (variant, text) in enumerate(public_tests(family, split))
            for wording, phrase in wordings(number)
        ]
        for family in FAMILIES
    ]
    rows = itertools.zip_longest(*columns)
    return [exercise for row in rows for exercise in row if exercise is not None]


def training_wordings(number: int) -> Sequence[tuple[Wording, int]]:
    """Return the wordings of a training test: both vague statements, for every fourth test also
    `word`, and for another fourth `example`."""
    vague: list[tuple[Wording, int]] = [("vague", 0), ("vague", 1)]
    extra: dict[int, tuple[Wording, int]] = {0: ("word", 0), 1: ("example", number // 4 % 2)}
    return [*vague, extra[number % 4]] if number % 4 in extra else vague


def held_out_wordings(number: int) -> Sequence[tuple[Wording, int]]:
    """Return the wording of a held-out test: only one, so that the problems are independent."""
    named: dict[int, Wording] = {0: "word", 1: "example"}
    wording = named.get(number % 10, "vague")
    return [(wording, 0 if wording == "word" else number // 2 % 2)]


def problems(split: Split) -> list[Problem]:
    """Return the problems of a split."""
    return [to_problem(exercise) for exercise in exercises(split)]
