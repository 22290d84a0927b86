"""The service's numbers in Prometheus' text format (version 0.0.4).

Everything is changed only in the event loop's thread, so nothing needs a lock.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable

# Seconds. A trivial program takes some milliseconds, a program at its limits about 10 s, and a full
# queue a minute.
LATENCY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# what follows a metric's name (suffix, labels), and the value
Samples = Iterable[tuple[str, float]]


class CountByLabels:
    """Counts, one for each combination of its labels' values, which need no escapes."""

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self.values: Counter[tuple[str, ...]] = Counter() if labels else Counter({(): 0})

    def add(self, *values: str) -> None:
        assert len(values) == len(self.labels)
        self.values[values] += 1

    def samples(self) -> Samples:
        for values, number in sorted(self.values.items()):
            named = zip(self.labels, values, strict=True)
            pairs = ",".join(f'{label}="{value}"' for label, value in named)
            yield (f"{{{pairs}}}" if pairs else ""), number


class LatencyHistogram:
    """How many observations were at most each bound, their number and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.sum += seconds

    def samples(self) -> Samples:
        edges = [*map(str, LATENCY_BOUNDS_S), "+Inf"]
        for edge, count in zip(edges, itertools.accumulate(self.counts), strict=True):
            yield f'_bucket{{le="{edge}"}}', count
        yield from (("_sum", self.sum), ("_count", sum(self.counts)))


class GradingMetrics:
    """What a server counts. docs/sandbox_service.md documents names, units and meaning."""

    def __init__(self) -> None:
        self.requests = CountByLabels("endpoint", "code")
        self.results = CountByLabels("status")
        self.faults = CountByLabels("kind")
        self.joined = CountByLabels()
        self.cancelled = CountByLabels()
        self.latency_s = LatencyHistogram()
        self.wait_s = LatencyHistogram()
        self._named: dict[str, tuple[str, Callable[[], Samples], str]] = {}
        for name, metric, meaning in (
            ("requests_total", self.requests, "Requests answered, by endpoint and HTTP status."),
            ("results_total", self.results, "Programs run on a test, by verdict."),
            ("faults_total", self.faults, "Failures of the sandbox, never verdicts."),
            ("joined_total", self.joined, "Repeated requests, which share the first's work."),
            ("cancelled_total", self.cancelled, "Requests abandoned by their client in the queue."),
            ("request_seconds", self.latency_s, "From a request's arrival to its answer."),
            ("wait_seconds", self.wait_s, "From a request's arrival to its start in the sandbox."),
        ):
            kind = "counter" if isinstance(metric, CountByLabels) else "histogram"
            self._named[name] = kind, metric.samples, meaning

    def read_when_asked(
        self, kind: str, name: str, read: Callable[[], float], meaning: str
    ) -> None:
        """Add a number that is kept elsewhere."""
        self._named[name] = kind, lambda: [("", read())], meaning

    def text(self) -> str:
        lines = []
        for name, (kind, samples, meaning) in self._named.items():
            full_name = f"rlef_sandbox_{name}"
            lines += [f"# HELP {full_name} {meaning}", f"# TYPE {full_name} {kind}"]
            lines += [f"{full_name}{suffix} {value:.12g}" for suffix, value in samples()]
        return "\n".join(lines) + "\n"
