"""Easy functions for a small pretrained model: a name, a sentence, and tests by a Python callable.

HumanEval is too hard for a model of 135M parameters to learn from: hardly any of its tasks is
sometimes solved. These are what such a model solves now and then. The first input is the public
test, the others are private. The splits share no kind of function ("plus 3" and "plus 7" are one).
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import CallTest, Limits

Split = Literal["train", "valid", "test"]
Inputs = tuple[tuple[Any, ...], ...]

LIMITS = Limits(cpu_s=2.0, memory_bytes=256 << 20)
HELD_OUT = {"test": 16, "valid": 8}  # kinds of functions

NUMBERS: Inputs = ((5,), (0,), (-3,), (12,))
COUNTS: Inputs = ((15,), (9,), (20,), (1,))
NUMBER_PAIRS: Inputs = ((7, 4), (0, 5), (-2, 7), (10, 10))
TEXTS: Inputs = (("hello",), ("Abc",), ("",), ("x y z",))
WORDS: Inputs = (("hello",), ("Abc",), ("z",), ("x y",))
LISTS: Inputs = (([3, 1, 2],), ([5],), ([-1, 4, 4, 0],), ([10, 20, 30, 40],))


@dataclass(frozen=True)
class Function:
    """`does` completes "Write a Python function `name(parameters)` that ..."."""

    name: str
    parameters: str
    does: str
    compute: Callable[..., Any]
    inputs: Inputs
    kind: str = ""  # functions of one kind differ in a constant


def with_constants(
    kind: str,
    parameters: str,
    does: str,
    compute: Callable[..., Any],
    inputs: Inputs,
    constants: Iterable[Any],
) -> list[Function]:
    """One function a constant, which is the last argument of `compute` and {} in `does`."""
    return [
        Function(
            f"{kind}_{constant}",
            parameters,
            does.format(constant),
            lambda *args, constant=constant: compute(*args, constant),
            inputs,
            kind,
        )
        for constant in constants
    ]


def arithmetic() -> list[Function]:
    return [
        *with_constants(
            "add", "x", "returns x plus {}", lambda x, k: x + k, NUMBERS, (3, 7, 10, 25)
        ),
        *with_constants(
            "minus", "x", "returns x minus {}", lambda x, k: x - k, NUMBERS, (4, 6, 15)
        ),
        *with_constants(
            "times", "x", "returns x multiplied by {}", lambda x, k: x * k, NUMBERS, (2, 5, 9)
        ),
        *with_constants(
            "twice_plus", "x", "returns 2 times x plus {}", lambda x, k: 2 * x + k, NUMBERS, (1, 4)
        ),
        *with_constants(
            "is_multiple_of",
            "n",
            "returns True if n is divisible by {}, otherwise False",
            lambda n, k: n % k == 0,
            ((15,), (14,), (21,), (1,)),
            (3, 5, 7),
        ),
        *with_constants(
            "remainder",
            "n",
            "returns the remainder of n divided by {}",
            lambda n, k: n % k,
            COUNTS,
            (3, 10),
        ),
        *with_constants(
            "is_above",
            "x",
            "returns True if x is greater than {}, otherwise False",
            lambda x, k: x > k,
            ((6,), (5,), (100,), (101,)),
            (5, 100),
        ),
        Function("square", "x", "returns x squared", lambda x: x * x, NUMBERS),
        Function("cube", "x", "returns x cubed", lambda x: x**3, NUMBERS),
        Function("negate", "x", "returns the negative of x", lambda x: -x, NUMBERS),
        Function("absolute", "x", "returns the absolute value of x", abs, ((-3,), (0,), (5,))),
        Function(
            "is_odd", "n", "returns True if n is odd, otherwise False", lambda n: n % 2 == 1, COUNTS
        ),
        Function(
            "is_positive",
            "x",
            "returns True if x is greater than zero, otherwise False",
            lambda x: x > 0,
            NUMBERS,
        ),
        Function("subtract", "a, b", "returns a minus b", lambda a, b: a - b, NUMBER_PAIRS),
        Function(
            "multiply", "a, b", "returns the product of a and b", lambda a, b: a * b, NUMBER_PAIRS
        ),
        Function("smaller", "a, b", "returns the smaller of a and b", min, NUMBER_PAIRS),
        Function(
            "distance",
            "a, b",
            "returns the absolute difference of a and b",
            lambda a, b: abs(a - b),
            NUMBER_PAIRS,
        ),
        Function(
            "power",
            "a, b",
            "returns a raised to the power b",
            lambda a, b: a**b,
            ((2, 3), (5, 0), (3, 2), (10, 1)),
        ),
        Function(
            "largest_of_three",
            "a, b, c",
            "returns the largest of a, b and c",
            max,
            ((1, 2, 3), (9, 2, 3), (-1, -5, -2), (4, 8, 8)),
        ),
        Function(
            "sum_to",
            "n",
            "returns the sum of the integers from 1 to n",
            lambda n: n * (n + 1) // 2,
            COUNTS,
        ),
        Function(
            "last_digit",
            "n",
            "returns the last digit of the non-negative integer n",
            lambda n: n % 10,
            COUNTS,
        ),
        Function(
            "rectangle_area",
            "w, h",
            "returns the area of a rectangle of width w and height h",
            lambda w, h: w * h,
            ((3, 4), (1, 5), (2, 7)),
        ),
    ]


def on_text() -> list[Function]:
    return [
        *with_constants(
            "repeat",
            "s",
            "returns the string s repeated {} times",
            lambda s, k: s * k,
            TEXTS,
            (2, 3),
        ),
        *with_constants(
            "count_letter",
            "s",
            "returns how many times the letter '{}' occurs in s",
            lambda s, letter: s.count(letter),
            (("banana",), ("eel",), ("",), ("apple pie",)),
            "ae",
        ),
        *with_constants(
            "starts_with",
            "s",
            "returns True if s starts with the letter '{}', otherwise False",
            lambda s, letter: s.startswith(letter),
            (("apple",), ("banana",), ("ab",), ("",)),
            "ab",
        ),
        Function("upper", "s", "returns s converted to uppercase", str.upper, TEXTS),
        Function("lower", "s", "returns s converted to lowercase", str.lower, TEXTS),
        Function("reverse", "s", "returns the string s reversed", lambda s: s[::-1], TEXTS),
        Function("length", "s", "returns the number of characters of s", len, TEXTS),
        Function(
            "first_char",
            "s",
            "returns the first character of the non-empty string s",
            lambda s: s[0],
            WORDS,
        ),
        Function(
            "last_char",
            "s",
            "returns the last character of the non-empty string s",
            lambda s: s[-1],
            WORDS,
        ),
        Function(
            "concat",
            "a, b",
            "returns the string a followed by the string b",
            lambda a, b: a + b,
            (("ab", "cd"), ("", "x"), ("q", "")),
        ),
        Function(
            "count_words",
            "s",
            "returns the number of words in the string s",
            lambda s: len(s.split()),
            (("hello world",), ("a",), ("a b c d",), ("",)),
        ),
        Function(
            "remove_spaces",
            "s",
            "returns s with all spaces removed",
            lambda s: s.replace(" ", ""),
            (("x y z",), ("hello",), (" a ",)),
        ),
        Function(
            "is_empty",
            "s",
            "returns True if the string s is empty, otherwise False",
            lambda s: s == "",
            TEXTS,
        ),
        Function("exclaim", "s", "returns s with '!' added at the end", lambda s: s + "!", TEXTS),
        Function(
            "hello",
            "name",
            "returns the string 'Hello, ' followed by name",
            lambda name: "Hello, " + name,
            (("Bob",), ("Ann",), ("",)),
        ),
    ]


def on_lists() -> list[Function]:
    return [
        *with_constants(
            "keep_above",
            "numbers",
            "returns a list of those numbers that are greater than {}, in order",
            lambda numbers, k: [x for x in numbers if x > k],
            LISTS,
            (2, 5),
        ),
        *with_constants(
            "add_to_each",
            "numbers",
            "returns a new list where {} is added to every number",
            lambda numbers, k: [x + k for x in numbers],
            LISTS,
            (1, 10),
        ),
        Function(
            "first_item",
            "items",
            "returns the first element of a non-empty list",
            lambda x: x[0],
            LISTS,
        ),
        Function(
            "last_item",
            "items",
            "returns the last element of a non-empty list",
            lambda x: x[-1],
            LISTS,
        ),
        Function("count_items", "items", "returns the number of elements in the list", len, LISTS),
        Function("total", "numbers", "returns the sum of the numbers", sum, LISTS),
        Function("smallest", "numbers", "returns the smallest of the numbers", min, LISTS),
        Function(
            "ascending", "numbers", "returns the numbers sorted in ascending order", sorted, LISTS
        ),
        Function(
            "descending",
            "numbers",
            "returns the numbers sorted in descending order",
            lambda x: sorted(x, reverse=True),
            LISTS,
        ),
        Function("backwards", "items", "returns the list reversed", lambda x: x[::-1], LISTS),
        Function(
            "squares",
            "numbers",
            "returns a list of the squares of the numbers",
            lambda x: [n * n for n in x],
            LISTS,
        ),
        Function(
            "sum_of_evens",
            "numbers",
            "returns the sum of the even numbers",
            lambda x: sum(n for n in x if n % 2 == 0),
            LISTS,
        ),
        Function(
            "count_positive",
            "numbers",
            "returns how many of the numbers are positive",
            lambda x: sum(n > 0 for n in x),
            LISTS,
        ),
        Function(
            "only_odd",
            "numbers",
            "returns a list of the odd numbers, in order",
            lambda x: [n for n in x if n % 2],
            LISTS,
        ),
        Function(
            "without_first",
            "items",
            "returns the list without its first element",
            lambda x: x[1:],
            LISTS,
        ),
        Function(
            "count_distinct",
            "items",
            "returns the number of different elements",
            lambda x: len(set(x)),
            LISTS,
        ),
        Function(
            "is_ascending",
            "numbers",
            "returns True if the list is in ascending order, otherwise False",
            lambda x: x == sorted(x),
            LISTS,
        ),
        Function(
            "average",
            "numbers",
            "returns the average of the numbers",
            lambda x: sum(x) / len(x),
            LISTS,
        ),
        Function(
            "join_lists",
            "a, b",
            "returns the list a followed by the list b",
            lambda a, b: a + b,
            (([1], [2]), ([], [3]), ([1, 2], [])),
        ),
        Function(
            "contains",
            "items, x",
            "returns True if x is in the list items, otherwise False",
            lambda items, x: x in items,
            (([1, 2], 2), ([1, 2], 3), ([], 1)),
        ),
        Function(
            "up_to",
            "n",
            "returns the list of the integers from 1 to n",
            lambda n: list(range(1, n + 1)),
            ((3,), (1,), (5,)),
        ),
        Function(
            "join_dash",
            "words",
            "returns the strings joined with '-'",
            "-".join,
            ((["a", "b"],), (["x"],), (["1", "2", "3"],)),
        ),
    ]


def to_problem(function: Function) -> Problem:
    tests = [
        CallTest(function.name, arguments, function.compute(*arguments))
        for arguments in function.inputs
    ]
    signature = f"{function.name}({function.parameters})"
    return Problem(
        id=f"functions-{function.name}",
        statement=f"Write a Python function `{signature}` that {function.does}.",
        public_tests=tuple(tests[:1]),
        private_tests=PrivateTests(tuple(tests[1:])),
        limits=LIMITS,
        template="mbpp",
        entry_point=function.name,
        family=function.kind or function.name,
        wrong_programs=(f"def {signature}:\n    return {function.parameters.partition(',')[0]}\n",),
    )


def problems(split: Split) -> list[Problem]:
    """Whole kinds go to one split, by a shuffle that is the same everywhere."""
    functions = [*arithmetic(), *on_text(), *on_lists()]
    kinds = sorted({function.kind or function.name for function in functions})
    random.Random("functions").shuffle(kinds)
    test, valid = HELD_OUT["test"], HELD_OUT["valid"]
    chosen = {
        "test": kinds[:test],
        "valid": kinds[test : test + valid],
        "train": kinds[test + valid :],
    }[split]
    return [to_problem(f) for f in functions if (f.kind or f.name) in chosen]
