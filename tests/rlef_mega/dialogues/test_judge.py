"""Judging on grading servers: the verdicts of the embedded sandbox, even when servers fail."""

import __future__

import asyncio
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rlef_mega.config import ConfigError, JudgeConfig
from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import (
    EmbeddedGrader,
    Judge,
    JudgeError,
    RemoteGrader,
    check_judge,
    open_grader,
    with_prelude,
)
from rlef_mega.dialogues.programs import Extracted
from rlef_mega.dialogues.rollout import DialogueLoop, Rollout, Rules
from rlef_mega.run.guards import kinds_of
from rlef_mega.types import Episode, PrivateTests, Problem, Sampling, TestOutcome, Verdict
from rlef_sandbox import CallTest, Sandbox, Test
from tests.rlef_mega.dialogues.test_rollout import ScriptedEngine
from tests.sandbox.service_process import ONE_JOB, TOKEN, ServerProcess

RULES = Rules(turns=3, sampling=Sampling(max_new_tokens=80), max_context=800)
SQUARE = Problem(
    id="square",
    statement="Square the number.",
    public_tests=(Test("3", "9"), Test("-1", "1")),
    private_tests=PrivateTests((Test("12", "144"), Test("0", "0"))),
    template="curriculum",
)
DOUBLE = replace(
    SQUARE,
    id="double",
    public_tests=(CallTest("double", (3,), 6),),
    private_tests=PrivateTests((CallTest("double", ([1],), [1, 1]),)),
    entry_point="double",
)
PROGRAMS = (
    (SQUARE, "print(int(input()) ** 2)"),
    (SQUARE, "print(9)"),
    (SQUARE, "print(abs(int(input())) ** 2 if 1 else 1 / 0)"),
    (SQUARE, "n = int(input()); print(n * n if n < 10 else 1)"),
    (SQUARE, "1 / 0"),
    (SQUARE, None),
    (DOUBLE, "def double(x): return x * 2"),
    (DOUBLE, "def double(x): return x + x + (x if isinstance(x, list) else 0)"),
    (DOUBLE, "def triple(x): return 3 * x"),
)
SLOW_RIGHT = "```python\nimport time\ntime.sleep(.05)\nprint(int(input())**2)\n```"
WRONG = "```python\nprint(7)\n```"


IMPORT = "from __future__ import annotations"
FUTURE = {
    "alone": f"{IMPORT}\ndef f(x: Nowhere): return x\nprint(f(2) + math.pi)",
    "after_words": f'"""Words: {IMPORT}."""\n# more\n{IMPORT}\n',
    "on_several_lines": "from __future__ import (\n    annotations,\n    division,\n)\n",
    "twice_on_a_line": f"from __future__ import division; {IMPORT}; x = 1\n",
    "with_line_ends_of_windows": f"{IMPORT}\r\nx = 1\r\n",
}


@pytest.mark.parametrize("program", FUTURE.values(), ids=FUTURE)
def test_a_prelude_stands_after_the_programs_future_imports(program):
    problem = replace(SQUARE, prelude="import math\nx = 2\n")
    program += "\n1 / 0  # last"
    last = program.splitlines().index("1 / 0  # last")
    prelude, rest = with_prelude(problem, program)
    code = compile(prelude + rest, "solution.py", "exec", dont_inherit=True)
    assert code.co_flags & __future__.annotations.compiler_flag
    assert rest.splitlines().index("1 / 0  # last") == last and "x = 2" in prelude


def test_a_future_import_out_of_place_stays_an_error():
    problem = replace(SQUARE, prelude="import math\n")
    for program in ("x = 1\nfrom __future__ import annotations", "from __future__ import no_such"):
        with pytest.raises(SyntaxError):
            compile("".join(with_prelude(problem, program)), "solution.py", "exec")


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ChatFormat:
    return ChatFormat.for_tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer"), 704))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--workers", "2", token=TOKEN) as process:
        yield process


def remote(*servers: str, token: str | None = TOKEN, deadline_s: float = 60.0) -> RemoteGrader:
    return RemoteGrader(servers, token, deadline_s=deadline_s)


def judged(judge: Judge, *, last_turn: bool) -> list[Verdict]:
    async def judge_all() -> list[Verdict]:
        return await asyncio.gather(
            *(
                judge.judge(problem, Extracted(program), last_turn=last_turn)
                for problem, program in PROGRAMS
            )
        )

    return asyncio.run(judge_all())


def without_times(verdict: Verdict) -> Verdict:
    outcomes = (
        TestOutcome(o.test, replace(o.result, cpu_s=0, wall_s=0, max_rss_bytes=0))
        for o in verdict.public
    )
    return replace(verdict, public=tuple(outcomes))


def test_servers_give_the_verdicts_of_the_embedded_sandbox(server):
    with Sandbox(workers=1) as sandbox, remote(server.url) as grader:
        for last_turn in (False, True):
            embedded = judged(Judge(EmbeddedGrader(sandbox, workers=1)), last_turn=last_turn)
            there = judged(Judge(grader), last_turn=last_turn)
            assert list(map(without_times, there)) == list(map(without_times, embedded))
        solved = [verdict.solved for verdict in there]
        assert solved == [True, False, True, False, False, False, True, False, False]


