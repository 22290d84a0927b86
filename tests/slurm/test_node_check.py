"""Each fault of a node is one line with its remedy."""

import ctypes
import errno
import ipaddress
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlef_mega.cluster.node_check import (
    check_gpus,
    check_ports,
    check_quota,
    check_room,
    check_shared_folder,
)
from rlef_mega.cluster.slurm import disk_bytes, layout
from rlef_mega.config import TrainConfig, find_recipe, load_config
from rlef_mega.run.addresses import address_of_interface, reached_at


def shared(folder: Path, others: dict[str, float], **bounds: float) -> list[str]:
    for node, clock_s in others.items():
        (folder / node).write_text(repr(clock_s))
    settings = {"began_s": time.time(), "skew_s": 5.0, "wait_s": 0.3} | bounds
    return list(check_shared_folder(folder, "n0", ["n0", *others], **settings))


def test_nodes_that_see_each_other_are_accepted(tmp_path):
    assert shared(tmp_path, {"n1": time.time()}) == []


def test_a_node_of_two_roles_is_checked_twice_at_once(tmp_path):
    """As on nodes that both generate and grade."""
    words = [sys.executable, "-c", CHECK_AGAIN, str(tmp_path)]
    both = [subprocess.Popen(words) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]


CHECK_AGAIN = """
import sys, time
from pathlib import Path
from rlef_mega.cluster.node_check import check_shared_folder
for _ in range(300):
    found = check_shared_folder(
        Path(sys.argv[1]), "n0", ["n0"], began_s=time.time(), skew_s=5, wait_s=0
    )
    assert list(found) == []
"""


def test_a_folder_that_is_not_shared_names_the_missing(tmp_path):
    (fault,) = check_shared_folder(
        tmp_path, "n0", ["n0", "n1", "n2"], began_s=time.time(), skew_s=5, wait_s=0.3
    )
    assert "shows nothing from n1, n2" in fault


def test_clocks_that_differ_are_named_from_both_sides(tmp_path):
    assert "n1 is 9" in shared(tmp_path, {"n1": time.time() + 99.5})[0]
    assert "behind that of the first node" in shared(tmp_path, {}, began_s=time.time() + 60)[0]


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (fault,) = check_ports(port, 1)
    assert f"port {port} is taken" in fault
    assert list(check_ports(port, 1)) == []


def test_room_is_counted_where_the_folder_will_be(tmp_path):
    assert list(check_room(tmp_path / "not/yet", 0.001)) == []
    (fault,) = check_room(tmp_path / "not/yet", 1e6)
    assert "GiB free, 1e+06 are needed" in fault


def test_a_quota_is_found_before_it_ends_a_run(tmp_path, monkeypatch):
    """Of the C library only the call that reserves the room is replaced: a quota needs a mount."""
    assert list(check_quota(tmp_path / "not/yet", 0.001)) == []
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: OverQuota)
    (fault,) = check_quota(tmp_path, 30)
    assert "your quota leaves less than 30 GiB" in fault and not list(tmp_path.iterdir())


class OverQuota:
    @staticmethod
    def fallocate(*_: object) -> int:
        ctypes.set_errno(errno.EDQUOT)
        return -1


def test_a_node_is_reached_by_its_name_only_if_others_see_the_same_address(monkeypatch):
    """Names are those of a table, as in /etc/hosts; addresses and interfaces are this machine's."""
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    own = [(name, address) for name in names for address in addresses_if_any(name)]
    if not own:
        pytest.skip("this machine has no interface with an address but lo")
    interface, address = own[0]
    table = {"good": address, "debian": "127.0.1.1", "peer": address, "six": "::1"}

    def look_up(host: str, *_: object, **__: object) -> list[tuple]:
        found = ipaddress.ip_address(table.get(host, host))
        family = socket.AF_INET6 if found.version == 6 else socket.AF_INET
        return [(family, socket.SOCK_DGRAM, 0, "", (str(found), 9))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert reached_at("good", ["good", "peer"]) == "good"
    assert reached_at("debian", ["debian", "peer"]) == address
    assert reached_at("debian", ["debian"], interface) == address
    assert reached_at("debian", ["debian", "peer"], "lo") == "127.0.0.1"
    assert reached_at("six", ["six"]) == "six"  # all nodes are this machine
    with pytest.raises(OSError):
        reached_at("good", ["good"], "ib99")


def addresses_if_any(interface: str) -> list[str]:
    try:
        return [address_of_interface(interface)]
    except OSError:
        return []


def test_the_room_that_is_checked_is_that_of_the_recipes_checkpoints():
    """8.03e9 parameters of 14 bytes, and with a critic 7.5e9 more; two are kept, the best, and one
    is being written."""
    recipe = find_recipe("llama31_8b")
    alone = ["ppo.advantage=grpo", "rollout.samples_per_problem=8"]
    kept = ["run.keep_checkpoints=2", "run.keep_best=1", "rollout.servers.publish=distributed"]
    for settings, parameters in ((alone, 8.03e9), ([], 15.54e9)):
        found = disk_bytes(load_config(recipe, [*kept, *settings], TrainConfig))
        assert found == pytest.approx(4 * 14 * parameters, rel=2e-3)


def test_the_layout_has_what_the_services_of_a_run_need():
    """On each of two nodes the first four GPUs train and the others serve."""
    split = [
        *("parallel.data_parallel_size=8", "parallel.tensor_model_parallel_size=1"),
        *("parallel.processes_per_node=4", "rollout.engine=sglang", "rollout.servers.count=4"),
        *("rollout.servers.first_gpu=4", "rollout.servers.release_memory=false"),
        *("judge.isolation=minimal", "judge.packages=['numpy', 'sympy']"),
    ]
    found = layout(load_config(find_recipe("llama31_8b_node"), split, TrainConfig))
    assert (found["RANKS"], found["RANKS_PER_NODE"], found["PLACEMENT"]) == (8, 4, "")
    assert (found["ISOLATION"], found["PACKAGES"]) == ("minimal", "numpy,sympy")
    beside = [*split, "rollout.servers.first_gpu=3"]
    refusal = layout(load_config(find_recipe("llama31_8b_node"), beside, TrainConfig))["PLACEMENT"]
    assert "ranks take GPUs 0 to 3" in refusal


def test_gpus_are_counted_as_the_driver_shows_them(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor n in 0 1 2; do echo "GPU $n: NVIDIA H100"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert list(check_gpus(3)) == []
    (fault,) = check_gpus(8)
    assert "8 GPUs are needed, the driver shows 3 and Slurm gave 8" in fault


def test_a_rank_takes_its_place_from_slurm_and_dumps_its_stacks(tmp_path):
    """As srun sets the variables; then SIGUSR2, while the rank sleeps in C."""
    code = (
        "import os, sys, time; from rlef_mega.run import launch\n"
        "def work(folder):\n"
        "    print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')), flush=True)\n"
        "    time.sleep(60)\n"
        "sys.argv = ['', '.']; launch.worker_main(work)"
    )
    its = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
    its |= {"MASTER_ADDR": "n0", "RLEF_STACKS": str(tmp_path / "stacks")}
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | its
    rank = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert rank.stdout.readline().split() == ["5", "16", "1"]
        rank.send_signal(12)  # SIGUSR2
        file = tmp_path / "stacks/rank_5.txt"
        deadline = time.monotonic() + 20
        while "in work" not in file.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "in work" in file.read_text()
        assert rank.poll() is None  # a dump ends nothing
    finally:
        rank.kill()
        rank.wait()
