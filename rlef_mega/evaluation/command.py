"""`rlef eval`: run a model (or recorded responses) on problems, and write numbers and a plot.

    OUT/eval/NAME.dialogues.jsonl   every dialogue, written as it finishes (dialogue_file.py)
    OUT/eval/NAME.json, NAME.png    computed from that file only

The same command resumes from the file, however it was stopped; if nothing is missing it only
computes the numbers again. A later command may change dialogues per problem, protocols and n@k, but
not the settings that determine a dialogue.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rlef_mega.config import ConfigError, JudgeConfig, ServersConfig, read_json, requires_extra
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge, check_judge, open_grader
from rlef_mega.dialogues.programs import Which
from rlef_mega.dialogues.rollout import DialogueLoop, Rules
from rlef_mega.dialogues.templates import Cut
from rlef_mega.engines import Engine
from rlef_mega.engines.local import LocalEngine
from rlef_mega.evaluation.dialogue_file import DialogueFile, Key
from rlef_mega.evaluation.estimators import NAtK, parse_n_at_k
from rlef_mega.evaluation.numbers import numbers_of
from rlef_mega.evaluation.protocols import (
    PROTOCOLS,
    SINGLE,
    Feedback,
    PlannedDialogues,
    distractors_in,
    run_missing,
    sampling,
)
from rlef_mega.evaluation.recorded import RecordedResponses, grade_again, read_recorded
from rlef_mega.megatron.network.families import FAMILIES, read_config
from rlef_mega.problems import load_problems
from rlef_mega.problems.rows import SUFFIXES
from rlef_mega.problems.store import digest_of, digest_of_problems
from rlef_mega.report.plots import save_evaluation_figure
from rlef_mega.report.tables import print_comparison, print_evaluation
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.hub import find_model
from rlef_mega.run.inputs import digest_files
from rlef_mega.run.manifest import describe
from rlef_mega.run.model_folder import SafetensorsFolder
from rlef_mega.types import Problem, Sampling

LOCAL_AT_ONCE, SERVER_AT_ONCE = 128, 256
DETERMINING = (
    *("turns", "temperature", "top_p", "max_new_tokens", "max_context", "seed"),
    *("program", "feedback_tokens", "feedback_cut"),
)


@dataclass(frozen=True)
class EvalRequest:
    model: Path  # a Hugging Face folder, a checkpoint, a run, or a file of responses
    data: str
    out: Path
    name: str | None  # of the files; None: the model's
    step: int | None  # of a run's checkpoint; None: the newest
    problems: int  # number of problems, from the first; 0: all
    n_at_k: str | None
    rollouts: int | None  # dialogues per problem; None: as many as n@k needs
    turns: int
    feedback: tuple[str, ...]
    single_turn: bool
    temperature: float
    top_p: float
    max_new_tokens: int | None  # None: 512, or half of the context
    max_context: int | None  # None: 2048, or the model's positions
    dtype: str
    seed: int
    program: Which = "first"
    feedback_tokens: int | None = None
    feedback_cut: Cut = "middle"
    at_once: int | None = None  # concurrent dialogues
    servers: tuple[str, ...] = ()  # grading servers; none: an embedded sandbox
    packages: tuple[str, ...] = ()  # packages that programs may import
    isolation: Literal["default", "minimal"] = "default"  # of the embedded sandbox
    sglang: tuple[str, ...] = ()  # servers of a model of this shape; none: the embedded engine

    @property
    def pairs(self) -> tuple[NAtK, ...]:
        return parse_n_at_k(self.n_at_k) if self.n_at_k else ((1, self.turns),)

    @property
    def judge(self) -> JudgeConfig:
        return JudgeConfig(
            workers=len(os.sched_getaffinity(0)),
            isolation=self.isolation,
            packages=self.packages,
            servers=self.servers,
        )

    @property
    def dialogues_each(self) -> int:
        """Return the dialogues per problem: by default as many as the largest k needs."""
        return self.rollouts or max(k // self.turns for _, k in self.pairs)


@dataclass(frozen=True)
class Source:
    """Where the evaluated responses come from: the model in `folder` samples them, or a file has
    `recorded` them. `identity` is a digest of either; an evaluation resumes only with the same."""

    name: str
    identity: str
    folder: Path | None = None
    recorded: RecordedResponses | None = None


def run_evaluation(request: EvalRequest) -> None:
    """Run the missing dialogues, write the numbers, print the tables."""
    check_request(request)
    check_judge(request.judge)
    source = find_source(request)
    request = with_lengths(request, source)
    problems = {p.id: p for p in load_problems(request.data)[: request.problems or None]}
    parts = plan(request, source, list(problems.values()))
    name = request.name or source.name
    path = request.out / f"eval/{name}.dialogues.jsonl"
    asked = dialogue_settings(request, source, problems)
    with DialogueFile.locked(path, asked) as file:
        if any(key not in file.settled for part in parts for key in part.keys):
            run_parts(request, source, problems, parts, file)
    numbers = numbers_of(
        path, [*problems.values()], parts, turns=request.turns, n_at_k=request.pairs
    )
    content = {**asked, "dialogues_each": request.dialogues_each, **numbers}
    run = RunDirectory(request.out)
    run.write_json(f"eval/{name}.json", content)
    save_evaluation_figure(content, request.out / f"eval/{name}.png")
    print_comparison(request.out)
    print_evaluation(content)
    print(f"wrote {run.path / 'eval' / name}.json, .png and .dialogues.jsonl")


def with_lengths(request: EvalRequest, source: Source) -> EvalRequest:
    """Return the request with lengths that fit the model. Raises ConfigError if those asked for do
    not."""
    context = request.max_context or 2048
    if source.folder:
        positions = read_json(source.folder / "config.json")["max_position_embeddings"]
        context = request.max_context or min(context, positions)
    response = request.max_new_tokens or min(512, context // 2)
    if source.folder and context > positions:
        raise ConfigError(
            f"--max-context {context}: {source.folder}/config.json has max_position_embeddings = "
            f"{positions}; lower it to that"
        )
    if response >= context:
        raise ConfigError(
            f"--max-new-tokens {response} leaves no room for a prompt in a context of {context} "
            "tokens; lower it, or raise --max-context"
        )
    return replace(request, max_context=context, max_new_tokens=response)


def check_request(request: EvalRequest) -> None:
    unknown = set(request.feedback) - PROTOCOLS.keys()
    if unknown:
        raise ConfigError(
            f"--feedback {','.join(sorted(unknown))}: use one or more of {', '.join(PROTOCOLS)}"
        )
    for n, k in request.pairs:
        if k < request.turns:
            raise ConfigError(
                f"--n-at-k {n}@{k}: one dialogue of up to {request.turns} turns counts as "
                f"{request.turns} samples; increase k, or lower --turns"
            )
    if "random" in request.feedback and not (request.single_turn or "true" in request.feedback):
        raise ConfigError(
            "--feedback random needs the failed responses of another protocol: leave --single-turn "
            "on, or add true to --feedback"
        )
    if not (request.feedback or request.single_turn):
        raise ConfigError("nothing to evaluate: give --feedback, or leave --single-turn on")


def dialogue_settings(
    request: EvalRequest, source: Source, problems: Mapping[str, Problem]
) -> dict[str, Any]:
    """Return all settings that determine a dialogue of this evaluation."""
    engine = "recorded" if source.recorded else "sglang" if request.sglang else "local"
    return {
        "model": str(request.model),
        "weights": source.identity,
        "engine": engine,
        "dtype": request.dtype if engine == "local" else None,
        "data": request.data,
        "problems": len(problems),
        "problems_digest": digest_of_problems([*problems.values()]),
        **{name: getattr(request, name) for name in DETERMINING},
        "packages": sorted(request.packages) or None,
    }


# --------------------------------------------------------------------------------------- sources


def find_source(request: EvalRequest) -> Source:
    """Find the source of responses; a checkpoint is first exported to OUT/models, once.

    Raises ConfigError if there is none.
    """
    path = find_model(request.model)
    if path.is_file() and path.name.endswith(SUFFIXES):
        name = path.name.partition(".")[0]
        recorded = read_recorded(path, request.turns)
        return Source(f"{name}-regraded", digest_of("responses", [path]), recorded=recorded)
    if (path / "config.json").is_file():
        SafetensorsFolder(path)  # refuses a folder whose weights cannot be read
        if read_json(path / "config.json").get("model_type") in FAMILIES:
            read_config(path)  # refuses a config that contradicts itself
        return Source(request.model.name, weights_key(path), folder=path)
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder; give a Hugging Face folder, a checkpoint, a run, or a file "
            f"of responses ({', '.join(SUFFIXES[:3])})"
        )
    # only exporting needs megatron, which takes seconds to import
    from rlef_mega.megatron.convert.checkpoint_folder import find_checkpoint
    from rlef_mega.megatron.convert.to_hf import export_checkpoint

    checkpoint = find_checkpoint(path, request.step).folder
    is_of_run = (path / "config.toml").is_file()
    name = f"{path.name}-{checkpoint.name}" if is_of_run else path.name
    # the digest tells checkpoints of the same name apart
    digest = digest_files(path for path in checkpoint.rglob("*") if path.is_file())
    folder = request.out / "models" / f"{name}-{digest[:8]}"
    if not (folder / "config.json").is_file():
        export_checkpoint(checkpoint, folder)
    return Source(name, weights_key(folder), folder=folder)


def weights_key(folder: Path) -> str:
    return digest_files((*folder.glob("*.safetensors"), folder / "config.json"))


def plan(
    request: EvalRequest, source: Source, problems: Sequence[Problem]
) -> list[PlannedDialogues]:
    """Plan the dialogues of each protocol. Single turns get as many samples as the dialogues have,
    and at least the largest k if `rollouts` is not given. Random feedback comes after the protocols
    whose failures it shows."""
    if source.recorded:
        found = {key.problem_id for key in source.recorded}
        if unknown := sorted(found - {problem.id for problem in problems}):
            raise ConfigError(
                f"{request.model} has responses to {len(unknown)} problems that --data does not "
                f"have, such as {', '.join(unknown[:3])}; give the problem source that they were "
                "sampled for"
            )
        names = (*PROTOCOLS.values(), SINGLE)
        keys = {name: [key for key in source.recorded if key.protocol == name] for name in names}
    else:
        each, counts = request.dialogues_each, dict[str, int]()
        if request.single_turn:
            least = 0 if request.rollouts else max(k for _, k in request.pairs)
            counts[SINGLE] = max(each * request.turns, least)
        counts |= {name: each for how, name in PROTOCOLS.items() if how in request.feedback}
        keys = {  # in rounds over all problems
            name: [Key(name, problem.id, n) for n in range(count) for problem in problems]
            for name, count in counts.items()
        }
    return [
        PlannedDialogues(name, 1 if name == SINGLE else request.turns, tuple(mine))
        for name, mine in keys.items()
    ]


# --------------------------------------------------------------------------------------- running


def run_parts(
    request: EvalRequest,
    source: Source,
    problems: Mapping[str, Problem],
    parts: Sequence[PlannedDialogues],
    file: DialogueFile,
) -> None:
    with ExitStack() as stack:
        grader = stack.enter_context(open_grader(request.judge))
        judge = Judge(grader)
        facts: dict[str, Any] = {}
        if source.folder:
            chat = ChatFormat.from_folder(source.folder)
            engine, facts = stack.enter_context(open_engine(request, source.folder, file))
        file.append({"session": describe(engine=facts, isolation=grader.isolation)})
        at_once = request.at_once or (SERVER_AT_ONCE * len(request.sglang) or LOCAL_AT_ONCE)
        for part in parts:
            if source.recorded:
                run = grade_again(source.recorded, judge, part, request.program)
            else:
                rules = rules_of(request, part, file.path, problems, chat)
                if rules is None:
                    continue
                run = sampling(DialogueLoop(engine, judge, chat, rules), request.seed)
            run_missing(part, problems, run, file, at_once)


def rules_of(
    request: EvalRequest,
    part: PlannedDialogues,
    path: Path,
    problems: Mapping[str, Problem],
    chat: ChatFormat,
) -> Rules | None:
    """Return the rules of a part; None for random feedback if too few responses failed."""
    by_name: dict[str, Feedback] = {name: how for how, name in PROTOCOLS.items()}
    feedback = by_name.get(part.protocol, "true")
    distractors = distractors_in(path, problems) if feedback == "random" else ()
    if feedback == "random" and not distractors:
        print("random feedback is left out: it needs failed responses to at least two problems")
        return None
    assert request.max_new_tokens and request.max_context, "with_lengths has filled them in"
    return Rules(
        turns=part.turns,
        sampling=Sampling(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            stop_token_ids=tuple(chat.stop_token_ids),
        ),
        max_context=request.max_context,
        feedback=feedback,
        distractors=distractors,
        program=request.program,
        feedback_tokens=request.feedback_tokens,
        feedback_cut=request.feedback_cut,
    )


@contextmanager
def open_engine(
    request: EvalRequest, folder: Path, file: DialogueFile
) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """Open the engine; yield it with known facts about it. SGLang servers get the folder's weights,
    which are verified."""
    if request.sglang:
        with requires_extra("--sglang", "serve"):
            from rlef_mega.engines.sglang.engine import SGLangEngine
        facts = {"kind": "sglang", "servers": list(request.sglang), "weights": "verified"}
        opened = SGLangEngine(
            ServersConfig(urls=request.sglang),
            folder,
            weights_folder=file.path.with_name(f"{file.path.name}.weights"),
            take_over=file.claims(facts),
        )
        try:
            with opened as engine:
                if (room := engine.info.context_length) < (request.max_context or 0):
                    raise ConfigError(
                        f"--max-context {request.max_context}, but the servers have room for "
                        f"{room} tokens; lower it, or start them with a larger context"
                    )
                stored = SafetensorsFolder(folder)
                one_by_one = ((name, stored.read(name)) for name in stored.tensors)
                engine.update_weights(one_by_one, version=0)
                yield engine, facts
        finally:
            if opened.released:
                file.append({"released": facts})
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        local = LocalEngine(folder, dtype=request.dtype, device=device)
        yield local, {"kind": "local", "dtype": request.dtype}
