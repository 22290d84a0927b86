"""Dialogues against an engine that says what a test tells it, with the real judge, sandbox and chat
format."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.inspect import length_of, summarize
from rlef_mega.dialogues.judge import EmbeddedGrader, Judge
from rlef_mega.dialogues.rollout import (
    DialogueLoop,
    Rules,
    derive_seed,
    distractors_of,
    first_context,
    show_private_tests,
)
from rlef_mega.engines import EngineError, GenerationRequest, Session
from rlef_mega.types import Completion, PrivateTests, Problem, Sampling
from rlef_sandbox import Sandbox, Test


class ScriptedEngine:
    """Answers dialogue number n with the responses of script n, one per turn; an exception is
    raised."""

    weight_version = 7

    def __init__(self, chat: ChatFormat, *scripts: Sequence[str | Exception]) -> None:
        self.chat = chat
        self.scripts = [list(script) for script in scripts]
        self.opened = 0

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        script = self.scripts[self.opened % len(self.scripts)]
        self.opened += 1

        async def answer(request: GenerationRequest) -> Completion:
            said = script.pop(0)
            if isinstance(said, Exception):
                raise said
            ids = tuple(self.chat.respond(said))
            return Completion(ids, (-0.5,) * len(ids), (7,) * len(ids), "stop")

        yield answer


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("tokenizer")
    return ChatFormat.for_tokenizer(train_tokenizer(folder, 704))


@pytest.fixture(scope="module")
def judge():
    with Sandbox(workers=1) as sandbox:
        yield Judge(EmbeddedGrader(sandbox, workers=1))


RULES = Rules(turns=3, sampling=Sampling(max_new_tokens=60), max_context=600)
GREET = Problem(
    id="greet",
    statement="Greet the person whose name is given.",
    public_tests=(Test("Bob\n", "Hello Bob\n"),),
    private_tests=PrivateTests((Test("Zoe\n", "Hello Zoe\n"), Test("Ida\n", "Hello Ida\n"))),
    template="curriculum",
)
RIGHT = "```python\nprint('Hello',input())\n```"
WRONG = "```python\nprint('Ciao',input())\n```"
HARD_CODED = "```python\nprint('Hello Bob')\n```"
NO_CODE = "I am not sure."


def hold(chat, judge, *scripts, problem=GREET, rules=RULES):
    engine = ScriptedEngine(chat, *scripts)
    problems = [problem] * len(scripts)
    return asyncio.run(DialogueLoop(engine, judge, chat, rules).run_my_share(problems, 0))


def text(chat, episode) -> str:
    return chat.decode(episode.token_ids)


def test_a_right_program_ends_the_dialogue_at_once(chat, judge):
    (episode,) = hold(chat, judge, [RIGHT]).episodes
    assert episode.solved and len(episode.turns) == 1
    assert episode.turns[0].completion.weight_versions == (7,) * len(chat.respond(RIGHT))


def test_feedback_shows_the_public_test_and_the_dialogue_goes_on(chat, judge):
    (episode,) = hold(chat, judge, [WRONG, RIGHT]).episodes
    assert episode.solved and len(episode.turns) == 2
    assert "Expected output 'Hello Bob' but got 'Ciao Bob'" in text(chat, episode)
    assert [turn.verdict.solved for turn in episode.turns] == [None, True]


def test_no_private_test_ever_enters_a_dialogue(chat, judge):
    for script in ([WRONG, NO_CODE, WRONG], [HARD_CODED], [WRONG, WRONG, RIGHT]):
        (episode,) = hold(chat, judge, script).episodes
        assert "Zoe" not in text(chat, episode) and "Ida" not in text(chat, episode)


def test_printing_the_public_output_ends_the_dialogue_unsolved(chat, judge):
    (episode,) = hold(chat, judge, [HARD_CODED, RIGHT]).episodes
    assert len(episode.turns) == 1 and not episode.solved
    assert episode.turns[0].verdict.public_passed


def test_a_response_without_code_is_not_a_program_and_feedback_says_so(chat, judge):
    (episode,) = hold(chat, judge, [NO_CODE, f"```python\n{WRONG[10:-5]}\n```", RIGHT]).episodes
    assert [turn.program is None for turn in episode.turns] == [True, True, False]
    assert episode.solved and "- No code block found.\n" in text(chat, episode)
    assert "- SyntaxError: '(' was never closed\n" in text(chat, episode)


def test_the_rules_say_which_of_several_programs_counts(chat, judge):
    for which, said in ("first", [f"{RIGHT}\n{WRONG}"]), ("last", [f"{WRONG}\n{RIGHT}"]):
        (episode,) = hold(chat, judge, said, rules=replace(RULES, program=which)).episodes
        assert episode.solved
    both = [f"{RIGHT}\n{WRONG}"] * 3
    (episode,) = hold(chat, judge, both, rules=replace(RULES, program="only")).episodes
    assert "More than one code block" in text(chat, episode) and not episode.solved


def test_the_last_turn_is_final_and_graded(chat, judge):
    (episode,) = hold(chat, judge, [WRONG] * 3).episodes
    assert [turn.verdict.solved for turn in episode.turns] == [None, None, False]
    (single,) = hold(chat, judge, [WRONG], rules=replace(RULES, turns=1)).episodes
    assert single.turns[0].verdict.solved is False


def test_withheld_feedback_tells_nothing(chat, judge):
    rules = replace(RULES, feedback="none")
    (episode,) = hold(chat, judge, [WRONG, RIGHT], rules=rules).episodes
    assert "Hello Bob" not in text(chat, episode)
    assert episode.solved


def test_random_feedback_is_another_problems_but_the_real_tests_end_the_dialogue(chat, judge):
    other = replace(GREET, id="other", public_tests=(Test("Kim\n", "Dear Kim\n"),))
    (failed,) = hold(chat, judge, [WRONG] * 3, problem=other).episodes
    assert not distractors_of([failed])  # the other problem would have none
    (own,) = hold(chat, judge, [WRONG] * 3).episodes
    pool = distractors_of([failed, own])
    assert [d.problem_id for d in pool] == ["other", "greet"]
    rules = replace(RULES, feedback="random", distractors=pool)
    (episode,) = hold(chat, judge, [WRONG, RIGHT], rules=rules).episodes
    assert "Expected output 'Dear Kim'" in text(chat, episode)
    assert "Expected output 'Hello Bob'" not in text(chat, episode)
    assert episode.solved


def test_a_dialogue_whose_engine_fails_is_retried_then_dropped_and_counted(chat, judge):
    once, always = [EngineError("lost"), RIGHT], [EngineError("lost"), EngineError("lost")]
    held = hold(chat, judge, once)
    assert [episode.solved for episode in held.episodes] == [True]
    held = hold(chat, judge, always)
    assert not held.episodes
    assert held.reasons == {"EngineError: lost": 1}


def test_a_faulty_dialogue_costs_the_others_nothing(chat, judge):
    """The second of three dialogues fails in its session, and again in the next, which it opens
    when all three have theirs."""
    fault = [EngineError("lost")]
    engine = ScriptedEngine(chat, [RIGHT], fault, [WRONG, RIGHT], fault)
    held = asyncio.run(DialogueLoop(engine, judge, chat, RULES).run_my_share([GREET] * 3, 0))
    assert [len(o.turns) if not isinstance(o, str) else o for o in held.outcomes] == [
        1,
        "EngineError: lost",
        2,
    ]


class CountingChat:
    """Counts the pieces of text that it works on."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat, self.pieces = chat, 0

    def __getattr__(self, name):
        if name in ("open", "decode", "observe"):
            self.pieces += 1
        return getattr(self.chat, name)


