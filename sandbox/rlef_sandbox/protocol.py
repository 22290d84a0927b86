"""Messages between the controller and a zygote, over SOCK_SEQPACKET pairs: a message is a packet.

A request to a zygote comes over its control channel and brings, as its first descriptor, the
session to answer on: an Outcome, before which a SLEEPING notice may come. A session with a program
server goes on: it brings TESTs and their outcomes. Files come as descriptors (SCM_RIGHTS). No
message in either direction ever holds an expected output, and no program can write one: a child
closes these sockets before it runs a line.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

REQUEST = struct.Struct("<BddQQI")
OUTCOME = struct.Struct("<BBiddQ")
MAX_MESSAGE_BYTES = 64 << 10
MAX_DESCRIPTORS = 8
SLEEPING = b"~"  # the run waits instead of working: its turn on a core may go to another


class Task(enum.IntEnum):
    """What a request asks for, and the descriptors that come along. STREAMS are the standard input,
    output and error; EXCHANGE is a function call on the way in and its result on the way out; PEER
    is a socket to another run.
    """

    RUN = 1  # STREAMS [, EXCHANGE [, PEER]], source: compile and run once
    PROGRAM = 2  # STREAMS, source: compile once and become the server of TESTs, until the session
    # ends
    TEST = 3  # STREAMS [, EXCHANGE]: run the program in a fresh fork
    EXECUTE = 4  # STREAMS, executable: become that program
    COMPILE = 5  # STREAMS: compile the text on standard input (compiler.py alone)


class Phase(enum.IntEnum):
    """How far a process came. Told by trusted code only, before the program's first line."""

    SETUP = 0
    COMPILING = 1
    RUNNING = 2


class Ending(enum.IntEnum):
    """Why a process ended."""

    ITSELF = 0
    CPU_LIMIT = 1
    WALL_LIMIT = 2


class Request(NamedTuple):
    task: Task
    cpu_s: float = 0.0
    wall_s: float = 0.0
    memory_bytes: int = 0
    output_bytes: int = 0
    processes: int = 0

    def pack(self) -> bytes:
        return REQUEST.pack(*self)

    @classmethod
    def unpack(cls, message: bytes) -> Request:
        task, *bounds = REQUEST.unpack(message)
        return cls(Task(task), *bounds)


class Outcome(NamedTuple):
    """What the kernel says of a finished process, and how far it came."""

    phase: Phase
    ending: Ending
    wait_status: int
    cpu_s: float
    wall_s: float
    max_rss_bytes: int
    fault: str = ""  # what failed, where phase is SETUP

    def pack(self) -> bytes:
        *numbers, fault = self
        return OUTCOME.pack(*numbers) + fault.encode(errors="replace")

    @classmethod
    def unpack(cls, message: bytes) -> Outcome:
        """ValueError for a message that is none."""
        try:
            phase, ending, status, cpu_s, wall_s, rss_bytes = OUTCOME.unpack_from(message)
        except struct.error as error:
            raise ValueError(f"malformed outcome: {error}") from None
        fault = message[OUTCOME.size :].decode(errors="replace")
        return cls(Phase(phase), Ending(ending), status, cpu_s, wall_s, rss_bytes, fault)


def failed_to_start(fault: str) -> Outcome:
    """The outcome of a run that never began: a fault of the sandbox."""
    return Outcome(Phase.SETUP, Ending.ITSELF, 0, 0.0, 0.0, 0, fault)
