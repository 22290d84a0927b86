"""The system-call filter, interpreted here and compared with a second statement of the policy and
with libseccomp.

Every number is tried, with arguments at and around the bounds of every rule and with garbage in
the high words. The kernel reads only the low word of an `int` argument, so a filter that read the
high word too would judge another call than the one that is made.
"""

from __future__ import annotations

import errno
import functools
import itertools
import signal
import tempfile
from collections.abc import Iterator

import pytest

from rlef_sandbox import Limits, Sandbox, Status, seccomp, syscalls
from rlef_sandbox.syscalls import Action, Profile
from tests.sandbox.berkeley_packet_filter import Instruction, parsed, run

MACHINES = ("x86_64", "aarch64")
ALLOWED, KILLED, FAILS = 0x7FFF0000, 0x80000000, 0x00050000
PID = seccomp.OWN_PID  # stands in an assembled filter for the pid of the child that installs it
LOW = 2**32 - 1
RUBBISH = (0, 1 << 32, 0xFFFFFFFF << 32)  # for a high word
WORDS = sorted(
    {0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 0x7F, 0x80, 0x81, 0x189, PID, PID + 1}
    | {
        0o100,
        0o101,
        0o2000000,
        0o10000000,
        0o20000000,
        0o20200000,
        0o40000,
        0o200000,
        0x1002,
        0x1003,
        0x1000,
    }
    | {0x5401, 0x5412, 0x541B, 0x5421, 0x5450, 0x5451, 0x5452, 1030, 1031, 1032, 1033, 1034}
    | {0x3D0F00, 0x7D0F00, 0x3D0F11, 0x10000, 0x3D0F00 | 0x10000000, 0x3D0F00 | 0x1000, 0x11}
    | {0x7D0B00, 0x20, 0x21, 0x22, 0x23, 0x40022, 0x2022, 10, 14, 18, 19, 20, 21, 23, 25, 102}
    | {0x53564D41, 0x59616D61, 22, 36, LOW, 1 << 31, 0x7FFFFFFF}
)
FIRST_ARGUMENTS = [low | high for low, high in itertools.product(WORDS, RUBBISH)]


def low(argument: int) -> int:
    return argument & LOW


