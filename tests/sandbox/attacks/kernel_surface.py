"""Calls that no honest program makes, and bad arguments of calls that honest programs do make.

A call counts as an escape if the kernel's own code answers it: where the filter should kill, if the
program survives; where it should refuse, if the answer is not EPERM, EACCES or ENOSYS.
"""

from __future__ import annotations

from rlef_sandbox import Status

from .attack import FILES, KERNEL, SUPERVISION, Attack, attacks

CALL = """\
import ctypes, errno, os
c = ctypes.CDLL(None, use_errno=True)
c.syscall.restype = ctypes.c_long
def k(*a):
    r = c.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])
    return r if r >= 0 else -ctypes.get_errno()
def reached(r): return r >= 0 or -r not in (errno.EPERM, errno.EACCES, errno.ENOSYS)
SCRATCH = b'/dev/shm/rlef-attack-%d' % os.getpid()
buffer = ctypes.create_string_buffer(256)
"""


def killed(calls: dict[str, str], safe: bool = True) -> tuple[Attack, ...]:
    """Return attacks by calls for which the filter ends the program."""
    sources = {name: f"{CALL}k({call}); print('ESCAPED')" for name, call in calls.items()}
    return attacks(sources, ("seccomp",), Status.SECURITY_VIOLATION, safe=safe)


def refused(
    calls: dict[str, str], *stopped_by: str, safe: bool = True, after: str = ""
) -> tuple[Attack, ...]:
    """Return attacks by calls that the filter refuses; each is an expression that calls `k`."""
    sources = {
        name: f"{CALL}r = {call}{after}\nif reached(r): print('ESCAPED', r)"
        for name, call in calls.items()
    }
    return attacks(sources, stopped_by or ("seccomp",), Status.OK, safe=safe)


IOCTL = "print('ESCAPED') if {} >= 0 else ''"  # the filter answers as a file without ioctls would
CREATE = "if {} >= 0: os.unlink(SCRATCH); print('ESCAPED')"
ADVISE = "if k(28, k(9, 0, 4096, 3, 0x22, -1, 0), 4096, {}) == 0: print('ESCAPED')"
FORK_ENDS = "\nif r == 0: os._exit(0)"

OTHER_PROCESSES = (
    *killed(
        {
            "ptrace_traceme": "101, 0, 0, 0, 0",
            "ptrace_attach_to_the_parent": "101, 16, os.getppid(), 0, 0",
            "ptrace_seize_the_parent": "101, 0x4206, os.getppid(), 0, 0",
            "process_vm_readv": "310, os.getppid(), buffer, 1, buffer, 1, 0",
            "process_vm_writev": "311, os.getppid(), buffer, 1, buffer, 1, 0",
            "process_madvise": "440, 9, buffer, 1, 4, 0",
            "kcmp": "312, os.getpid(), os.getppid(), 0, 0, 0",
            "pidfd_open": "434, os.getppid(), 0",
            "pidfd_getfd": "438, 0, 0, 0",
            "pidfd_send_signal": "424, 0, 0, 0, 0",
        }
    ),
    *refused({"robust_list": "k(274, 0, buffer, buffer)"}),
    *refused({"release_the_memory_of_another": "k(448, 0, 0)"}),
    *refused(
        {
            "fork_by_number": "k(57)",
            "clone_a_process": "k(56, 17, 0, 0, 0, 0)",
            "clone_a_process_with_a_pidfd": "k(56, 17 | 0x1000, 0, buffer, 0, 0)",
            "clone_with_bits_above_the_flags": "k(56, 17 | 0x10000 << 32, 0, 0, 0, 0)",
            "clone3_a_process": ("k(435, (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17, 0, 0, 0), 64)"),
        },
        after=FORK_ENDS,
    ),
    *refused(
        {"clone_into_a_user_namespace": "k(56, 17 | 0x10000000, 0, 0, 0, 0)"},
        "seccomp",
        KERNEL,
        after=FORK_ENDS,
    ),
    *refused(
        {
            # a process that shares the memory, without a stack: it would crash the caller
            "vfork": "k(58)",
            "clone_a_thread_beside_its_parent": "k(56, 0x10f00 | 0x8000, 0, 0, 0, 0)",
            "clone_a_traced_thread": "k(56, 0x10f00 | 0x2000, 0, 0, 0, 0)",
            "clone_a_thread_with_a_pidfd": "k(56, 0x10f00 | 0x1000, 0, buffer, 0, 0)",
            "clone_a_thread_in_a_new_namespace": "k(56, 0x10f00 | 0x20000, 0, 0, 0, 0)",
        },
        safe=False,
    ),
    *refused(
        {
            "execve_of_nothing": "k(59, b'', 0, 0)",
            "execveat_of_a_descriptor": "k(322, 0, b'', 0, 0, 0x1000)",
        }
    ),
)

