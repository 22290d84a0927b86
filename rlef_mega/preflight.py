"""Check everything about a run that can be checked before a rank starts. A failed check raises one
clear message, and nothing is lost."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import track

from rlef_mega.config import (
    ConfigError,
    ParallelConfig,
    SFTConfig,
    TrainConfig,
    differences,
    dump_toml,
    flatten,
    load_config,
    requires_extra,
)
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import check_judge
from rlef_mega.dialogues.rollout import first_context
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.checkpoints.files import NETWORKS
from rlef_mega.megatron.convert.checkpoint_folder import find_checkpoint
from rlef_mega.megatron.hf_names import name_map, shapes_of
from rlef_mega.megatron.network.families import read_config
from rlef_mega.megatron.network.stages import check_layout
from rlef_mega.problems import load_problems
from rlef_mega.problems.store import digest_of_problems
from rlef_mega.run.directory import RunDirectory, append_whole, write_atomically
from rlef_mega.run.hub import CONFIG, find_model
from rlef_mega.run.inputs import claim_inputs, digest_files, digest_model, read_left_out
from rlef_mega.run.manifest import refuse_untested_megatron
from rlef_mega.run.model_folder import SafetensorsFolder
from rlef_mega.run.trackers import check_trackers
from rlef_mega.types import Problem

# Settings that a resumed run may change, such as its length, where it computes, how often it saves.
FREE_TO_CHANGE = {
    "run.allow_change",
    "run.dir",  # a moved run
    "run.steps",
    "run.checkpoint_every",
    "run.checkpoint_async",
    "run.keep_checkpoints",
    "run.keep_best",
    "checkpoint_every",  # of the supervised stage
    "checkpoint_async",
    "model.recompute",
    "learner.offload",
    "learner.microbatch_tokens",
    "critic_parallel",
    "judge.servers",
    "judge.deadline_s",
    "rollout.max_staleness",
    "rollout.max_passed_over",
    "rollout.open_dialogues",
}
FREE_SECTIONS = ("parallel", "critic_parallel", "rollout.servers", "guard", "track", "profile")
# Settings that a resumed run may change if run.allow_change names them.
ALLOWED_WHEN_NAMED = {
    f"learner.{network}.{key}"
    for network in ("policy", "critic")
    for key in ("lr", "min_lr_ratio", "warmup_updates", "decay_start_update", "decay_updates")
}


@dataclass(frozen=True)
class TrainingInputs:
    """What the checks of a training run have read: its model's folder and chat format, and the
    problems of each key of [data]."""

    model: Path
    chat: ChatFormat
    problems: dict[str, Sequence[Problem]]


def check_train(config: TrainConfig) -> TrainingInputs:
    """Check everything that a training run needs. Returns what it has read. Raises ConfigError or
    ValueError with the remedy.

    Rollout servers are checked later, by `check_rollout_servers`: they may not have been started.
    """
    refuse_untested_megatron()
    plan_train(config, model_shape(config))
    model = check_start(config)
    chat = ChatFormat.from_folder(model)
    check_positions(config, model, chat)
    check_trackers(config.track)
    check_judge(config.judge)
    sources = config.data.model_dump().items()
    problems = {
        name: load_problems(source) for name, source in sources if source or name == "train"
    }
    return TrainingInputs(model, chat, problems)


def check_positions(config: TrainConfig, model: Path, chat: ChatFormat) -> None:
    """Raise ConfigError if a dialogue may be longer than the model's positions, or a token's id is
    beyond the embedding's rows."""
    hf_config = read_config(model)
    if config.rollout.max_context > hf_config.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_context = {config.rollout.max_context}, but {model / 'config.json'} has "
            f"max_position_embeddings = {hf_config.max_position_embeddings}; lower max_context"
        )
    vocabulary = chat.tokenizer.get_vocab()
    if beyond := [token for token, number in vocabulary.items() if number >= hf_config.vocab_size]:
        raise ConfigError(
            f"the tokenizer in {model} has tokens without a row in the embedding of "
            f"{hf_config.vocab_size} rows: {', '.join(map(repr, sorted(beyond)[:5]))}. Enlarge the "
            "embedding (transformers' resize_token_embeddings), or use the model's own tokenizer"
        )


def check_start(config: TrainConfig) -> Path:
    """Raise ConfigError unless the weights that training starts from are complete. Returns the
    model's folder."""
    model = find_model(config.model.path)
    if config.model.weights:
        check_weights(Path(config.model.weights), model)
    else:
        check_stored_weights(model)
    return model


def check_stored_weights(model: Path) -> None:
    """Raise ConfigError unless the folder's weights are those of its config.json."""
    SafetensorsFolder(model).check(shapes_of(name_map(read_config(model))))


