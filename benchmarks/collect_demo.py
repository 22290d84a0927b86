"""Collect several seeds of the demo: python benchmarks/collect_demo.py RUN... --json OUT

Each RUN is a finished run directory with eval/before.json and eval/after.json. A solve rate is the
mean over problems of a problem's mean over seeds. Its 95% interval is a bootstrap over problems,
because the seeds share them. Each seed's own rate is given too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rlef_mega.report.intervals import bootstrap_interval
from rlef_mega.run.manifest import describe

PROTOCOLS = ("multi_turn", "independent", "random_feedback")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--single-turn", type=Path, help="a run with rollout.turns=1, equal tokens")
    arguments = parser.parse_args()
    command = f"python benchmarks/collect_demo.py {' '.join(map(str, arguments.runs))}"
    collected = {when: collect(arguments.runs, when) for when in ("before", "after")}
    if arguments.single_turn:
        command += f" --single-turn {arguments.single_turn}"
        collected["after_single_turn_training"] = collect([arguments.single_turn], "after")
    steps = [step_figures(run) for run in arguments.runs]
    content = describe(
        command=command, runs=list(map(str, arguments.runs)), **collected, steps=steps
    )
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def collect(runs: list[Path], when: str) -> dict[str, Any]:
    evaluations = [json.loads((run / f"eval/{when}.json").read_text()) for run in runs]
    pooled: dict[str, Any] = {"temperature": evaluations[0]["temperature"]}
    for protocol in PROTOCOLS:
        results = [evaluation["protocols"][protocol] for evaluation in evaluations]
        pooled[protocol] = {
            "solve_rate": bootstrap_interval(mean_outcomes(results)),
            "by_seed": [r["solve_rate"]["value"] for r in results],
            "by_family": pool(results, "by_family"),
            "by_kind": pool(results, "by_kind"),
            "invalid_fraction": [r["invalid_fraction"] for r in results],
        }
        if protocol == "multi_turn":
            for name in ("repaired_turn2", "repaired_turn3"):
                pooled[protocol][name] = [r[name] for r in results]
            pooled[protocol]["turn1"] = [r["turn1"]["value"] for r in results]
    return pooled


def mean_outcomes(results: list[dict[str, Any]]) -> list[float]:
    """Average each problem's outcome over the seeds; no dialogue may have been dropped."""
    columns = zip(*(result["outcomes"] for result in results), strict=True)
    return [sum(column) / len(results) for column in columns]


def pool(results: list[dict[str, Any]], group: str) -> dict[str, float]:
    """Average each member of `group` over the seeds, whose problems are the same."""
    members = results[0][group]
    return {
        member: sum(result[group][member]["value"] for result in results) / len(results)
        for member in members
    }


def step_figures(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["time"]["step"] - line["time"].get("evaluate", 0.0) for line in lines]
    return {
        "steps": len(lines),
        "median_step_s": sorted(seconds)[len(seconds) // 2],
        "tokens": sum(line["tokens"] for line in lines),  # of whole dialogues
        "episodes": sum(line["episodes"] for line in lines),
        "max_logprob_gap": max(line["logprob_gap_max"] for line in lines),
    }


if __name__ == "__main__":
    main()
