"""The steps of `rlef check-gpu`.

`python -m rlef_mega.check_gpu.steps NAME OUT SECONDS [KEY=VALUE ...]` runs benchmarks, tests and
commands that can also be run without it, for about SECONDS, and writes their figures to
OUT/NAME.json. It fails (exit code 1) if something is wrong; what was not measured for lack of time
or of a package is a note.
"""

import base64
import json
import os
import pickle
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlef_mega.bench import measured
from rlef_mega.bench.measure import measure_call
from rlef_mega.bench.results import Figure, Results, describe_benchmark
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.launch import PYTHON, RLEF, STOPPED

ROOT = Path(__file__).parents[2]
DEVICE_TESTS = (ROOT / "tests/kernels/device", ROOT / "tests/kernels/test_at_size.py")
SANITIZER_TEST = ROOT / "tests/kernels/test_sanitizer.py"
CASES = "8B | 8192,70B"
PEERS = "Liger,cut-cross,verl,chunks,logits stored"
SLICE, LAYERS = "llama31_8b", "6"  # a fixed number: its memory on the null GPU is known
BESIDE = ROOT / "benchmarks/experiments/slice_against_hf.py"
NO_SUCH_PROGRAM = 127
SAVING_S = 40  # for the last step and the checkpoint of a run that is stopped
OF_METRICS = {  # names of metrics.jsonl, and their units
    "logprob_gap_max": "nats",
    "logprob_gap_mean": "nats",
    "policy_grad_norm": "",
    "solved": "share",
    "tokens": "tokens",
}


@dataclass
class Found:
    """What a step found. `failures` are the reasons why it does not pass."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, unit: str, *samples: float) -> None:
        self.figures.append(Figure(name, unit, samples))


def run(command: Sequence[object], limit_s: float, saving_s: float = 10.0) -> int:
    """Run a command; at the limit interrupt it, so that it writes what it has, and kill it if that
    takes longer than `saving_s`. Returns its exit code, 127 if there is no such program."""
    limits = ("timeout", "--foreground", "--verbose", "--preserve-status", "--signal=INT")
    words = (*limits, f"--kill-after={saving_s}", max(1.0, limit_s), *command)
    return subprocess.run([str(word) for word in words]).returncode


def machine(out: Path, limit_s: float) -> Found:
    """Measure a matrix product of cuBLAS and a copy; let nvidia-smi and `rlef doctor` describe the
    machine in the log."""
    device, size, found = torch.device("cuda", 0), 8192, Found()
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = measure_call(lambda: matrix @ matrix, device, 0.3)
    found.add("cuBLAS, 8192^3", "TFLOP/s", *(2 * size**3 / s / 1e12 for s in product.seconds))
    memory = torch.zeros(2**31, dtype=torch.uint8, device=device)
    copies = measure_call(memory.clone, device, 0.3)
    found.add("copy, read and written", "TB/s", *(2**32 / s / 1e12 for s in copies.seconds))
    for command in (("nvidia-smi",), (*RLEF, "doctor")):
        if (code := run(command, limit_s)) == NO_SUCH_PROGRAM:
            found.notes.append(f"{command[0]} is not installed")
        elif code:
            found.failures.append(f"{command[-1]} ended with exit code {code}")
    return found


def pytest(out: Path, limit_s: float, *, tests: Sequence[object]) -> Found:
    """Run tests. A failed assertion means that numbers differ; any other exception is an error."""
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    options = ("-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}")
    code = run((*PYTHON, "-m", "pytest", *options, f"--rootdir={ROOT}", *tests), limit_s)
    counts: Counter[str] = Counter()
    found = Found()
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        outcome = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        message = "" if outcome is None else outcome.get("message", "").partition("\n")[0]
        what = "passed" if outcome is None else outcome.tag
        if what in ("failure", "error"):
            what = "numbers differ" if message.startswith("AssertionError") else "error"
            found.failures.append(f"{what}: {case.get('name')}: {message[:200]}")
        counts[what] += 1
    for what, number in counts.items():
        found.add(f"tests | {what}", "tests", number)
    if not found.failures and (code or not counts["passed"]):
        found.failures = [f"pytest ended with exit code {code}; {counts['passed']} tests passed"]
    return found


def heads(out: Path, limit_s: float, *, cases: str, methods: str) -> Found:
    """Measure implementations of the output head."""
    results = measured("kernels", "", cases=cases, methods=methods, minutes=limit_s / 60)
    found = Found(list(results.figures), list(results.notes), about=results.about)
    found.failures = [n for n in results.notes if "| rlef" in n and "the time was up" not in n]
    return found if found.figures else Found(failures=["nothing was measured", *found.notes])


def slice_(out: Path, limit_s: float) -> Found:
    """Measure a training step of part of the 8B model, then our policy update and one in a plain
    loop with Hugging Face's model."""
    begun = time.monotonic()
    results = measured("slice", SLICE, layers=LAYERS, minutes=limit_s / 60 * 0.4)
    found = Found(list(results.figures), list(results.notes), about=results.about)
    if resident := results.about["memory"]["resident_bytes"]:
        found.add("all networks | memory resident", "MiB", resident / 2**20)
    file = out / "slice_beside.json"
    file.unlink(missing_ok=True)
    left_s = limit_s - (time.monotonic() - begun)
    options = ("--layers", LAYERS, "--minutes", left_s / 60 * 0.6, "--json", file)
    code = run((*PYTHON, BESIDE, SLICE, *options), left_s)
    if not file.exists():
        found.failures.append(f"{BESIDE.name} ended with exit code {code} and no figures")
        return found
    beside = json.loads(file.read_text(encoding="utf-8"))
    found.notes += beside["notes"]
    for name, figure in beside["figures"].items():
        found.add(name, figure["unit"], *figure["samples"])
    return found


