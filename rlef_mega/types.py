"""The data of a training step: one frozen dataclass for each stage.

    Problem -> Episode (of Turns) -> Batch -> Scores -> Targets

A dialogue about a `Problem` is an `Episode`: turns of exact token ids. The episodes of a step are
packed into one `Batch`. The learner scores the batch (`Scores`), `targets_of` turns the scores
into `Targets`, and these update the policy and the critic. No stage writes into the data of an
earlier one.

Shape suffixes, used in all of rlef_mega:

    T  all tokens of a packed batch: prompts, feedback and responses
    A  action tokens: the response tokens of the batch, in order
    N  turns of the batch, in order
    E  episodes of the batch
    M  values: one for each turn (M = N) or, with token-level values, for each action token (M = A)
"""

from dataclasses import dataclass, field

import torch

from rlef_sandbox import AnyTest, CallTest, CheckerProgram, CheckTest, Limits, Result, Status, Test
from rlef_sandbox.languages import LANGUAGES as LANGUAGES


@dataclass(frozen=True)
class AssertTest(CheckTest):
    """A `CheckTest` that can be shown to the model: `statement` is the assert that its code runs.
    The last line that a failing run writes is an error with the values that were compared."""

    __test__ = False

    statement: str = ""


TEMPLATE_NAMES = ("codecontests", "humaneval", "mbpp", "functions", "curriculum")  # last 2: ours
PublicTest = Test | CallTest | AssertTest  # what can be shown to the model


@dataclass(frozen=True)
class PrivateTests:
    """Tests that decide the reward. They have a type of their own so that code which builds
    dialogues cannot take them by mistake."""

    tests: tuple[AnyTest, ...]


@dataclass(frozen=True)
class Problem:
    """A statement with public tests (feedback) and private tests (reward)."""

    id: str
    statement: str
    public_tests: tuple[PublicTest, ...]
    private_tests: PrivateTests
    limits: Limits = field(default_factory=Limits)
    checker: str | CheckerProgram = "tokens"
    language: str = "python"
    template: str = "codecontests"  # of prompts and feedback, one of TEMPLATE_NAMES
    entry_point: str | None = None  # function-call problems
    prelude: str = ""  # lines put before every program: what the benchmark's grader imports
    family: str = ""  # reports break results down by it: a curriculum family, a source
    difficulty: str = ""  # a second breakdown, in the words of the problem's source
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.public_tests and not self.private_tests.tests:
            raise ValueError(f"problem {self.id!r} has no tests; drop it or give it at least one")


def tests_of(problem: Problem) -> tuple[AnyTest, ...]:
    """Return all tests in the order in which they run, in the sandbox's types."""
    return tuple(
        CheckTest(test.entry_point, test.code, compiled=False)
        if isinstance(test, AssertTest)
        else test
        for test in (*problem.public_tests, *problem.private_tests.tests)
    )


@dataclass(frozen=True)
class TestOutcome:
    """A test and what the program did on it, as the model may see it."""

    __test__ = False  # not a pytest class

    test: PublicTest
    result: Result


@dataclass(frozen=True)
class Verdict:
    """The grading of one response. `solved` is None unless the response was final.

    A final response that passes the public tests is run on the private tests, until the first
    failure; only their statuses are kept."""

    public: tuple[TestOutcome, ...]
    public_passed: bool
    solved: bool | None
    private_statuses: tuple[Status, ...] = ()
    invalid: str = ""  # why the response holds no valid code


@dataclass(frozen=True)
class Sampling:
    """How to sample a response. Training uses temperature 1, no top-p and no top-k (RLEF 3.1)."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A response as the engine sampled it; each tuple has one entry for each token."""

    token_ids: tuple[int, ...]  # the end-of-turn token included, if it was sampled
    logprobs: tuple[float, ...]  # at the sampling temperature
    weight_versions: tuple[int, ...]  # of the weights that produced the token
    finish_reason: str  # "stop" | "length"

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs) == len(self.weight_versions)


@dataclass(frozen=True)
class Turn:
    """One response, and the tokens that the model observed since its last response: the prompt in
    the first turn, feedback in the others."""

    observed_ids: tuple[int, ...]
    completion: Completion
    program: str | None  # None: the response holds no valid code
    verdict: Verdict


@dataclass(frozen=True)
class Episode:
    """A whole dialogue. Its token ids are never decoded and encoded again."""

    problem_id: str
    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        assert self.turns, "an episode has at least one response"

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return all tokens of the dialogue; the last one ends the last response."""
        return (*self.context(len(self.turns) - 1), *self.turns[-1].completion.token_ids)

    def context(self, number: int) -> tuple[int, ...]:
        """Return all tokens before the response of turn `number`: what the engine was given."""
        before = [
            i for t in self.turns[:number] for i in (*t.observed_ids, *t.completion.token_ids)
        ]
        return (*before, *self.turns[number].observed_ids)

    @property
    def solved(self) -> bool:
        return bool(self.turns[-1].verdict.solved)


@dataclass(frozen=True)
class Batch:
    """Episodes packed without padding (thd). Episode e has the tokens from cu_seqlens[e] to before
    cu_seqlens[e + 1].

    The log-prob of token t is computed from the hidden state at t - 1. A turn's value is read at
    the last token of its prompt, whose next token is the first of the response (RLEF A.1).
    """

    token_ids_T: torch.Tensor  # int64
    cu_seqlens: torch.Tensor  # int32 [E + 1]
    action_positions_A: torch.Tensor  # int64, into T
    turn_of_action_A: torch.Tensor  # int64, into N
    behaviour_logprobs_A: torch.Tensor  # fp32, of the policy that sampled the token
    weight_versions_A: torch.Tensor  # int64, of the weights that sampled the token
    value_positions_N: torch.Tensor  # int64, into T
    episode_of_turn_N: torch.Tensor  # int64, into E
    group_of_turn_N: torch.Tensor  # int64: one group for turn t of all dialogues about a problem
    valid_code_N: torch.Tensor  # bool: the response holds valid code
    solved_E: torch.Tensor  # bool: the last response passes all tests

    @property
    def action_bounds(self) -> torch.Tensor:
        """Return [E + 1]: episode e has the actions action_bounds[e]:action_bounds[e + 1]."""
        return torch.searchsorted(self.action_positions_A, self.cu_seqlens.long())

    @property
    def turn_bounds(self) -> torch.Tensor:
        """Return [E + 1]: episode e has the turns turn_bounds[e]:turn_bounds[e + 1]."""
        return torch.searchsorted(self.value_positions_N, self.cu_seqlens.long())

    @property
    def num_sequences(self) -> int:
        return self.solved_E.numel()

    @property
    def num_turns(self) -> int:
        return self.value_positions_N.numel()

    @property
    def num_actions(self) -> int:
        return self.action_positions_A.numel()

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.numel()


@dataclass(frozen=True)
class Scores:
    """The networks' outputs on a batch, before the batch's updates; fp32."""

    old_logprobs_A: torch.Tensor  # of the policy
    ref_logprobs_A: torch.Tensor | None  # of the frozen reference; None without a KL penalty
    values_M: torch.Tensor | None  # of the critic; None without one
    # KL(policy || reference) over the vocabulary at the token's position; only for ppo.kl = "exact"
    kl_A: torch.Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """The inputs of a batch's losses that stay constant over its updates; fp32."""

    old_logprobs_A: torch.Tensor
    advantages_A: torch.Tensor  # the same for all tokens of a turn, unless values are token-level
    old_values_M: torch.Tensor | None
    returns_M: torch.Tensor
