"""Run the steps of the check, each for a limited time, and keep each one's results once it ends.

Theory of operation. This process needs the standard library alone, so it starts where our
dependencies are missing and can install them from wheels. A step is a process (`steps.py NAME`)
which writes OUT/NAME.json; OUT/NAME.log has its output. A step that fails, or is killed at its
limit, does not stop the others. Its processes form a group, which is killed when the step ends or
this process gets SIGINT or SIGTERM.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from rlef_mega.check_gpu.summary import write_summary

LIMITS = {  # of each step in seconds; the most informative steps come first
    "machine": 60,
    "tests": 100,
    "head": 60,
    "peers": 100,
    "slice": 150,
    "ipc": 30,
    "memcheck": 60,
    "smollm2": 150,
}
ROOT = Path(__file__).parents[2]  # the checkout: the steps run its tests
GRACE_S = 15  # a step is told to end its work this long before its limit
SHORTEST_S = 30  # no step is started with less time
FAILED = 2  # exit code
SHOWN = 14  # lines of a step that failed


def main(words: Sequence[str]) -> int:
    """Run the command with these arguments. Returns 0 if every step asked for has passed, else 2.
    Exits with a message for bad arguments, or if wheels cannot be installed."""
    parser = argparse.ArgumentParser(prog="rlef check-gpu", description="Check one GPU.")
    steps: dict[str, Any] = {"nargs": "+", "choices": LIMITS, "default": [], "metavar": "STEP"}
    parser.add_argument("out", type=Path, help="folder for the results")
    only = f"run only these steps, even if they passed before; known: {', '.join(LIMITS)}"
    parser.add_argument("--only", **steps, help=only)
    parser.add_argument("--skip", **steps, help="steps to leave out")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all steps")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install into OUT/site")
    parser.add_argument("--patience", type=float, default=1.0, help="factor for each step's limit")
    smollm2 = "settings of the recipe that the step smollm2 trains"
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=smollm2)
    asked = parser.parse_args(words)
    end = time.monotonic() + 60 * asked.minutes
    out, site = asked.out.absolute(), asked.out.absolute() / "site"
    out.mkdir(parents=True, exist_ok=True)
    if asked.wheels is not None and not install(asked.wheels, site):
        parser.error(f"--wheels {asked.wheels}: pip could not install *.whl of this folder")
    if missing := missing_packages(site):
        print(f"not installed: {', '.join(missing)}; give --wheels (docs/gpu_day.md)", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(FAILED))  # `finally` kills the step
    wanted = [name for name in asked.only or LIMITS if name not in asked.skip]
    for name in wanted:
        left_s = end - time.monotonic()
        if name not in asked.only and passed(out, name):
            print(f"{name}: passed before", flush=True)
        elif left_s < SHORTEST_S:
            print(f"{name}: not run, the time was up; the same command runs it", flush=True)
        else:
            limit_s = min(left_s, LIMITS[name] * asked.patience)
            run_step(name, out, limit_s, environment_of(site), asked.set)
            write_summary(out, tuple(LIMITS))
    print(f"every figure: {out / 'summary.md'}")
    return 0 if all(passed(out, name) for name in wanted) else FAILED


def install(wheels: Path, site: Path) -> bool:
    """Install the folder's wheels into `site`. Returns whether pip succeeded."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    files = sorted(map(str, wheels.glob("*.whl")))
    done = subprocess.run([*pip, "--upgrade", "--target", site, *files])
    shutil.rmtree(site / "tests", ignore_errors=True)  # verl's, which would hide ours
    return not done.returncode


def missing_packages(site: Path) -> list[str]:
    """Return the dependencies in pyproject.toml that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[^\w-]", words)[0] for words in (*project["dependencies"], "triton")}
    found = distributions(path=[str(site), *sys.path])
    return sorted(needed - {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in found})


def environment_of(site: Path) -> dict[str, str]:
    """Return a step's environment: the wheels and the checkout on Python's path, no network, and
    torch.compile without processes that could outlive the step."""
    before = [path for path in [os.environ.get("PYTHONPATH")] if path]
    paths = (site, ROOT, ROOT / "kernels", ROOT / "sandbox", *before)
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    compiling = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return os.environ | fixed | compiling | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def passed(out: Path, name: str) -> bool:
    result = out / f"{name}.json"
    return result.exists() and bool(json.loads(result.read_text(encoding="utf-8"))["passed"])


def run_step(
    name: str, out: Path, limit_s: float, environment: dict[str, str], settings: Sequence[str]
) -> None:
    """Run a step, add to its results how it ended, and print that."""
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    words = [name, str(out), str(limit_s - GRACE_S), *settings]
    command = [sys.executable, "-P", "-m", "rlef_mega.check_gpu.steps", *words]
    begun = time.monotonic()
    with log.open("wb") as file:
        step = subprocess.Popen(
            command, cwd=out, env=environment, stdout=file, stderr=file, process_group=0
        )
    try:
        ended = f"exit code {step.wait(limit_s)}"
    except subprocess.TimeoutExpired:
        ended = f"SIGKILL, at its limit of {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(step.pid, signal.SIGKILL)  # and what the step left behind
        step.wait()
    found: dict[str, Any] = {"title": f"rlef check-gpu: {name}", "notes": [], "figures": {}}
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(result.read_text(encoding="utf-8"))
    given = ["--set", *settings] if settings else []
    again = shlex.join(["rlef", "check-gpu", "OUT", "--only", name, *given])
    found |= {"command": again, "ended": ended, "passed": ended == "exit code 0"}
    found["wall_s"] = round(time.monotonic() - begun, 1)
    if not found["passed"] and not found.get("failures"):
        found["failures"] = log.read_text("utf-8", "replace").splitlines()[-SHOWN:]
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    state = "passed" if found["passed"] else f"FAILED with {ended}"
    said = [f"{name}: {state} in {found['wall_s']:.0f} s", *found.get("failures", [])[:SHOWN]]
    print("\n    ".join(said), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