NEW_INTERFACES = (
    *killed(
        {
            "io_uring_setup": "425, 1, buffer",
            "io_uring_enter": "426, 0, 0, 0, 0, 0, 0",
            "io_uring_register": "427, 0, 0, 0, 0",
            "asynchronous_io": "206, 1, buffer",
            "bpf_map": "321, 0, buffer, 48",
            "bpf_program": "321, 5, buffer, 48",
            "userfaultfd": "323, 1",
            "perf_event": "298, buffer, 0, -1, -1, 0",
            "keyctl_session": "250, 1, 0, 0, 0, 0",
            "add_key": "248, b'user', b'rlef', b'x', 1, -2",
            "request_key": "249, b'user', b'rlef', 0, 0",
            "another_filter": "317, 1, 0, 0",
            "filter_with_a_listener": "317, 1, 8, buffer",
            "landlock_ruleset": "444, 0, 0, 1",
            "landlock_rule": "445, 0, 1, buffer, 0",
            "landlock_restrict_self": "446, 0, 0",
        }
    ),
    *refused(
        {
            "watch_files": "k(294, 0)",
            "signal_descriptor": "k(289, -1, buffer, 8, 0)",
            "timer_descriptor": "k(283, 1, 0)",
            "splice_descriptors": "k(275, 0, 0, 1, 0, 1, 0)",
            "give_pages_to_a_pipe": "k(278, 1, buffer, 1, 0)",
            "copy_between_files": "k(326, 0, 0, 1, 0, 1, 0)",
            "cache_statistics": "k(451, 0, buffer, buffer, 0)",
            "protection_keys": "k(330, 0, 0)",
            "secret_memory": "k(447, 0)",
            "memory_file_by_number": "k(319, b'x', 0)",
            "openat2_to_read": "k(437, -100, b'/', (ctypes.c_uint64 * 3)(), 24)",
            "several_futexes": "k(449, buffer, 1, 0, 0, 0)",
            "priority_inheriting_futex": "k(202, buffer, 6, 0, 0, 0, 0)",
            "requeue_to_a_priority_inheriting_futex": "k(202, buffer, 12, 1, 1, buffer, 0)",
            "wait_for_a_requeue_with_inheritance": "k(202, buffer, 11, 1, 0, buffer, 0)",
            "list_mounts": "k(458, buffer, buffer, 1, 0)",
            "an_unknown_call": "k(999, 0, 0)",
        },
        "seccomp",
        KERNEL,
    ),
)

