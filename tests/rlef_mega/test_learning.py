"""Reinforcement learning that works: a few RLEF steps, made of the parts that `rlef train` uses,
teach a tiny model to read execution feedback.

The task. A problem asks for a program that prints one digit, and only the failure message of the
public test shows which. A response is one token of the vocabulary, a whole program. Without reading
the feedback, two responses solve at most a quarter of the problems; a model that copies the
expected output from the feedback solves all of them. The start is a model that was shown dialogues
in which the second response copies it now and then.

Not tested: faults that need long responses, several ranks or stale weights.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlef_mega import metrics
from rlef_mega.config import LearnerConfig, OptimizerConfig, PPOConfig
from rlef_mega.dialogues import templates
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import EmbeddedGrader, Judge
from rlef_mega.dialogues.rollout import DialogueLoop, Rules, derive_seed, distractors_of
from rlef_mega.engines.local import LocalEngine
from rlef_mega.engines.publish import publish
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.packing import pack, shuffled
from rlef_mega.targets import targets_of
from rlef_mega.types import PrivateTests, Problem, Sampling, TestOutcome
from rlef_sandbox import Result, Sandbox, Status, Test
from tests.rlef_mega.tiny_llama import tiny_llama

DIGITS = range(8)
PROGRAMS = [f"```python\nprint({digit})\n```" for digit in DIGITS]
VOCABULARY = ["<text>", "<user>", "<assistant>", "<end>", *map(str, DIGITS), *PROGRAMS]
END = VOCABULARY.index("<end>")
PROBLEMS = [
    Problem(
        id=f"digit {digit}",
        statement="Print the digit that the test asks for.",
        public_tests=(Test("", f"{digit}\n"),),
        private_tests=PrivateTests((Test("", f"{digit}\n"),)),
        template="curriculum",
    )
    for digit in DIGITS
]
RULES = Rules(turns=2, sampling=Sampling(2, stop_token_ids=(END,)), max_context=60)
COPIES = 0.3  # how often the second response of a shown dialogue copies the expected digit
STEPS, DIALOGUES = 8, 96


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    """Return a chat format in which all text between digits and programs is one token."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<text>"))
    programs = r"```python\nprint\(\d\)\n```"
    words.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{programs}|\d"), "isolated")
    words.decoder = decoders.Fuse()
    return ChatFormat(
        PreTrainedTokenizerFast(tokenizer_object=words),
        begin=(),
        user_header=(VOCABULARY.index("<user>"),),
        user_lead="",
        assistant_header=(VOCABULARY.index("<assistant>"),),
        end_of_turn=END,
        between=(),
        stop_token_ids=(END,),
    )


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Sandbox(workers=1) as sandbox:
        yield Judge(EmbeddedGrader(sandbox, workers=1))


def shown_dialogue(chat: ChatFormat, source: random.Random) -> tuple[list[int], list[bool]]:
    """Return the ids of a dialogue, and which of them have a loss."""
    expected, printed = source.sample(DIGITS, 2)
    problem, first, second = PROBLEMS[expected], PROGRAMS[printed], source.choice(PROGRAMS)
    if source.random() < COPIES:
        second = PROGRAMS[expected]
    result = Result(Status.WRONG_ANSWER, b"%d" % printed, b"", 0, None, 0.0, 0.0, 0)
    failure = TestOutcome(problem.public_tests[0], result)
    asked = chat.open(templates.first_prompt(problem.statement, "curriculum", ()))
    told = chat.observe(templates.feedback((failure,), "curriculum"), ended=False)[1:]
    ids, learned = list(asked), [False] * len(asked)
    for more, is_response in ((chat.respond(first), True), (told, False)):
        ids, learned = ids + more, learned + [is_response] * len(more)
    return ids + chat.respond(second), [*learned, True, True]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, chat: ChatFormat) -> Path:
    """Train a model that answers in the right format, and sometimes copies the expected digit."""
    model = tiny_llama(len(VOCABULARY), initializer_range=0.1, max_position_embeddings=128)
    source = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        dialogues = [shown_dialogue(chat, source) for _ in range(64)]
        ids, learned = map(torch.tensor, zip(*dialogues, strict=True))
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits[learned[:, 1:]], ids[:, 1:][learned[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def solve_rates(
    base: Path,
    chat: ChatFormat,
    judge: Judge,
    ranks: Ranks,
    *,
    sign: int = 1,
    feedback: str = "true",
    **estimator: Any,
) -> list[float]:
    """Train. Returns the solve rates of the rollouts: of the base model, and after each step."""
    optimizer = OptimizerConfig(lr=2e-3, warmup_updates=0)
    learner = Learner(
        ranks,
        base,
        learner=LearnerConfig(policy=optimizer, critic=optimizer),
        ppo=PPOConfig(updates_per_batch=4, **estimator),
        dtype="float32",
        temperature=1.0,
    )
    engine = LocalEngine(base)
    loop = DialogueLoop(engine, judge, chat, RULES)
    problems = PROBLEMS * (DIALOGUES // len(PROBLEMS))
    if feedback == "random":
        others = distractors_of(loop.run_on_all_ranks(problems, 0).episodes)
        loop = loop.under(replace(RULES, feedback="random", distractors=others))
    rates = []
    for step in range(STEPS + 1):
        rollout = loop.run_on_all_ranks(problems, derive_seed("learning", step))
        assert not rollout.reasons
        rates.append(metrics.episode_metrics(rollout.episodes)["solved"])
        batch = pack(rollout.episodes)
        scores = learner.score(batch)
        targets, _ = targets_of(batch, scores, learner.ppo)
        targets = replace(targets, advantages_A=sign * targets.advantages_A)
        learner.update(batch, targets, shuffled(batch.num_sequences, step))
        publish(learner.policy_weights, engine, version=step + 1)
    return rates


def late(rates: list[float]) -> float:
    """Return the mean of the last three rates; its standard error is below 0.03."""
    return sum(rates[-3:]) / 3


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param({}, id="critic"),
        pytest.param({"advantage": "rloo"}, id="RLOO", marks=pytest.mark.slow),
        pytest.param({"advantage": "grpo"}, id="GRPO", marks=pytest.mark.slow),
        pytest.param({"lam": 0.5}, id="lambda 0.5", marks=pytest.mark.slow),
    ],
)
def test_a_few_steps_teach_the_model_to_read_feedback(base, chat, judge, ranks, estimator) -> None:
    """A batch has twelve dialogues about each problem."""
    rates = solve_rates(base, chat, judge, ranks, **estimator)
    assert 0.35 < rates[0] < 0.6 and late(rates) > rates[0] + 0.25, rates


def test_with_the_sign_of_advantages_flipped_the_model_gets_worse(base, chat, judge, ranks) -> None:
    rates = solve_rates(base, chat, judge, ranks, sign=-1)
    assert late(rates) < rates[0] - 0.15, rates


@pytest.mark.slow
def test_from_another_problems_feedback_nothing_is_learned(base, chat, judge, ranks) -> None:
    rates = solve_rates(base, chat, judge, ranks, feedback="random")
    assert late(rates) < 0.35, rates
