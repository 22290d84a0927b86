"""When a run stops by itself, because going on would waste the machine. Each message says what was
seen."""

from collections import deque
from typing import Any

from rlef_mega.config import GuardConfig
from rlef_mega.rollout import Rollout


class GuardError(RuntimeError):
    """A run that stopped itself. What was recorded stays; checkpoints from before the fault can be
    resumed."""


class Guards:
    """Watches the record of each step; all ranks see the same one, and so stop together."""

    def __init__(self, limits: GuardConfig, max_drop_fraction: float) -> None:
        self.limits = limits
        self.max_drop_fraction = max_drop_fraction
        self.invalid: deque[float] = deque(maxlen=limits.window)

    def check_drops(self, held: Rollout) -> None:
        """Few drops are the price of faults; many mean that engine or sandbox is broken."""
        dropped, allowed = held.drops.total(), self.max_drop_fraction
        if dropped > allowed * len(held.outcomes):
            raise GuardError(
                f"{dropped} of {len(held.outcomes)} dialogues were dropped: {dict(held.drops)}; "
                f"rollout.max_drop_fraction = {allowed}"
            )

    def check(self, record: dict[str, Any]) -> None:
        """A step's record, before its weights are saved."""
        step = record["step"]
        for name, limit in (
            ("logprob_gap_max", self.limits.max_logprob_gap),
            ("logprob_gap_mean", self.limits.mean_logprob_gap),
        ):
            if not record[name] <= limit:  # also true of NaN
                raise GuardError(
                    f"step {step}: {name} = {record[name]:.3g}, allowed {limit}: engine and "
                    "trainer disagree on the log-probs of the same tokens. They do not hold the "
                    "same weights, or compute at another precision or temperature, and the "
                    "policy gradient would be wrong. Check model.dtype; bfloat16 needs wider "
                    "guards than float32"
                )
        self.invalid.append(record["invalid_fraction"])
        recent, allowed = sum(self.invalid) / len(self.invalid), self.limits.max_invalid_fraction
        if len(self.invalid) == self.limits.window and recent > allowed:
            raise GuardError(
                f"step {step}: {recent:.0%} of the responses of the last "
                f"{self.limits.window} steps hold no valid code; guard.max_invalid_fraction = "
                f"{allowed}. The policy has broken, and does not mend by itself: go on from an "
                "earlier checkpoint with a lower learner.policy.lr"
            )
