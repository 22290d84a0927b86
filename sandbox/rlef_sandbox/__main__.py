"""`python -m rlef_sandbox doctor`, `... run FILE --stdin FILE` and `... serve`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .sandbox import ISOLATION_LEVELS, IsolationError, Sandbox
from .service.command import add_serve
from .verdict import Limits, Status
from .worker import ZygoteLostError


def doctor(arguments: argparse.Namespace) -> int:
    """Print the isolation layers of this machine, as JSON."""
    with Sandbox(1, arguments.isolation, packages=arguments.packages) as sandbox:
        print(json.dumps(sandbox.isolation, indent=2))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run one program; print its output, and the verdict on stderr."""
    stdin = arguments.stdin.read_bytes() if arguments.stdin else b""
    limits = Limits(cpu_s=arguments.cpu_s, memory_bytes=arguments.memory_mib << 20)
    with Sandbox(1, arguments.isolation, packages=arguments.packages) as sandbox:
        result = sandbox.run(arguments.file.read_bytes(), stdin, limits)
    sys.stdout.buffer.write(result.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(result.stderr)
    memory_mib = result.max_rss_bytes / 2**20
    print(
        f"{result.status}: {result.cpu_s:.3f} s CPU, {result.wall_s:.3f} s, {memory_mib:.0f} MiB",
        file=sys.stderr,
    )
    return 0 if result.status is Status.OK else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlef_sandbox", description=__doc__)
    parser.add_argument("--isolation", choices=ISOLATION_LEVELS, default="default")
    parser.add_argument(
        "--packages",
        type=lambda names: names.split(",") if names else [],
        default=[],
        help="such as numpy,sympy",
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("doctor", help=doctor.__doc__)
    command.set_defaults(handler=doctor)
    command = commands.add_parser("run", help=run.__doc__)
    command.set_defaults(handler=run)
    command.add_argument("file", type=Path, help="a Python program")
    command.add_argument("--stdin", type=Path, help="a file with its input")
    command.add_argument("--cpu-s", type=float, default=10.0)
    command.add_argument("--memory-mib", type=int, default=1024)
    add_serve(commands)
    arguments = parser.parse_args()
    try:
        return arguments.handler(arguments)
    except (IsolationError, ZygoteLostError, OSError, ValueError) as error:
        print(f"rlef_sandbox: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
