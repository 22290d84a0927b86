"""Collect evaluations of several models, each with its seeds, into one JSON.

    python benchmarks/collect_evaluations.py OUT.json NAME=FILE[,FILE] ...

Each FILE is an evaluation of `rlef eval` or of a run (eval/before.json, eval/after.json), all on
the same problems. Intervals (95%) resample seeds and problems; with one seed, problems alone.
`gain` is the difference, in dialogues of several turns, to the first model evaluated at the same
temperature, with problems paired.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rlef_mega.paper.comparison import interval
from rlef_mega.report.comparison import outcomes_of
from rlef_mega.report.intervals import interval_over_seeds
from rlef_mega.run.manifest import describe

ALSO = ("dialogues", "invalid_fraction", "repaired_turn2", "repaired_turn3")


def main(out: str, *models: str) -> None:
    found: dict[str, Any] = {}
    first: dict[float, Any] = {}
    for name, _, paths in (model.partition("=") for model in models):
        seeds = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths.split(",")]
        outcomes = np.array([outcomes_of(seed, "multi_turn") for seed in seeds], dtype=float)
        base = first.setdefault(seeds[0]["temperature"], outcomes.mean(0))
        found[name] = {
            "temperature": seeds[0]["temperature"],
            "gain": interval_over_seeds((outcomes - base).tolist()),
            **{protocol: rates(seeds, protocol) for protocol in seeds[0]["protocols"]},
        }
        print(f"{name}: {json.dumps(found[name])}")
    command = shlex.join(["python", *sys.argv])
    Path(out).write_text(
        json.dumps(describe(command=command, models=found), indent=1) + "\n", "utf-8"
    )


def rates(seeds: list[dict[str, Any]], protocol: str) -> dict[str, Any]:
    """Return a protocol's solve rate over the seeds, and other figures of each seed."""
    parts = [seed["protocols"][protocol] for seed in seeds]
    return {
        **interval([outcomes_of(seed, protocol) for seed in seeds]),
        "turn1": [part["turn1"]["value"] for part in parts],
        **{name: [part[name] for part in parts] for name in ALSO if name in parts[0]},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
