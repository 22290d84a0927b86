"""The bundled curriculum: small problems in CodeContests shape whose statements withhold what their
tests show.

A family is one kind of program with some hidden variants ("Greet the person whose name is given.":
with which word?). Its problems come in three wordings:

- `vague` leaves the variant open. The public test gives it away, but only as feedback: a first
  response can but guess, and whoever reads the feedback is right at the second.
- `word` names the variant.
- `example` is vague and quotes the public test: the inference that feedback asks for, within one
  turn.

No two variants print the same on a public input, so one test settles the variant. Private tests
have other inputs and more than one output, so printing the public output solves nothing.

The splits share no (family, variant, public input), whatever the wording: no split shows a public
test of another. All problems follow from this file, on every machine; no program is run to make
them.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Limits, Test

Split = Literal["train", "valid", "test"]
Wording = Literal["vague", "word", "example"]
Variant = tuple[str, ...]  # what the program's text has that the statement may withhold

PRIVATE_TESTS = 4
HELD_OUT = {"test": 50, "valid": 30}  # public tests of each family; the rest is for training
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
LIMITS = Limits(cpu_s=2.0, memory_bytes=256 << 20)

NAMES = tuple(
    [
        "Ann",
        "Bob",
        "Eva",
        "Tom",
        "Mia",
        "Leo",
        "Zoe",
        "Max",
        "Ida",
        "Sam",
        "Kim",
        "Jon",
        "Amy",
        "Ben",
        "Dan",
        "Fay",
        "Gus",
        "Ivy",
    ]
)
WORDS = tuple(
    [
        "cat",
        "dog",
        "sun",
        "map",
        "box",
        "cup",
        "red",
        "sky",
        "tea",
        "ice",
        "pen",
        "car",
        "egg",
        "fox",
        "hat",
        "ink",
        "jam",
        "key",
    ]
)
SIGNS = ", - : / | + * ; _ # & ~"
AMOUNTS = tuple(str(n) for n in range(1, 100) if n % 6 in (1, 2))  # as many odd as even


@dataclass(frozen=True)
class Family:
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
        return self.program.format(*variant)


def one_word(words: str) -> tuple[Variant, ...]:
    return tuple((word,) for word in words.split())


def two_words(words: str) -> tuple[Variant, ...]:
    """Variants written a/b."""
    return tuple(tuple(word.split("/")) for word in words.split())


def digits(count: int, every: int) -> tuple[str, ...]:
    """Every so manieth list of distinct digits."""
    lists = itertools.islice(itertools.permutations("123456789", count), 0, None, every)
    return tuple(" ".join(chosen) for chosen in lists)


FAMILIES = (
    Family(
        name="greet",
        vague=("Greet the person whose name is given.", "Read a name and print a greeting."),
        word="Greet the person with the word {0}.",
        variants=one_word("Hello Hi Hey Dear Bye Welcome Howdy Thanks Sorry Ciao Cheers Servus"),
        program="print('{0}',input())",
        output=lambda text, variant: f"{variant[0]} {text}",
        public_inputs=NAMES,
        private_inputs=NAMES,
    ),
    Family(
        name="unit",
        vague=(
            "Print the amount n with its unit.",
            "Read an amount and print it with the unit.",
        ),
        word="Print the amount n with the unit {0}.",
        variants=one_word("km kg cm USD EUR ms GB mm mph lb kWh pts"),
        program="print(input(),'{0}')",
        output=lambda text, variant: f"{text} {variant[0]}",
        public_inputs=AMOUNTS,
        private_inputs=tuple(map(str, range(1, 100))),
    ),
    Family(
        name="separator",
        vague=("Print the integers with the right separator.", "Join the integers."),
        word="Join the integers with the separator '{0}'.",
        variants=one_word(SIGNS),
        program="print(*input().split(),sep='{0}')",
        output=lambda text, variant: variant[0].join(text.split()),
        public_inputs=digits(2, every=6) + digits(3, every=43),
        private_inputs=digits(2, every=5) + digits(3, every=41) + digits(4, every=101),
    ),
    Family(
        name="parity",
        vague=("Tell whether n is even.", "Read n and print its parity."),
        word="Print {0} if n is even and {1} if n is odd.",
        variants=two_words(
            "YES/NO Yes/No true/false even/odd E/O T/F ok/bad good/wrong left/right up/down "
            "white/black in/out"
        ),
        program="n=int(input())\nprint(['{0}','{1}'][n%2])",
        output=lambda text, variant: variant[int(text) % 2],
        public_inputs=AMOUNTS,
        private_inputs=tuple(map(str, range(1, 100))),
    ),
    Family(
        name="wrap",
        vague=(
            "Print the word between the right marks.",
            "Read a word and put the marks around it.",
        ),
        word="Print the word between '{0}' and '{1}'.",
        variants=tuple(zip("<([{*#-=/|~+", ">)]}*#-=/|~+", strict=True)),
        program="print('{0}'+input()+'{1}')",
        output=lambda text, variant: f"{variant[0]}{text}{variant[1]}",
        public_inputs=WORDS,
        private_inputs=WORDS,
    ),
    Family(
        name="ending",
        vague=(
            "Print the word with its ending.",
            "Read a word and print it with the right ending.",
        ),
        word="Print the word with the ending '{0}'.",
        variants=one_word("! ? . ; : % $ & * ~ ... !!"),
        program="print(input()+'{0}')",
        output=lambda text, variant: f"{text}{variant[0]}",
        public_inputs=WORDS,
        private_inputs=WORDS,
    ),
    Family(
        name="echo",
        vague=(
            "Print the word twice with the right sign between.",
            "Read a word and print it two times.",
        ),
        word="Print the word twice with '{0}' between.",
        variants=one_word(SIGNS),
        program="s=input()\nprint(s,s,sep='{0}')",
        output=lambda text, variant: f"{text}{variant[0]}{text}",
        public_inputs=WORDS,
        private_inputs=WORDS,
    ),
    Family(
        name="sign",
        vague=(
            "Print the amount n with its sign in front.",
            "Read an amount and put the sign before it.",
        ),
        word="Print the amount n with '{0}' in front.",
        variants=one_word("$ # @ ~ + - = * % & : >"),
        program="print('{0}'+input())",
        output=lambda text, variant: f"{variant[0]}{text}",
        public_inputs=AMOUNTS,
        private_inputs=tuple(map(str, range(1, 100))),
    ),
)


@dataclass(frozen=True)
class Exercise:
    """A problem before it takes the common form: what the generator knows about it."""

    family: Family
    variant: int
    public_input: str
    wording: Wording
    phrase: int = 0  # which vague statement

    @property
    def id(self) -> str:
        place = f"{self.family.name}-{self.variant}-{self.public_input.replace(' ', '.')}"
        return f"{place}-{self.wording}{self.phrase if self.wording != 'word' else ''}"

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
        """The reference program."""
        return self.family.source(self.family.variants[self.variant])

    def output(self, text: str, variant: int | None = None) -> str:
        """What the reference program, or that of another variant, prints for an input."""
        chosen = self.family.variants[self.variant if variant is None else variant]
        return self.family.output(text, chosen)

    def test(self, text: str) -> Test:
        return Test(f"{text}\n".encode(), f"{self.output(text)}\n".encode())


def to_problem(exercise: Exercise) -> Problem:
    """The common form. Its private inputs are drawn by the exercise's id."""
    return Problem(
        id=exercise.id,
        statement=exercise.statement,
        public_tests=(exercise.test(exercise.public_input),),
        private_tests=PrivateTests(tuple(map(exercise.test, private_inputs(exercise)))),
        limits=LIMITS,
        template="curriculum",
        family=exercise.family.name,
        tags=(exercise.wording,),
        wrong_programs=(another_guess(exercise),),
    )