THE_MACHINE = (
    *killed(
        {
            "mount": "165, 0, 0, 0, 0, 0",
            "unmount": "166, b'/', 2",
            "open_tree": "428, -100, b'/', 1",
            "move_mount": "429, 0, b'', 0, b'', 0",
            "new_file_system": "430, b'proc', 0",
            "configure_a_file_system": "431, 0, 0, 0, 0, 0",
            "attributes_of_a_mount": "442, -100, b'/', 0, buffer, 32",
            "pivot_root": "155, b'.', b'.'",
            "chroot": "161, b'/'",
            "unshare_a_user_namespace": "272, 0x10000000",
            "unshare_files": "272, 0x400",
            "enter_a_namespace": "308, 0, 0",
            "file_handle": "303, -100, b'/', buffer, buffer, 0",
            "open_by_handle": "304, -100, buffer, 0",
            "fanotify": "300, 0, 0",
            "kernel_module": "313, 0, b'', 0",
            "unload_a_module": "176, b'rlef', 0",
            "another_kernel": "246, 0, 0, 0, 0",
            "quota": "179, 0, 0, 0, 0",
            "swap": "167, b'/tmp', 0",
            "kernel_log": "103, 3, buffer, 256",
            "set_the_clock": "227, 0, buffer",
            "adjust_the_clock": "305, 0, buffer",
            "io_privilege_level": "172, 3",
            "io_port_permissions": "173, 0, 1, 1",
            "segment_descriptors": "154, 0, buffer, 16",
            "personality_without_randomisation": "135, 0x0040000",
            "personality_that_reads_as_executable": "135, 0x0400000",
            "move_its_pages": "279, 0, 0, 0, 0, 0, 0",
            "memory_policy": "238, 0, 0, 0",
            "host_name": "170, b'x', 1",
        }
    ),
    *killed({"reboot": "169, 0xfee1dead, 672274793, 0x89abcdef, 0"}, safe=False),
)

ARGUMENTS = (
    *refused(
        {"message_queue": "k(240, b'rlef', 0o102, 0o600, 0)"},
        "seccomp",
        KERNEL,
        after="; k(241, b'rlef')",
    ),
    *refused({"system_v_memory": "k(29, 0, 4096, 0o1600)"}, after="; k(31, r, 0, 0)"),
    *refused({"system_v_semaphore": "k(64, 0, 1, 0o1600)"}, after="; k(66, r, 0, 0)"),
    *refused({"system_v_message": "k(68, 0, 0o1600)"}, after="; k(71, r, 0, 0)"),
    *refused(
        {
            "send_a_descriptor": "k(46, 1, buffer, 0)",
            "lock_all_memory": "k(151, 99)",
            "become_dumpable": "k(157, 4, 1, 0, 0, 0)",
            "filter_by_prctl": "k(157, 22, 99, 0, 0, 0)",
            "dispatch_its_system_calls": "k(157, 59, 0, 0, 0, 0)",
            "become_a_reaper": "k(157, 36, 0, 0, 0, 0)",
            "name_a_tracer": "k(157, 0x59616d61, -1, 0, 0, 0)",
            "read_the_bounding_set": "k(157, 23, 0, 0, 0, 0)",
            "speculation_control": "k(157, 53, 99, 0, 0, 0)",
            "segment_base": "k(158, 0x1003, buffer)",
            "signal_owner_of_a_descriptor": "k(72, 0, 8, 0)",
            "size_of_a_pipe": "k(72, os.pipe()[0], 1031, 1 << 20)",
            "record_lock": "k(72, 0, 6, buffer)",
            "read_past_the_page_cache": "k(72, 0, 4, os.O_DIRECT)",
            "own_table_of_descriptors": "k(436, 1000, 1001, 2)",
            "own_table_of_descriptors_with_high_bits": "k(436, 1000, 1001, 2 | 1 << 32)",
            "shared_memory_without_a_file": "k(9, 0, 4096, 3, 0x21, -1, 0)",
            "shared_memory_without_a_file_validated": "k(9, 0, 4096, 3, 0x23, -1, 0)",
            "huge_pages": "k(9, 0, 2 << 20, 3, 0x40022, -1, 0)",
            "core_dumps_by_the_hosts_handler": "k(160, 4, buffer)",
            "core_dumps_by_the_hosts_handler_by_prlimit": "k(302, 0, 4, buffer, 0)",
        }
    ),
    *refused(
        {
            "lock_memory": "k(149, buffer, 1)",
            "locked_mapping": "k(9, 0, 4096, 3, 0x2022, -1, 0)",
        },
        "seccomp",
        "rlimits",
    ),
    *refused(
        {
            "clone_a_thread_with_descriptors_of_its_own": "k(56, 0x10b00, 0, 0, 0, 0)",
        },
        safe=False,
    ),
    *attacks({"pages_hidden_in_swap": CALL + ADVISE.format(21)}, ("seccomp",), Status.OK),
    *attacks(
        {"read_from_the_disk": "import os\nos.open(os.__file__, os.O_DIRECT)\nprint('ESCAPED')"},
        ("seccomp", KERNEL),
    ),
    *attacks(  # of a pipe, which only the kernel's own code refuses
        {
            "flush_the_disk": CALL + "if k(74, os.pipe()[0]) < 0: print('ESCAPED')",
            "flush_the_data_of_the_disk": CALL + "if k(75, os.pipe()[0]) < 0: print('ESCAPED')",
        },
        ("seccomp",),
        Status.OK,
    ),
    *attacks(
        {
            "pages_hidden_by_merging": CALL + ADVISE.format(12),
            "page_tables_without_pages": CALL + ADVISE.format(102),
        },
        ("seccomp", KERNEL),
        Status.OK,
    ),
    *refused({"move_its_memory_map": "k(157, 35, 1, 0, 0, 0)"}, "seccomp", KERNEL),
    *attacks(
        {
            "file_attributes_by_ioctl": CALL + IOCTL.format("k(16, 1, 0x80086601, buffer)"),
            "file_attributes_by_ioctl_with_high_bits": (
                CALL + IOCTL.format("k(16, 1, 0x80086601 | 1 << 32, buffer)")
            ),
            "asynchronous_notice_by_ioctl": (
                CALL + "buffer[0] = 1\n" + IOCTL.format("k(16, os.pipe()[0], 0x5452, buffer)")
            ),
        },
        ("seccomp",),
        Status.OK,
    ),
    # Bits above an int: the kernel drops them, so the filter must judge what is left.
    *attacks(
        {
            "create_with_high_bits": CALL + CREATE.format("k(2, SCRATCH, 0o101 | 1 << 32, 0o600)"),
            "openat_with_high_bits": (
                CALL + CREATE.format("k(257, -100, SCRATCH, 0o101 | 7 << 40, 0o600)")
            ),
            "openat2_to_write": (
                CALL + CREATE.format("k(437, -100, SCRATCH, (ctypes.c_uint64 * 3)(0o102, 384), 24)")
            ),
        },
        ("seccomp", *FILES),
        Status.OK,
    ),
    *refused(
        {
            "fcntl_with_high_bits": "k(72, 0, 8 | 1 << 63, 0)",
            "prctl_with_high_bits": "k(157, 4 | 1 << 33, 1, 0, 0, 0)",
            "signal_with_high_bits": "k(62, os.getppid() | 1 << 32, 0)",
            "limits_of_the_parent_with_high_bits": "k(302, os.getppid() | 1 << 32, 7, 0, buffer)",
        }
    ),
)

