"""`rlef eval`: a model (or recorded responses) and problems to a file of dialogues, and that file
to numbers, a table and a picture.

    OUT/eval/NAME.dialogues.jsonl   every dialogue, as soon as it ended (dialogue_file.py)
    OUT/eval/NAME.json, NAME.png    computed from that file alone

The same command goes on with the file where it was, whatever ended it; with everything in it, it
only computes the numbers again. More dialogues a problem, other protocols and other n@k may be
asked for later; what decides a dialogue may not change.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlef_mega.config import ConfigError, JudgeConfig
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge, check_servers, open_grader
from rlef_mega.dialogues.rollout import DialogueLoop, Rules
from rlef_mega.engines import Engine
from rlef_mega.engines.local import LocalEngine
from rlef_mega.evaluation.dialogue_file import DialogueFile
from rlef_mega.evaluation.estimators import NAtK, parse_n_at_k
from rlef_mega.evaluation.numbers import ProblemLabels, numbers_of
from rlef_mega.evaluation.protocols import (
    PROTOCOLS,
    SINGLE,
    PlannedDialogues,
    distractors_in,
    plan_dialogues,
    run_missing,
    sampling,
)
from rlef_mega.evaluation.recorded import (
    RecordedResponses,
    grade_again,
    read_recorded,
    refuse_unknown,
)
from rlef_mega.megatron.convert.safetensors_files import open_safetensors
from rlef_mega.problems import load_problems
from rlef_mega.problems.rows import SUFFIXES
from rlef_mega.problems.store import store_key
from rlef_mega.report import print_comparison
from rlef_mega.report.plots import save_evaluation_figure
from rlef_mega.report.tables import print_evaluation
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.manifest import describe
from rlef_mega.types import Problem, Sampling

LOCAL_AT_ONCE, SERVER_AT_ONCE = 128, 256


@dataclass(frozen=True)
class EvalRequest:
    model: Path  # a Hugging Face folder, a checkpoint, a run, or a file of responses
    data: str
    out: Path
    name: str | None  # of the files; else the model's
    step: int | None  # of a run's checkpoint; else its newest
    problems: int  # the first so many; 0 for all
    n_at_k: str | None
    rollouts: int | None  # dialogues a problem; else as many as n@k needs
    turns: int
    feedback: tuple[str, ...]
    single_turn: bool
    temperature: float
    top_p: float
    max_new_tokens: int
    max_context: int
    dtype: str
    seed: int
    at_once: int | None = None  # dialogues
    servers: tuple[str, ...] = ()  # grading servers; without, an embedded sandbox
    grading_token: str | None = None
    sglang: tuple[str, ...] = ()  # servers of a model of this shape; without, the embedded engine
    openai: tuple[str, ...] = ()  # or servers that speak OpenAI's completions
    served_model: str | None = None
    api_key: str | None = None

    @property
    def pairs(self) -> tuple[NAtK, ...]:
        return parse_n_at_k(self.n_at_k) if self.n_at_k else ((1, self.turns),)

    @property
    def dialogues_each(self) -> int:
        """As many as the greatest k needs, where the request does not say."""
        return self.rollouts or max(k // self.turns for _, k in self.pairs)


@dataclass(frozen=True)
class Source:
    """Where responses come from: a model's folder, or a file."""

    name: str
    identity: str
    folder: Path | None = None
    recorded: RecordedResponses | None = None


def run_evaluation(request: EvalRequest) -> None:
    """RunDialogue what is missing, write the numbers, print the tables."""
    check_request(request)
    check_servers(JudgeConfig(servers=request.servers), request.grading_token)
    source = find_source(request)
    problems = {p.id: p for p in load_problems(request.data)[: request.problems or None]}
    parts = plan(request, source, list(problems.values()))
    name = request.name or source.name
    path = request.out / f"eval/{name}.dialogues.jsonl"
    asked = what_decides(request, source, problems)
    with DialogueFile(path, asked, [vars(ProblemLabels.of(p)) for p in problems.values()]) as file:
        if any(key not in file.settled for part in parts for key in part.keys):
            hold_parts(request, source, problems, parts, file)
    numbers = numbers_of(path, parts, turns=request.turns, n_at_k=request.pairs)
    content = {**asked, "dialogues_each": request.dialogues_each, **numbers}
    run = RunDirectory(request.out)
    run.write_json(f"eval/{name}.json", content)
    save_evaluation_figure(content, request.out / f"eval/{name}.png")
    print_comparison(request.out)
    print_evaluation(content)
    print(f"wrote {run.path / 'eval' / name}.json, .png and .dialogues.jsonl")


