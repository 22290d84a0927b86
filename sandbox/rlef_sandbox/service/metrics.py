"""The service's numbers in Prometheus' text format (version 0.0.4).

Written by hand: three kinds of number are a page, and one dependency less. Everything is changed
from the event loop's thread alone, so nothing needs a lock.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Protocol

# Seconds. A trivial program takes some milliseconds, a program in its limits some 10 s, and a full
# queue a minute.
LATENCY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metric(Protocol):
    kind: str

    def samples(self) -> list[tuple[str, float]]:
        """What follows the metric's name (suffix and labels), and its value."""


class Count:
    """A number that only grows, one for each value of its labels."""

    kind = "counter"

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self.values: Counter[tuple[str, ...]] = Counter()
        if not labels:
            self.values[()] = 0

    def add(self, *values: str, amount: float = 1) -> None:
        assert len(values) == len(self.labels)
        self.values[values] += amount  # type: ignore[assignment]

    def samples(self) -> list[tuple[str, float]]:
        return [
            (labelled(dict(zip(self.labels, values, strict=True))), number)
            for values, number in sorted(self.values.items())
        ]


class Reading:
    """A number that is kept elsewhere and read when it is asked for."""

    def __init__(self, kind: str, read: Callable[[], float]) -> None:
        self.kind = kind
        self.read = read

    def samples(self) -> list[tuple[str, float]]:
        return [("", self.read())]


class Histogram:
    """How many observations were at most each bound, their number and their sum."""

    kind = "histogram"

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> list[tuple[str, float]]:
        edges = [*map(str, self.bounds), "+Inf"]
        rows = [
            ("_bucket" + labelled({"le": edge}), float(count))
            for edge, count in zip(edges, itertools.accumulate(self.counts), strict=True)
        ]
        return [*rows, ("_sum", self.sum), ("_count", float(sum(self.counts)))]


def labelled(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    pairs = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
    return "{" + pairs + "}"


def escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Metrics:
    """What a server counts. Names, units and meaning are documented in docs/sandbox_service.md."""

    def __init__(self) -> None:
        self.requests = Count("endpoint", "code")
        self.results = Count("status")
        self.faults = Count("kind")
        self.joined = Count()
        self.cancelled = Count()
        self.latency_s = Histogram()
        self.wait_s = Histogram()
        self._named: dict[str, tuple[Metric, str]] = {}
        for name, metric, meaning in (
            ("requests_total", self.requests, "Requests answered, by endpoint and HTTP status."),
            ("results_total", self.results, "Programs run on a test, by verdict."),
            ("faults_total", self.faults, "Failures of the sandbox, never verdicts."),
            ("joined_total", self.joined, "Requests answered with work of an earlier one."),
            ("cancelled_total", self.cancelled, "Requests given up by their client while queued."),
            ("request_seconds", self.latency_s, "From a request's arrival to its answer."),
            ("wait_seconds", self.wait_s, "From a request's arrival to its start in the sandbox."),
        ):
            self.add(name, metric, meaning)

    def add(self, name: str, metric: Metric, meaning: str) -> None:
        self._named[f"rlef_sandbox_{name}"] = (metric, meaning)

    def text(self) -> str:
        lines = []
        for name, (metric, meaning) in self._named.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {metric.kind}"]
            lines += [f"{name}{suffix} {value:.12g}" for suffix, value in metric.samples()]
        return "\n".join(lines) + "\n"