def another_guess(exercise: Exercise) -> str:
    """The program of another variant, which prints something else on the public input."""
    variants = exercise.family.variants
    others = [variant for number, variant in enumerate(variants) if number != exercise.variant]
    return exercise.family.source(random.Random(f"wrong {exercise.id}").choice(others))


def private_inputs(exercise: Exercise) -> list[str]:
    """Inputs other than the public one; for at least one of them the output is another too."""
    generator = random.Random(exercise.id)
    pool = [text for text in exercise.family.private_inputs if text != exercise.public_input]
    public_output = exercise.output(exercise.public_input)
    while True:
        chosen = generator.sample(pool, PRIVATE_TESTS)
        if any(exercise.output(text) != public_output for text in chosen):
            return chosen


@cache
def public_tests(family: Family) -> dict[Split, list[tuple[int, str]]]:
    """The (variant, public input) pairs of each split: an even shuffle, cut."""
    every = list(itertools.product(range(len(family.variants)), family.public_inputs))
    random.Random(f"curriculum {family.name}").shuffle(every)
    test, valid = HELD_OUT["test"], HELD_OUT["valid"]
    return {
        "test": every[:test],
        "valid": every[test : test + valid],
        "train": every[test + valid :],
    }


def exercises(split: Split) -> list[Exercise]:
    """All problems of a split: 80% vague, 10% word, 10% example. Families take turns, so any first
    part has all.
    """
    wordings = training_wordings if split == "train" else held_out_wordings
    columns = [
        [
            Exercise(family, variant, text, wording, phrase)
            for place, (variant, text) in enumerate(public_tests(family)[split])
            for wording, phrase in wordings(place)
        ]
        for family in FAMILIES
    ]
    rows = itertools.zip_longest(*columns)
    return [exercise for row in rows for exercise in row if exercise is not None]


def training_wordings(place: int) -> Sequence[tuple[Wording, int]]:
    """Each public test with both vague statements, each fourth one named, each fourth one shown."""
    vague: list[tuple[Wording, int]] = [("vague", 0), ("vague", 1)]
    extra: dict[int, tuple[Wording, int]] = {0: ("word", 0), 1: ("example", place // 4 % 2)}
    return [*vague, extra[place % 4]] if place % 4 in extra else vague


def held_out_wordings(place: int) -> Sequence[tuple[Wording, int]]:
    """Each public test once, so that held-out problems are independent."""
    told: dict[int, Wording] = {0: "word", 1: "example"}
    wording = told.get(place % 10, "vague")
    return [(wording, 0 if wording == "word" else place // 2 % 2)]


def problems(split: Split) -> list[Problem]:
    return [to_problem(exercise) for exercise in exercises(split)]
