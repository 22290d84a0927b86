"""Servers without a model: they take the time that real ones would, and answer with token ids that
the real rollout code decodes, parses, grades and appends.

Theory of operation. Everything is of one event loop, in real or in virtual time (virtual_time.py).
A server decodes for all its running requests together, a token each a step, which takes

    step_s + running * step_per_request_s

so a response takes the longer the more run beside it. It counts its steps, and has one timer, for
the request that will end first; who comes or goes changes the pace from there on. A request that
starts holds the server up for the tokens of its context that are not in its cache: all of a first
turn, after that what was added since the answer before. More than `most_running` wait in order of
arrival. A publication pauses all servers; afterwards the caches are empty, the contexts of what
runs are computed again (SGLang's `retract`), and tokens carry the new version.

What a server says depends on the request's seed alone: its length is drawn from a log-normal
distribution and cut at `max_new_tokens`, and a program is right with probability `solve`. So all
modes of training hold the same dialogues, and differ in when.
"""

import asyncio
import bisect
import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from rlef_mega.dialogues.chat import ChatFormat, encode_plain
from rlef_mega.types import Completion, PrivateTests, Problem, Sampling
from rlef_sandbox import Result, Status, Test


@dataclass(frozen=True)
class ServerSpeed:
    """What a server takes, in seconds."""

    step_s: float  # a decoding step, to read the weights
    step_per_request_s: float  # and for each running request, to read its context
    prefill_token_s: float
    most_running: int = 256


# Llama 3.1 8B in bfloat16 on one H100, from its data sheet (3.35 TB/s, 989 dense TFLOP/s) and
# assumed efficiencies: 16 GB of weights at 70% of the bandwidth; 128 KiB a token of contexts of
# about 1,700 tokens at 70% of it; a prompt's tokens at half the FLOP/s. Steps that grow linearly
# with the requests are what NVIDIA's tables show (docs.nvidia.com/nim/benchmarking/llm,
# Llama 3.1 8B and 70B, up to 200 at once). 256 requests: 31 ms a step, 8,200 tokens/s.
H100_8B = ServerSpeed(step_s=7e-3, step_per_request_s=95e-6, prefill_token_s=33e-6)

RIGHT, WRONG = "solved = True", "solved = False"
PROSE = (
    "First think about what is read and what must be printed. The numbers fit in memory, so a "
    "list holds them all, and one pass over it is enough. Mind the last line, which may be empty. "
)
CODE = """\
values = [int(word) for word in input().split()]
total = sum(value for value in values if value > 0)
best = max(values, default=0)
for place, value in enumerate(values):
    if value * 2 > best and place % 3:
        total += value - best // 2
print(total, best)
"""


@dataclass(frozen=True)
class Lengths:
    """Of responses, in tokens: log-normal. Made up, with a long tail: with these, one in 25 is cut
    at 2,048."""

    median: float = 500.0
    spread: float = 0.8  # standard deviation of the logarithm

    def draw(self, generator: random.Random) -> int:
        return max(1, round(generator.lognormvariate(math.log(self.median), self.spread)))


