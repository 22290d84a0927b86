"""Collect evaluations of several models, each with its seeds, into one JSON and a table.

    python benchmarks/collect_evaluations.py OUT.json NAME=FILE[,FILE] ... [--against NAME]

Each FILE is an evaluation of `rlef eval` or of a run (eval/before.json, eval/after.json), all on
the same problems. Intervals (95%) resample seeds and problems; with one seed, problems alone.
`--against` adds the difference of each model to one of them, for which problems are paired.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rlef_mega.report.intervals import interval_over_seeds
from rlef_mega.run.manifest import describe

Evaluations = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE[,FILE]")
    parser.add_argument("--against", metavar="NAME")
    arguments = parser.parse_args()
    models = {
        name: [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths.split(",")]
        for name, _, paths in (model.partition("=") for model in arguments.models)
    }
    rows = {name: row(evaluations) for name, evaluations in models.items()}
    if arguments.against:
        for name, evaluations in models.items():
            rows[name]["difference"] = difference(evaluations, models[arguments.against])
    command = shlex.join(["python", *sys.argv])
    content = describe(command=command, against=arguments.against, models=rows)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


def row(evaluations: Evaluations) -> dict[str, Any]:
    """Return a model's solve rates by protocol, and what only dialogues of several turns have."""
    found: dict[str, Any] = {"temperature": evaluations[0]["temperature"]}
    for protocol in evaluations[0]["protocols"]:
        parts = [evaluation["protocols"][protocol] for evaluation in evaluations]
        found[protocol] = interval_over_seeds([part["outcomes"] for part in parts]) | {
            "seeds": [part["solve_rate"]["value"] for part in parts],
            "dialogues": [part["dialogues"] for part in parts],
            "turn1": [part["turn1"]["value"] for part in parts],
            "invalid": [part["invalid_fraction"] for part in parts],
        }
        for turn in ("repaired_turn2", "repaired_turn3"):
            if turn in parts[0]:
                found[protocol][turn] = [part[turn] for part in parts]
    return found


def difference(evaluations: Evaluations, others: Evaluations) -> dict[str, float]:
    """Return the mean gain in solved dialogues of several turns over the mean of the others."""
    ours, base = (
        np.array([one["protocols"]["multi_turn"]["outcomes"] for one in several], dtype=float)
        for several in (evaluations, others)
    )
    return interval_over_seeds((ours - base.mean(0)).tolist())


def table(rows: dict[str, dict[str, Any]]) -> str:
    protocols = next(iter(rows.values())).keys() - {"temperature", "difference"}
    columns = [*sorted(protocols), "difference"]
    lines = ["model | T | " + " | ".join(columns)]
    for name, found in rows.items():
        rates = [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * one[k] for k in ("value", "low", "high")))
            for one in (found[column] for column in columns if column in found)
        ]
        lines.append(" | ".join([name, str(found["temperature"]), *rates]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
