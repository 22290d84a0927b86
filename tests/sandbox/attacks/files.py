"""Attacks that read what is not the program's, or write anything at all."""

from __future__ import annotations

from rlef_sandbox import Status

from .attack import FILES, KERNEL, UNDUMPABLE, attacks

OK_OR_ERROR = (Status.OK, Status.RUNTIME_ERROR)

READING = (
    *attacks(
        {
            "password_file": "print('ESCAPED', open('/etc/passwd').read())",
            "password_file_by_a_descriptor_of_its_directory": (
                "import os; d = os.open('/etc', os.O_PATH)\n"
                "print('ESCAPED', os.read(os.open('passwd', os.O_RDONLY, dir_fd=d), 9))"
            ),
            "password_file_by_dots": (
                "import os; print('ESCAPED', open('../' * 40 + 'etc/passwd').read())"
            ),
            "etc_listing": "import os; print('ESCAPED', os.listdir('/etc'))",
            "etc_walked_by_glob": (
                "import glob; found = glob.glob('/etc/*'); assert found; print('ESCAPED', found)"
            ),
            "own_mount_table": "print('ESCAPED', open('/proc/self/mountinfo').read())",
            "own_maps": "print('ESCAPED', open('/proc/self/maps').read())",
            "kernel_version_in_proc": "print('ESCAPED', open('/proc/version').read())",
            "kernel_settings": "print('ESCAPED', open('/proc/sys/kernel/ostype').read())",
            "process_list": (
                "import os; print('ESCAPED', [n for n in os.listdir('/proc') if n.isdigit()])"
            ),
            "sysfs": "import os; print('ESCAPED', os.listdir('/sys/kernel'))",
            "block_devices": "import os; print('ESCAPED', os.listdir('/sys/class/block'))",
            "device": "print('ESCAPED', open('/dev/zero', 'rb').read(1))",
            "shared_memory_directory": "import os; print('ESCAPED', os.listdir('/dev/shm'))",
            "temporary_directory": "import os; print('ESCAPED', os.listdir('/var/tmp'))",
        },
        FILES,
    ),
    *attacks(
        {
            "shadow_file": "print('ESCAPED', open('/etc/shadow').read())",
            "kernel_memory": "print('ESCAPED', open('/proc/kcore', 'rb').read(1))",
            "environment_of_process_1": "print('ESCAPED', open('/proc/1/environ').read())",
        },
        (*FILES, "unprivileged_user"),
    ),
    *attacks(
        {
            "memory_of_the_parent": (
                "import os; print('ESCAPED', open(f'/proc/{os.getppid()}/mem', 'rb').read(0))"
            ),
            "descriptors_of_the_parent": (
                "import os; print('ESCAPED', os.listdir(f'/proc/{os.getppid()}/fd'))"
            ),
            "environment_of_the_parent": (
                "import os; print('ESCAPED', open(f'/proc/{os.getppid()}/environ').read())"
            ),
            "memory_of_itself": "print('ESCAPED', open('/proc/self/mem', 'rb').read(0))",
        },
        (*FILES, UNDUMPABLE),
    ),
    *attacks(
        {
            "existence_of_a_file": (
                "import os; print('ESCAPED' if os.path.exists('/etc/passwd') else '')"
            ),
            "target_of_a_link": (
                "import os; print('ESCAPED' if os.path.lexists('/proc/self/exe') else '')"
            ),
            "size_of_a_disk": "import os; print('ESCAPED', os.statvfs('/etc'))",
        },
        ("private_root", "empty_root"),
        *OK_OR_ERROR,
    ),
    *attacks(
        {
            "names_of_third_party_packages": (
                "import os, sysconfig; found = os.listdir(sysconfig.get_path('purelib'))\n"
                "assert any('pip' in name for name in found); print('ESCAPED', found)"
            ),
        },
        ("private_root", "empty_root"),  # Landlock gives the right to list with the directory above
    ),
    *attacks(
        {
            "name_of_the_host": (
                "import os; name = os.uname().nodename\n"
                "if name != 'sandbox': print('ESCAPED', name)"
            ),
        },
        ("uts",),
        Status.OK,
    ),
    *attacks(
        {
            "third_party_package": (
                "import os, sysconfig; d = sysconfig.get_path('purelib')\n"
                "print('ESCAPED', open(os.path.join(d, 'pip', '__init__.py')).read())"
            ),
        },
        FILES,
    ),
)

