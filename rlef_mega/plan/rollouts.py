"""Dialogues, and the servers that sample them: memory for contexts, and seconds of a batch.

A server decodes one token for each of its c requests in

    pace(c) = bytes of its weights / rate + c x bytes of a context / rate + 2 L all-reduces

and computes prompts at a fraction of its FLOP/s. A batch takes as long as the servers' work on it
(`work`), but no less than its longest dialogue, which is sampled token after token and may take
max_staleness + 1 steps (`longest`).
"""

import math
import random
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from rlef_mega.config import RolloutConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.plan.hardware import ALL_REDUCE_S, DECODE_MEMORY, PREFILL_PRODUCTS, Device

# Assumed: medians in tokens at the paper's limits (a context of 8,192, responses up to 2,048), and
# standard deviations of the logarithm. Other recipes' lengths are in proportion to their limits.
PROMPT, FEEDBACK, RESPONSE = (700, 0.5), (250, 0.0), (500, 0.8)
SOLVED = 0.25  # of the programs (assumed)
MOST_RUNNING = 256  # requests of a server at once
DRAWN = 4096


@dataclass(frozen=True)
class DialogueLengths:
    tokens: int
    sampled: int


def draw_dialogues(rollout: RolloutConfig) -> list[DialogueLengths]:
    """Draw dialogues within the recipe's limits; the same ones on every call."""
    generator = random.Random(0)
    context, response = rollout.max_context / 8192, rollout.max_new_tokens / 2048

    def length(what: tuple[int, float], scale: float) -> int:
        median, spread = what
        return max(1, round(scale * generator.lognormvariate(math.log(median), spread)))

    def dialogue() -> DialogueLengths:
        tokens = sampled = 0
        for turn in range(rollout.turns):
            observed = length(FEEDBACK if turn else PROMPT, context)
            answer = min(length(RESPONSE, response), rollout.max_new_tokens)
            if tokens + observed + answer > rollout.max_context:
                break
            tokens, sampled = tokens + observed + answer, sampled + answer
            if generator.random() < SOLVED:
                break
        return DialogueLengths(tokens, sampled)

    drawn = [dialogue() for _ in range(DRAWN)]
    return [each for each in drawn if each.tokens] or [DialogueLengths(rollout.max_context, 1)]


@dataclass(frozen=True, eq=False)
class DialogueSample:
    """Drawn dialogues, of which batches consist. Compared by identity, as a key of caches."""

    drawn: tuple[DialogueLengths, ...]

    @cached_property
    def tokens(self) -> float:
        return fmean(each.tokens for each in self.drawn)

    @cached_property
    def sampled(self) -> float:
        return fmean(each.sampled for each in self.drawn)

    @cached_property
    def by_length(self) -> list[int]:
        return sorted(each.sampled for each in self.drawn)

    def longest(self, batch: int) -> int:
        """Return the tokens sampled in a batch's longest dialogue, as the median over batches."""
        index = round(len(self.drawn) * 0.5 ** (1 / batch))
        return self.by_length[min(index, len(self.drawn) - 1)]

    def batch(self, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (lengths, tokens that the head reads) of the sequences of one batch."""
        chosen = [self.drawn[n % len(self.drawn)] for n in range(size)]
        return tuple(d.tokens for d in chosen), tuple(d.sampled for d in chosen)


@dataclass(frozen=True)
class SamplingServer:
    """An SGLang server with the model in bfloat16 on `gpus` GPUs."""

    shape: LlamaShape
    device: Device
    gpus: int
    memory_fraction: float = 0.8

    @property
    def weights(self) -> float:
        """Return the bytes on each GPU."""
        return 2 * self.shape.parameters / self.gpus

    @property
    def cache(self) -> float:
        """Return a GPU's bytes for contexts: SGLang's share of the memory less the weights."""
        return self.memory_fraction * self.device.server_share - self.weights

    @property
    def token_bytes(self) -> float:
        """Return the bytes of a token's keys and values, over all GPUs."""
        return 4 * self.shape.layers * self.shape.key_value_heads * self.shape.head_dim

    @property
    def cached_tokens(self) -> int:
        return int(self.cache * self.gpus / self.token_bytes)

    @property
    def bandwidth(self) -> float:
        return self.gpus * self.device.bandwidth * DECODE_MEMORY

    @property
    def step_s(self) -> float:
        """Return the seconds of a decoding step, without reading the contexts."""
        all_reduces = 2 * self.shape.layers * ALL_REDUCE_S if self.gpus > 1 else 0.0
        return 2 * self.shape.parameters / self.bandwidth + all_reduces

    def pace(self, running: float, context: float) -> float:
        """Return the seconds of a decoding step of `running` requests."""
        return self.step_s + running * context * self.token_bytes / self.bandwidth

    @property
    def prefill_token_s(self) -> float:
        flops = self.gpus * self.device.flops * PREFILL_PRODUCTS
        return 2 * self.shape.parameters / flops


@dataclass(frozen=True)
class Generation:
    """Seconds of sampling a batch, by what bounds it."""

    work: float
    longest: float

    @property
    def seconds(self) -> float:
        return max(self.work, self.longest)


def generation(
    dialogues: DialogueSample, server: SamplingServer, servers: int, batch: int, max_staleness: int
) -> Generation:
    """Estimate the time to sample a batch of dialogues on `servers` servers.

    `batch` x (max_staleness + 1) dialogues run concurrently, or fewer if each server would have
    more than MOST_RUNNING or than its KV cache holds.
    """
    context = dialogues.tokens - dialogues.sampled / 2
    room = min(MOST_RUNNING, server.cached_tokens / dialogues.tokens)
    running = max(1.0, min(room, batch * (max_staleness + 1) / servers))
    each = batch / servers
    observed = dialogues.tokens - dialogues.sampled
    steps = each * dialogues.sampled / running
    work = steps * server.pace(running, context) + each * observed * server.prefill_token_s
    if max_staleness == 0:
        running /= 2  # the average, as dialogues finish one after another
    longest = dialogues.longest(batch) * server.pace(running, context)
    return Generation(work, longest / (max_staleness + 1))
