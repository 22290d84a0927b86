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
# printable, for an HTTP header; long, against guessing
TOKEN_FORM = re.compile(r"[\x21-\x7e]{16,4096}")
NUMBERS = (  # option, default, least, most, help
    ("port", 8765, 0, 65535, "0: any free one"),
    ("workers", len(os.sched_getaffinity(0)), 1, 1024, "programs that work at once"),
    ("queue", 2048, 0, 1 << 20, "requests that may wait"),
    ("max-body-mib", 512, 1, 2048, "largest body of a request"),
    ("max-held-mib", 1024, 1, 1 << 20, "bodies of all open requests together"),
    ("keep-s", 600.0, 0, 24 * 3600, "how long answers are kept"),
    ("keep-answers", 4096, 0, 1 << 20, "how many answers are kept"),
    ("keep-mib", 256, 0, 1 << 20, "size of all kept answers"),
)


class ServerSettings(argparse.Namespace):
    """The options of a grading server."""

    host: str
    port: int
    token: str | None
    workers: int
    jobs: int
    queue: int
    isolation: str
    packages: list[str]
    max_body_mib: int
    max_held_mib: int
    keep_s: float
    keep_answers: int
    keep_mib: int


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command `serve`."""
    command = commands.add_parser("serve", help=serve.__doc__)
    command.set_defaults(handler=serve)
    command.add_argument("--host", default="127.0.0.1", help="an address of this machine")
    command.add_argument(
        "--token-file", type=Path, help=f"mode 600; else the variable {TOKEN_VARIABLE}"
    )
    command.add_argument(
        "--jobs",
        type=int,
        help=f"programs under way, sleeping ones included (default: {JOBS_PER_WORKER} per worker)",
    )
    for name, default, *_, meaning in NUMBERS:
        command.add_argument(f"--{name}", type=type(default), default=default, help=meaning)


def serve(arguments: argparse.Namespace) -> int:
    """Grade over HTTP until SIGTERM; needs aiohttp."""
    most_jobs = arguments.workers * JOBS_PER_WORKER
    if arguments.jobs is None:
        arguments.jobs = most_jobs
    for name, _, least, most, _ in (*NUMBERS, ("jobs", 0, 1, most_jobs, "")):
        value = getattr(arguments, name.replace("-", "_"))
        if not least <= value <= most:
            raise ValueError(f"--{name} is {value}; it must be between {least} and {most}")
    token = read_token(arguments.token_file, os.environ.get(TOKEN_VARIABLE))
    if token is None and not is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host} is not a loopback address, so anyone who reaches it could "
            f"run programs here; give a token with --token-file or {TOKEN_VARIABLE}"
        )
    try:
        from .server import serve as serve_forever
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("aiohttp"):
            raise
        raise ValueError("serve needs aiohttp; install it with: pip install aiohttp") from None
    return serve_forever(ServerSettings(**{**vars(arguments), "token": token}))


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
