"""Grades untrusted programs: fast, confined, and without ever showing them the answer."""

from .checkers import CHECKERS
from .sandbox import IsolationError, Sandbox
from .verdict import CallTest, Limits, Result, Status, Test

__all__ = [
    "CHECKERS",
    "CallTest",
    "IsolationError",
    "Limits",
    "Result",
    "Sandbox",
    "Status",
    "Test",
]
