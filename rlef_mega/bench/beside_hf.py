"""Our policy update and Hugging Face's on the same batch, in turn, in one process.

First the peer is tried in several ways (padded or packed, token budgets, attention kernels, heads),
each checked to compute our loss from the same weights; its fastest padded and its fastest packed
way go on. Then rounds: each side makes one update a round, in an order that changes from round to
round, and a ratio is taken within a round, so that what else the machine does, and how it drifts,
hits all alike. An update is everything from the batch on the host to the new weights: cutting,
forward, backward, clipping, optimizer step.
"""

import importlib.util
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from rlef_mega.bench.figures import Figure
from rlef_mega.bench.hf_policy import (
    Form,
    Head,
    HuggingFacePolicy,
    PeerBatch,
    has_liger,
    liger_head,
    liger_tensor_parallel_head,
    logits_head,
    peer_batches,
)
from rlef_mega.bench.measure import wall_seconds
from rlef_mega.types import Batch, Targets

T = TypeVar("T")
OURS = "ours"
TRIES = 3  # of each way, to find the fastest
LAYOUTS = ("padded", "packed")
HEADS: dict[str, Head] = {
    "Liger": liger_head,
    "Liger, chunked": liger_tensor_parallel_head,
    "logits": logits_head,
}
# Of the first loss, a mean of terms of about 1, and, relative, of the gradient norm: rounding, and
# the noise of another attention kernel.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
NORM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Way:
    form: Form
    attention: str
    head: str

    @property
    def name(self) -> str:
        return f"{self.form.name}, {self.attention}, head: {self.head}"

    @property
    def layout(self) -> str:
        return LAYOUTS[self.form.packed]


@dataclass
class Comparison:
    """What was measured: seconds an update by side, a sample a round; what was tried and left
    out.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    # of the processor, where it is the device: what other work on the machine takes is not in it
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)  # by layout
    tried: dict[str, float] = field(default_factory=dict)  # seconds
    left_out: dict[str, str] = field(default_factory=dict)  # why
    first: dict[str, dict[str, float]] = field(default_factory=dict)  # loss and norm by side


def ways(device: torch.device, budgets: Sequence[int]) -> list[Way]:
    """All that the peer is tried in on this device; the likely fastest first."""
    heads = list(HEADS) if has_liger(device) else ["logits"]
    packed, padded = ["sdpa"], ["sdpa"]
    if device.type == "cuda":
        packed = ["flex_attention", "sdpa"]
        if importlib.util.find_spec("flash_attn"):
            packed, padded = ["flash_attention_2"], ["flash_attention_2", "sdpa"]
    return [
        Way(Form(layout == "packed", budget), attention, head)
        for layout, kernels in (("packed", packed), ("padded", padded))
        for budget in budgets
        for attention in kernels
        for head in heads
    ]


class Duel:
    def __init__(
        self,
        our_update: Callable[[], dict[str, float]],
        peer: HuggingFacePolicy,
        batch: Batch,
        targets: Targets,
        device: torch.device,
        dtype: torch.dtype,
        *,
        deadline: float,
    ) -> None:
        self.our_update, self.peer = our_update, peer
        self.batch, self.targets, self.device = batch, targets, device
        self.dtype, self.deadline = dtype, deadline
        self.found = Comparison()

    @property
    def is_over(self) -> bool:
        return time.time() > self.deadline

    def their_update(self, way: Way) -> dict[str, float]:
        return self.peer.update(self.batches(way), HEADS[way.head])

    def their_loss(self, way: Way) -> float:
        return self.peer.evaluate(self.batches(way), HEADS[way.head])

    def batches(self, way: Way) -> list[PeerBatch]:
        self.peer.use_attention(way.attention)
        return peer_batches(self.batch, self.targets, way.form, self.device)

    def run(self, candidates: Sequence[Way], rounds: int) -> Comparison:
        self.found.first[OURS] = self.our_update()
        right = [way for way in candidates if self.works(way)]
        self.compare_first_updates(right)
        best = {}
        for layout in LAYOUTS:
            if fastest := self.fastest([way for way in right if way.layout == layout]):
                best[layout] = fastest
        self.found.chosen = {layout: way.name for layout, way in best.items()}
        sides: dict[str, Callable[[], object]] = {OURS: self.our_update}
        for layout, way in best.items():
            sides[layout] = partial(self.their_update, way)
        self.found.seconds = {name: [] for name in sides}
        if self.device.type == "cpu":
            self.found.cpu_seconds = {name: [] for name in sides}
        orders = itertools.cycle(itertools.permutations(sides))
        for _ in range(rounds):
            if self.is_over:
                break
            for name in next(orders):
                before = time.process_time()
                self.found.seconds[name].append(wall_seconds(sides[name], self.device))
                if self.found.cpu_seconds:
                    self.found.cpu_seconds[name].append(time.process_time() - before)
        return self.found

    def works(self, way: Way) -> bool:
        """Whether this way runs here and computes the loss that ours begins with; the weights stay
        as they are.
        """
        if self.is_over:
            self.found.left_out[way.name] = "the time was up"
            return False
        loss = self.attempt(way, partial(self.their_loss, way))
        if loss is None:
            return False
        expected = self.found.first[OURS]["policy_loss"]
        if abs(loss - expected) > LOSS_TOLERANCE[self.dtype]:
            self.found.left_out[way.name] = f"computes a loss of {loss}, not {expected}"
            return False
        return True

    def compare_first_updates(self, candidates: list[Way]) -> None:
        """RuntimeError unless both sides' first updates have the same loss and gradient norm: then
        the same work is compared. Ways that cannot make one are taken out.
        """
        ours = self.found.first[OURS]
        limits = {
            "policy_loss": LOSS_TOLERANCE[self.dtype],
            "policy_grad_norm": NORM_TOLERANCE[self.dtype] * ours["policy_grad_norm"],
        }
        while candidates:
            way = candidates[0]
            theirs = self.attempt(way, partial(self.their_update, way))
            if theirs is None:
                candidates.remove(way)
                continue
            self.found.first["Hugging Face"] = theirs
            for name, limit in limits.items():
                if abs(theirs[name] - ours[name]) > limit:
                    raise RuntimeError(
                        f"the two sides do different work: {name} is {ours[name]} with ours, "
                        f"{theirs[name]} with Hugging Face ({way.name})"
                    )
            return

    def take_time(self, update: Callable[[], object]) -> float:
        """By the processor's clock, where that is the device."""
        before = time.process_time()
        wall_s = wall_seconds(update, self.device)
        return wall_s if self.device.type == "cuda" else time.process_time() - before

    def attempt(self, way: Way, function: Callable[[], T]) -> T | None:
        """None, and the reason noted, if it fails: a peer may fail in its own ways, running out of
        memory among them.
        """
        try:
            return function()
        except Exception as error:
            self.found.left_out[way.name] = f"{type(error).__name__}: {error}"[:300]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def fastest(self, candidates: Sequence[Way]) -> Way | None:
        for way in candidates:
            if self.is_over and self.found.tried:
                self.found.left_out[way.name] = "the time was up"
                continue
            update = partial(self.their_update, way)
            if self.attempt(way, update) is None:  # the warm-up, which compiles
                continue
            # the least of some, for other work on the machine only adds to it
            seconds = [self.attempt(way, partial(self.take_time, update)) for _ in range(TRIES)]
            if None not in seconds:
                self.found.tried[way.name] = min(s for s in seconds if s is not None)
        tried = [way for way in candidates if way.name in self.found.tried]
        return min(tried, key=lambda way: self.found.tried[way.name]) if tried else None