WRITING = (
    *attacks(
        {
            "create": (
                "import os; open('/dev/shm/rlef-attack', 'w').write('x')\n"
                "os.unlink('/dev/shm/rlef-attack'); print('ESCAPED')"
            ),
            "unnamed_file": (
                "import os; os.open('/dev/shm', os.O_TMPFILE | os.O_RDWR, 0o600); print('ESCAPED')"
            ),
            "make_directory": (
                "import os; n = '/dev/shm/rlef-attack-d'; os.mkdir(n); os.rmdir(n)\n"
                "print('ESCAPED')"
            ),
            "symlink": (
                "import os; n = '/dev/shm/rlef-attack-l'; os.symlink('/', n); os.unlink(n)\n"
                "print('ESCAPED')"
            ),
            "fifo": (
                "import os; n = '/dev/shm/rlef-attack-f'; os.mkfifo(n); os.unlink(n)\n"
                "print('ESCAPED')"
            ),
            "named_socket": (
                "import os; os.mknod('/dev/shm/rlef-attack-s', 0o140600)\n"
                "os.unlink('/dev/shm/rlef-attack-s'); print('ESCAPED')"
            ),
            "write_only_device": "import os; os.open('/dev/null', os.O_WRONLY); print('ESCAPED')",
            "shared_memory": (
                "from multiprocessing.shared_memory import SharedMemory\n"
                "m = SharedMemory(create=True, size=9); m.unlink(); print('ESCAPED')"
            ),
            "shared_memory_by_name": (
                "import os; os.open('/dev/shm/rlef-attack', os.O_CREAT | os.O_RDWR, 0o600)\n"
                "os.unlink('/dev/shm/rlef-attack'); print('ESCAPED')"
            ),
        },
        ("seccomp", *FILES),
    ),
    *attacks(
        {
            "memory_file": "import os; os.memfd_create('x'); print('ESCAPED')",
            "grow_a_file_without_writing": (
                "import os; os.posix_fallocate(1, 0, 9); print('ESCAPED')"
            ),
            "lock_a_file": (
                "import fcntl, os; fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX)\n"
                "print('ESCAPED')"
            ),
            "lease_a_file": "import fcntl; fcntl.fcntl(0, 1025); print('ESCAPED')",
            "attribute_of_the_output": (
                "import os; os.setxattr(1, 'user.x', b'1'); print('ESCAPED')"
            ),
        },
        ("seccomp",),
    ),
    *attacks(
        {
            "mode_of_the_output": "import os; os.chmod(1, 0o777); print('ESCAPED')",
            "seal_the_output": "import fcntl; fcntl.fcntl(1, 1033, 1); print('ESCAPED')",
        },
        ("seccomp", KERNEL),
    ),
    *attacks(
        {
            "append_to_the_library": "import os; open(os.__file__, 'a').close(); print('ESCAPED')",
            "remove": "import os; os.unlink(os.__file__); print('ESCAPED')",
            "rename": "import os; os.rename(os.__file__, '/x'); print('ESCAPED')",
            "link": "import os; os.link(os.__file__, '/x'); print('ESCAPED')",
            "change_mode": "import os; os.chmod(os.__file__, 0o777); print('ESCAPED')",
            "change_owner": "import os; os.chown(os.__file__, 1, 1); print('ESCAPED')",
            "change_times": "import os; os.utime(os.__file__); print('ESCAPED')",
            "truncate": "import os; os.truncate(os.__file__, 9**6); print('ESCAPED')",
            "create_in_the_root": "open('/x', 'w').write('x'); print('ESCAPED')",
        },
        ("seccomp", *FILES, "unprivileged_user"),
    ),
)
