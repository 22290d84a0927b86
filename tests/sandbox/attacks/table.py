"""Print sandbox/ATTACKS.md from the table that the tests assert.

python -m tests.sandbox.attacks.table > sandbox/ATTACKS.md
"""

from __future__ import annotations

from .attack import ALWAYS, KERNEL
from .suite import ATTACKS, CATEGORIES
from .worlds import WORLDS, World, is_stopped

HEAD = """\
# Attacks, and what stops them

{count} programs try to break out, to take more than they are given, or to pass a test without
solving it. `tests/sandbox` runs each of them with all layers on, and again in the worlds below,
most of which lack some layers; slow attacks are repeated only in the last, which lacks most.
This page is generated from the tests' table: `python -m tests.sandbox.attacks.table`.

An attack must fail where a layer in its list is on. Where none is, it must succeed, otherwise its
test would prove nothing. There are two exceptions: attacks that the kernel's own rules or settings
may stop as well, about which nothing is claimed, and {unsafe} attacks that would harm the machine,
which are tried only where they are stopped.

## What is stopped where a layer is missing

| world | attacks stopped | not stopped |
|---|---|---|
"""


def world_row(world: World) -> str:
    stopped, through = 0, []
    for category, attacks in CATEGORIES.items():
        loose = [a for a in attacks if not is_stopped(a, world.layers)]
        stopped += len(attacks) - len(loose)
        if len(loose) == len(attacks):
            through.append(f"all of *{category.replace('_', ' ')}*")
        elif loose:
            names = ", ".join(attack.name.replace("_", " ") for attack in loose)
            through.append(f"*{category.replace('_', ' ')}*: {names}")
    return f"| {world.what} | {stopped} of {len(ATTACKS)} | {'; '.join(through) or 'none'} |"


def category_rows(category: str) -> list[str]:
    """Return the rows of a category: one for all attacks with the same list of layers."""
    by_layers: dict[tuple[str, ...], list[str]] = {}
    for attack in CATEGORIES[category]:
        by_layers.setdefault(attack.stopped_by, []).append(attack.name.replace("_", " "))
    rows = []
    for layers, names in by_layers.items():
        stops = ", ".join(layer.replace("_", " ") for layer in layers if layer != KERNEL)
        if KERNEL in layers:
            stops += "; perhaps the kernel"
        rows.append(f"| {', '.join(names)} | {stops} |")
    return rows


def page() -> str:
    unsafe = sum(not attack.safe for attack in ATTACKS.values())
    lines = [HEAD.format(count=len(ATTACKS), unsafe=unsafe).rstrip("\n")]
    lines += [world_row(world) for world in WORLDS.values()]
    always = ", ".join(sorted(layer.replace("_", " ") for layer in ALWAYS))
    lines += [
        "",
        "## Which layers stop which attack",
        "",
        "Any one of the layers in a row is enough.",
        "",
        f"Always on, in every world: {always}.",
        "*Separation*: the expected output is in no process that runs a program. *Supervision*:",
        "limits and verdicts follow from what the kernel reports to the parent of a run.",
    ]
    for category in CATEGORIES:
        title = category.replace("_", " ").capitalize()
        lines += ["", f"### {title}", "", "| attacks | stopped by any of |", "|---|---|"]
        lines += category_rows(category)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
