"""Landlock: the kernel's own file access control, available without privilege since Linux 5.13."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from . import kernel

EXECUTE, READ_FILE, READ_DIR = 1, 4, 8
# WRITE_FILE REMOVE_DIR REMOVE_FILE MAKE_DIR MAKE_REG REFER TRUNCATE; an old ABI lacks the last two
WRITE = 2 | 16 | 32 | 128 | 256 | 8192 | 16384
# The number of kinds of file access that each ABI version handles.
FILE_ACCESS_KINDS = {1: 13, 2: 14, 3: 15, 4: 15}
NEWEST_FILE_ACCESS_KINDS = 16
ALL_TCP = 3  # bind and connect, since ABI 4
ALL_SCOPES = 3  # abstract unix sockets and signals, since ABI 6


def abi() -> int:
    """Return the kernel's Landlock version, or 0 if it has none."""
    try:
        number = kernel.SYS_LANDLOCK_CREATE_RULESET
        return kernel.syscall("landlock", number, None, ctypes.c_size_t(0), 1)
    except OSError:
        return 0


def restrict_to(
    directories: Iterable[str],
    files_beneath: Iterable[str],
    executable: Iterable[str] = (),
    writable: Iterable[str] = (),
) -> None:
    """Irrevocably deny this process every file access except listing `directories`, reading
    `files_beneath`, executing what is below `executable`, and changing what is below `writable`.
    TCP, and signals and abstract sockets to other processes, are denied if the ABI supports it.
    """
    version = abi()
    handled_files = (1 << FILE_ACCESS_KINDS.get(version, NEWEST_FILE_ACCESS_KINDS)) - 1
    attributes = struct.pack("<Q", handled_files)
    if version >= 4:
        attributes += struct.pack("<Q", ALL_TCP)
    if version >= 6:
        attributes += struct.pack("<Q", ALL_SCOPES)
    ruleset = kernel.syscall(
        "landlock_create_ruleset",
        kernel.SYS_LANDLOCK_CREATE_RULESET,
        attributes,
        ctypes.c_size_t(len(attributes)),
        0,
    )
    try:
        for path in directories:
            _allow(ruleset, path, READ_DIR)
        for path in files_beneath:
            _allow(ruleset, path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE)
        for path in executable:
            _allow(ruleset, path, EXECUTE | READ_FILE | READ_DIR)
        for path in writable:
            _allow(ruleset, path, (WRITE | READ_FILE | READ_DIR) & handled_files)
        number = kernel.SYS_LANDLOCK_RESTRICT_SELF
        kernel.syscall("landlock_restrict_self", number, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("<Qi", access, parent)
        kernel.syscall(f"landlock: {path}", kernel.SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
    finally:
        os.close(parent)