def test_the_loop_processes_one_text_per_turn_however_many_answers_arrive_at_once(chat, judge):
    counting = CountingChat(chat)
    engine = ScriptedEngine(chat, *[[NO_CODE, NO_CODE]] * 300)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            before = counting.pieces
            await asyncio.sleep(0)
            most = max(most, counting.pieces - before)

    async def run() -> None:
        watching = asyncio.ensure_future(watch())
        rules = replace(RULES, turns=2)
        held = await DialogueLoop(engine, judge, counting, rules).run_my_share([GREET] * 300, 0)
        assert len(held.episodes) == 300
        watching.cancel()

    asyncio.run(run())
    assert counting.pieces == 300 * 4 and most == 1


def test_all_sessions_are_open_before_the_first_request(chat, judge):
    """The embedded engine's waves need this, also with more than START_TOGETHER dialogues."""
    opened = []

    class Watching(ScriptedEngine):
        @asynccontextmanager
        async def session(self):
            async with super().session() as session:

                async def watched(request):
                    opened.append(self.opened)
                    return await session(request)

                yield watched

    engine = Watching(chat, *[[NO_CODE]] * 450)
    rules = replace(RULES, turns=1)
    asyncio.run(DialogueLoop(engine, judge, chat, rules).run_my_share([GREET] * 450, 0))
    assert set(opened) == {450} and len(opened) == 450