def figures(measured: dict[str, Any], tokens: int, peer: str) -> list[Figure]:
    """Tokens a second of each side, and ours over each of theirs, a sample a round: by the clock,
    and by the processor's time where that was measured.
    """
    rows: list[Figure] = []
    for kind, clock in (("seconds", ""), ("cpu_seconds", ", by processor time")):
        seconds = {name: samples for name, samples in measured[kind].items() if samples}
        for name, samples in seconds.items():
            side = OURS if name == OURS else f"{peer}, {name}"
            speeds = tuple(tokens / s for s in samples)
            rows.append(Figure(f"policy update, {side}{clock}", "tokens/s", speeds))
        for name, samples in seconds.items():
            if name != OURS:
                ratios = tuple(t / o for o, t in zip(seconds[OURS], samples, strict=True))
                title = f"policy update, {OURS} / {peer}, {name}{clock}"
                rows.append(Figure(title, "ratio", ratios))
    return rows


def notes(
    measured: dict[str, Any], rows: Sequence[Figure], peer: str, goal: float | None
) -> list[str]:
    """The verdict, against the faster of the peer's layouts, by processor time where that was
    measured; and what was left out.
    """
    ratios = [row for row in rows if row.unit == "ratio"]
    if measured["cpu_seconds"]:
        ratios = [row for row in ratios if row.name.endswith("processor time")]
    said = []
    if ratios:
        least = min(ratios, key=lambda row: row.median)
        verdict = "met" if goal and least.median >= goal else "missed"
        ending = f", goal {goal:.2f}: {verdict}" if goal else ""
        said.append(
            f"{least.name}: {least.median:.2f} ({least.low:.2f} to {least.high:.2f}){ending}"
        )
    elif goal:
        said.append(f"{peer} was not measured, so goal {goal:.2f} is open")
    said += [f"{peer}, {layout}: {way}" for layout, way in measured["chosen"].items()]
    said += [f"not measured: {way}: {why}" for way, why in measured["left_out"].items()]
    return said
