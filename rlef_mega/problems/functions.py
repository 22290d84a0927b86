"""Easy functions for a small pretrained model: a signature, a docstring, and tests.

A model of 135M parameters hardly ever solves a task of HumanEval, but sometimes one of these, which
`functions.jsonl` holds as one template per line:

    {"name": "add_fee", "parameters": "x", "says": "Return the price x with our fixed fee added.",
     "returns": "x + {}", "constants": [3, 7], "inputs": [[0], [5], [12]]}

`returns` is the right answer, a Python expression over the parameters. Each input is a list of
arguments; the first one (or as many as `shown` says) is a public test, the others are private. A
template with `constants` gives a function for each, which replaces {} in both texts ({{ and }}
stand for braces); a constant that is itself a list replaces {0}, {1} and so on. The wrong programs
of supervised dialogues give the answers of other constants, or those of `wrong`.

If `says` names no constant, as here, the statement withholds what only the public tests tell. All
functions of a template are in the same split; new names change which templates a split has.
"""

import ast
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import islice
from typing import Any

from rlef_mega.problems.splits import SPLITS, Split, part
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import CallTest, Limits

LIMITS = Limits(cpu_s=2.0, memory_bytes=256 << 20)
Solved = tuple[Problem, str, list[str]]  # a problem, its solution and wrong programs
HELD_OUT = {"test": 20, "valid": 10}  # templates of each kind
HELD_OUT_CONSTANTS = 3  # of each template, at most
WRONG = 4  # wrong programs of a problem, at most


def problems(split: Split) -> list[Problem]:
    """Return the problems of a split."""
    return [problem for problem, _, _ in solved(split)]


@cache
def solved(split: Split) -> list[Solved]:
    """Return the problems of a split with their programs. The split is cut from a shuffle that is
    the same everywhere. No function is in two splits, not even under other names."""
    templates = read_templates()
    here: list[Solved] = []
    held_out = SPLITS[SPLITS.index(split) + 1 :]
    seen = {without_names(solution) for other in held_out for _, solution, _ in solved(other)}
    most = None if split == "train" else HELD_OUT_CONSTANTS
    for kind in (False, True):
        names = sorted(name for name, t in templates.items() if withholds(t) is kind)
        random.Random("functions").shuffle(names)
        for name in part(names, split, **HELD_OUT):
            new = (one for one in expand(templates[name]) if without_names(one[1]) not in seen)
            here += islice(new, most)
    return here


def without_names(solution: str) -> str:
    """Return the answer of a solution with its variables numbered."""
    parameters, answer = solution.partition("(")[2].split("):", 1)
    for number, name in enumerate(parameters.split(", ") + re.findall(r"for (\w+) in", answer)):
        answer = re.sub(rf"\b{name}\b", f"_{number}", answer)
    return answer


def read_templates() -> dict[str, dict[str, Any]]:
    lines = (resources.files("rlef_mega.problems") / "functions.jsonl").read_text().splitlines()
    return {template["name"]: template for template in map(json.loads, lines)}


def withholds(template: dict[str, Any]) -> bool:
    """Return whether the statements of a template do not name its constant."""
    return "constants" in template and "{" not in template["says"]


def expand(template: dict[str, Any]) -> Iterator[Solved]:
    """Yield one problem, with its programs, for each constant of a template."""
    name, parameters, says = template["name"], template["parameters"], template["says"]
    shown, constants = template.get("shown", 1), template.get("constants", ([],))
    values = [constant if isinstance(constant, list) else [constant] for constant in constants]
    answers = [template["returns"].format(*value) for value in values]
    for number, (value, answer) in enumerate(zip(values, answers, strict=True)):
        compute = eval(f"lambda {parameters}: {answer}")  # the package's own text
        tests = [CallTest(name, tuple(given), compute(*given)) for given in template["inputs"]]
        wrong = answers[number + 1 :] + answers[:number] + template.get("wrong", [])
        problem = Problem(
            id="-".join(["functions", name, *map(str, value)]),
            statement=f'def {name}({parameters}):\n    """{says.format(*value)}"""',
            public_tests=tuple(tests[:shown]),
            private_tests=PrivateTests(tuple(tests[shown:])),
            limits=LIMITS,
            template="functions",
            entry_point=name,
            family=name,
            tags=("withheld" if withholds(template) else "told",),
        )
        solution, *others = (program(name, parameters, each) for each in (answer, *wrong[:WRONG]))
        yield problem, solution, others


def program(name: str, parameters: str, answer: str) -> str:
    """Return the function that returns an answer, laid out as Python's own tools do."""
    return ast.unparse(ast.parse(f"def {name}({parameters}):\n    return {answer}")) + "\n"
