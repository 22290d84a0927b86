"""The worlds in which every attack is tried: who starts the sandbox, and which layers are missing.

`python -m tests.sandbox.attacks.worlds NAME` tries the suite in one world and prints, as JSON, the
layers that were on and how every attack ended. It is a process of its own, since some worlds begin
by giving up root.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import rlef_sandbox
from rlef_sandbox import Sandbox, kernel, worker

from .attack import ALWAYS, KERNEL, STDIN, Attack
from .suite import ATTACKS, SLOW

ORDINARY_USER = 60001  # an id that no one else has
ROOT = Path(__file__).parents[3]

# A world removes a layer by making the kernel seem to refuse it, in the zygote before it begins.
NO_NAMESPACES = """
def refuse(flags): raise OSError(1, "no namespaces here")
rlef_sandbox.kernel.unshare = refuse
rlef_sandbox.kernel.CLONE_NEWUSER = rlef_sandbox.kernel.CLONE_NEWPID = 0
"""
NO_LANDLOCK = "rlef_sandbox.landlock.abi = lambda: 0\n"
NO_PRIVATE_ROOT = """
def refuse(*arguments): raise OSError(1, "no private root here")
rlef_sandbox.private_root.enter = refuse
"""
NO_CHROOT = """
def refuse(): raise OSError(1, "no chroot here")
rlef_sandbox.private_root.enter_nothing = refuse
"""
NO_SECCOMP = """
def refuse(*arguments): raise ValueError("no filter here")
rlef_sandbox.seccomp.Filter.__init__ = refuse
"""


NAMESPACES = frozenset({"user", "mount", "net", "ipc", "uts", "pid"})
LANDLOCK = frozenset({"landlock", "landlock_network"})
WITH_NAMESPACES = NAMESPACES | {"private_root", "process_ids"}
ALL = ALWAYS | WITH_NAMESPACES | LANDLOCK | {"seccomp", "unprivileged_user"}
NO_LAYERS: frozenset[str] = frozenset()
OTHER_LAYERS = ("seccomp", "unprivileged_user", "process_ids")


@dataclass(frozen=True)
class World:
    """A world. The lines `missing`, run in each zygote, turn `off` some layers, and may turn `on`
    one that only replaces them. `root`: whether root starts the sandbox.
    """

    what: str
    missing: str = ""
    off: frozenset[str] = NO_LAYERS
    on: frozenset[str] = NO_LAYERS
    root: bool = True
    isolation: str = "default"

    @property
    def layers(self) -> frozenset[str]:
        """The layers here, on a machine that has them all."""
        return (ALL - self.off) | self.on


WORLDS = {
    "root": World("root starts it; all layers"),
    "user": World("an ordinary user starts it; all layers", root=False),
    "no_namespaces": World("no namespaces, so no private root", NO_NAMESPACES, WITH_NAMESPACES),
    "user_without_namespaces": World(
        "an ordinary user; no namespaces, so no private root",
        NO_NAMESPACES,
        WITH_NAMESPACES,
        root=False,
    ),
    "no_landlock": World("no Landlock", NO_LANDLOCK, LANDLOCK),
    "no_private_root": World("no private root", NO_PRIVATE_ROOT, frozenset({"private_root"})),
    "empty_root": World(
        "no namespaces and no Landlock; a chroot to an empty directory",
        NO_NAMESPACES + NO_LANDLOCK,
        WITH_NAMESPACES | LANDLOCK,
        frozenset({"empty_root"}),
    ),
    "no_filter": World(
        "no system call filter", NO_SECCOMP, frozenset({"seccomp"}), isolation="minimal"
    ),
    "user_without_filter": World(
        "an ordinary user; no system call filter",
        NO_SECCOMP,
        frozenset({"seccomp"}),
        root=False,
        isolation="minimal",
    ),
    "bare": World(
        "an ordinary user; only resource limits and no_new_privs",
        NO_NAMESPACES + NO_LANDLOCK + NO_CHROOT + NO_SECCOMP,
        WITH_NAMESPACES | LANDLOCK | {"seccomp"},
        root=False,
        isolation="minimal",
    ),
}
# The world of test_attacks.py, which tries every attack in it.
OWN_WORLD = "root" if os.getuid() == 0 else "user"
# Attacks on resources take long, and so do some that succeed. The layers in which worlds differ do
# not affect them, so they are tried only in the world with the fewest layers.
SLOW_WORLD = "bare"
SLOW_SUCCESSES = [key for key in ATTACKS if key.startswith("sandbox_faults.hard_limit_of_cpu_time")]


def take_away(missing: str) -> None:
    """Make every zygote that this process starts find a machine without some layers."""
    modules = "import rlef_sandbox.zygote, rlef_sandbox.private_root, rlef_sandbox.seccomp\n"
    worker.COMMAND[-1] = worker.BOOTSTRAP.replace("main()\n", modules + missing + "main()\n")


def let_everyone_read_the_interpreter() -> None:
    """Let any user read the interpreter and this code, in a mount namespace of our own."""
    paths = [sys.base_prefix, sys.prefix, str(ROOT), str(Path(rlef_sandbox.__file__).parents[1])]
    if blocked := {top for path in paths if (top := _closed_directory(os.path.realpath(path)))}:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        for top in blocked:
            _open_up(top, [p for p in map(os.path.realpath, paths) if p.startswith(top + "/")])


def become_an_ordinary_user() -> None:
    """Give up root, with no way back."""
    os.setgroups([])
    os.setresgid(*[ORDINARY_USER] * 3)
    os.setresuid(*[ORDINARY_USER] * 3)


def _closed_directory(path: str) -> str | None:
    """Return the first directory on the way to `path` that other users may not cross."""
    way = [*reversed(Path(path).parents), Path(path)]
    return next((str(p) for p in way if p.is_dir() and not p.stat().st_mode & 0o001), None)


def _open_up(top: str, paths: list[str]) -> None:
    """Cover `top`, only in this mount namespace, with an open directory that leads to `paths`."""
    sources = [os.open(path, os.O_PATH) for path in paths]
    kernel.mount("tmpfs", top, "tmpfs", 0, "mode=755")
    for source, path in zip(sources, paths, strict=True):
        os.makedirs(path, exist_ok=True)
        kernel.mount(f"/proc/self/fd/{source}", path, "", kernel.MS_BIND)
        os.close(source)


def layers_reported(isolation: dict[str, object]) -> set[str]:
    """Return the names of the layers that a sandbox reports, as `Attack.stopped_by` has them."""
    files, namespaces = isolation["files"], isolation["namespaces"]
    assert isinstance(files, list) and isinstance(namespaces, list)
    named = {name for name in OTHER_LAYERS if isolation[name]}
    for name in files:
        layer, _, abi = name.partition("_abi_")
        named |= {layer} | ({"landlock_network"} if int(abi or 0) >= 4 else set())
    return ALWAYS | named | set(namespaces)


def is_stopped(attack: Attack, on: Set[str]) -> bool:
    return bool(on & set(attack.stopped_by))


def proves(key: str, on: Set[str], world: str) -> bool:
    """Return whether to try an attack where these layers are on: only if a test asserts how it ends
    there, and no other world tries it with the same layers against it.
    """
    attack, category = ATTACKS[key], key.partition(".")[0]
    if is_stopped(attack, on):
        return category not in SLOW or world == SLOW_WORLD
    harmless = attack.safe and KERNEL not in attack.stopped_by
    return harmless and (key not in SLOW_SUCCESSES or world == SLOW_WORLD)


def try_all(name: str) -> dict[str, object]:
    """Try the attacks in this world. Returns how each ended, and the layers that were on."""
    world = WORLDS[name]
    take_away(world.missing)
    with Sandbox(workers=2, isolation=world.isolation) as sandbox, ThreadPoolExecutor(2) as pool:
        on = layers_reported(sandbox.isolation)
        tried = {key: attack for key, attack in ATTACKS.items() if proves(key, on, name)}
        ends = pool.map(lambda attack: attempt(sandbox, attack), tried.values())
        return {"layers": sorted(on), "ends": dict(zip(tried, ends, strict=True))}


def attempt(sandbox: Sandbox, attack: Attack) -> dict[str, object]:
    if attack.test is None:
        result = sandbox.run(attack.source, STDIN, attack.limits)
    else:
        (result,) = sandbox.grade(attack.source, [attack.test], attack.limits)
    return {
        "status": result.status,
        "broke_out": attack.broke_out(result.status, result.stdout),
        "held": attack.held(result),
        "words": (result.stdout[-200:] + result.stderr[-300:]).decode(errors="replace"),
    }


def main() -> None:
    name = sys.argv[1]
    if os.getuid() == 0:
        let_everyone_read_the_interpreter()
        if not WORLDS[name].root:
            become_an_ordinary_user()
    print(json.dumps(try_all(name)))


if __name__ == "__main__":
    main()
