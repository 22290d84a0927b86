"""Turn problems into episodes: the multi-turn dialogue of RLEF 2.1, token-in token-out.

Theory of operation: each dialogue is a coroutine, and all of them run in one event loop. A dialogue
opens a session of the engine, asks it for a response, passes the program to the judge, appends the
feedback as token ids and asks again, until the public tests pass or no turns are left. The engine
decides what to batch; the judge's threads wait for the sandbox. After a fault of engine or sandbox
the dialogue is started once more, then dropped and counted; the others are not affected.

Work on text (encoding, decoding, parsing) runs in the event loop, one dialogue's at a time and in
the order of requests; between two of them the loop runs whatever else is ready. So it is blocked
for one text at a time, even if thousands of dialogues start or are answered together.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from rlef_mega.dialogues import programs, templates
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge, JudgeError
from rlef_mega.dialogues.stream import START_TOGETHER
from rlef_mega.engines import Engine, EngineError, EngineLostError, GenerationRequest, Session
from rlef_mega.run.guards import reason_of
from rlef_mega.run.ranks import Item, gather, interleave, my_share
from rlef_mega.types import Episode, PrivateTests, Problem, PublicTest, Sampling, Turn, Verdict

TRIES = 2  # how often a dialogue is started, at most
TOO_LONG = "prompt too long"  # a drop that a retry would not change
TESTS_WITH_PRIVATE = 20  # RLEF B.3


@dataclass(frozen=True)
class Distractor:
    """The verdict on an incorrect response to another problem, for random feedback (RLEF C.2)."""

    problem_id: str
    verdict: Verdict


@dataclass(frozen=True)
class Rules:
    """How dialogues are run."""

    turns: int
    sampling: Sampling
    max_context: int
    feedback: Literal["true", "none", "random", "private"] = "true"
    distractors: tuple[Distractor, ...] = ()
    program: programs.Which = "first"
    feedback_tokens: int | None = None  # None: as many as the context has room for
    feedback_cut: templates.Cut = "middle"


@dataclass(frozen=True)
class Rollout:
    """For each problem, in order: its episode, or the reason why its dialogue was dropped."""

    outcomes: tuple[Episode | str, ...]

    @property
    def episodes(self) -> tuple[Episode, ...]:
        return tuple(o for o in self.outcomes if isinstance(o, Episode))

    @property
    def reasons(self) -> Counter[str]:
        return Counter(o for o in self.outcomes if isinstance(o, str))


def derive_seed(*parts: int | str) -> int:
    """Return the seed of an independent random stream for these parts (run seed, step, number,
    ...); the same on every machine and layout."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class DialogueLoop:
    """Runs dialogues, all concurrent ones in one event loop."""

    def __init__(self, engine: Engine, judge: Judge, chat: ChatFormat, rules: Rules) -> None:
        self.engine, self.judge, self.chat, self.rules = engine, judge, chat, rules
        self.text_lock = asyncio.Lock()

    def under(self, rules: Rules) -> "DialogueLoop":
        """Return a loop with other rules."""
        return DialogueLoop(self.engine, self.judge, self.chat, rules)

    def run_on_all_ranks(self, problems: Sequence[Problem], seed: int) -> Rollout:
        """Run the dialogues, a share of them on each rank. Collective.

        Returns all outcomes, in the order of the problems, on all ranks. Raises EngineLostError on
        all ranks if one rank has lost its engine.
        """
        return join_shares(lambda: asyncio.run(self.run_my_share(problems, seed)))

    async def run_my_share(self, problems: Sequence[Problem], seed: int) -> Rollout:
        """Run this rank's share of the dialogues; each ends as one episode or one counted drop."""
        self.text_lock = asyncio.Lock()  # a lock belongs to one event loop
        running = []
        async with self.text_lock:  # no prompt is sent before all sessions are open (LocalEngine)
            for number, problem in my_share(list(enumerate(problems))):
                dialogue = self.run(problem, derive_seed(seed, number))
                running.append(asyncio.ensure_future(dialogue))
                if len(running) % START_TOGETHER == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0)
        return Rollout(tuple(await asyncio.gather(*running)))

    async def run(self, problem: Problem, seed: int) -> Episode | str:
        """Run one dialogue. Returns its episode, or the reason why it was dropped."""
        reason = ""
        for _ in range(TRIES):
            try:
                # first of all, so that dialogues that start together all have their sessions
                async with self.engine.session() as session:
                    return await self.run_once(problem, session, seed)
            except (EngineError, JudgeError) as fault:
                reason = reason_of(fault)
        return reason

    @asynccontextmanager
    async def text(self) -> AsyncIterator[None]:
        """Hold the lock for work on text. Before the work, let the loop run whatever is ready."""
        async with self.text_lock:
            await asyncio.sleep(0)  # else the next dialogue would work in the same iteration
            yield

    async def run_once(self, problem: Problem, session: Session, seed: int) -> Episode | str:
        """Run a dialogue as token ids: sampled ids are appended as they are, and never decoded and
        encoded again. Returns the episode, or why the dialogue is dropped. Raises EngineError or
        JudgeError after a fault."""
        chat, rules = self.chat, self.rules
        async with self.text():
            observed_ids, begun = first_context(problem, chat)
            context = observed_ids
        if self.room(len(context)) < 0:
            return TOO_LONG
        if rules.feedback == "private":
            problem = show_private_tests(problem)
        turns: list[Turn] = []
        while True:
            turn_seed = derive_seed(seed, len(turns))
            completion = await session(GenerationRequest(context, rules.sampling, turn_seed))
            async with self.text():
                response = chat.decode(completion.token_ids)
                found = programs.extract_program(response, problem.language, begun, rules.program)
            last_turn = len(turns) + 1 == rules.turns
            verdict = await self.judge.judge(problem, found, last_turn=last_turn)
            async with self.text():
                turns.append(Turn(observed_ids, completion, found.program, verdict))
                context += completion.token_ids
                feedback = None
                if not (verdict.public_passed or last_turn):
                    text_seed = derive_seed(seed, len(turns), "feedback")
                    feedback = self.observe(problem, turns[-1], text_seed, begun, len(context))
                if feedback is None:  # also if the context has no room for another turn
                    episode = Episode(problem.id, tuple(turns))
                    # token-in token-out: what is trained on is what the engine read and sampled
                    assert episode.token_ids == context, problem.id
                    return episode
                observed_ids = tuple(feedback)
                context += observed_ids

    def room(self, context_len: int) -> int:
        """Return how many tokens fit between this context and a response of the maximum length."""
        return self.rules.max_context - self.rules.sampling.max_new_tokens - context_len

    def observe(
        self, problem: Problem, turn: Turn, seed: int, begun: str, context_len: int
    ) -> list[int] | None:
        """Return the feedback on a turn as tokens, shortened until it has at most `feedback_tokens`
        and leaves room for the longest response; None if even the shortest leaves no room."""
        room = self.room(context_len)
        budget = min(room, self.rules.feedback_tokens or room)
        limit: int | None = None
        while True:
            text = choose_feedback(problem, turn.verdict, self.rules, seed, limit)
            ended = turn.completion.finish_reason == "stop"
            observed = self.chat.observe(text, ended, begun)
            shortest = limit is not None and len(text) > limit
            if len(observed) <= (room if shortest else budget):
                return observed
            if shortest:
                return None
            # a tenth less than in proportion: the tokens around the text do not shrink with it
            limit = len(text) * max(budget, 0) * 9 // (len(observed) * 10)