def check_request(request: EvalRequest) -> None:
    unknown = set(request.feedback) - PROTOCOLS.keys()
    if unknown:
        raise ConfigError(
            f"--feedback {','.join(sorted(unknown))}: known are {', '.join(PROTOCOLS)}"
        )
    for n, k in request.pairs:
        if k < request.turns:
            raise ConfigError(
                f"--n-at-k {n}@{k}: one dialogue of up to {request.turns} turns is "
                f"{request.turns} samples already; ask for a larger k, or lower --turns"
            )
    if request.sglang and request.openai:
        raise ConfigError("--sglang and --openai: give one of them")
    if "random" in request.feedback and not (request.single_turn or "true" in request.feedback):
        raise ConfigError(
            "--feedback random is made of responses that failed: leave --single-turn on, or add "
            "true to --feedback"
        )
    if not (request.feedback or request.single_turn):
        raise ConfigError("nothing to evaluate: give --feedback, or leave --single-turn on")


def what_decides(
    request: EvalRequest, source: Source, problems: Mapping[str, Problem]
) -> dict[str, Any]:
    """All that a dialogue of this evaluation follows from."""
    digest = hashlib.blake2b(digest_size=16)
    for problem in problems.values():
        digest.update(repr(problem).encode())
    engine = "local"
    if source.recorded:
        engine = "recorded"
    elif request.sglang or request.openai:
        engine = "sglang" if request.sglang else f"openai {request.served_model or ''}".rstrip()
    return {
        "model": str(request.model),
        "weights": source.identity,
        "engine": engine,
        "dtype": request.dtype if engine == "local" else None,
        "data": request.data,
        "problems": len(problems),
        "problems_digest": digest.hexdigest(),
        "turns": request.turns,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_new_tokens": request.max_new_tokens,
        "max_context": request.max_context,
        "seed": request.seed,
    }


# --------------------------------------------------------------------------------------- sources


def find_source(request: EvalRequest) -> Source:
    """A checkpoint is exported first, once, to OUT/models."""
    path = request.model
    if path.is_file() and path.name.endswith(SUFFIXES):
        name = path.name.partition(".")[0]
        recorded = read_recorded(path)
        if recorded.turns is not None and recorded.turns < request.turns:
            raise ConfigError(
                f"{path} holds dialogues of at most {recorded.turns} turns; set --turns to that, "
                "or to less"
            )
        return Source(f"{name}-regraded", store_key("responses", [path]), recorded=recorded)
    if (path / "config.json").is_file():
        return Source(path.name, weights_key(path), folder=path)
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder; give a Hugging Face folder, a checkpoint, a run, or a file "
            f"of responses ({', '.join(SUFFIXES[:3])})"
        )
    # the only part that needs megatron, which takes seconds to import
    from rlef_mega.megatron.convert.checkpoint_folder import find_checkpoint
    from rlef_mega.megatron.convert.command import export_checkpoint

    checkpoint = find_checkpoint(path, request.step).folder
    is_of_run = (path / "config.toml").is_file()
    name = f"{path.name}-{checkpoint.name}" if is_of_run else path.name
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    # of this checkpoint, whatever else had its name
    folder = request.out / "models" / f"{name}-{store_key('export', files)[:8]}"
    if not (folder / "config.json").is_file():
        export_checkpoint(checkpoint, folder)
    return Source(name, weights_key(folder), folder=folder)


def weights_key(folder: Path) -> str:
    files = sorted((*folder.glob("*.safetensors"), folder / "config.json"))
    return store_key("weights", files)


