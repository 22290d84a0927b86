"""How many token slots and FLOPs are wasted by ways of making micro-batches, on made-up lengths.

Ours against what else is done: batches padded to their longest sequence, in the order of arrival or
sorted by length; first-fit packing into rows of the budget, padded full or computed as they are;
and the greedy balance by length. All get the same sequences and the same budget a micro-batch, and
give each data-parallel rank as many micro-batches.

- *padding*: token slots that are computed and hold nothing. Ours has only what sequence parallelism
  rounds up to and the slots of empty micro-batches. Attention over packed sequences pads nothing on
  a GPU; where it is PyTorch's SDPA there, `attention_padding` is what it pads, inside attention
  alone.
- *idle*: 1 - mean / max of the ranks' FLOPs in an update, padding counted as work: all ranks wait
  for the last one.
- *wasted*: 1 - useful FLOPs / (ranks x FLOPs of the last one): padding and idle ranks together.
- *uneven*: 1 - mean / max over all micro-batches: at most what a pipeline's stages wait for each
  other beyond the schedule's own bubble. With one stage nobody waits for that.

    python -m rlef_mega.bench.packing RESULTS.json PICTURE.png

draws a results file.
"""

import heapq
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.slice_model import demo_shape
from rlef_mega.bench.workload import random_episodes
from rlef_mega.config import TrainConfig, find_recipe, load_config
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, SequenceFlops
from rlef_mega.packing import microbatches
from rlef_mega.report.plots import STYLE

BATCHES = 10  # of made-up lengths, each from its own seed
GOAL = 0.03
SHAPES = {"llama31_8b": LLAMA_31_8B, "llama31_70b": LLAMA_31_70B}
Sequence = tuple[int, int]  # tokens, and response tokens among them
Rows = list[list[int]]  # micro-batches: indices of their sequences
UNITS = {
    "padding": "share",
    "idle": "share",
    "wasted": "share",
    "uneven": "share",
    "microbatches": "a rank",
    "planning_s": "s",
}


@dataclass(frozen=True)
class Case:
    """Batches of sequences, and the layout that shares them out."""

    name: str
    flops: SequenceFlops
    batches: list[list[Sequence]]
    token_budget: int
    ranks: int  # data-parallel
    multiple: int = 1  # of micro-batches a rank: the pipeline's stages
    rounding: int = 1  # of a micro-batch's tokens: sequence parallelism

    def describe(self) -> dict[str, Any]:
        tokens = [tokens for batch in self.batches for tokens, _ in batch]
        return {
            "sequences": len(self.batches[0]),
            "mean_tokens": round(statistics.mean(tokens)),
            "longest_tokens": max(tokens),
            "token_budget": self.token_budget,
            "data_parallel_size": self.ranks,
            "microbatches_multiple_of": self.multiple,
        }


@dataclass(frozen=True)
class Waste:
    padding: float
    idle: float
    wasted: float
    uneven: float
    microbatches: int  # a rank
    planning_s: float


def benchmark() -> Report:
    figures: list[Figure] = []
    for case in cases():
        for name, way in WAYS.items():
            wastes = [measure(case, batch, way) for batch in case.batches]
            for part, unit in UNITS.items():
                samples = tuple(float(getattr(waste, part)) for waste in wastes)
                figures.append(Figure(f"{case.name} | {name} | {part}", unit, samples))
        samples = tuple(attention_padding(case, batch) for batch in case.batches)
        figures.append(Figure(f"{case.name} | ours | attention_padding", "share", samples))
    many = made_up_dialogues(1024, 8192, 1.0)
    largest = Case("1,024 sequences over 128 ranks", LLAMA_31_8B.flops, many, 16384, 128)
    planning = tuple(measure(largest, batch, WAYS["ours"]).planning_s for batch in many)
    figures.append(Figure(f"{largest.name} | ours | planning_s", "s", planning))
    worst = max(f.high for f in figures if f.name.endswith("| ours | wasted"))
    verdict = "met" if worst < GOAL else "missed"
    return Report(
        "rlef bench packing",
        describe_benchmark(cases={case.name: case.describe() for case in cases()}),
        tuple(figures),
        (f"ours, worst case and batch: {worst:.1%} wasted; goal below {GOAL:.0%}: {verdict}",),
    )