def answer(machine: str, number: int, action: Action, arguments: list[int]) -> int:
    """Return what the filter must return for a call in the table: the policy, stated again."""
    a, b, c, d, *_ = arguments
    permission, access = FAILS | errno.EPERM, FAILS | errno.EACCES
    match action:
        case Action.ALLOW:
            return ALLOWED
        case Action.NOTHING:
            return FAILS
        case Action.DENY:
            return permission
        case Action.READ_ONLY:
            return access
        case Action.ABSENT:
            return FAILS | errno.ENOSYS
        case Action.KILL:
            return KILLED
        case Action.OPEN:
            flags = b if (machine, number) == ("x86_64", 2) else c
            writes = flags & 0o3 or flags & 0o100 or flags & 0o1000 or flags & 0o20000000
            return access if writes or flags & DIRECT[machine] else ALLOWED
        case Action.CLONE:
            is_thread = a & 0x10000 and a & 0x400 and not low(a) & ~0x7D0F00
            return ALLOWED if is_thread else permission
        case Action.CLOSE_RANGE:
            return ALLOWED if low(c) in (0, 4) else permission
        case Action.MMAP:
            is_hidden = d & 0x40000 or d & 0x2000 or (d & 0x20 and d & 1)
            return permission if is_hidden else ALLOWED
        case Action.MADVISE:
            plain = (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19, 22, 23)
            return ALLOWED if low(c) in plain else FAILS | errno.EINVAL
        case Action.PROCESS:  # every CLONE_NEW* flag
            return permission if low(a) & (0x7E020000 | 0x80) else ALLOWED
        case Action.FCNTL:
            if low(b) == 4:
                return permission if c & DIRECT[machine] else ALLOWED
            return ALLOWED if low(b) in (0, 1, 2, 3, 1030, 1032, 1034) else permission
        case Action.IOCTL:
            known = low(b) in (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
            return ALLOWED if known else FAILS | errno.ENOTTY
        case Action.PRCTL:
            return ALLOWED if low(a) in (15, 16, 0x53564D41) else permission
        case Action.SETRLIMIT:
            return permission if low(a) in (0, 4, 15) else ALLOWED
        case Action.PRLIMIT:
            reads_or_is_harmless = c == 0 or low(b) not in (0, 4, 15)
            return ALLOWED if low(a) == 0 and reads_or_is_harmless else permission
        case Action.FUTEX:
            plain = low(b) & 0x7F in (0, 1, 3, 4, 5, 9, 10)
            return ALLOWED if plain else FAILS | errno.ENOSYS
        case Action.SIGNAL_SELF:
            sent = b if number in (62, 129) and number == KILL[machine] else c
            allowed = low(a) == PID and low(sent) != signal.SIGKILL
            return ALLOWED if allowed else permission
        case Action.ABOUT_SELF:
            whom = b if number == {"x86_64": 140, "aarch64": 141}[machine] else a
            return ALLOWED if low(whom) in (0, PID) else permission
        case Action.CLOCK:
            return FAILS | errno.EINVAL if low(a) >> 31 else ALLOWED
        case Action.SOCKET_PAIR:
            is_stream = low(a) == 1 and low(b) & ~(0o2000000 | 0o4000) == 1
            return ALLOWED if is_stream else permission
        case Action.TO_PEER:
            return ALLOWED if low(arguments[3]) == 0 and arguments[4] == 0 else permission
        case Action.EXECUTE_GIVEN:
            return ALLOWED if low(arguments[4]) == 0x1000 else permission
        case Action.THREAD_POINTER:
            return ALLOWED if low(a) in (0x1002, 0x1003) else FAILS | errno.EINVAL
    raise AssertionError(f"no case for {action}")


KILL = {"x86_64": 62, "aarch64": 129}
DIRECT = {"x86_64": 0o40000, "aarch64": 0o200000}
UNCONDITIONAL = (Action.ALLOW, Action.NOTHING, Action.DENY, Action.READ_ONLY, Action.ABSENT)
UNCONDITIONAL += (Action.KILL,)


@functools.cache
def assembled(machine: str, profile: Profile) -> list[Instruction]:
    return seccomp.assemble(syscalls.policy(machine, profile), machine)


def argument_lists(action: Action) -> Iterator[list[int]]:
    """Yield arguments to try with an action: if it reads any, each value in each position."""
    if action in UNCONDITIONAL:
        yield from ([0] * 6, [2**64 - 1] * 6)
        return
    for value in FIRST_ARGUMENTS:
        for others in (0, 9, PID, 2**64 - 1):
            for place in range(5):
                arguments = [others] * 6
                arguments[place] = value
                yield arguments


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_decides_as_the_table_says(machine: str, profile: Profile) -> None:
    architecture = seccomp.AUDIT_ARCHITECTURE[machine]
    program = assembled(machine, profile)
    actions = syscalls.policy(machine, profile)
    for number, action in actions.items():
        for arguments in argument_lists(action):
            got = run(program, architecture, number, arguments)
            assert got == answer(machine, number, action, arguments), (number, action, arguments)


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_call_outside_the_table_is_absent(machine: str, profile: Profile) -> None:
    architecture = seccomp.AUDIT_ARCHITECTURE[machine]
    known = syscalls.policy(machine, profile)
    for number in {*range(1000), 0x3FFFFFFF} - set(known):
        got = run(assembled(machine, profile), architecture, number)
        assert got == FAILS | errno.ENOSYS, number


@pytest.mark.parametrize("number", [0x40000000, 0x40000000 + 39, 0x7FFFFFFF, 0xFFFFFFFF, -1])
def test_x32_numbers_kill(number: int) -> None:
    for profile in Profile:
        architecture = seccomp.AUDIT_ARCHITECTURE["x86_64"]
        assert run(assembled("x86_64", profile), architecture, number) == KILLED


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_another_architecture_kill(machine: str) -> None:
    others = {0x40000003, 0x40000028, 0, LOW, *seccomp.AUDIT_ARCHITECTURE.values()}
    for architecture in others - {seccomp.AUDIT_ARCHITECTURE[machine]}:
        for number in (0, 1, 60, 93, 231):
            assert run(assembled(machine, Profile.PROGRAM), architecture, number) == KILLED


@pytest.mark.parametrize("machine", MACHINES)
def test_a_filter_is_within_the_kernels_bounds(machine: str) -> None:
    for profile in Profile:
        program = assembled(machine, profile)
        assert len(program) <= 4096  # BPF_MAXINSNS
        for position, (code, if_true, if_false, _) in enumerate(program):
            assert 0 <= if_true <= 255 and 0 <= if_false <= 255
            if code in (0x15, 0x35, 0x45):
                assert position + 1 + max(if_true, if_false) < len(program)


def test_no_call_is_in_two_groups() -> None:
    groups = syscalls.read_groups()[Profile.PROGRAM]
    calls = [name for group in groups for name in group.calls]
    assert len(calls) == len(set(calls))


def test_the_kernel_reads_the_words_that_the_filter_reads(sandbox: Sandbox) -> None:
    """With garbage above an int, the kernel makes the call that the filter judged."""
    source = (
        "import ctypes, os, threading\n"
        "c = ctypes.CDLL(None, use_errno=True); c.syscall.restype = ctypes.c_long\n"
        "def k(*a): return c.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])\n"
        "high = 5 << 32; buffer = ctypes.create_string_buffer(16)\n"
        "print(k(72, 0, 3 | high, 0) >= 0, k(157, 16 | high, buffer),\n"
        "      k(62, os.getpid() | high, 0 | high), k(228, 1 | high, buffer),\n"
        "      k(257, -100, os.__file__.encode(), high, 0) > 0)"
    )
    if seccomp.kernel.MACHINE != "x86_64":
        pytest.skip("calls x86-64 system-call numbers")
    result = sandbox.run(source, limits=Limits(cpu_s=2))
    assert result.status is Status.OK
    assert result.stdout == b"True 0 0 0 True\n"


@functools.cache
def libseccomp():  # type: ignore[no-untyped-def]
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:  # no package, or no library behind it
        pytest.skip(f"libseccomp is not available: {error}")
    return pyseccomp


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_those_that_libseccomp_knows(machine: str) -> None:
    oracle = libseccomp()
    arch = {"x86_64": oracle.Arch.X86_64, "aarch64": oracle.Arch.AARCH64}[machine]
    for group in itertools.chain(*syscalls.read_groups().values()):
        for name, numbers in group.calls.items():
            ours = numbers[syscalls.COLUMNS[machine]]
            theirs = oracle.resolve_syscall(arch, name)  # negative if there is no such call
            assert theirs < 0 if ours == "-" else theirs == int(ours), (name, theirs)


def exported(oracle, machine: str, default: int, rules: list) -> list[Instruction]:  # type: ignore[no-untyped-def]
    """Return libseccomp's filter. A rule is (action, number, *(argument, mask, value))."""
    made = oracle.SyscallFilter(default)
    arch = {"x86_64": oracle.Arch.X86_64, "aarch64": oracle.Arch.AARCH64}[machine]
    if oracle.system_arch() != arch:
        made.add_arch(arch)
        made.remove_arch(oracle.system_arch())
    for action, number, *conditions in rules:
        if action != default:
            compared = [oracle.Arg(i, oracle.MASKED_EQ, mask, v) for i, mask, v in conditions]
            made.add_rule_exactly(action, number, *compared)
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        return parsed(file.read())


def test_libseccomps_filter_of_the_same_table_decides_the_same() -> None:
    """For this machine only: libseccomp resolves numbers by their native names."""
    oracle, machine = libseccomp(), seccomp.kernel.MACHINE
    plain = {
        Action.ALLOW: oracle.ALLOW,
        Action.NOTHING: oracle.ERRNO(0),
        Action.DENY: oracle.ERRNO(errno.EPERM),
        Action.READ_ONLY: oracle.ERRNO(errno.EACCES),
        Action.ABSENT: oracle.ERRNO(errno.ENOSYS),
        Action.KILL: oracle.KILL_PROCESS,
    }
    policy = syscalls.policy(machine)
    rules = [(plain[action], number) for number, action in policy.items() if action in plain]
    theirs = exported(oracle, machine, oracle.ERRNO(errno.ENOSYS), rules)
    ours, architecture = assembled(machine, Profile.PROGRAM), seccomp.AUDIT_ARCHITECTURE[machine]
    for number in range(600):
        if policy.get(number, Action.ABSENT) in plain:
            assert run(ours, architecture, number) == run(theirs, architecture, number), number


def one_of(index: int, values: tuple[int, ...]) -> list[tuple]:
    return [((index, LOW, value),) for value in values]


# For each action: the result if no rule matches, the result if one does, and the rules, each a
# conjunction of (argument, mask, value).
CONDITIONAL = {
    Action.FCNTL: (
        "EPERM",
        "ALLOW",
        [
            *one_of(1, seccomp.FCNTL_COMMANDS),
            ((1, LOW, seccomp.F_SETFL), (2, DIRECT.get(seccomp.kernel.MACHINE, 0), 0)),
        ],
    ),
    Action.IOCTL: ("ENOTTY", "ALLOW", one_of(1, seccomp.IOCTL_REQUESTS)),
    Action.PRCTL: ("EPERM", "ALLOW", one_of(0, seccomp.PRCTL_OPTIONS)),
    Action.SETRLIMIT: ("ALLOW", "EPERM", one_of(0, seccomp.KEPT_LIMITS)),
    Action.FUTEX: ("ENOSYS", "ALLOW", [((1, 0x7F, n),) for n in seccomp.FUTEX_COMMANDS]),
    Action.CLOSE_RANGE: ("EPERM", "ALLOW", one_of(2, (0, seccomp.CLOSE_RANGE_CLOEXEC))),
    Action.MADVISE: ("EINVAL", "ALLOW", one_of(2, seccomp.ADVICE)),
    Action.CLOCK: ("ALLOW", "EINVAL", [((0, 1 << 31, 1 << 31),)]),
    Action.CLONE: (
        "EPERM",
        "ALLOW",
        [((0, 0x10400 | LOW & ~seccomp.THREAD_FLAGS, 0x10400),)],
    ),
}


@pytest.mark.parametrize("action", CONDITIONAL, ids=lambda action: action.name)
def test_arguments_are_judged_as_libseccomp_judges_them(action: Action) -> None:
    oracle, machine = libseccomp(), seccomp.kernel.MACHINE

    def meant(word: str) -> int:
        return oracle.ALLOW if word == "ALLOW" else oracle.ERRNO(getattr(errno, word))

    default, matched, conditions = CONDITIONAL[action]
    numbers = [n for n, its_action in syscalls.policy(machine).items() if its_action is action]
    rules = [(meant(matched), number, *rule) for number in numbers for rule in conditions]
    theirs = exported(oracle, machine, meant(default), rules)
    ours, architecture = assembled(machine, Profile.PROGRAM), seccomp.AUDIT_ARCHITECTURE[machine]
    for number in numbers:
        for arguments in argument_lists(action):
            judged = [run(program, architecture, number, arguments) for program in (ours, theirs)]
            assert judged[0] == judged[1], (number, arguments)
