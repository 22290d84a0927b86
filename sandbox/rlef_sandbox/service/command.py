"""`python -m rlef_sandbox serve`: its options and their checks.

Imports aiohttp only to serve: the rest of the command line does not need it.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import stat
from pathlib import Path

from ..sandbox import JOBS_PER_WORKER

TOKEN_VARIABLE = "RLEF_SANDBOX_TOKEN"
TOKEN_FORM = re.compile(
    r"[\x21-\x7e]{16,4096}"
)  # printable, for an HTTP header; long, against guessing
DEFAULT_PORT = 8765


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command `serve`."""
    command = commands.add_parser("serve", help=serve.__doc__)
    command.set_defaults(handler=serve)
    command.add_argument("--host", default="127.0.0.1", help="an address of this machine")
    command.add_argument("--port", type=int, default=DEFAULT_PORT, help="0: any free one")
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    command.add_argument(
        "--jobs",
        type=int,
        help=f"programs under way, sleeping ones included (default: {JOBS_PER_WORKER} per worker)",
    )
    command.add_argument("--queue", type=int, default=2048, help="requests that may wait")
    command.add_argument(
        "--token-file", type=Path, help=f"mode 600; else the variable {TOKEN_VARIABLE}"
    )
    command.add_argument("--max-body-mib", type=int, default=64, help="of one request")
    command.add_argument("--max-held-mib", type=int, default=1024, help="of all open requests")
    command.add_argument("--keep-s", type=float, default=600.0, help="how long answers are kept")
    command.add_argument("--keep-answers", type=int, default=4096)
    command.add_argument("--keep-mib", type=int, default=256)


def serve(arguments: argparse.Namespace) -> int:
    """Grade over HTTP until SIGTERM; needs aiohttp."""
    if arguments.jobs is None:
        arguments.jobs = arguments.workers * JOBS_PER_WORKER
    check_bounds(arguments)
    token = read_token(arguments.token_file, os.environ.get(TOKEN_VARIABLE))
    if token is None and not is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host} is not a loopback address, so anyone who reaches it could "
            f"run programs here; give a token with --token-file or {TOKEN_VARIABLE}"
        )
    try:
        from .endpoints import ServerSettings
        from .grading_queue import AnswerRetention
        from .server import serve as serve_forever
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("aiohttp"):
            raise
        raise ValueError("serve needs aiohttp; install it with: pip install aiohttp") from None
    return serve_forever(
        ServerSettings(
            host=arguments.host,
            port=arguments.port,
            token=token,
            workers=arguments.workers,
            jobs=arguments.jobs,
            queue=arguments.queue,
            isolation=arguments.isolation,
            packages=arguments.packages,
            max_body_bytes=arguments.max_body_mib << 20,
            max_held_bytes=arguments.max_held_mib << 20,
            keep=AnswerRetention(
                arguments.keep_s, arguments.keep_answers, arguments.keep_mib << 20
            ),
        )
    )


def check_bounds(arguments: argparse.Namespace) -> None:
    """Raise ValueError if a number is out of its bounds."""
    for option, least, most in (
        ("port", 0, 65535),
        ("workers", 1, 1024),
        ("jobs", 1, arguments.workers * JOBS_PER_WORKER),
        ("queue", 0, 1 << 20),
        ("max_body_mib", 1, 2048),
        ("max_held_mib", 1, 1 << 20),
        ("keep_s", 0, 24 * 3600),
        ("keep_answers", 0, 1 << 20),
        ("keep_mib", 0, 1 << 20),
    ):
        value = getattr(arguments, option)
        if not least <= value <= most:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is {value}; it must be within {least} and {most}")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: Path | None, variable: str | None) -> str | None:
    """Read the service's token from `file` or, without a file, from the environment variable's
    value. Raises ValueError if other users may read the file, or if the token is malformed.
    """
    if file is None:
        return None if variable is None else checked_token(variable, TOKEN_VARIABLE)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"others may read the token in {file} (mode {mode:o}); chmod 600 {file}")
    return checked_token(file.read_text(encoding="utf-8"), str(file))


def checked_token(text: str, origin: str) -> str:
    token = text.strip()
    if not TOKEN_FORM.fullmatch(token):
        raise ValueError(
            f"the token in {origin} has {len(token)} characters; it must have 16 to 4096 printable "
            "ASCII ones without spaces. Make one with: openssl rand -hex 32"
        )
    return token
