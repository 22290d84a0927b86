"""Grades untrusted programs: fast, confined, and without ever showing them the answer."""

from .checkers import CHECKERS
from .sandbox import IsolationError, Sandbox
from .verdict import AnyTest, CallTest, CheckerProgram, CheckTest, Limits, Result, Status, Test

__all__ = [
    "CHECKERS",
    "AnyTest",
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
