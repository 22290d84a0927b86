"""The system call policy of a program, as one table: what it may ask of the kernel, and why.

A row gives an action, its reason, and the calls as `name x86-64/aarch64` numbers ("-" where an
architecture has no such call). Calls in no row are answered ENOSYS, as on an older kernel.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Action(enum.Enum):
    """What becomes of a call; `seccomp` holds the filter code of each."""

    ALLOW = enum.auto()
    DENY = enum.auto()  # EPERM
    READ_ONLY = enum.auto()  # EACCES
    ABSENT = enum.auto()  # ENOSYS
    KILL = enum.auto()  # SIGSYS: the run is a SECURITY_VIOLATION
    # Decided by the arguments:
    OPEN = enum.auto()
    CLONE = enum.auto()
    FCNTL = enum.auto()
    IOCTL = enum.auto()
    SETRLIMIT = enum.auto()
    PRLIMIT = enum.auto()
    FUTEX = enum.auto()
    PRCTL = enum.auto()
    SIGNAL_SELF = enum.auto()
    ABOUT_SELF = enum.auto()
    CLOCK = enum.auto()
    PROCESS = enum.auto()
    EXECUTE_GIVEN = enum.auto()
    THREAD_POINTER = enum.auto()


class Profile(enum.Enum):
    """Who is held by a filter: each has the table below, with the exceptions of EXCEPTIONS."""

    PROGRAM = "program"  # in an interpreter that runs already
    EXECUTABLE = "executable"  # a compiled program, which a child has yet to become
    COMPILER = (
        "compiler"  # a compiler and the programs it starts; their code is ours, not their input
    )


class Group(NamedTuple):
    action: Action
    reason: str
    calls: str


GROUPS = (
    Group(
        Action.ALLOW,
        "bytes in and out of the descriptors it was given",
        """
        read 0/63, write 1/64, readv 19/65, writev 20/66, pread64 17/67, pwrite64 18/68,
        preadv 295/69, pwritev 296/70, lseek 8/62, close 3/57, close_range 436/436,
        dup 32/23, dup2 33/-, dup3 292/24, fstat 5/80, fsync 74/82, fdatasync 75/83,
        ftruncate 77/46
        """,
    ),
    Group(
        Action.ALLOW,
        "look at files; the file layer decides which there are",
        """
        stat 4/-, lstat 6/-, newfstatat 262/79, statx 332/291, access 21/-, faccessat 269/48,
        faccessat2 439/439, readlink 89/-, readlinkat 267/78, getdents64 217/61,
        getcwd 79/17, chdir 80/49, fchdir 81/50, statfs 137/43, fstatfs 138/44
        """,
    ),
    Group(
        Action.ALLOW,
        "its own memory, bounded by RLIMIT_AS",
        """
        mmap 9/222, mprotect 10/226, munmap 11/215, mremap 25/216, madvise 28/233,
        msync 26/227, brk 12/214, membarrier 324/283
        """,
    ),
    Group(
        Action.ALLOW,
        "its own threads and signals",
        """
        set_robust_list 273/99, set_tid_address 218/96, rseq 334/293,
        sched_yield 24/124, gettid 186/178, exit 60/93,
        exit_group 231/94, rt_sigaction 13/134, rt_sigprocmask 14/135, rt_sigreturn 15/139,
        rt_sigsuspend 130/133, rt_sigpending 127/136, rt_sigtimedwait 128/137,
        sigaltstack 131/132, restart_syscall 219/128, wait4 61/260, waitid 247/95
        """,
    ),
    Group(
        Action.ALLOW,
        "clocks, sleeping and timers, bounded by the wall clock limit",
        """
        nanosleep 35/101, gettimeofday 96/169, time 201/-, times 100/153, pause 34/-,
        alarm 37/-, getitimer 36/102, setitimer 38/103
        """,
    ),
    Group(
        Action.ALLOW,
        "waiting on its own descriptors",
        """
        poll 7/-, ppoll 271/73, select 23/-, pselect6 270/72, epoll_create1 291/20,
        epoll_ctl 233/21, epoll_wait 232/-, epoll_pwait 281/22, eventfd2 290/19, pipe 22/-,
        pipe2 293/59
        """,
    ),
    Group(
        Action.ALLOW,
        "facts about itself and the machine",
        """
        getpid 39/172, getppid 110/173, getuid 102/174, geteuid 107/175, getgid 104/176,
        getegid 108/177, getresuid 118/148, getresgid 120/150, getgroups 115/158,
        getpgrp 111/-, getrlimit 97/163, getrusage 98/165, getcpu 309/168,
        sysinfo 99/179, uname 63/160, getrandom 318/278
        """,
    ),
    Group(
        Action.CLOCK,
        "the same, by the machine's clocks; a negative number is a clock of some process",
        """
        clock_gettime 228/113, clock_getres 229/114, clock_nanosleep 230/115
        """,
    ),
    Group(
        Action.ABOUT_SELF,
        "facts about itself, never whether another process is there",
        """
        getpgid 121/155, getsid 124/156, getpriority 140/141, sched_getaffinity 204/123
        """,
    ),
    Group(
        Action.OPEN,
        "read-only, whatever the file layer says",
        """
        open 2/-, openat 257/56
        """,
    ),
    Group(
        Action.CLONE,
        "threads, no processes and no namespaces",
        """
        clone 56/220
        """,
    ),
    Group(
        Action.ABSENT,
        "arguments behind a pointer, which a filter cannot read; libc falls back",
        """
        clone3 435/435, openat2 437/437
        """,
    ),
    Group(
        Action.FCNTL,
        "duplicate descriptors and their flags; no owner, signal, seal or lease",
        """
        fcntl 72/25
        """,
    ),
    Group(
        Action.IOCTL,
        "is it a terminal, bytes waiting, close on exec, non-blocking",
        """
        ioctl 16/29
        """,
    ),
    Group(
        Action.FUTEX,
        "waiting on memory, without the priority inheritance that kernels got wrong so often",
        """
        futex 202/98
        """,
    ),
    Group(
        Action.SETRLIMIT,
        "lower its limits, but not those whose passing is a SIGKILL: that one means the machine",
        """
        setrlimit 160/164
        """,
    ),
    Group(
        Action.PRLIMIT,
        "its own limits, never another process's; the same exceptions, which it may still read",
        """
        prlimit64 302/261
        """,
    ),
    Group(
        Action.SIGNAL_SELF,
        "signals to itself only, and not SIGKILL: that one means the machine",
        """
        kill 62/129, tgkill 234/131
        """,
    ),
    Group(
        Action.PRCTL,
        "name a thread or a mapping",
        """
        prctl 157/167
        """,
    ),
    Group(
        Action.DENY,
        "one run is one process",
        """
        fork 57/-, vfork 58/-, execve 59/221, execveat 322/281, setsid 112/157,
        setpgid 109/154
        """,
    ),
    Group(
        Action.DENY,
        "no network and no other processes to talk to",
        """
        socket 41/198, socketpair 53/199, connect 42/203, bind 49/200, listen 50/201,
        accept 43/202, accept4 288/242, sendto 44/206, recvfrom 45/207, sendmsg 46/211,
        recvmsg 47/212, sendmmsg 307/269, recvmmsg 299/243, shutdown 48/210,
        getsockname 51/204, getpeername 52/205, setsockopt 54/208, getsockopt 55/209,
        shmget 29/194, shmat 30/196, shmctl 31/195, shmdt 67/197, semget 64/190,
        semop 65/193, semctl 66/191, semtimedop 220/192, msgget 68/186, msgsnd 69/189,
        msgrcv 70/188, msgctl 71/187, mq_open 240/180, mq_unlink 241/181,
        mq_timedsend 242/182, mq_timedreceive 243/183, mq_notify 244/184,
        mq_getsetattr 245/185
        """,
    ),
    Group(
        Action.DENY,
        "nobody else's signals, priority or schedule",
        """
        tkill 200/130, rt_sigqueueinfo 129/138, rt_tgsigqueueinfo 297/240,
        setpriority 141/140, sched_setscheduler 144/119, sched_setparam 142/118,
        sched_setattr 314/274, sched_setaffinity 203/122, ioprio_set 251/30
        """,
    ),
    Group(
        Action.DENY,
        "memory outside the limits",
        """
        memfd_create 319/279, memfd_secret 447/447, mlock 149/228, mlock2 325/284,
        mlockall 151/230, remap_file_pages 216/234, fallocate 285/47
        """,
    ),
    Group(
        Action.DENY,
        "nobody else's identity; capget would tell whether another process is there",
        """
        setuid 105/146, setgid 106/144, setreuid 113/145, setregid 114/143,
        setresuid 117/147, setresgid 119/149, setfsuid 122/151, setfsgid 123/152,
        setgroups 116/159, capset 126/91, capget 125/90
        """,
    ),
    Group(
        Action.READ_ONLY,
        "changes no file",
        """
        creat 85/-, mkdir 83/-, mkdirat 258/34, rmdir 84/-, rename 82/-, renameat 264/38,
        renameat2 316/276, link 86/-, linkat 265/37, unlink 87/-, unlinkat 263/35,
        symlink 88/-, symlinkat 266/36, chmod 90/-, fchmod 91/52, fchmodat 268/53,
        chown 92/-, fchown 93/55, lchown 94/-, fchownat 260/54, mknod 133/-, mknodat 259/33,
        truncate 76/45, utime 132/-, utimes 235/-, utimensat 280/88, futimesat 261/-,
        setxattr 188/5, lsetxattr 189/6, fsetxattr 190/7, removexattr 197/14,
        lremovexattr 198/15, fremovexattr 199/16, umask 95/166, flock 73/32
        """,
    ),
    Group(
        Action.KILL,
        "reaches into other processes or the kernel; no honest program asks",
        """
        ptrace 101/117, process_vm_readv 310/270, process_vm_writev 311/271,
        process_madvise 440/440, kcmp 312/272, pidfd_open 434/434, pidfd_getfd 438/438,
        pidfd_send_signal 424/424, bpf 321/280, perf_event_open 298/241, userfaultfd 323/282,
        io_uring_setup 425/425, io_uring_enter 426/426, io_uring_register 427/427,
        io_setup 206/0, io_submit 209/2, keyctl 250/219, add_key 248/217,
        request_key 249/218, seccomp 317/277, landlock_create_ruleset 444/444,
        landlock_add_rule 445/445, landlock_restrict_self 446/446
        """,
    ),
    Group(
        Action.KILL,
        "rearranges the machine; no honest program asks",
        """
        unshare 272/97, setns 308/268, mount 165/40, umount2 166/39, pivot_root 155/41,
        chroot 161/51, open_tree 428/428, move_mount 429/429, fsopen 430/430,
        fsconfig 431/431, fsmount 432/432, fspick 433/433, mount_setattr 442/442,
        open_by_handle_at 304/265, name_to_handle_at 303/264, fanotify_init 300/262,
        fanotify_mark 301/263, quotactl 179/60, acct 163/89, swapon 167/224, swapoff 168/225,
        reboot 169/142, sethostname 170/161, setdomainname 171/162, init_module 175/105,
        finit_module 313/273, delete_module 176/106, kexec_load 246/104,
        kexec_file_load 320/294, iopl 172/-, ioperm 173/-, modify_ldt 154/-,
        personality 135/92, settimeofday 164/170, clock_settime 227/112,
        clock_adjtime 305/266, adjtimex 159/171, syslog 103/116, vhangup 153/58,
        lookup_dcookie 212/18, nfsservctl 180/42, uselib 134/-, move_pages 279/239,
        migrate_pages 256/238, mbind 237/235, set_mempolicy 238/237
        """,
    ),
)

EXCEPTIONS = {
    Profile.PROGRAM: (),
    Profile.EXECUTABLE: (
        Group(
            Action.EXECUTE_GIVEN,
            "become the file it was given. Should it do so again, with a file that it can read or "
            "wrote to its own output, it stays the same process under the same layers",
            """
            execveat 322/281
            """,
        ),
        Group(
            Action.THREAD_POINTER,
            "a program's start sets its thread pointer",
            """
            arch_prctl 158/-
            """,
        ),
    ),
    Profile.COMPILER: (
        Group(
            Action.ALLOW,
            "it starts an assembler and a linker; the file layer decides what can be started",
            """
            execve 59/221, fork 57/-, vfork 58/-
            """,
        ),
        Group(
            Action.PROCESS,
            "the same by way of clone; no namespaces",
            """
            clone 56/220
            """,
        ),
        Group(
            Action.THREAD_POINTER,
            "a program's start sets its thread pointer",
            """
            arch_prctl 158/-
            """,
        ),
        Group(
            Action.ALLOW,
            "it writes files; the file layer leaves it one directory for that",
            """
            open 2/-, openat 257/56, creat 85/-, unlink 87/-, unlinkat 263/35, rename 82/-,
            renameat 264/38, renameat2 316/276, mkdir 83/-, mkdirat 258/34, rmdir 84/-,
            chmod 90/-, fchmod 91/52, fchmodat 268/53, umask 95/166, utimensat 280/88,
            flock 73/32, fallocate 285/47, truncate 76/45
            """,
        ),
    ),
}
COLUMNS = {"x86_64": 0, "aarch64": 1}


def policy(machine: str, profile: Profile = Profile.PROGRAM) -> dict[int, Action]:
    """System call number to action on `machine`, as `platform.machine()` names it."""
    if machine not in COLUMNS:
        raise ValueError(f"no system call table for {machine!r}; known: {', '.join(COLUMNS)}")
    actions = {}
    for group in (*GROUPS, *EXCEPTIONS[profile]):
        for call in group.calls.split(","):
            _, numbers = call.split()
            number = numbers.split("/")[COLUMNS[machine]]
            if number != "-":
                actions[int(number)] = group.action
    return actions
