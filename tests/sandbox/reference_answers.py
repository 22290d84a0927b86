"""Computes the answers of trusted solutions, in a process of its own without a sandbox.

`python reference_answers.py` reads one JSON object per line, {"source", "entry_point", "inputs"},
and prints one list per line: for each input the wire form of what the function returned, or null if
it raised, or returned something that is not plain data or is too large. It is the trusted half of
`test_reference_solutions.py`; nothing untrusted runs here.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

from rlef_sandbox import values

MAX_WIRE_CHARACTERS = 1 << 20  # some inputs of MBPP+ have answers of hundreds of megabytes


def answers(source: str, entry_point: str, inputs: list[list[Any]]) -> list[str | None]:
    namespace: dict[str, Any] = {"__name__": "solution"}
    exec(source, namespace)
    found: list[str | None] = []
    for arguments in inputs:
        try:
            returned = namespace[entry_point](*copy.deepcopy(arguments))
            wire = values.encode(returned).decode()
            found.append(wire if len(wire) <= MAX_WIRE_CHARACTERS else None)
        except Exception:  # an input of the data set that its own solution refuses
            found.append(None)
    return found


def main() -> None:
    sys.setrecursionlimit(10**5)
    for line in sys.stdin:
        print(json.dumps(answers(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
