"""Record what a training run holds while it goes on: memory, descriptors, files in /dev/shm.

    python -m tests.rlef_mega.soak RUN_DIR --out samples.jsonl        # ends when the run does
    python -m tests.rlef_mega.soak RUN_DIR --out samples.jsonl --summary

One line per sample and process of the run. The summary compares, for each process that lived
through ten samples or more, the mean of its last tenth with that of the tenth after its first one.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between samples")
    parser.add_argument("--summary", action="store_true", help="print what --out holds, and end")
    arguments = parser.parse_args()
    if arguments.summary:
        print(json.dumps(summary(arguments.out), indent=1))
        return
    while processes := processes_of(arguments.run):
        with arguments.out.open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in samples(processes))
        time.sleep(arguments.every)


def processes_of(run: str) -> list[psutil.Process]:
    """Return the ranks and the launcher of a run, with all that descends from them."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if run in words and any(word.startswith("rlef_mega.") for word in words):
            for one in (process, *process.children(recursive=True)):
                found[one.pid] = one
    return list(found.values())


def samples(processes: list[psutil.Process]) -> list[dict[str, Any]]:
    now, shm = round(time.time()), psutil.disk_usage("/dev/shm").used
    lines = []
    for process in processes:
        try:
            memory = process.memory_full_info()
            name = " ".join(process.cmdline()[:5])
            lines.append(
                {
                    "time": now,
                    "pid": process.pid,
                    "name": name,
                    "rss": memory.rss,
                    "pss": memory.pss,
                    "descriptors": process.num_fds(),
                    "shm": shm,
                }
            )
        except psutil.Error:  # it has ended meanwhile
            continue
    return lines


def summary(path: Path) -> list[dict[str, Any]]:
    by_process = defaultdict(list)
    for text in path.read_text().splitlines():
        line = json.loads(text)
        by_process[line["pid"], line["name"]].append(line)
    rows = []
    for (pid, name), lines in by_process.items():
        tenth = len(lines) // 10
        if not tenth:
            continue
        row: dict[str, Any] = {"pid": pid, "name": name, "samples": len(lines)}
        for what in ("rss", "pss", "descriptors", "shm"):
            first, last = (
                sum(line[what] for line in part) / tenth
                for part in (lines[tenth : 2 * tenth], lines[-tenth:])
            )
            row[what] = {"warm": round(first), "end": round(last)}
            row[what]["growth"] = round(last / first - 1, 4) if first else 0.0
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