def ipc(out: Path, limit_s: float) -> Found:
    """Send weights to another process as a publication to servers of this node does, by handles of
    CUDA IPC, and compare what both processes read."""
    from rlef_mega.engines.sglang.transfer import handle_of

    weight = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16)
    receiver = "from rlef_mega.check_gpu.steps import receive; receive()"
    child = subprocess.run(
        [*PYTHON, "-c", receiver], input=handle_of([("weight", weight)]), stdout=-1, text=True
    )
    if child.returncode:
        return Found(failures=[f"the receiver ended with exit code {child.returncode}"])
    seconds, *received = json.loads(child.stdout.splitlines()[-1])
    found, sent = Found(), checksums(weight)
    found.add("opening a handle", "s", seconds)
    if received != sent:
        found.failures.append(f"numbers differ: checksums sent {sent}, received {received}")
    return found


def receive() -> None:
    """Open the handle in stdin, as a server does; print how long that took, and checksums."""
    torch.cuda.init()
    begun = time.perf_counter()
    ((_, weight),) = pickle.loads(base64.b64decode(sys.stdin.read()))
    print(json.dumps([time.perf_counter() - begun, *checksums(weight)]))


def checksums(weight: torch.Tensor) -> list[str]:
    """Return the weight's checksums, computed on the device and on the host."""
    from rlef_mega.engines.sglang.weights import cpu_checksum, gpu_checksum

    return [gpu_checksum([weight]), cpu_checksum([weight])]


def smollm2(out: Path, limit_s: float) -> Found:
    """Train SmolLM2-135M in bfloat16 until the time is up; resume the run of an earlier check."""
    from rlef_mega.demo.smollm2 import convert

    model, folder = out / "smollm2-135m", out / "smollm2-run"
    begun = time.monotonic()
    convert(model)
    settings = (
        *(f"run.dir={json.dumps(str(folder))}", "run.steps=1000", "run.checkpoint_every=1000"),
        f"model.path={json.dumps(str(model))}",  # without the supervised stage
        *("parallel.data_parallel_size=1", "parallel.processes_per_node=1"),
        *("data.test=''", "eval.every=0", "guard.max_invalid_fraction=1.0"),
        *sys.argv[4:],
    )
    sets = [word for setting in settings for word in ("--set", setting)]
    left_s = limit_s - SAVING_S - (time.monotonic() - begun)
    code = run((*RLEF, "train", "smollm2_functions", *sets), left_s, SAVING_S)
    found, records = Found(), RunDirectory(folder).read_metrics()
    if code not in (0, STOPPED):
        found.failures.append(f"rlef train ended with exit code {code}")
    if not records:
        found.failures.append("rlef train finished no step")
    found.add("steps finished", "steps", len(records))
    for name, unit in OF_METRICS.items():
        if samples := [record[name] for record in records if record[name] is not None]:
            found.add(name, unit, *samples)
    for phase in records[0]["time"] if records else ():
        found.add(f"{phase} | time", "s", *(record["time"].get(phase, 0.0) for record in records))
    return found


STEPS: dict[str, Callable[[Path, float], Found]] = {
    "machine": machine,
    # the kernels' tests on the device, in one process per core, but at most 8
    "tests": partial(pytest, tests=("-n", min(8, os.cpu_count() or 1), *DEVICE_TESTS)),
    # our implementations, and cuBLAS's product alone; published ones and PyTorch's, for 8B only
    "head": partial(heads, cases=CASES, methods="fused,cuBLAS"),
    "peers": partial(heads, cases="8B | 8192 | 0%", methods=PEERS),
    "slice": slice_,
    "ipc": ipc,
    "memcheck": partial(pytest, tests=(SANITIZER_TEST, "-k", "memcheck")),
    "smollm2": smollm2,
}


def main() -> None:
    name, out, limit_s = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU; it needs a CUDA build and NVIDIA's driver")
    found = STEPS[name](out, limit_s)
    about = (found.about or describe_benchmark()) | {"failures": found.failures}
    results = Results(f"rlef check-gpu: {name}", about, tuple(found.figures), tuple(found.notes))
    results.write(out / f"{name}.json")
    results.show()
    print("\n".join(found.failures), flush=True)
    os._exit(bool(found.failures))  # without destructors of process groups, which may hang


if __name__ == "__main__":
    main()
