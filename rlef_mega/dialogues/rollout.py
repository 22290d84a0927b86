"""Problems to episodes: the multi-turn dialogue of RLEF 2.1, token-in token-out.

Theory of operation: one coroutine a dialogue, all in one event loop. A dialogue opens a session of
the engine, asks it for a response, hands the program to the judge, appends the feedback as token
ids and goes on, until its public tests pass or its turns are used up. The engine decides what to
batch, the judge's threads wait for the sandbox. A fault of engine or sandbox ends the try, not the
batch: the dialogue is started afresh once, then dropped and counted.

Work on text (encoding, decoding, parsing) runs in the loop, one piece in each of its turns, in the
order of coming, and between two the loop looks after everything else. So when thousands of
dialogues start or are answered together, it stands still for one piece of text, not for thousands.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from rlef_mega.dialogues import templates
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge, JudgeError
from rlef_mega.dialogues.stream import START_TOGETHER
from rlef_mega.engines import Engine, EngineError, EngineLostError, Session
from rlef_mega.run.ranks import Item, gather, interleave, my_share
from rlef_mega.types import (
    Completion,
    Episode,
    PrivateTests,
    Problem,
    PublicTest,
    Sampling,
    TestOutcome,
    Turn,
    Verdict,
)

TRIES = 2  # a dialogue is started at most this often
TESTS_WITH_PRIVATE = 20  # RLEF B.3


@dataclass(frozen=True)
class Distractor:
    """What another problem's incorrect program did on its public tests, for random feedback (RLEF
    C.2)."""

    problem_id: str
    outcomes: tuple[TestOutcome, ...]


@dataclass(frozen=True)
class Rules:
    """How dialogues are held."""

    turns: int
    sampling: Sampling
    max_context: int
    feedback: Literal["true", "none", "random", "private"] = "true"
    distractors: tuple[Distractor, ...] = ()
    example: tuple[int, ...] = ()  # few-shot: a whole dialogue that stands before each question


@dataclass(frozen=True)
class Rollout:
    """For each problem, in order, its episode or the reason why it was dropped."""

    outcomes: tuple[Episode | str, ...]

    @property
    def episodes(self) -> tuple[Episode, ...]:
        return tuple(o for o in self.outcomes if isinstance(o, Episode))

    @property
    def drops(self) -> Counter[str]:
        return Counter(o for o in self.outcomes if isinstance(o, str))


def derive_seed(*parts: int | str) -> int:
    """An independent stream for each (run seed, step, place, ...), the same on every machine and
    layout."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class DialogueLoop:
    """Dialogues of one event loop, of which each is held by itself."""

    def __init__(self, engine: Engine, judge: Judge, chat: ChatFormat, rules: Rules) -> None:
        self.engine, self.judge, self.chat, self.rules = engine, judge, chat, rules
        self.text_lock = asyncio.Lock()

    @asynccontextmanager
    async def text(self) -> AsyncIterator[None]:
        """The time for one piece of work on text."""
        async with self.text_lock:
            await asyncio.sleep(0)  # else whoever is ready would have its own in the same turn
            yield

    async def hold(self, problem: Problem, seed: int) -> Episode | str:
        """The episode, or the reason why there is none."""
        reason = ""
        for _ in range(TRIES):
            try:
                # before anything else, so that those that start together have all their sessions
                async with self.engine.session() as session:
                    return await self.hold_once(problem, session, seed)
            except (EngineError, JudgeError) as fault:
                reason = type(fault).__name__
        return reason

    def open(self, question: str, begun: str) -> tuple[int, ...]:
        """The first prompt, after an example if there is one."""
        example = self.rules.example
        if not example:
            return tuple(self.chat.open(question, begun))
        ended = example[-1] in self.chat.stop_token_ids
        return (*example, *self.chat.observe(question, ended, begun))

    async def hold_once(self, problem: Problem, session: Session, seed: int) -> Episode | str:
        """The dialogue as token ids: what the engine sampled is appended as it is and never encoded
        again."""
        chat, rules = self.chat, self.rules
        async with self.text():
            question = templates.first_prompt(
                problem.statement, problem.template, problem.public_tests
            )
            begun = templates.response_start(problem.statement, problem.template)
            # a tuple: a list's thousands of ids would be gone through at each garbage collection
            token_ids = self.open(question, begun)
        if self.room(len(token_ids)) < 0:
            return "prompt too long"
        if rules.feedback == "private":
            problem = show_private_tests(problem)
        turns: list[Turn] = []
        while True:
            completion = await session.generate(
                token_ids, rules.sampling, derive_seed(seed, len(turns))
            )
            async with self.text():
                response = chat.decode(completion.token_ids)
                program = templates.extract_program(response, problem.language, begun)
            last_turn = len(turns) + 1 == rules.turns
            verdict = await self.judge.judge(problem, program, last_turn=last_turn)
            async with self.text():
                turns.append(make_turn(len(token_ids), completion, program, verdict))
                token_ids += completion.token_ids
                if verdict.public_passed or last_turn:
                    return make_episode(problem, token_ids, turns)
                feedback_seed = derive_seed(seed, len(turns), "feedback")
                observed = self.observe(
                    problem, verdict, feedback_seed, completion, begun, len(token_ids)
                )
                if observed is None:
                    # no room for another turn: this failed response was the last one
                    return make_episode(problem, token_ids, turns)
                token_ids = (*token_ids, *observed)

    def room(self, context_len: int) -> int:
        """Tokens that may come before a response of the greatest length."""
        return self.rules.max_context - self.rules.sampling.max_new_tokens - context_len

    def observe(
        self,
        problem: Problem,
        verdict: Verdict,
        seed: int,
        completion: Completion,
        begun: str,
        context_len: int,
    ) -> list[int] | None:
        """The feedback as tokens, shortened until it leaves room for a response of the greatest
        length; None where even the shortest does not."""
        room = self.room(context_len)
        limit: int | None = None
        while True:
            told = choose_feedback(problem, verdict, self.rules, seed, limit)
            ended = completion.finish_reason == "stop"
            observed = self.chat.observe(told, ended, begun)
            if len(observed) <= room:
                return observed
            # a tenth less than in proportion: the tokens around the text do not shrink with it
            shorter = len(told) * max(room, 0) * 9 // (len(observed) * 10)
            if limit is not None and len(told) > limit:
                return None  # the last try was the shortest already
            limit = shorter


