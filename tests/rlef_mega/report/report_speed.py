"""Measure how long a page of ten thousand episodes takes to write, to open and to navigate:
`python -m tests.rlef_mega.report.report_speed --json benchmarks/results/report.json`.

The episodes are made from Python's own library: programs of 40 lines, one of which changes from
turn to turn, with the log-probs of each token; 2.4 turns per episode.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlef_mega.report.page import write_report
from rlef_mega.run.manifest import describe
from tests.rlef_mega.report.chromium import Chromium
from tests.rlef_mega.report.runs import make_episode, write_episodes, write_run

EPISODES = 10_000
STEPS = 9
SCROLL = """(async () => {
  const list = document.getElementById("list"), frames = [];
  for (let frame = 0; frame < 120; frame++) {
    list.scrollTop += 900;
    const began = performance.now();
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - began);
  }
  return frames.sort((a, b) => a - b);
})()"""
SEARCH = """(async () => {
  document.getElementById("deep").click();
  const search = document.getElementById("search"), count = document.getElementById("count");
  const began = performance.now();
  search.value = "sorted dict return";
  search.dispatchEvent(new Event("input"));
  count.textContent = "";
  while (!/ of /.test(count.textContent)) await new Promise((resume) => setTimeout(resume, 2));
  return performance.now() - began;
})()"""


def long_episodes(count: int, lines: list[str], source: random.Random) -> list[dict[str, Any]]:
    episodes = []
    for number in range(count):
        episode = make_episode(number, 0.4, source, values=True)
        start = source.randrange(len(lines) - 80)
        program, statement = lines[start : start + 40], lines[start + 40 : start + 60]
        for place, turn in enumerate(episode["turns"]):
            if place:
                program[source.randrange(40)] = source.choice(lines)
            turn["program"] = "\n".join(program)
            turn["response"] = f"```python\n{turn['program']}\n```"
            pieces = [len(piece) for piece in re.findall(r" *\w+|\s+|\W", turn["response"])]
            # most tokens are nearly certain, as in a sampled program
            logprobs = [-round(12 * source.expovariate(1) ** 4) for _ in pieces]
            turn |= {"pieces": pieces, "logprobs": logprobs, "versions": [[3, len(pieces)]]}
            turn["ref_logprobs"] = [round(x * source.uniform(0.8, 1.3)) for x in logprobs]
            turn["tokens"] = len(pieces)
            turn["public"] *= 3
            turn["observation"] += "" if place else "\n".join(statement)
        episodes.append(episode)
    return episodes


def measure(run: Path) -> dict[str, Any]:
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    lines = [line for path in library for line in path.read_text(errors="replace").split("\n")]
    source = random.Random(0)
    write_run(run)
    for step in range(31, 31 + STEPS):
        episodes = long_episodes(EPISODES // STEPS + 50, lines, source)
        write_episodes(run / "episodes" / f"step_{step:06d}.jsonl.zst", episodes)
    started, cpu = time.perf_counter(), time.process_time()
    page = write_report(run, episodes=EPISODES)
    figures: dict[str, Any] = {
        "episodes": EPISODES,
        "write_s": time.perf_counter() - started,
        "write_cpu_s": time.process_time() - cpu,
        "page_bytes": page.stat().st_size,
        "open_s": [],
    }
    with Chromium() as browser:
        for _ in range(5):
            started = time.perf_counter()
            browser.open(page)
            browser.wait_for("document.documentElement?.dataset.openedMs")
            figures["open_s"].append(time.perf_counter() - started)
        shown = browser.evaluate("document.getElementById('count').textContent")
        assert shown == f"{EPISODES:,} of {EPISODES:,} episodes", shown
        frames = browser.evaluate(SCROLL)
        figures["scroll_frame_ms"] = {"median": frames[60], "worst": frames[-1]}
        started = time.perf_counter()
        browser.press(*"j" * 20)
        browser.evaluate("0")
        figures["next_episode_ms"] = 1000 * (time.perf_counter() - started) / 20
        figures["search_all_texts_s"] = browser.evaluate(SEARCH) / 1000
        figures["browser"] = browser.call("Browser.getVersion")["product"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    out = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder) / "run")
    command = f"python -m tests.rlef_mega.report.report_speed --json {out}"
    load = os.getloadavg()[0]
    content = describe(command=command, load_average=load, **figures)
    out.write_text(json.dumps(content, indent=1) + "\n")
    json.dump(figures, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