def check_weights(checkpoint: Path, model: Path) -> None:
    """Raise ConfigError unless the checkpoint is complete and holds a policy of this model."""
    found = find_checkpoint(checkpoint, None, model)
    if found.folder != checkpoint or not (checkpoint / NETWORKS).is_dir():
        raise ConfigError(
            f"model.weights = {checkpoint}: give a checkpoint's own folder, as `rlef import-hf` "
            f"writes it or as RUN/checkpoints/step_000100"
        )
    found.network("policy", name_map(read_config(model)))


def plan_train(config: TrainConfig, shape: LlamaShape) -> dict[str, Any]:
    """Check a run's layout, for a model of this shape, and its batch sizes. Returns them as `rlef
    plan` prints them. Raises ConfigError."""
    check_layout(shape, config.parallel)
    if config.critic_parallel:
        try:
            check_layout(shape, config.critic_parallel)
        except ConfigError as error:
            raise ConfigError(f"critic_parallel: {error}") from None
    if config.rollout.max_context > config.learner.microbatch_tokens:
        raise ConfigError(
            f"rollout.max_context = {config.rollout.max_context} exceeds "
            f"learner.microbatch_tokens = {config.learner.microbatch_tokens}: "
            "the longest dialogue would not fit a micro-batch"
        )
    rollout = config.rollout
    problems = rollout.episodes_per_batch // rollout.samples_per_problem
    if rollout.mode == "async" and problems % config.world_size:
        raise ConfigError(
            f'rollout.mode = "async": rollout.episodes_per_batch = {rollout.episodes_per_batch} '
            f"with rollout.samples_per_problem = {rollout.samples_per_problem} is {problems} "
            f"problems, not divisible by {config.world_size} processes, each of which drives its "
            "share of the dialogues"
        )
    if config.critic_parallel:
        critic = layout_words(config.critic_parallel) + ", ranks of its own"
    elif config.ppo.advantage == "critic":
        critic = "on the policy's ranks"
    else:
        samples = rollout.samples_per_problem
        critic = f"none: {config.ppo.advantage}, {samples} dialogues of a problem"
    updates = config.ppo.updates_per_batch
    return {
        "model": config.model.path,
        **asdict(shape),
        "world size": config.world_size,
        "layout": layout_words(config.parallel),
        "critic": critic,
        "rollouts per batch": rollout.episodes_per_batch,
        "updates": f"{config.run.steps * updates:,} of {rollout.episodes_per_batch // updates} "
        "sequences",
    }


def layout_words(parallel: ParallelConfig) -> str:
    virtual = parallel.virtual_pipeline_model_parallel_size
    return (
        f"TP {parallel.tensor_model_parallel_size} x "
        f"PP {parallel.pipeline_model_parallel_size}"
        + (f" (x {virtual} virtual)" if virtual > 1 else "")
        + f" x DP {parallel.data_parallel_size}"
    )


def check_sft(config: SFTConfig) -> None:
    """Raise ConfigError unless the supervised stage has its model, and a layout that fits it."""
    refuse_untested_megatron()
    if config.model:
        model = find_model(config.model)
        check_stored_weights(model)
        shape = LlamaShape.of(read_config(model))
    else:
        shape = LlamaShape(**config.sizes())
    check_layout(shape, config.parallel)


def model_shape(config: TrainConfig) -> LlamaShape:
    """Read the model's shape from its config.json or, where the model is not on this machine, from
    the recipe's [model.shape]."""
    stated = LlamaShape(**config.model.shape.sizes()) if config.model.shape else None
    path = find_model(config.model.path, files=CONFIG, fetch=stated is None) / "config.json"
    if not path.is_file():
        if stated:
            return stated
        raise ConfigError(
            f"no file {path}: model.path must be a Hugging Face model folder; "
            "a plan or a rehearsal without one needs [model.shape]"
        )
    shape = LlamaShape.of(read_config(path.parent))
    if stated and stated != shape:
        raise ConfigError(f"{path} has {shape}, but the recipe's [model.shape] says {stated}")
    return shape


def check_rollout_servers(config: TrainConfig, model: Path) -> None:
    """Raise ConfigError unless every SGLang server answers, has the run's `model`, and has room for
    its dialogues. Does nothing for another engine."""
    if config.rollout.engine != "sglang":
        return
    with requires_extra("rollout.engine = sglang", "serve"):
        from rlef_mega.engines.sglang.engine import SGLangEngine
    try:
        with SGLangEngine(config.rollout.servers, model) as engine:
            context = engine.info.context_length
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"rollout.servers: {error}. Start them with `rlef serve RECIPE` on their nodes, or use "
            "`rlef train RECIPE --serve`, which starts its own"
        ) from None
    if context < config.rollout.max_context:
        raise ConfigError(
            f"rollout.max_context = {config.rollout.max_context}, but the servers have room for "
            f"{context} tokens; start them with a longer context or more memory"
        )


