"""Builds the sandbox's C library, once for each machine and user, if there is a compiler.

The results are in a folder of the user's cache, named by a hash of their recipe. They are renamed
into it, so any number of processes may build at once. A folder that others own or may write to is
not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "csrc"
SOURCES = [FOLDER / "spawn.c", FOLDER / "serve.c"]
FLAGS = [
    *("-std=gnu11", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-Wl,-z,relro,-z,now"),
]
BUILD_TIMEOUT_S = 120


def cache_folder() -> Path | None:
    """Return the folder of built files: in the user's cache or, if that cannot be written, among
    the temporary files. Returns None if there is no such folder that only this user can write to.
    """
    roots = [Path(tempfile.gettempdir(), f"cache-{os.getuid()}")]
    with contextlib.suppress(RuntimeError):  # a user without a home
        roots.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
    for root in roots:
        folder = root / "rlef_sandbox"
        try:
            for made in (folder.parent, folder):  # with these modes whatever the umask
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = [folder.stat(), folder.parent.stat()]
        except OSError:
            continue
        is_ours = all(f.st_uid == os.getuid() and not f.st_mode & 0o022 for f in found)
        if is_ours and os.access(folder, os.W_OK):
            return folder
    return None


def version_of(compiler: str) -> bytes:
    """Return the output of `compiler --version`; empty if that fails."""
    try:
        return subprocess.run(
            [compiler, "--version"], capture_output=True, check=True, timeout=BUILD_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def built(
    name: str, recipe: bytes, build: Callable[[Path], list[str]], text: bytes = b""
) -> Path | None:
    """Return the file `name` of this `recipe`, from the cache or made now. `build` gives the
    command for an output path; `text` is its standard input. Returns None if there is no folder or
    the command fails.
    """
    folder = cache_folder()
    if folder is None:
        return None
    key = hashlib.sha256(recipe + platform.machine().encode()).hexdigest()[:16]
    target = folder / key / name
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / key / name
        output.parent.mkdir(parents=True)
        for made in {Path(scratch, key), output.parent}:
            made.chmod(0o755)  # for the unprivileged compiler, whatever the umask
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                build(output),
                input=text,
                check=True,
                capture_output=True,
                timeout=BUILD_TIMEOUT_S,
                cwd=scratch,
                env={"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": scratch},
                umask=0o022,
            )
            Path(scratch, key).rename(folder / key)  # fails if another process built it first
    return target if target.exists() else None


def spawn_library() -> Path | None:
    """Return the shared library of csrc/, or None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    texts = [path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in (".c", ".h")]
    recipe = " ".join([compiler, *FLAGS]).encode() + b"".join(texts)
    return built(
        "zygote.so", recipe, lambda to: [compiler, *FLAGS, "-o", str(to), *map(str, SOURCES)]
    )
