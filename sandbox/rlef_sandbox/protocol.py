"""Messages between the controller and a zygote, on one SOCK_SEQPACKET pair: a message is a packet.

A request carries descriptors (SCM_RIGHTS). No message in either direction ever holds an expected
output, and no program can write one: a child closes the socket before it runs a line.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

REQUEST = struct.Struct("<BddQQI")
OUTCOME = struct.Struct("<BBiddQ")
MAX_MESSAGE_BYTES = 64 << 10
MAX_DESCRIPTORS = 5


class Task(enum.IntEnum):
    """What a request asks for, with the descriptors that come along."""

    RUN = 1  # source, stdin, stdout, stderr [, exchange]: compile and run once
    PROGRAM = 2  # source, stderr: compile once and become the server of TESTs
    TEST = 3  # stdin, stdout, stderr [, exchange]: run the program in a fresh fork
    END = 4  # the program is done with


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
        phase, ending, status, cpu_s, wall_s, rss_bytes = OUTCOME.unpack_from(message)
        fault = message[OUTCOME.size :].decode(errors="replace")
        return cls(Phase(phase), Ending(ending), status, cpu_s, wall_s, rss_bytes, fault)