def cases() -> list[Case]:
    """Updates and scoring of the recipes, in their layouts; the demo's on two data-parallel ranks,
    which its own layout has not."""
    recipes = {
        name: load_config(find_recipe(name), [], TrainConfig)
        for name in ("llama31_8b", "llama31_70b", "demo")
    }

    def large(what: str, recipe: str, *, scoring: bool = False, scale: float = 1.0, context: int):
        config = recipes[recipe]
        parts = 1 if scoring else config.ppo.updates_per_batch
        return Case(
            what,
            SHAPES[recipe].flops,
            made_up_dialogues(config.rollout.episodes_per_batch // parts, context, scale),
            config.learner.microbatch_tokens,
            config.parallel.data_parallel_size,
            config.parallel.pipeline_model_parallel_size,
            config.parallel.tensor_model_parallel_size,
        )

    demo, shape = recipes["demo"], demo_shape()
    demo_batches = [
        [
            (len(episode.token_ids), sum(len(turn.completion.token_ids) for turn in episode.turns))
            for episode in random_episodes(demo.rollout, shape.vocabulary, seed)
        ]
        for seed in range(BATCHES)
    ]
    return [
        large("8B update", "llama31_8b", context=8192),
        large("8B scoring", "llama31_8b", context=8192, scoring=True),
        large("8B long update", "llama31_8b", context=16384, scale=2.5),
        large("70B update", "llama31_70b", context=8192),
        Case("demo scoring", shape.flops, demo_batches, demo.learner.microbatch_tokens, 2),
    ]


def made_up_dialogues(count: int, context: int, scale: float) -> list[list[Sequence]]:
    return [dialogues(count, context, scale, seed) for seed in range(BATCHES)]


def dialogues(count: int, context: int, scale: float, seed: int) -> list[Sequence]:
    """Multi-turn dialogues about competition problems: log-normal parts, of at most a quarter of
    the context each; another turn unless the last one solved it (a quarter do), three at most.

    Assumed, not measured: medians of 700 tokens a problem, 500 a response and 250 a feedback, times
    `scale`.
    """
    generator = random.Random(seed)

    def draw(median: float, spread: float) -> int:
        tokens = generator.lognormvariate(math.log(median * scale), spread)
        return min(max(1, round(tokens)), context // 4)

    def dialogue() -> Sequence:
        tokens = responses = 0
        for turn in range(3):
            observed = draw(250, 0.7) if turn else draw(700, 0.5)
            answer = draw(500, 0.6)
            if tokens + observed + answer > context:
                break
            tokens, responses = tokens + observed + answer, responses + answer
            if generator.random() < 0.25:
                break
        return tokens, responses

    return [dialogue() for _ in range(count)]


def measure(case: Case, batch: list[Sequence], way: "Way") -> Waste:
    started = time.perf_counter()
    ranks = way.plan(case, batch)
    planning_s = time.perf_counter() - started
    useful = sum(case.flops(*sequence) for sequence in batch)
    slots, work = [], []
    for rank in ranks:
        costs = [way.cost(case, [batch[i] for i in row]) for row in rank]
        slots += [tokens for tokens, _ in costs]
        work.append([flops for _, flops in costs])
    loads = [sum(rank) for rank in work]
    each = list(itertools.chain(*work))
    return Waste(
        padding=1 - sum(tokens for tokens, _ in batch) / sum(slots),
        idle=1 - statistics.mean(loads) / max(loads),
        wasted=1 - useful / (len(loads) * max(loads)),
        uneven=1 - statistics.mean(each) / max(each),
        microbatches=len(ranks[0]),
        planning_s=planning_s,
    )


def attention_padding(case: Case, batch: list[Sequence]) -> float:
    """Of attention's token slots, where sequences are padded into blocks for lack of a kernel."""
    slots = 0
    for row in itertools.chain(*ours(case, batch)):
        blocks = padded_blocks([batch[i][0] for i in row], torch.device("cpu"))
        slots += sum(block.sequences * block.longest for block in blocks)
    return 1 - sum(tokens for tokens, _ in batch) / slots


def ours(case: Case, batch: list[Sequence]) -> list[Rows]:
    return microbatches(
        [tokens for tokens, _ in batch],
        case.token_budget,
        case.ranks,
        costs=[case.flops(*sequence) for sequence in batch],
        multiple=case.multiple,
    )


def greedy(case: Case, batch: list[Sequence]) -> list[Rows]:
    """Longest first, each to the micro-batch with the fewest tokens: what largest differencing and
    FLOPs are measured against."""
    tokens = sum(length for length, _ in batch)
    share = case.ranks * case.multiple
    count = share * max(1, -(-tokens // (case.token_budget * share)))
    while True:
        rows: Rows = [[] for _ in range(count)]
        lightest = [(0, row) for row in range(count)]
        for index in by_length(batch):
            load, row = lightest[0]
            heapq.heapreplace(lightest, (load + batch[index][0], row))
            rows[row].append(index)
        if max(load for load, _ in lightest) <= case.token_budget:
            return deal(case, rows)
        count += share


def by_length(batch: list[Sequence]) -> list[int]:
    return sorted(range(len(batch)), key=lambda i: -batch[i][0])


def padded(case: Case, batch: list[Sequence], order: list[int]) -> list[Rows]:
    """As many sequences as fit when padded to the longest of them."""
    rows: Rows = [[]]
    longest = 0
    for index in order:
        longest = max(longest, batch[index][0])
        if longest * (len(rows[-1]) + 1) > case.token_budget:
            rows.append([])
            longest = batch[index][0]
        rows[-1].append(index)
    return deal(case, rows)


def first_fit(case: Case, batch: list[Sequence], order: list[int]) -> list[Rows]:
    rows: Rows = []
    room: list[int] = []
    for index in order:
        tokens = batch[index][0]
        row = next((r for r, left in enumerate(room) if left >= tokens), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(case.token_budget)
        rows[row].append(index)
        room[row] -= tokens
    return deal(case, rows)


def deal(case: Case, rows: Rows) -> list[Rows]:
    """In turn to the ranks; empty ones so that all get as many."""
    rows = rows + [[] for _ in range(-len(rows) % (case.ranks * case.multiple))]
    return [rows[rank :: case.ranks] for rank in range(case.ranks)]


def packed_cost(case: Case, row: list[Sequence]) -> tuple[int, int]:
    """Token slots and FLOPs. Slots beyond the sequences pass through the layers, but not through
    attention with anything else."""
    tokens = sum(length for length, _ in row)
    slots = max(1, -(-tokens // case.rounding)) * case.rounding
    return slots, sum(case.flops(*s) for s in row) + case.flops(slots - tokens, 0)


def padded_cost(case: Case, row: list[Sequence]) -> tuple[int, int]:
    longest = max((length for length, _ in row), default=case.rounding)
    return len(row) * longest, sum(case.flops(longest, read) for _, read in row)


def full_cost(case: Case, row: list[Sequence]) -> tuple[int, int]:
    empty = case.token_budget - sum(length for length, _ in row)
    return case.token_budget, sum(case.flops(*s) for s in row) + 6 * case.flops.layers * empty


@dataclass(frozen=True)
class Way:
    """How micro-batches are made, and what one of them takes in token slots and FLOPs."""

    plan: Callable[[Case, list[Sequence]], list[Rows]]
    cost: Callable[[Case, list[Sequence]], tuple[int, int]]


WAYS = {
    "ours": Way(ours, packed_cost),
    "greedy by length": Way(greedy, packed_cost),
    "first-fit decreasing, unpadded": Way(
        lambda case, batch: first_fit(case, batch, by_length(batch)), packed_cost
    ),
    "first-fit decreasing": Way(
        lambda case, batch: first_fit(case, batch, by_length(batch)), full_cost
    ),
    "first-fit": Way(
        lambda case, batch: first_fit(case, batch, list(range(len(batch)))), full_cost
    ),
    "padded, sorted": Way(lambda case, batch: padded(case, batch, by_length(batch)), padded_cost),
    "padded": Way(lambda case, batch: padded(case, batch, list(range(len(batch)))), padded_cost),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Wasted FLOPs of each way, a group of bars a case; whiskers from best to worst batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    names = list(results["cases"])
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9, 4))
        for number, way in enumerate(WAYS):
            found = [results["figures"][f"{name} | {way} | wasted"] for name in names]
            medians = [f["median"] for f in found]
            reach = [
                [m - f["low"] for m, f in zip(medians, found, strict=True)],
                [f["high"] - m for m, f in zip(medians, found, strict=True)],
            ]
            places = [place + 0.12 * (number - 3) for place in range(len(names))]
            bars = axes.bar(places, medians, 0.11, label=way, yerr=reach, ecolor="#555555")
            axes.bar_label(bars, [f"{m:.1%}" for m in medians], fontsize=5, padding=2)
        axes.axhline(GOAL, color="black", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(names)), names)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title("FLOPs of an update lost to padding and to waiting for the fullest rank")
        axes.legend(ncols=4, fontsize=7, loc="upper left")
        axes.margins(y=0.25)
        figure.tight_layout()
        figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))


# Sequences share a padded block while they are at least this fraction of its longest. SDPA's work
# grows with the square of the padded length: at 0.75 at most 44% of it is lost, and a micro-batch
# of sorted lengths makes a handful of calls.
BLOCK_FRACTION = 0.75


@dataclass(frozen=True)
class PaddedBlock:
    """Neighbouring sequences of similar length: tokens start:end, and their rows in [S * L]."""

    start: int
    end: int
    sequences: int
    longest: int
    rows_T: torch.Tensor


def padded_blocks(lengths: list[int], device: torch.device) -> Iterator[PaddedBlock]:
    """Cut the sequences, in order, into blocks of similar length."""
    first = start = 0
    while first < len(lengths):
        longest, last = lengths[first], first
        while last < len(lengths) and BLOCK_FRACTION * longest <= lengths[last] <= longest:
            last += 1
        lengths_S = torch.tensor(lengths[first:last])
        starts_S = lengths_S.cumsum(0) - lengths_S
        tokens = int(lengths_S.sum())
        skipped_S = torch.arange(last - first) * longest - starts_S
        rows_T = torch.arange(tokens) + skipped_S.repeat_interleave(lengths_S)
        yield PaddedBlock(start, start + tokens, last - first, longest, rows_T.to(device))
        first, start = last, start + tokens
