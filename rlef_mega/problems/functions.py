"""Easy functions for a small pretrained model: a name, a sentence, and tests.

HumanEval is too hard for a model of 135M parameters to learn from: it hardly ever solves a task.
It sometimes solves these. `functions.jsonl` holds one template per line:

    {"name": "add", "parameters": "x", "does": "returns x plus {}", "returns": "x + {}",
     "constants": [3, 7], "inputs": [[5], [0]]}

`does` completes "Write a Python function `add_3(x)` that ...". `returns` is the right answer as a
Python expression over the parameters. Each input is a list of arguments; the first input is the
public test, the others are private. With `constants`, a template gives one function a constant,
which replaces {} in both texts (write {{ and }} for braces); without, it gives one function. A
constant that is itself a list replaces {0}, {1} and so on.

To add problems, add lines. All functions of a template are in the same split; new names change
which templates each split has.
"""

import json
import random
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from rlef_mega.problems.splits import Split, part
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import CallTest, Limits

LIMITS = Limits(cpu_s=2.0, memory_bytes=256 << 20)
HELD_OUT = {"test": 16, "valid": 8}  # templates


def problems(split: Split) -> list[Problem]:
    """Return the problems of a split. It is cut from a shuffle that is the same everywhere."""
    lines = (resources.files("rlef_mega.problems") / "functions.jsonl").read_text().splitlines()
    templates = [json.loads(line) for line in lines]
    names = sorted(template["name"] for template in templates)
    random.Random("functions").shuffle(names)
    chosen = part(names, split, **HELD_OUT)
    return [p for template in templates if template["name"] in chosen for p in expand(**template)]


def expand(
    name: str,
    parameters: str,
    does: str,
    returns: str,
    inputs: Sequence[Sequence[Any]],
    constants: Sequence[Any] = ([],),
) -> Iterator[Problem]:
    """Yield one problem for each constant of a template."""
    for constant in constants:
        values = constant if isinstance(constant, list) else [constant]
        function = "_".join([name, *map(str, values)])
        compute = eval(f"lambda {parameters}: {returns.format(*values)}")  # the package's own text
        tests = [CallTest(function, tuple(given), compute(*given)) for given in inputs]
        signature = f"{function}({parameters})"
        yield Problem(
            id=f"functions-{function}",
            statement=f"Write a Python function `{signature}` that {does.format(*values)}.",
            public_tests=tuple(tests[:1]),
            private_tests=PrivateTests(tuple(tests[1:])),
            limits=LIMITS,
            template="mbpp",
            entry_point=function,
            family=name,
            wrong_programs=(f"def {signature}:\n    return {parameters.partition(',')[0]}\n",),
        )
