"""The process between the controller and a zygote, which cleans up after both.

A zygote is process 1 of a pid namespace. Only a forked child can become that, and only a parent can
wait for it, so the process that the controller started stays as the zygote's parent. It keeps none
of the zygote's channels and runs no program. It puts the zygote into its cgroup, if there is one.
When the zygote or the controller ends, it kills what is left and removes the cgroup and the scratch
directory.
"""

from __future__ import annotations

import os
import select
import signal
from typing import NoReturn

from . import kernel
from .confinement import enter_user_namespace, succeeds


def leave_reaper_behind(control: int, controller: int, cgroup: str, scratch: str = "") -> list[str]:
    """Fork. Returns only in the child, with the namespaces that it is in: it is process 1 of a new
    pid namespace if the machine allows one. The parent becomes the reaper.
    """
    namespaces = []
    if os.geteuid() != 0 and succeeds(enter_user_namespace):
        namespaces.append("user")
    if succeeds(kernel.unshare, kernel.CLONE_NEWPID):
        namespaces.append("pid")
    wait, go = os.pipe()
    pid = kernel.checked(kernel.fork(), "fork")
    if pid == 0:
        kernel.die_with_parent()
        os.close(go)
        os.read(wait, 1)  # returns when the reaper has put this process into its cgroup
        os.close(wait)
        return namespaces
    os.close(control)
    _reap(pid, controller, cgroup, scratch, go)


def _reap(pid: int, controller: int, cgroup: str, scratch: str, go: int) -> NoReturn:
    import shutil  # not in the zygote: every module makes its forks slower

    from . import cgroups, page_tables

    zygote = os.pidfd_open(pid)
    if cgroup:
        cgroups.write(cgroup, "cgroup.procs", pid)
    os.close(go)
    poller = select.poll()
    for descriptor in (zygote, controller):
        poller.register(descriptor, select.POLLIN)
    # compilers, which have a scratch directory, run no program whose page tables need a bound
    while not poller.poll(None if scratch else page_tables.MEASURE_EVERY_S * 1000):
        page_tables.bound(pid)
    signal.pidfd_send_signal(zygote, signal.SIGKILL)
    os.waitpid(pid, 0)
    if cgroup:
        cgroups.remove(cgroup)
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)
