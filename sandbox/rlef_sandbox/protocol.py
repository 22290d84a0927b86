"""Messages between the controller and a zygote, over SOCK_SEQPACKET pairs: a message is a packet.

A request to a zygote comes over its control channel. Its first descriptor is the session on which
the zygote answers: SLEEPING and WOKE each time the run changes, then one Outcome. Files are passed
as descriptors (SCM_RIGHTS). No message in either direction ever holds an expected output, and no
program can write one: a child closes these sockets before the program's first line.
"""

from __future__ import annotations

import array
import enum
import os
import socket
import struct
from typing import NamedTuple

REQUEST = struct.Struct("<BddQQI")
OUTCOME = struct.Struct("<BBiddQ")
MAX_MESSAGE_BYTES = 64 << 10
MAX_DESCRIPTORS = 8  # MAX_FILES in csrc/zygote.h; a zygote keeps the numbers below it occupied
ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)  # an operation on the enum takes as long as the call
SLEEPING = b"~"  # the run waits instead of working: another program may use its core
WOKE = b"!"  # it wants to work again: the controller answers TURN, or PAUSE, RESUME and TURN
# The controller's messages about a run. A pause does not count towards the wall clock limit.
PAUSE, RESUME, TURN = b"p", b"r", b"t"
# A program that worked until its wall clock limit, though slowly, was starved by other processes.
# It gets this many times the limit.
STARVED_EXTENSION = 2


class Task(enum.IntEnum):
    """What a request asks for, with its descriptors. STREAMS are standard input, output and error.
    EXCHANGE is a file with a function call, then with its result. PEER is a socket to another run.
    CODE is a file for what the source was compiled to.
    """

    RUN = 1  # STREAMS [, EXCHANGE [, PEER]], source: compile and run once
    TEST = 2  # STREAMS [, EXCHANGE], CODE, source: run; compile only if CODE is empty, and fill it
    EXECUTE = 3  # STREAMS [, output, answer], executable: become that program, or checker
    COMPILE = 4  # STREAMS: compile the text on standard input (compiler.py only)


class Phase(enum.IntEnum):
    """How far a process got, as trusted code reports before the program's first line."""

    SETUP = 0
    COMPILING = 1
    RUNNING = 2


class Ending(enum.IntEnum):
    """Why a process ended."""

    ITSELF = 0
    CPU_LIMIT = 1
    WALL_LIMIT = 2
    MEMORY_LIMIT = 3


class ZygoteRequest(NamedTuple):
    """A task and the bounds of its run."""

    task: Task
    cpu_s: float = 0.0
    wall_s: float = 0.0
    memory_bytes: int = 0
    output_bytes: int = 0
    processes: int = 0

    def pack(self) -> bytes:
        return REQUEST.pack(*self)

    @classmethod
    def unpack(cls, message: bytes) -> ZygoteRequest:
        task, *bounds = REQUEST.unpack(message)
        return cls(Task(task), *bounds)


class Outcome(NamedTuple):
    """How far a process got, and what the kernel reports of its end."""

    phase: Phase
    ending: Ending
    wait_status: int
    cpu_s: float
    wall_s: float
    max_rss_bytes: int
    fault: str = ""  # what failed, where phase is SETUP

    @property
    def killed_by(self) -> int:
        """Return the signal that ended the process, or 0."""
        return os.WTERMSIG(self.wait_status) if os.WIFSIGNALED(self.wait_status) else 0

    def pack(self) -> bytes:
        *numbers, fault = self
        return OUTCOME.pack(*numbers) + fault.encode(errors="replace")

    @classmethod
    def unpack(cls, message: bytes) -> Outcome:
        """Return the outcome in a message. Raises ValueError if it holds none."""
        try:
            phase, ending, status, cpu_s, wall_s, rss_bytes = OUTCOME.unpack_from(message)
        except struct.error as error:
            raise ValueError(f"malformed outcome: {error}") from None
        fault = message[OUTCOME.size :].decode(errors="replace")
        return cls(Phase(phase), Ending(ending), status, cpu_s, wall_s, rss_bytes, fault)


def failed_to_start(fault: str) -> Outcome:
    """Return the outcome of a run that never began: a fault of the sandbox."""
    return Outcome(Phase.SETUP, Ending.ITSELF, 0, 0.0, 0.0, 0, fault)


def receive(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return the next message, empty if the other end is closed, and its descriptors."""
    message, ancillary, _, _ = channel.recvmsg(
        MAX_MESSAGE_BYTES, ANCILLARY_BYTES, flags | CLOSE_ON_EXEC
    )
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return message, list(descriptors)
