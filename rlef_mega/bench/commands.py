"""A command of ours in a process of its own."""

import subprocess
import sys


def rlef(*words: str) -> None:
    """RuntimeError with the end of what it printed where it fails."""
    command = [sys.executable, "-m", "rlef_mega.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        printed = "\n".join((ended.stdout + ended.stderr).splitlines()[-20:])
        raise RuntimeError(f"rlef {' '.join(words)} ended with {ended.returncode}:\n{printed}")