def test_a_killed_server_costs_a_rollout_nothing(chat):
    """24 dialogues over two servers, one killed as soon as it has graded some: each ends as one
    episode with its own verdicts, as if nothing had happened."""
    with ServerProcess(*ONE_JOB) as doomed, ServerProcess(*ONE_JOB) as other:

        def kill_in_the_middle() -> None:
            while doomed.metrics()["request_seconds_count"] < 6:
                pass
            doomed.process.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill_in_the_middle)
        scripts = [[SLOW_RIGHT] if number % 2 else [WRONG, SLOW_RIGHT] for number in range(24)]
        with remote(doomed.url, other.url, token=None) as grader:
            killer.start()
            problems = [replace(SQUARE, id=f"square {number}") for number in range(24)]
            loop = DialogueLoop(ScriptedEngine(chat, *scripts), Judge(grader), chat, RULES)
            held = asyncio.run(loop.run_my_share(problems, 0))
        killer.join()
        assert doomed.process.wait(5) == -signal.SIGKILL
        assert held.reasons == {}
        # a session is opened for each problem in turn, so problem and script have one number
        assert [episode.problem_id for episode in held.episodes] == [
            f"square {number}" for number in range(24)
        ]
        assert [turns_of(episode) for episode in held.episodes] == [
            [True] if number % 2 else [None, True] for number in range(24)
        ]


def turns_of(episode: Episode) -> list[bool | None]:
    return [turn.verdict.solved for turn in episode.turns]


def test_dialogues_without_a_server_are_dropped_and_counted_never_scored(chat):
    with ServerProcess(*ONE_JOB) as gone, remote(gone.url, deadline_s=0.5) as grader:
        gone.process.kill()
        gone.process.wait()
        judge = Judge(grader)
        with pytest.raises(JudgeError, match=r"no server answered within 0.5 s .*" + gone.url):
            asyncio.run(judge.judge(SQUARE, Extracted("print(1)"), last_turn=True))
        engine = ScriptedEngine(chat, *([SLOW_RIGHT] for _ in range(4)))
        held: Rollout = asyncio.run(
            DialogueLoop(engine, judge, chat, RULES).run_my_share([SQUARE] * 2, 0)
        )
        assert held.episodes == () and kinds_of(held.reasons) == {"JudgeError": 2}


def test_a_problem_that_a_sandbox_refuses_is_a_fault_of_its_own_dialogue_only(server):
    unknown = replace(SQUARE, language="perl")
    with Sandbox(workers=1) as sandbox, remote(server.url) as grader:
        for judge in (Judge(EmbeddedGrader(sandbox, workers=1)), Judge(grader)):
            with pytest.raises(JudgeError, match="unknown language 'perl'"):
                asyncio.run(judge.judge(unknown, Extracted("print 9"), last_turn=True))


def test_one_grader_serves_the_event_loops_of_many_steps(server):
    with remote(server.url) as grader:
        for _ in range(3):
            verdicts = judged(Judge(grader), last_turn=True)
            assert verdicts[0].solved


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("RLEF_SANDBOX_TOKEN", raising=False)


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("RLEF_SANDBOX_TOKEN", TOKEN)


def test_the_manifest_tells_how_servers_confine_programs(server, token):
    settings = JudgeConfig(servers=(server.url,))
    with open_grader(settings) as grader:
        confined = grader.isolation["servers"][server.url]
        assert confined["level"] == "default" and confined["seccomp"] is True
    with open_grader(JudgeConfig()) as grader:
        assert grader.isolation["level"] == "default" and "servers" not in grader.isolation


def test_preflight_finds_what_is_wrong_with_servers(server, token, monkeypatch):
    check_judge(JudgeConfig())
    check_judge(JudgeConfig(servers=(server.url,)))
    for servers, sent, words in (
        (("http://127.0.0.1:9",), TOKEN, "http://127.0.0.1:9: cannot connect"),
        ((server.url,), "another-wrong-token", f"{server.url}: 401 the token is missing or wrong"),
        ((server.url,), "", f"{server.url}: 401 the token is missing or wrong"),
        ((server.url,), "short", "16 to 4096"),
        (("node7:8765",), TOKEN, "write it like http://node7:8765"),
    ):
        monkeypatch.setenv("RLEF_SANDBOX_TOKEN", sent)
        with pytest.raises(ConfigError, match=r"^judge\.servers: ") as refusal:
            check_judge(JudgeConfig(servers=servers))
        assert words in str(refusal.value)
        assert "RLEF_SANDBOX_TOKEN" in str(refusal.value)


def test_preflight_refuses_a_server_that_confines_less_than_is_asked_for():
    with ServerProcess(*ONE_JOB, isolation="minimal") as lax:
        with pytest.raises(ConfigError, match="runs with isolation 'minimal'"):
            check_judge(JudgeConfig(servers=(lax.url,)))
        check_judge(JudgeConfig(servers=(lax.url,), isolation="minimal"))


def test_preflight_refuses_packages_that_programs_could_not_import(server, token, monkeypatch):
    with pytest.raises(ValueError, match=r"^package 'nowhere' is not installed"):
        check_judge(JudgeConfig(packages=("nowhere",)))
    with pytest.raises(ConfigError, match=r"cannot import numpy; .* --packages numpy serve"):
        check_judge(JudgeConfig(servers=(server.url,), packages=("numpy",)))
    monkeypatch.delenv("RLEF_SANDBOX_TOKEN")
    with ServerProcess(*ONE_JOB, packages="numpy") as wide:
        check_judge(JudgeConfig(servers=(wide.url,), packages=("numpy",)))
