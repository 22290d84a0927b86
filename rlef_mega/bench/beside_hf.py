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
from typing import Any

import torch

from rlef_mega.bench.figures import Figure
from rlef_mega.bench.hf_policy import (
    Form,
    Head,
    HuggingFacePolicy,
    has_liger,
    liger_head,
    liger_tensor_parallel_head,
    logits_head,
    peer_batches,
)
from rlef_mega.bench.measure import wall_seconds
from rlef_mega.types import Batch, Targets

OURS = "ours"
LAYOUTS = ("padded", "packed")
HEADS: dict[str, Head] = {
    "Liger": liger_head,
    "Liger, chunked": liger_tensor_parallel_head,
    "logits": logits_head,
}
# Of the first loss and gradient norm: rounding, and the noise of another attention kernel.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


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
        self.tolerance, self.deadline = TOLERANCE[dtype], deadline
        self.found = Comparison()

    @property
    def is_over(self) -> bool:
        return time.time() > self.deadline

    def their_update(self, way: Way) -> dict[str, float]:
        self.peer.use_attention(way.attention)
        batches = peer_batches(self.batch, self.targets, way.form, self.device)
        return self.peer.update(batches, HEADS[way.head])

    def run(self, candidates: Sequence[Way], rounds: int) -> Comparison:
        self.found.first[OURS] = self.our_update()
        right = [way for way in candidates if self.works(way)]
        if right:
            self.compare_first_updates(right[0])
        best = {}
        for layout in LAYOUTS:
            if fastest := self.fastest([way for way in right if way.layout == layout]):
                best[layout] = fastest
        self.found.chosen = {layout: way.name for layout, way in best.items()}
        sides: dict[str, Callable[[], object]] = {OURS: self.our_update}
        for layout, way in best.items():
            sides[layout] = partial(self.their_update, way)
        self.found.seconds = {name: [] for name in sides}
        orders = itertools.cycle(itertools.permutations(sides))
        for _ in range(rounds):
            if self.is_over:
                break
            for name in next(orders):
                self.found.seconds[name].append(wall_seconds(sides[name], self.device))
        return self.found

    def works(self, way: Way) -> bool:
        """Whether this way runs here and computes the loss that ours begins with; the weights stay
        as they are.
        """
        if self.is_over:
            self.found.left_out[way.name] = "the time was up"
            return False
        try:
            self.peer.use_attention(way.attention)
            batches = peer_batches(self.batch, self.targets, way.form, self.device)
            loss = self.peer.evaluate(batches, HEADS[way.head])
        # a peer may fail in its own ways, running out of memory among them
        except Exception as error:
            self.found.left_out[way.name] = f"{type(error).__name__}: {error}"[:300]
            return False
        expected = self.found.first[OURS]["policy_loss"]
        if not self.agree(loss, expected):
            self.found.left_out[way.name] = f"computes a loss of {loss}, not {expected}"
            return False
        return True

    def compare_first_updates(self, way: Way) -> None:
        """RuntimeError unless both sides' first updates have the same loss and gradient norm: then
        the same work is compared.
        """
        ours = self.found.first[OURS]
        theirs = self.found.first["Hugging Face"] = self.their_update(way)
        for name, value in theirs.items():
            if not self.agree(value, ours[name]):
                raise RuntimeError(
                    f"the two sides do different work: {name} is {ours[name]} with ours, "
                    f"{value} with Hugging Face ({way.name})"
                )

    def agree(self, theirs: float, ours: float) -> bool:
        return abs(theirs - ours) <= self.tolerance * max(1.0, abs(ours))

    def fastest(self, candidates: Sequence[Way]) -> Way | None:
        for way in candidates:
            if self.is_over and self.found.tried:
                self.found.left_out[way.name] = "the time was up"
                continue
            try:
                self.their_update(way)  # the warm-up, which compiles
                seconds = wall_seconds(partial(self.their_update, way), self.device)
            except Exception as error:
                self.found.left_out[way.name] = f"{type(error).__name__}: {error}"[:300]
                continue
            self.found.tried[way.name] = seconds
        tried = [way for way in candidates if way.name in self.found.tried]
        return min(tried, key=lambda way: self.found.tried[way.name]) if tried else None


def figures(measured: dict[str, Any], tokens: int, peer: str) -> list[Figure]:
    """Tokens a second of each side, and ours over each of theirs, a sample a round."""
    seconds = measured["seconds"]
    ours = seconds[OURS]
    rows = [
        Figure(
            f"policy update, {OURS if name == OURS else f'{peer}, {name}'}",
            "tokens/s",
            tuple(tokens / s for s in samples),
        )
        for name, samples in seconds.items()
        if samples
    ]
    rows += [
        Figure(
            f"policy update, ours / {peer}, {layout}",
            "ratio",
            tuple(t / o for o, t in zip(ours, samples, strict=True)),
        )
        for layout, samples in seconds.items()
        if layout != OURS and samples
    ]
    return rows


def notes(
    measured: dict[str, Any], rows: Sequence[Figure], peer: str, goal: float | None
) -> list[str]:
    """The verdict, against the faster of the peer's layouts, and what was left out."""
    ratios = [row for row in rows if row.unit == "ratio"]
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
