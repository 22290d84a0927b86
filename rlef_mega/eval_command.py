"""`rlef eval`: a Hugging Face folder and problems to numbers, with the embedded engine in this
process, or on SGLang servers, to which the folder's weights are brought first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rlef_mega.chat import ChatFormat
from rlef_mega.config import ConfigError, JudgeConfig
from rlef_mega.engines import Engine
from rlef_mega.engines.local import LocalEngine
from rlef_mega.evaluate import evaluate, write_evaluation
from rlef_mega.judge import Judge, open_grader
from rlef_mega.megatron.hf_weights import open_safetensors
from rlef_mega.preflight import check_servers
from rlef_mega.problems import load_problems
from rlef_mega.record import RunDirectory
from rlef_mega.report import print_comparison
from rlef_mega.rollout import Rules
from rlef_mega.types import Sampling


@dataclass(frozen=True)
class EvalRequest:
    model: Path
    data: str
    out: Path
    problems: int
    turns: int
    temperature: float
    top_p: float
    max_new_tokens: int
    max_context: int
    dtype: str
    seed: int
    protocols: tuple[str, ...]
    servers: tuple[str, ...] = ()  # grading servers; without, an embedded sandbox
    grading_token: str | None = None
    sglang: tuple[str, ...] = ()  # servers of a model of this shape; without, the embedded engine


def run_evaluation(request: EvalRequest) -> None:
    """Evaluate, write eval/MODEL.json and its dialogues under `out`, print the table."""
    if not (request.model / "config.json").is_file():
        raise ConfigError(f"no file {request.model / 'config.json'}: give a Hugging Face folder")
    check_servers(JudgeConfig(servers=request.servers), request.grading_token)
    problems = load_problems(request.data)
    problems = problems[: request.problems or None]
    chat = ChatFormat.from_folder(request.model)
    rules = Rules(
        turns=request.turns,
        sampling=Sampling(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            stop_token_ids=tuple(chat.stop_token_ids),
        ),
        max_context=request.max_context,
    )
    grading = JudgeConfig(workers=len(os.sched_getaffinity(0)), servers=request.servers)
    with (
        open_engine(request) as engine,
        open_grader(**grading.model_dump(), token=request.grading_token) as grader,
    ):
        result = evaluate(
            problems,
            engine,
            Judge(grader),
            chat,
            rules,
            seed=request.seed,
            protocols=request.protocols,
        )
    run = RunDirectory(request.out)
    write_evaluation(
        run,
        request.model.name,
        result,
        problems,
        chat,
        model=str(request.model),
        data=request.data,
        rules=rules,
        seed=request.seed,
    )
    path = request.out / f"eval/{request.model.name}.json"
    print_comparison(request.out)
    print(f"wrote {path}")


@contextmanager
def open_engine(request: EvalRequest) -> Iterator[Engine]:
    """With the weights of the folder, verified where servers took them over."""
    if not request.sglang:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield LocalEngine(request.model, dtype=request.dtype, device=device)
        return
    try:
        from rlef_mega.engines.sglang import SGLangEngine
    except ModuleNotFoundError as error:
        raise ConfigError(f"--sglang needs {error.name}: pip install 'rlef-mega[serve]'") from None
    weights = request.out / "weights"
    with SGLangEngine(request.sglang, request.model, way="disk", weights_folder=weights) as engine:
        engine.update_weights(stored_weights(request.model), version=0)
        yield engine


def stored_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One after the other, so that none but the one in hand takes memory."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"no *.safetensors in {folder}: give a folder that holds the weights")
    for file in files:
        with open_safetensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dictionary
                yield name, stored.get_tensor(name)