def check_imitation(config: TrainConfig) -> None:
    """Raise ConfigError unless `rlef imitate` can run with these settings."""
    if config.rollout.engine != "local" or config.critic_parallel:
        raise ConfigError(
            "rlef imitate samples with the embedded engine and has no critic: "
            "set rollout.engine=local and remove critic_parallel"
        )


def claim_run_directory(
    config: TrainConfig | SFTConfig, run_dir: Path, inputs: TrainingInputs | None = None
) -> None:
    """Write the resolved config into the run directory and, when a run is resumed with other
    settings, append these to changes.jsonl. A training run needs its `inputs`. Raises ConfigError
    if the directory holds a run with other inputs, or with other values of fixed settings."""
    RunDirectory(run_dir).refuse_if_locked()  # first: nothing of a run in progress changes
    path = run_dir / "config.toml"
    changes: dict[str, Any] = {}
    if path.exists():
        before = flatten(load_config(path, [], type(config)).model_dump())
        asked = flatten(config.model_dump())
        free = FREE_TO_CHANGE | allowed_changes(config)
        fixed = {
            key: value
            for key, value in asked.items()
            if key not in free and key.rpartition(".")[0] not in FREE_SECTIONS
        }
        if other := differences(before, fixed):
            raise ConfigError(
                f"{run_dir} holds a run with other settings ({other}); "
                "choose another folder, or remove that one to start again"
            )
        changes = {
            key: [before.get(key), asked.get(key)]
            for key in before.keys() | asked.keys()
            if key not in ("run.allow_change", "run.dir") and before.get(key) != asked.get(key)
        }
    if isinstance(config, TrainConfig):
        assert inputs is not None, "check_train returns them"
        digests = digests_of(config, inputs)
        left_out = read_left_out(run_dir)
        if left_out is None:
            left_out = without_room(config, inputs)
        claim_inputs(run_dir, digests, left_out)
    if changes:
        words = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in sorted(changes.items()))
        print(f"settings of the run in {run_dir} changed: {words}")
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "changes": changes}
        append_whole(run_dir / "changes.jsonl", json.dumps(record) + "\n")
    write_atomically(path, dump_toml(config))


def allowed_changes(config: TrainConfig | SFTConfig) -> set[str]:
    """Return the settings that run.allow_change names. Raises ConfigError if one may not change."""
    named = set(config.run.allow_change) if isinstance(config, TrainConfig) else set()
    if refused := named - ALLOWED_WHEN_NAMED:
        raise ConfigError(
            f"run.allow_change: {', '.join(sorted(refused))} cannot change within a run; "
            f"these can: {', '.join(sorted(ALLOWED_WHEN_NAMED))}"
        )
    return named


def digests_of(config: TrainConfig, inputs: TrainingInputs) -> dict[str, str]:
    """Return digests of a run's model files, starting checkpoint and problems, by name, to notice
    when they change."""
    digests = digest_model(inputs.model)
    if config.model.weights:
        files = (path for path in Path(config.model.weights).rglob("*") if path.is_file())
        digests["model.weights"] = digest_files(files)
    found = {name: digest_of_problems(problems) for name, problems in inputs.problems.items()}
    return digests | {f"data.{name}": digest for name, digest in found.items()}


def without_room(config: TrainConfig, inputs: TrainingInputs) -> list[int]:
    """Return the indices of the training problems whose prompts leave no room for a response of the
    maximum length. Raises ConfigError if they are more than `rollout.max_drop_fraction` of all."""
    problems = inputs.problems["train"]
    rollout = config.rollout
    most = rollout.max_context - rollout.max_new_tokens
    reading = track(problems, "reading prompts", transient=True)
    lengths = [len(first_context(problem, inputs.chat)[0]) for problem in reading]
    left_out = [index for index, length in enumerate(lengths) if length > most]
    if left_out:
        longest = max(left_out, key=lambda index: lengths[index])
        words = (
            f"{len(left_out)} of {len(problems)} problems of data.train = {config.data.train} have "
            f"prompts of more than rollout.max_context - rollout.max_new_tokens = {most} tokens "
            f"(the longest, {problems[longest].id!r}: {lengths[longest]})"
        )
        if len(left_out) > rollout.max_drop_fraction * len(problems):
            raise ConfigError(
                f"{words}, more than rollout.max_drop_fraction = {rollout.max_drop_fraction:g} of "
                f"them. Raise rollout.max_context, or filter the problems"
            )
        print(f"WARNING: {words}; they are left out", file=sys.stderr)
    return left_out
