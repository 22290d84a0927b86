"""Start a program on the null GPU.

    python -m tests.null_gpu.launch [--device h200] [--gpus 2] -- PROGRAM ...

PROGRAM is a command whose Python has a CUDA build of PyTorch 2.11. All that it starts runs on the
null GPU too. README.md says what the null GPU is, and lists its variables.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("memory.c", "runtime.c", "driver.c", "libraries.c", "nccl.c")
LIBRARY = "libcuda.so.1"  # code that loads the driver by this name gets ours
FLAGS = ["-shared", "-fPIC", "-O1", "-std=gnu11"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-cast-function-type"]
DEVICES = ("h100", "h200", "b200")


def build() -> Path:
    """Compile the library, unless these sources were compiled before. Returns its folder."""
    sources = [HERE / name for name in SOURCES]
    digest = hashlib.sha256()
    for path in (*sources, HERE / "null_gpu.h"):
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "rlef-mega/null-gpu" / digest.hexdigest()[:16]
    if not (folder / LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            made = Path(draft, LIBRARY)
            options = ["-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}", "-o", made]
            subprocess.run(
                ["gcc", *FLAGS, *WARNINGS, *options, *sources, "-ldl", "-lm"], check=True
            )
            made.rename(folder / LIBRARY)
    return folder


def environment(
    *, device: str = "h200", gpus: int = 1, state: Path | None = None, **settings: object
) -> dict[str, str]:
    """Return the environment of a process on the null GPU. `state` is a file that all processes of
    the machine share; `settings` are further variables, without NULL_GPU_ and in lower case."""
    folder = build()
    chosen: Mapping[str, object] = {
        "NULL_GPU_DEVICE": device,
        "NULL_GPU_COUNT": gpus,
        **({"NULL_GPU_STATE": state} if state else {}),
        **{f"NULL_GPU_{name.upper()}": value for name, value in settings.items()},
    }
    before = os.environ
    paths = (str(HERE / "hook"), *filter(None, [before.get("PYTHONPATH")]))
    return {
        **before,
        "LD_PRELOAD": " ".join(filter(None, [str(folder / LIBRARY), before.get("LD_PRELOAD")])),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes, which outlive their user
        "PYTHONPATH": os.pathsep.join(paths),
        **{name: str(value) for name, value in chosen.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Start a program on the null GPU.")
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="null-gpu-") as folder:
        settings = environment(
            device=options.device, gpus=options.gpus, state=Path(folder, "state")
        )
        return subprocess.run(options.program, env=settings).returncode


if __name__ == "__main__":
    sys.exit(main())
