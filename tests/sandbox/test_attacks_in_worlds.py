"""The attacks again, as root and as an ordinary user, with one layer missing at a time.

A world is a process of its own with a given set of layers (`attacks/worlds.py`). What must happen
in it follows from the table alone: an attack is stopped where one of its layers is on, and succeeds
where none is. test_attacks.py tries this process's own world, with all its layers.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys

import pytest

from tests.sandbox.attacks.attack import KERNEL
from tests.sandbox.attacks.suite import ATTACKS, CATEGORIES
from tests.sandbox.attacks.worlds import OWN_WORLD, ROOT, WORLDS, is_stopped

OTHERS = [name for name in WORLDS if name != OWN_WORLD]
each_world = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="calls x86-64 system-call numbers"
)


@functools.cache
def tried_in(name: str) -> dict:
    """Return what `worlds.py` reports of a world. Skips if this machine cannot create it."""
    if WORLDS[name].root and os.getuid() != 0:
        pytest.skip("needs root")
    command = [sys.executable, "-m", "tests.sandbox.attacks.worlds", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sandbox")])}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    if "IsolationError" in ended.stderr:
        pytest.skip(f"this machine isolates too little: {ended.stderr.strip().splitlines()[-1]}")
    assert ended.returncode == 0, ended.stderr
    world = json.loads(ended.stdout)
    if missing := WORLDS[name].layers - set(world["layers"]):
        pytest.skip(f"this machine has no {', '.join(sorted(missing))}")
    return world


@each_world
def test_a_world_has_exactly_its_declared_layers(name: str) -> None:
    assert set(tried_in(name)["layers"]) == WORLDS[name].layers


@pytest.mark.parametrize("category", CATEGORIES)
@each_world
def test_an_attack_is_stopped_where_a_layer_against_it_is_on(name: str, category: str) -> None:
    ends = tried_in(name)["ends"]
    for key, end in ends.items():
        if key.partition(".")[0] == category and is_stopped(ATTACKS[key], WORLDS[name].layers):
            assert end["held"], (key, end)


@each_world
def test_an_attack_succeeds_where_no_layer_against_it_is_on(name: str) -> None:
    ends = tried_in(name)["ends"]
    for key, end in ends.items():
        attack = ATTACKS[key]
        if not is_stopped(attack, WORLDS[name].layers) and KERNEL not in attack.stopped_by:
            assert end["broke_out"], (key, end)


@pytest.mark.slow
def test_every_safe_attack_that_a_layer_stops_succeeds_somewhere() -> None:
    """No row of the table is an attack in name only."""
    through = {
        key for name in OTHERS for key, end in tried_in(name)["ends"].items() if end["broke_out"]
    }
    claimed = {
        key
        for key, attack in ATTACKS.items()
        if attack.safe
        and KERNEL not in attack.stopped_by
        and not is_stopped(attack, WORLDS["bare"].layers)
    }
    assert claimed <= through
