"""What flows: one frozen dataclass a stage.

A `Problem` becomes an `Episode` (turns of exact token ids), episodes are packed into a `Batch`, the
batch is scored (`Scores`) and turned into `Targets`, which update policy and critic. No type has a
field that a later stage fills in.

Shape suffixes: T packed tokens of a batch, N turns in episode order, E episodes.
"""

from dataclasses import dataclass, field

import torch

from rlef_sandbox import (
    AnyTest,
    CallTest,
    CheckerProgram,
    CheckTest,
    Limits,
    Result,
    Status,
    Test,
)


@dataclass(frozen=True)
class AssertTest(CheckTest):
    """A `CheckTest` that can be shown: `statement` is the assert that its code carries out, and the
    last line which a failing run writes is an error with the values that were compared."""

    __test__ = False

    statement: str = ""


LANGUAGES = ("python", "cpp")
TEMPLATE_NAMES = ("codecontests", "humaneval", "mbpp", "curriculum")  # RLEF C.1, C.4, C.5, ours
PublicTest = Test | CallTest | AssertTest  # what can be shown to the model


@dataclass(frozen=True)
class PrivateTests:
    """Tests that decide the reward. A type of their own, so that what builds dialogues cannot take
    them by mistake."""

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
    template: str = "codecontests"  # which prompt and feedback templates of RLEF C.1, C.4, C.5
    entry_point: str | None = None  # function-call problems
    prelude: str = ""  # whole lines before every program: what a benchmark's grader imports
    family: str = ""  # breakdowns in reports: a curriculum family, a source
    difficulty: str = ""  # another breakdown, in the words of its source
    tags: tuple[str, ...] = ()
    wrong_programs: tuple[str, ...] = ()  # known to fail, for random feedback (RLEF C.2)

    def __post_init__(self) -> None:
        if not self.public_tests and not self.private_tests.tests:
            raise ValueError(f"problem {self.id!r} has no tests; drop it or give it at least one")


@dataclass(frozen=True)
class TestOutcome:
    """One test and what the program did on it, as the model may see it."""

    __test__ = False  # not a pytest class

    test: PublicTest
    result: Result


@dataclass(frozen=True)
class Verdict:
    """Grading of one response. `solved` is None unless the response was final and went to the
    private tests, of which no more is known here than how each ended; the first that fails is the
    last that is run."""

    public: tuple[TestOutcome, ...]
    public_passed: bool
    solved: bool | None
    private_statuses: tuple[Status, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How to sample a response. Training uses temperature 1 and neither top-p nor top-k (RLEF
    3.1)."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What an engine sampled: exact ids, end-of-turn token included, with their log-probs at the
    sampling temperature.

    `weight_versions` has one entry a token: the version of the weights that produced it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: str  # "stop" | "length"


@dataclass(frozen=True)
class Turn:
    """One model response. The tokens between turns are observations, appended verbatim."""

    context_len: int  # tokens of the dialogue before the first action token
    action_ids: tuple[int, ...]  # end-of-turn token included, when it was sampled
    action_logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    program: str | None  # None: no valid code
    verdict: Verdict


@dataclass(frozen=True)
class Episode:
    """A whole dialogue. `token_ids` are made once and never re-encoded from text."""

    problem_id: str
    family: str
    token_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    solved: bool

    def __post_init__(self) -> None:
        """Token-in token-out: the ids that will be scored are the ids that the engine sampled."""
        for number, turn in enumerate(self.turns):
            end = turn.context_len + len(turn.action_ids)
            sampled = self.token_ids[turn.context_len : end]
            assert sampled == turn.action_ids, f"turn {number} of {self.problem_id}: ids differ"
            assert len(turn.action_logprobs) == len(turn.action_ids)
        assert self.turns and end == len(self.token_ids), "an episode ends with a response"


@dataclass(frozen=True)
class Batch:
    """Episodes packed without padding (thd). Sequence e occupies cu_seqlens[e]:cu_seqlens[e + 1].

    The log-prob of token t is read from the hidden state at t - 1; a turn's value is read at the
    last token of its prompt, the position whose next token is the first of the response (RLEF A.1).
    """

    token_ids_T: torch.Tensor  # int64
    position_ids_T: torch.Tensor  # int64, restarts at 0 in each sequence
    cu_seqlens: torch.Tensor  # int32 [E + 1]
    action_mask_T: torch.Tensor  # bool: response tokens
    turn_index_T: torch.Tensor  # int64: which turn a response token belongs to; -1 elsewhere
    behaviour_logprobs_T: torch.Tensor  # fp32; 0 where action_mask is False
    weight_versions_T: torch.Tensor  # int64: of the weights that sampled it; -1 where none did
    value_positions_N: torch.Tensor  # int64 into T
    episode_of_turn_N: torch.Tensor  # int64
    rewards_N: torch.Tensor  # fp32 task rewards, without KL

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_turns(self) -> int:
        return self.value_positions_N.numel()

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.numel()


@dataclass(frozen=True)
class Scores:
    """What the trainer reads off the batch before its updates.

    With token-level values (RLEF B.6) `values` has one entry a response token (in order), else one
    a turn.
    """

    old_logprobs_T: torch.Tensor  # fp32; 0 where action_mask is False
    ref_logprobs_T: torch.Tensor
    values_N: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """What the updates aim for, constant over the updates of one batch.

    advantages, returns and old values are per turn; with token-level values, per response token.
    """

    old_logprobs_T: torch.Tensor
    old_values_N: torch.Tensor
    advantages_N: torch.Tensor
    returns_N: torch.Tensor
