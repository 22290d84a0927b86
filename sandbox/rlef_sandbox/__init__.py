"""Grades untrusted programs: fast, confined, and without ever showing them the answer."""

from .checkers import CHECKERS
from .sandbox import IsolationError, Sandbox
from .verdict import CallTest, CheckerProgram, CheckTest, Limits, Result, Status, Test

__all__ = [
    "CHECKERS",
    "CallTest",
    "CheckTest",
    "CheckerProgram",
    "IsolationError",
    "Limits",
    "Result",
    "Sandbox",
    "Status",
    "Test",
]
