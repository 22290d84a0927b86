"""Alarms of a run, and the limits at which it stops itself because it cannot succeed."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rlef_mega.config import GuardConfig


def reason_of(fault: Exception) -> str:
    """Return why a dialogue was dropped: the kind of fault, a colon, and the error's message."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:500]}"


def kinds_of(reasons: Mapping[str, int]) -> Counter[str]:
    """Count drops by kind of fault."""
    return Counter(reason.partition(":")[0] for reason in Counter(reasons).elements())


def most_frequent(reasons: Mapping[str, int]) -> str:
    """Return the three most frequent reasons with their counts, and how many others there are."""
    shown = Counter(reasons).most_common(3)
    others = sum(reasons.values()) - sum(count for _, count in shown)
    parts = [f"{count} x {reason}" for reason, count in shown]
    return "; ".join([*parts, *([f"{others} for other reasons"] if others else [])])


class GuardError(RuntimeError):
    """The run stopped itself. It can be resumed from a checkpoint from before the fault."""


class Guards:
    """Checks the record of each step. All ranks check the same record, so they stop together."""

    def __init__(
        self, limits: GuardConfig, *, max_drop_fraction: float, max_staleness: int
    ) -> None:
        self.limits = limits
        self.max_drop_fraction, self.max_staleness = max_drop_fraction, max_staleness
        self.recent: list[dict[str, Any]] = []  # records of the last guard.window steps

    def check_drops(self, reasons: Mapping[str, int], dialogues: int) -> None:
        """Raise GuardError, with the most frequent reasons, if more than max_drop_fraction of a
        batch's dialogues were dropped.

        A few drops are the price of faults; many mean that the engine or the sandbox is broken.
        """
        dropped, allowed = sum(reasons.values()), self.max_drop_fraction
        if dropped > allowed * dialogues:
            raise GuardError(
                f"{dropped} of {dialogues} dialogues were dropped, more than "
                f"rollout.max_drop_fraction = {allowed} allows: {most_frequent(reasons)}"
            )

    def alarms(self, record: dict[str, Any]) -> list[str]:
        """Return a message for each log-prob gap over half its limit, and each off-policy number
        beyond its limit, which `check` applies only to the mean of several steps."""
        messages = [
            f"{name} = {gap:.3g} is over half of what is allowed, {limit}"
            for name, gap, limit in self.gaps(record)
            if limit / 2 < gap <= limit
        ]
        size, least = record["effective_sample_size"], self.limits.min_effective_sample_size
        if not size >= least:
            messages.append(f"effective_sample_size = {size:.2f}, wanted {least}")
        k3, most = record["behaviour_k3"], self.limits.max_behaviour_k3
        if not k3 <= most:
            messages.append(f"behaviour_k3 = {k3:.3g}, allowed {most}")
        return messages

    def check(self, record: dict[str, Any]) -> None:
        """Check a step's record before its weights are saved; raise GuardError to stop the run."""
        step = record["step"]
        lags = [int(lag) for lag in record["staleness"]]
        if min(lags) < 0 or max(lags) > self.max_staleness:
            raise GuardError(
                f"step {step}: tokens are {min(lags)} to {max(lags)} versions behind the trainer's "
                f"weights, which is impossible with rollout.max_staleness = {self.max_staleness}: "
                "another run publishes weights to the same servers. Give each run its own"
            )
        for name, gap, limit in self.gaps(record):
            if not gap <= limit:  # also true of NaN
                raise GuardError(
                    f"step {step}: {name} = {gap:.3g}, allowed {limit}: engine and trainer "
                    "disagree on the log-probs of the same tokens, so the policy gradient would "
                    "be wrong: their weights differ, or their precision or temperature. Check "
                    "model.dtype; if only single tokens differ, raise the limit in [guard]"
                )
        self.recent = [*self.recent, record][-self.limits.window :]
        if len(self.recent) < self.limits.window:
            return
        invalid, allowed = self.mean("invalid_fraction"), self.limits.max_invalid_fraction
        if invalid > allowed:
            raise GuardError(
                f"step {step}: {invalid:.0%} of the responses of the last "
                f"{self.limits.window} steps hold no valid code; guard.max_invalid_fraction = "
                f"{allowed}. The policy has collapsed and will not recover: resume from an earlier "
                "checkpoint with a lower learner.policy.lr"
            )
        size, k3 = self.mean("effective_sample_size"), self.mean("behaviour_k3")
        least, most = self.limits.min_effective_sample_size, self.limits.max_behaviour_k3
        if not (size >= least and k3 <= most):
            raise GuardError(
                f"step {step}: over the last {self.limits.window} steps the policy that sampled "
                f"was too far from the one that is trained: effective_sample_size = {size:.2f} "
                f"(guard.min_effective_sample_size = {least}), behaviour_k3 = {k3:.3g} "
                f"(guard.max_behaviour_k3 = {most}). Lower rollout.max_staleness or "
                "learner.policy.lr"
            )

    def gaps(self, record: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
        """Yield name, value and limit of each log-prob gap; nothing if no token of the batch was
        sampled with the trainer's own weights."""
        for name, limit in (
            ("logprob_gap_max", self.limits.max_logprob_gap),
            ("logprob_gap_mean", self.limits.mean_logprob_gap),
        ):
            if record[name] is not None:
                yield name, record[name], limit

    def mean(self, name: str) -> float:
        return sum(record[name] for record in self.recent) / len(self.recent)
