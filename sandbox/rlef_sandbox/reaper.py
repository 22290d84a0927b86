"""The process between the controller and a zygote: it sees no program, and cleans up after both.

A zygote is process 1 of a pid namespace, which only a child can be; and only a parent is told of an
end. So the process that the controller started stays behind as the zygote's parent. It holds none
of the zygote's channels. It puts the zygote into its cgroup, if there is one, and when the zygote
or the controller ends, in whatever way, it kills what is left and removes the cgroup and scratch.
"""

from __future__ import annotations

import os
import select
import signal
from typing import NoReturn

from . import kernel
from .confinement import enter_user_namespace, succeeds


def leave_reaper_behind(control: int, controller: int, cgroup: str, scratch: str = "") -> list[str]:
    """Fork: the child goes on, process 1 of a new pid namespace if the machine gives one, and is
    told which namespaces it is in; the parent waits for the end.
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
        os.read(wait, 1)  # until it is in its cgroup
        os.close(wait)
        return namespaces
    os.close(control)
    _reap(pid, controller, cgroup, scratch, go)


def _reap(pid: int, controller: int, cgroup: str, scratch: str, go: int) -> NoReturn:
    import shutil  # here, and not in the zygote, for whose children every module is dearer

    from . import cgroups

    zygote = os.pidfd_open(pid)
    if cgroup:
        succeeds(cgroups.join, cgroup, pid)
    os.close(go)
    poller = select.poll()
    for descriptor in (zygote, controller):
        poller.register(descriptor, select.POLLIN)
    poller.poll()
    signal.pidfd_send_signal(zygote, signal.SIGKILL)
    os.waitpid(pid, 0)
    if cgroup:
        cgroups.remove(cgroup)
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)