def first_context(problem: Problem, chat: ChatFormat) -> tuple[tuple[int, ...], str]:
    """Return the token ids of a dialogue's first prompt, and the text with which every response
    begins.

    The ids are a tuple, so that the garbage collector does not scan thousands of them repeatedly.
    """
    question = templates.first_prompt(problem.statement, problem.template, problem.public_tests)
    begun = templates.response_start(problem.statement, problem.template)
    return tuple(chat.open(question, begun)), begun


def join_shares(share: Callable[[], Rollout]) -> Rollout:
    """Call `share` for this rank's outcomes and return those of all ranks. Collective."""
    shares = gather_unless_lost(share)
    return Rollout(tuple(interleave([share.outcomes for share in shares])))


def show_private_tests(problem: Problem) -> Problem:
    """Make private tests public, up to 20 public tests in all: the ablation with feedback from
    private tests (RLEF B.3). Feedback shows at most 8 failures (`Template.max_tests`)."""
    hidden = problem.private_tests.tests
    showable = [test for test in hidden if isinstance(test, PublicTest)]
    shown = showable[: max(0, TESTS_WITH_PRIVATE - len(problem.public_tests))]
    kept = tuple(test for test in hidden if not any(test is one for one in shown))
    return replace(
        problem, public_tests=(*problem.public_tests, *shown), private_tests=PrivateTests(kept)
    )


def choose_feedback(
    problem: Problem, verdict: Verdict, rules: Rules, seed: int, max_characters: int | None = None
) -> str:
    """Return the feedback text: on this program, on another problem's program, or withheld."""
    if rules.feedback == "none":
        return templates.feedback_withheld(problem.template)
    if rules.feedback == "random":
        others = [d for d in rules.distractors if d.problem_id != problem.id]
        assert others, "distractors come from at least two problems"
        verdict = others[seed % len(others)].verdict
    return templates.feedback(
        verdict.public,
        problem.template,
        max_characters,
        invalid=verdict.invalid,
        cut=rules.feedback_cut,
    )


def distractors_of(episodes: Sequence[Episode]) -> tuple[Distractor, ...]:
    """Return the failed first responses of these episodes as feedback for other problems; none if
    all of them are on one problem."""
    first_turns = ((episode.problem_id, episode.turns[0].verdict) for episode in episodes)
    failed = tuple(
        Distractor(problem_id, verdict)
        for problem_id, verdict in first_turns
        if not verdict.public_passed
    )
    return failed if len({distractor.problem_id for distractor in failed}) > 1 else ()


def gather_unless_lost(work: Callable[[], Item]) -> list[Item]:
    """Return what `work` returns on every rank, in rank order. Collective. Raises EngineLostError
    on all ranks if it is raised on one, so that they stop together."""
    try:
        mine, lost = work(), ""
    except EngineLostError as error:
        mine, lost = None, str(error)
    everyone = gather((mine, lost))
    for _, why in everyone:
        if why:
            raise EngineLostError(why)
    return [theirs for theirs, _ in everyone]  # type: ignore[misc]