MACHINE_CODE = """\
import ctypes, mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes.fromhex({code!r}))
f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
if f() > 0: print('ESCAPED')
"""

OTHER_ENTRIES = (
    *attacks(
        {
            # mov eax, 20 (getpid); int 0x80; ret
            "the_32_bit_entry": MACHINE_CODE.format(code="b814000000cd80c3"),
            # mov eax, 0x40000027 (getpid, x32); syscall; neg rax; ret: -ENOSYS where unknown
            "the_x32_numbers": MACHINE_CODE.format(code="b8270000400f0548f7d8c3"),
        },
        ("seccomp", KERNEL),
        Status.SECURITY_VIOLATION,
        Status.RUNTIME_ERROR,
    ),
    *attacks(
        {
            # a write to the kernel's memory, and a bad rseq area
            "a_page_of_the_kernel": "import ctypes; ctypes.memmove(0xffffffff81000000, b'x', 1)",
            "a_bad_restartable_sequence": (
                CALL + "print('ESCAPED') if k(334, buffer, 9, 0, 0) >= 0 else exit(1)"
            ),
            "a_corrupt_signal_frame": CALL + "k(15); print('ESCAPED')",
        },
        (SUPERVISION,),
    ),
)

KERNEL_SURFACE = OTHER_PROCESSES + NEW_INTERFACES + THE_MACHINE + ARGUMENTS + OTHER_ENTRIES