def test_a_full_context_ends_the_dialogue_unsolved(chat, judge):
    (whole,) = hold(chat, judge, [WRONG, RIGHT]).episodes
    room = len(whole.context(1)) + RULES.sampling.max_new_tokens
    (fits,) = hold(chat, judge, [WRONG, RIGHT], rules=replace(RULES, max_context=room)).episodes
    assert fits.solved
    (full,) = hold(chat, judge, [WRONG, RIGHT], rules=replace(RULES, max_context=room - 1)).episodes
    assert len(full.turns) == 1 and not full.solved


def test_a_prompt_that_does_not_fit_is_dropped_and_counted(chat, judge):
    held = hold(chat, judge, [RIGHT], rules=replace(RULES, max_context=70))
    assert held.reasons == {"prompt too long": 1}


def test_seeds_are_streams_of_their_own():
    seeds = {
        derive_seed(run, step, place) for run in range(3) for step in range(9) for place in range(9)
    }
    assert len(seeds) == 3 * 9 * 9
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_feedback_from_private_tests_shows_them_and_their_success_ends_the_dialogue(chat, judge):
    rules = replace(RULES, feedback="private")
    (episode,) = hold(chat, judge, [HARD_CODED, RIGHT], rules=rules).episodes
    told = text(chat, episode)
    assert "Expected output 'Hello Zoe' but got 'Hello Bob'" in told and episode.solved
    assert "Zoe" not in chat.decode(episode.context(0))
    many = tuple(Test(f"N{n}\n", f"Hello N{n}\n") for n in range(30))
    shown = show_private_tests(replace(GREET, private_tests=PrivateTests(many)))
    assert len(shown.public_tests) == 20 and len(shown.private_tests.tests) == 11
    assert shown.public_tests[1:] + shown.private_tests.tests == many


def test_a_response_that_was_begun_counts_only_what_the_model_said(chat, judge):
    statement = "def greet():\n    name = input()"
    problem = replace(GREET, template="humaneval", statement=statement)
    answer = "    print('Hello', name)\n\ngreet()\n```"
    (episode,) = hold(chat, judge, ["    pass\n```", answer], problem=problem).episodes
    assert episode.solved and len(episode.turns) == 2
    for number, turn in enumerate(episode.turns):
        before = chat.decode(episode.context(number))
        assert before.endswith(f"```python\n{statement}\n")
        assert turn.program.startswith(statement)
    assert chat.decode(episode.turns[1].completion.token_ids) == answer


def test_an_inspection_counts_the_first_prompt_with_what_begins_the_response(chat, tmp_path):
    problem = replace(GREET, template="humaneval", statement="def greet():\n    name = input()")
    chat.tokenizer.save_pretrained(tmp_path)
    found = summarize([problem], *length_of(tmp_path))["prompt in tokens"]
    assert found.startswith(f"min {len(first_context(problem, chat)[0])},")


def test_feedback_is_shortened_to_what_the_context_has_room_for(chat, judge):
    shout = "```python\nprint('Ciao' + 'o' * 999, input())\n```"
    long = replace(GREET, template="codecontests")
    lengths = {}
    for room in (5000, 900):
        rules = replace(RULES, max_context=room)
        (episode,) = hold(chat, judge, [shout, RIGHT], problem=long, rules=rules).episodes
        assert episode.solved and len(episode.turns) == 2
        assert "left out" in text(chat, episode) or room == 5000
        lengths[room] = len(episode.context(1))
        assert len(episode.context(1)) + RULES.sampling.max_new_tokens <= room
    assert lengths[900] < lengths[5000]


def test_feedback_keeps_a_budget_of_its_own_or_is_as_short_as_possible(chat, judge):
    """Too small a budget does not end the dialogue."""
    shout = "```python\nprint('Ciao' + 'o' * 999, input())\n```"
    long = replace(GREET, template="codecontests")
    lengths = {}
    for tokens in (None, 500, 400, 10, 1):
        rules = replace(RULES, max_context=5000, feedback_tokens=tokens, feedback_cut="right")
        (episode,) = hold(chat, judge, [shout, RIGHT], problem=long, rules=rules).episodes
        assert episode.solved
        lengths[tokens] = len(episode.turns[1].observed_ids)
    assert lengths[None] > 500 >= lengths[500] > lengths[400] > lengths[10] == lengths[1] > 10


def test_a_full_context_makes_the_failed_response_the_last_one(chat, judge):
    prompt = len(hold(chat, judge, [RIGHT]).episodes[0].context(0))
    rules = replace(RULES, max_context=prompt + 60 + 5)  # a response, and no word more
    (episode,) = hold(chat, judge, [WRONG, RIGHT], rules=rules).episodes
    assert len(episode.turns) == 1 and not episode.solved
    assert hold(chat, judge, [RIGHT], rules=replace(rules, max_context=prompt)).reasons == {
        "prompt too long": 1
    }
