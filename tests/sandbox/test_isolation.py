"""Layers removed one by one: what still holds, and when a sandbox refuses to start."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlef_sandbox import IsolationError, Sandbox, Status, Test, worker
from tests.sandbox.attacks.worlds import NO_CHROOT, NO_LANDLOCK, NO_NAMESPACES

NO_SECCOMP = "rlef_sandbox.zygote.filter_for_this_machine = lambda profile: None\n"


@pytest.fixture
def machine_without(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return a function that makes zygotes find a machine without what the given lines remove."""

    def lacking(lines: str) -> None:
        modules = "import rlef_sandbox.zygote, rlef_sandbox.private_root\n"
        bootstrap = worker.BOOTSTRAP.replace("main()\n", modules + lines + "main()\n")
        monkeypatch.setattr(worker, "COMMAND", [*worker.COMMAND[:-1], bootstrap])

    yield lacking


@pytest.mark.parametrize(
    ("lacking", "layer"),
    [
        ("", "private_root"),
        (NO_NAMESPACES, "landlock"),
        (NO_LANDLOCK, "private_root"),
        pytest.param(
            NO_NAMESPACES + NO_LANDLOCK,
            "empty_root",
            marks=pytest.mark.skipif(os.getuid() != 0, reason="chroot needs root"),
        ),
    ],
    ids=["all", "no_namespaces", "no_landlock", "neither"],
)
def test_one_file_layer_is_enough(machine_without, lacking: str, layer: str) -> None:
    machine_without(lacking)
    with Sandbox(workers=1) as sandbox:
        if not any(name.startswith(layer) for name in sandbox.isolation["files"]):
            pytest.skip(f"this machine has no {layer}")
        for attack in ("open('/etc/passwd')", "import os; os.listdir('/etc')", "open('/x', 'w')"):
            assert sandbox.run(attack).status is Status.RUNTIME_ERROR
        assert sandbox.grade("print(input())", [Test(b"1", b"1")])[0].status is Status.OK


@pytest.mark.parametrize(
    ("lacking", "layer"),
    [(NO_SECCOMP, "seccomp"), (NO_NAMESPACES + NO_LANDLOCK + NO_CHROOT, "files")],
    ids=["seccomp", "files"],
)
def test_a_machine_below_the_floor_is_refused_unless_asked_for(
    machine_without, lacking: str, layer: str
) -> None:
    machine_without(lacking)
    with pytest.raises(IsolationError, match=layer):
        Sandbox(workers=1)
    with Sandbox(workers=1, isolation="minimal") as sandbox:
        assert sandbox.isolation["level"] == "minimal"
        assert not sandbox.isolation[layer]
        assert sandbox.run("print(1)").status is Status.OK


def test_a_zygote_that_comes_back_below_the_floor_runs_nothing(machine_without) -> None:
    """The machine lost a layer between two zygotes, of which the second is refused each time."""
    socket_made = "import socket; socket.socket(); print('made')"
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run(socket_made).status is not Status.OK
        sandbox._workers[0].lose()
        machine_without(NO_SECCOMP)
        for _ in range(3):
            with pytest.raises(IsolationError, match="seccomp"):
                sandbox.run(socket_made)


def test_a_program_never_runs_as_root(sandbox: Sandbox) -> None:
    result = sandbox.run("import os; print(os.getuid(), os.getgid(), os.geteuid())")
    assert sandbox.isolation["unprivileged_user"]
    assert b"0" not in result.stdout.split()


def test_the_layers_are_reported(sandbox: Sandbox) -> None:
    layers = sandbox.isolation
    assert layers["level"] == "default"
    assert layers["no_new_privs"] and layers["rlimits"] and layers["seccomp"] and layers["files"]
    bound = resource.prlimit(sandbox._workers[0]._process.pid, resource.RLIMIT_CORE)[1]
    to_a_pipe = Path("/proc/sys/kernel/core_pattern").read_text().startswith("|")
    assert ("limit" in layers["core_dumps_stopped_by"]) == (bound == 1 if to_a_pipe else bound < 2)
    private = Path("/proc/sys/fs/suid_dumpable").read_text() == "0\n"
    assert ("undumpable" in layers["core_dumps_stopped_by"]) == private
