"""Reading what is not the program's, and writing anything at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlef_sandbox import Result, Status

Attempt = Callable[[str], Result]

READS = {
    "password_file": "print('ESCAPED', open('/etc/passwd').read())",
    "root_listing": "import os; print('ESCAPED' if set(os.listdir('/')) & {'etc', 'home'} else '')",
    "home_listing": "import os; print('ESCAPED', os.listdir(os.path.expanduser('~root')))",
    "proc_of_the_zygote": "print('ESCAPED', open(f'/proc/1/maps').read())",
    "own_environment_in_proc": "print('ESCAPED', open('/proc/self/environ').read())",
    "parent_of_the_working_directory": "import os; print('ESCAPED', os.listdir('../../../..'))",
    "third_party_packages": (
        "import os, sysconfig; d = sysconfig.get_path('purelib')\n"
        "print('ESCAPED' if any('pip' in n for n in os.listdir(d)) else '')"
    ),
    "cgroup_tree": "import os; print('ESCAPED', os.listdir('/sys/fs/cgroup'))",
    "device": "print('ESCAPED', open('/dev/vda', 'rb').read(1))",
    "open_by_handle": (
        "import ctypes; c = ctypes.CDLL(None)\n"
        "print('ESCAPED' if c.syscall(304, -100, b'x' * 16, 0) >= 0 else '')"
    ),
    "openat2": (
        "import ctypes; c = ctypes.CDLL(None); how = (ctypes.c_uint64 * 3)()\n"
        "print('ESCAPED' if c.syscall(437, -100, b'/', how, 24) >= 0 else '')"
    ),
    "inherited_descriptors": (
        "import os\n"
        "for fd in range(3, 64):\n"
        "    try: print('ESCAPED', fd, os.fstat(fd))\n"
        "    except OSError: pass"
    ),
}

WRITES = {
    "create": "open('/tmp/x', 'w').write('x'); print('ESCAPED')",
    "create_in_working_directory": "open('x', 'w').write('x'); print('ESCAPED')",
    "append_to_the_library": "import os; open(os.__file__, 'a').write('x'); print('ESCAPED')",
    "unnamed_file": "import os; os.open('/', os.O_TMPFILE | os.O_RDWR); print('ESCAPED')",
    "make_directory": "import os; os.mkdir('/tmp/x'); print('ESCAPED')",
    "remove": "import os; os.unlink(os.__file__); print('ESCAPED')",
    "rename": "import os; os.rename(os.__file__, '/x'); print('ESCAPED')",
    "link": "import os; os.link(os.__file__, '/x'); print('ESCAPED')",
    "symlink": "import os; os.symlink('/', '/x'); print('ESCAPED')",
    "change_mode": "import os; os.chmod(os.__file__, 0o777); print('ESCAPED')",
    "truncate": "import os; os.truncate(os.__file__, 0); print('ESCAPED')",
    "fifo": "import os; os.mkfifo('/x'); print('ESCAPED')",
    "memory_file": "import os; os.memfd_create('x'); print('ESCAPED')",
    "shared_memory": (
        "from multiprocessing.shared_memory import SharedMemory\n"
        "SharedMemory(create=True, size=9); print('ESCAPED')"
    ),
}


@pytest.mark.parametrize("source", READS.values(), ids=READS)
def test_nothing_but_the_library_can_be_read(attempt: Attempt, source: str) -> None:
    attempt(source)


@pytest.mark.parametrize("source", WRITES.values(), ids=WRITES)
def test_nothing_can_be_written(attempt: Attempt, source: str) -> None:
    assert attempt(source).status is Status.RUNTIME_ERROR


def test_a_world_readable_file_of_the_host_is_not_there(attempt: Attempt, tmp_path: Path) -> None:
    secret = tmp_path / "expected.out"
    secret.write_text("42")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(0o755)
    result = attempt(f"print('ESCAPED', open({str(secret)!r}).read())")
    assert result.status is Status.RUNTIME_ERROR


def test_files_outside_cannot_even_be_asked_about(sandbox_has_private_root: None, attempt: Attempt):
    attempt("import os; print('ESCAPED' if os.path.exists('/etc/passwd') else '')")


@pytest.fixture
def sandbox_has_private_root(sandbox) -> None:
    if "private_root" not in sandbox.isolation["files"]:
        pytest.skip("Landlock alone does not hide that a file exists")