class Writer:
    """Responses of any length: prose, then a program that parses."""

    def __init__(self, chat: ChatFormat, longest: int) -> None:
        def ids(text: str) -> list[int]:
            return encode_plain(chat.tokenizer, text)

        self.end = [*ids("\n```"), chat.end_of_turn]
        self.openings = {
            solved: ids(f"\n```python\n{RIGHT if solved else WRONG}\n") for solved in (True, False)
        }
        prose, code = ids(PROSE), ids(CODE)
        self.prose = prose * (longest // len(prose) + 2)
        self.code, self.code_len = code * (longest // len(code) + 2), len(code)

    def write(self, length: int, solved: bool) -> tuple[int, ...]:
        """Exactly so many tokens, or the fewest that hold a program; about half are code."""
        opening = self.openings[solved]
        room = max(0, length - len(opening) - len(self.end))
        code = room // 2 // self.code_len * self.code_len
        return tuple(
            itertools.chain(self.prose[: room - code], opening, self.code[:code], self.end)
        )


@dataclass
class Request:
    context: int  # tokens before the answer
    uncached: int  # of these
    length: int  # of the answer
    done: "asyncio.Future[None]"
    begun: float = 0.0  # the server's steps when it started


class Server:
    """What runs and waits on one server, and how many steps it has made."""

    def __init__(self, speed: ServerSpeed, version: int) -> None:
        self.speed = speed
        self.steps = 0.0
        self.looked_at = self.held_until = 0.0  # no step is made before the latter
        self.running: list[tuple[float, int, Request]] = []  # a heap, by the step that ends each
        self.waiting: deque[Request] = deque()
        self.busy_s = 0.0  # with something to run
        self.arrivals = itertools.count()
        self.timer: asyncio.TimerHandle | None = None
        self.versions = [(0.0, version)]  # since which step

    @property
    def open(self) -> int:
        return len(self.running) + len(self.waiting)

    @property
    def pace_s(self) -> float:
        return self.speed.step_s + self.speed.step_per_request_s * len(self.running)

    async def serve(self, context: int, uncached: int, length: int) -> list[int]:
        """Returns the weights' version of each token."""
        loop = asyncio.get_running_loop()
        request = Request(context, uncached, length, loop.create_future())
        self.catch_up(loop.time())
        self.waiting.append(request)
        self.go_on()
        await request.done
        return self.versions_of(request)

    def catch_up(self, now: float) -> None:
        """The steps made since it was last looked at."""
        if self.running:
            self.busy_s += now - self.looked_at
            self.steps += max(0.0, now - max(self.looked_at, self.held_until)) / self.pace_s
        self.looked_at = now

    def go_on(self) -> None:
        """Start what has room, and set the timer for what ends first."""
        while self.waiting and len(self.running) < self.speed.most_running:
            request = self.waiting.popleft()
            self.hold(request.uncached * self.speed.prefill_token_s)
            request.begun = self.steps
            heapq.heappush(
                self.running, (self.steps + request.length, next(self.arrivals), request)
            )
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.running:
            loop = asyncio.get_running_loop()
            begins = max(self.looked_at, self.held_until)
            ends = begins + max(0.0, self.running[0][0] - self.steps) * self.pace_s
            self.timer = loop.call_at(ends, self.end_first)

    def end_first(self) -> None:
        self.catch_up(asyncio.get_running_loop().time())
        while self.running and self.running[0][0] <= self.steps + 1e-6:
            _, _, request = heapq.heappop(self.running)
            if not request.done.done():  # its dialogue was not cancelled
                request.done.set_result(None)
        self.go_on()

    def hold(self, seconds: float) -> None:
        self.held_until = max(self.looked_at, self.held_until) + seconds

    def publish(self, pause_s: float, version: int) -> None:
        """Stand still, then compute the contexts of what runs again."""
        self.catch_up(asyncio.get_running_loop().time())
        again = sum(r.context + self.steps - r.begun for _, _, r in self.running)
        self.hold(pause_s + again * self.speed.prefill_token_s)
        for request in self.waiting:
            request.uncached = request.context
        self.versions.append((self.steps, version))
        self.go_on()

    def versions_of(self, request: Request) -> list[int]:
        newest = bisect.bisect_right(self.versions, (request.begun, math.inf)) - 1
        found: list[int] = []
        for step, version in reversed(self.versions[newest:]):
            earlier = round(max(0.0, min(step - request.begun, request.length)))
            found += [version] * (request.length - earlier - len(found))
        return found[::-1]


class SimulatedSession:
    """A dialogue's place: its turns go to one server, which holds its context."""

    def __init__(self, engine: "SimulatedEngine") -> None:
        self.engine = engine
        self.server: Server | None = None
        self.cached = self.cached_version = 0  # tokens of the dialogue there, and since when

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        engine, context = self.engine, len(token_ids)
        if self.server is None:
            self.server = min(engine.servers, key=lambda server: server.open)
        generator = random.Random(seed)
        length = engine.lengths.draw(generator)
        written = engine.writer.write(length, generator.random() < engine.solve)
        sampled = written[: sampling.max_new_tokens]
        kept = self.cached if self.cached_version == engine.weight_version else 0
        engine.counted.update(
            requests=1, context_tokens=context, cached_tokens=kept, sampled_tokens=len(sampled)
        )
        versions = await self.server.serve(context, context - kept, len(sampled))
        self.cached, self.cached_version = context + len(sampled), engine.weight_version
        finish = "stop" if len(written) == len(sampled) else "length"
        return Completion(sampled, (-0.5,) * len(sampled), tuple(versions), finish)


class SimulatedEngine:
    """`servers` of one speed. `publish_s` is how long a publication stops them."""

    def __init__(
        self,
        chat: ChatFormat,
        *,
        servers: int,
        speed: ServerSpeed,
        lengths: Lengths,
        max_new_tokens: int,
        solve: float = 0.25,
        publish_s: float = 0.0,
    ) -> None:
        self.weight_version = 0
        self.servers = [Server(speed, self.weight_version) for _ in range(servers)]
        self.writer = Writer(chat, max_new_tokens)
        self.lengths, self.solve, self.publish_s = lengths, solve, publish_s
        self.counted: Counter[str] = Counter()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[SimulatedSession]:
        yield SimulatedSession(self)

    async def publish(self, version: int) -> None:
        """What the trainer waits for: servers that stand still."""
        for server in self.servers:
            server.publish(self.publish_s, version)
        self.weight_version = version
        await asyncio.sleep(self.publish_s)

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Of the protocol; here for rollouts between which nothing runs."""
        for server in self.servers:
            server.versions.append((server.steps, version))
        self.weight_version = version

    def rest(self) -> None:
        """It has no memory."""

    def end_update(self, version: int | None) -> None:
        """Nobody else brings weights here."""

    def take_counts(self) -> dict[str, float]:
        taken: dict[str, float] = dict(self.counted)
        self.counted.clear()
        return taken

    def busy_s(self) -> float:
        """Seconds so far in which servers had something to run, summed over them."""
        now = asyncio.get_running_loop().time()
        for server in self.servers:
            server.catch_up(now)
        return sum(server.busy_s for server in self.servers)


class SimulatedGrader:
    """Takes a while, log-normal, and believes what a program says of itself."""

    isolation: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, median_s: float, spread: float = 0.8) -> None:
        self.median_s, self.spread = median_s, spread
        self.random = random.Random(0)

    async def grade(self, problem: Problem, program: str) -> list[Result]:
        seconds = self.random.lognormvariate(0.0, self.spread) * self.median_s
        await asyncio.sleep(seconds)
        if RIGHT in program:
            tests = len(problem.public_tests) + len(problem.private_tests.tests)
            return [Result(Status.OK, wall_s=seconds / tests)] * tests
        wrong = Result(Status.WRONG_ANSWER, stdout=b"17 42 " * 20, wall_s=seconds)
        return [wrong] * len(problem.public_tests)


def made_up_problems(count: int, seed: int = 0) -> list[Problem]:
    """Statements and tests as long as CodeContests' are, about: some 700 tokens in the median, and
    of feedback 250; the lengths of `rlef bench packing`."""
    generator = random.Random(seed)

    def words(median_tokens: float, spread: float) -> str:
        length = generator.lognormvariate(math.log(median_tokens), spread)
        return " ".join(generator.choices(WORDS, k=min(round(length), 2000)))

    def problem(number: int) -> Problem:
        numbers = [" ".join(str(generator.randrange(1000)) for _ in range(10)) for _ in range(3)]
        tests = tuple(Test(f"{line}\n".encode(), f"{line} {line}\n".encode()) for line in numbers)
        return Problem(
            id=f"made up {number}",
            statement=words(600, 0.5),
            public_tests=tests[:2],
            private_tests=PrivateTests(tests[2:]),
        )

    return [problem(number) for number in range(count)]


WORDS = PROSE.replace(".", "").replace(",", "").split()