async def rollout(
    problems: Sequence[Problem],
    engine: Engine,
    judge: Judge,
    chat: ChatFormat,
    rules: Rules,
    seeds: Sequence[int],
) -> Rollout:
    """One episode a problem. Every problem ends as exactly one episode or one counted drop."""
    dialogues = DialogueLoop(engine, judge, chat, rules)
    held = []
    async with dialogues.text_lock:  # nobody speaks before all have come: the local engine's waves
        for number, (problem, seed) in enumerate(zip(problems, seeds, strict=True)):
            held.append(asyncio.ensure_future(dialogues.hold(problem, seed)))
            if number % START_TOGETHER == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
    return Rollout(tuple(await asyncio.gather(*held)))


def roll_out_on_all_ranks(
    problems: Sequence[Problem],
    engine: Engine,
    judge: Judge,
    chat: ChatFormat,
    rules: Rules,
    seed: int,
) -> Rollout:
    """Each rank holds its share of the dialogues; then all ranks have all outcomes, in the order of
    the problems. EngineLostError on all ranks, where an engine is lost on one."""
    mine = roll_out_my_share(problems, engine, judge, chat, rules, seed)
    return join_shares(lambda: asyncio.run(mine))


async def roll_out_my_share(
    problems: Sequence[Problem],
    engine: Engine,
    judge: Judge,
    chat: ChatFormat,
    rules: Rules,
    seed: int,
) -> Rollout:
    mine = my_share(list(enumerate(problems)))
    seeds = [derive_seed(seed, number) for number, _ in mine]
    return await rollout([p for _, p in mine], engine, judge, chat, rules, seeds)


def join_shares(held: Callable[[], Rollout]) -> Rollout:
    """All ranks' shares, once this rank's is `held`."""
    shares = gather_unless_lost(held)
    return Rollout(tuple(interleave([share.outcomes for share in shares])))


def make_episode(problem: Problem, token_ids: tuple[int, ...], turns: Sequence[Turn]) -> Episode:
    return Episode(
        problem_id=problem.id,
        family=problem.family,
        token_ids=token_ids,
        turns=tuple(turns),
        solved=bool(turns[-1].verdict.solved),
    )


def make_turn(
    context_len: int, completion: Completion, program: str | None, verdict: Verdict
) -> Turn:
    return Turn(
        context_len=context_len,
        action_ids=completion.token_ids,
        action_logprobs=completion.logprobs,
        weight_versions=completion.weight_versions,
        program=program,
        verdict=verdict,
    )


def show_private_tests(problem: Problem) -> Problem:
    """The ablation with feedback from private tests (RLEF B.3): of up to 20 tests in all, public
    ones first, the dialogue shows what failed, 8 at most (`Template.max_tests`)."""
    hidden = problem.private_tests.tests
    showable = [test for test in hidden if isinstance(test, PublicTest)]
    shown = showable[: max(0, TESTS_WITH_PRIVATE - len(problem.public_tests))]
    kept = tuple(test for test in hidden if not any(test is one for one in shown))
    return replace(
        problem,
        public_tests=(*problem.public_tests, *shown),
        private_tests=PrivateTests(kept),
    )


def choose_feedback(
    problem: Problem, verdict: Verdict, rules: Rules, seed: int, max_characters: int | None = None
) -> str:
    """What the model is told: the truth, nothing, or what happened to another problem's program."""
    if rules.feedback == "none":
        return templates.feedback_withheld(problem.template)
    outcomes = verdict.public
    if rules.feedback == "random":
        others = [d for d in rules.distractors if d.problem_id != problem.id]
        assert others, "at least two problems give distractors"
        outcomes = others[seed % len(others)].outcomes
    return templates.feedback(outcomes, problem.template, max_characters)


def distractors_of(episodes: Sequence[Episode]) -> tuple[Distractor, ...]:
    """The failed first responses among these episodes, as feedback for others; none where all are
    of one problem, which then has no others."""
    first_turns = ((episode.problem_id, episode.turns[0].verdict) for episode in episodes)
    failed = tuple(
        Distractor(problem_id, verdict.public)
        for problem_id, verdict in first_turns
        if not verdict.public_passed
    )
    return failed if len({distractor.problem_id for distractor in failed}) > 1 else ()


def gather_unless_lost(work: Callable[[], Item]) -> list[Item]:
    """What `work` comes to on every rank, as `gather`. EngineLostError on all ranks if on one: they
    stop together."""
    try:
        mine, lost = work(), ""
    except EngineLostError as error:
        mine, lost = None, str(error)
    everyone = gather((mine, lost))
    for _, why in everyone:
        if why:
            raise EngineLostError(why)
    return [theirs for theirs, _ in everyone]  # type: ignore[misc]