def plan(
    request: EvalRequest, source: Source, problems: Sequence[Problem]
) -> list[PlannedDialogues]:
    """Single turns have the samples that the dialogues may have, and where their number was not
    asked for, as many as the greatest k; what random feedback is made of comes before it."""
    if source.recorded:
        parts = source.recorded.parts(request.turns)
        known = {problem.id: problem for problem in problems}
        refuse_unknown((key for part in parts for key in part.keys), known, request.model)
        return parts
    each, parts = request.dialogues_each, []
    if request.single_turn:
        least = 0 if request.rollouts else max(k for _, k in request.pairs)
        parts.append(plan_dialogues(SINGLE, 1, "true", problems, max(each * request.turns, least)))
    for feedback, protocol in PROTOCOLS.items():
        if feedback in request.feedback:
            parts.append(plan_dialogues(protocol, request.turns, feedback, problems, each))
    return parts


# --------------------------------------------------------------------------------------- holding


def hold_parts(
    request: EvalRequest,
    source: Source,
    problems: Mapping[str, Problem],
    parts: Sequence[PlannedDialogues],
    file: DialogueFile,
) -> None:
    grading = JudgeConfig(workers=len(os.sched_getaffinity(0)), servers=request.servers)
    with ExitStack() as stack:
        grader = stack.enter_context(
            open_grader(**grading.model_dump(), token=request.grading_token)
        )
        judge = Judge(grader)
        facts: dict[str, Any] = {}
        if source.folder:
            chat = ChatFormat.from_folder(source.folder)
            engine, facts = stack.enter_context(open_engine(request, source.folder, chat, file))
        file.append({"session": describe(engine=facts, isolation=grader.isolation)})
        servers = len(request.sglang or request.openai)
        at_once = request.at_once or (SERVER_AT_ONCE * servers or LOCAL_AT_ONCE)
        for part in parts:
            if source.recorded:
                hold = grade_again(source.recorded, judge, part)
            else:
                rules = rules_of(request, part, file.path, problems, chat)
                if rules is None:
                    continue
                hold = sampling(DialogueLoop(engine, judge, chat, rules), chat, request.seed)
            run_missing(part, problems, hold, file, at_once)


def rules_of(
    request: EvalRequest,
    part: PlannedDialogues,
    path: Path,
    problems: Mapping[str, Problem],
    chat: ChatFormat,
) -> Rules | None:
    """None for random feedback that there is nothing to make from."""
    distractors = distractors_in(path, problems) if part.feedback == "random" else ()
    if part.feedback == "random" and len({d.problem_id for d in distractors}) < 2:
        print("random feedback is left out: hardly a response failed that it could be made from")
        return None
    return Rules(
        turns=part.turns,
        sampling=Sampling(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            stop_token_ids=tuple(chat.stop_token_ids),
        ),
        max_context=request.max_context,
        feedback=part.feedback,
        distractors=distractors,
    )


@contextmanager
def open_engine(
    request: EvalRequest, folder: Path, chat: ChatFormat, file: DialogueFile
) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """The engine, and what is known of how it samples. SGLang's servers get the folder's weights,
    verified; those of completion servers are not known to be the folder's."""
    if request.openai:
        openai = needs_aiohttp("--openai", "rlef_mega.evaluation.completion_servers")
        options = {"model": request.served_model, "api_key": request.api_key}
        with openai.OpenAIEngine(
            request.openai, chat, context=request.max_context, **options
        ) as engine:
            print("not what training samples from: " + described(engine.facts))
            yield engine, engine.facts
    elif request.sglang:
        sglang = needs_aiohttp("--sglang", "rlef_mega.engines.sglang.engine")
        facts = {"kind": "sglang", "servers": list(request.sglang), "weights": "verified"}
        with sglang.SGLangEngine(
            request.sglang,
            folder,
            way="disk",
            weights_folder=request.out / "weights",
            take_over=facts in file.engines(),  # what this evaluation held when it was killed
        ) as engine:
            engine.update_weights(stored_weights(folder), version=0)
            yield engine, facts
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        local = LocalEngine(folder, dtype=request.dtype, device=device)
        yield local, {"kind": "local", "dtype": request.dtype}


def needs_aiohttp(option: str, module: str) -> Any:
    """The engine's module."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{option} needs {error.name}: pip install 'rlef-mega[serve]'") from None


def described(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())


def stored_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One after the other, so that none but the one in hand takes memory."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"no *.safetensors in {folder}: give a folder that holds the weights")
    for file in files:
        with open_safetensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dictionary
                yield name, stored.get_tensor(name)
