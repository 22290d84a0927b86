"""The settings of a run: one frozen pydantic model for each section of a recipe.

A recipe is a TOML file, which may extend another; `--set section.key=value` overrides single keys,
unknown keys are refused, and the resolved config is written into the run directory. Functions take
the values that they use, not the config. Defaults are the paper's (RLEF A.1, 3.1) where it gives
one.
"""

import codecs
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A user's error in a recipe, a command or a file. The message names the file or the key, and
    the remedy."""


def read_text(path: Path) -> str:
    """Read a text file, which is UTF-8 whatever the locale. Raises ConfigError that names the file
    and what is wrong with it."""
    content = path.read_bytes()
    marks = {codecs.BOM_UTF8: "begins with a byte order mark (BOM)"}
    marks |= {mark: "is UTF-16" for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    if found := next((name for mark, name in marks.items() if content.startswith(mark)), ""):
        raise ConfigError(f"{path} {found}; save it as UTF-8 without a byte order mark")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ConfigError that names the file if it is damaged."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}; copy the file again") from None


def at_home(value: Any) -> Any:
    """Replace `~` by the home directory where a path begins, also within tables and lists:
    `~/model`, `mbpp:~/mbpp.jsonl`, `model.path=~/model`."""
    if isinstance(value, str):
        return re.sub(r"(?:^|(?<=[:=]))~[\w.-]*(?=/|$)", lambda m: os.path.expanduser(m[0]), value)
    if isinstance(value, dict):
        return {name: at_home(below) for name, below in value.items()}
    return [at_home(one) for one in value] if isinstance(value, list) else value


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


AnyConfig = TypeVar("AnyConfig", bound=Section)


class RunConfig(Section):
    dir: str  # run directory; an existing run in it is resumed
    seed: int = 0
    steps: int = Field(gt=0)  # rollout batches; each gives ppo.updates_per_batch updates
    checkpoint_every: int = Field(10, gt=0)
    checkpoint_async: bool = True  # write checkpoints while training continues
    keep_checkpoints: int = Field(2, gt=0)  # how many of the newest to keep
    keep_best: bool = True  # also keep the best one on data.valid
    allow_change: tuple[str, ...] = ()  # learning rates and schedules that a resumed run may change


class ModelShape(Section):
    """The model's shape, for a plan when the model is not on this machine."""

    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    key_value_heads: int = Field(gt=0)
    layers: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    ffn: int = Field(gt=0)
    head_dim: int | None = Field(None, gt=0)  # if it differs from hidden / heads
    tied: bool = False  # the head is the embedding

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of `flops.LlamaShape`."""
        given = self.model_dump(exclude={"vocab_size"})
        head_dim = self.head_dim or self.hidden // self.heads
        return given | {"head_dim": head_dim, "vocabulary": self.vocab_size}


class ModelConfig(Section):
    # the instruction-tuned starting point: a Hugging Face folder, or the name of a model on the hub
    path: str
    weights: str | None = None  # a checkpoint folder to start from, instead of the weights in path
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"
    shape: ModelShape | None = None


class ParallelConfig(Section):
    """One network's layout: tensor x pipeline x data parallel ranks, in Megatron's terms."""

    tensor_model_parallel_size: int = Field(1, gt=0)
    pipeline_model_parallel_size: int = Field(1, gt=0)
    # model chunks per pipeline rank; above 1, the interleaved schedule
    virtual_pipeline_model_parallel_size: int = Field(1, gt=0)
    # layers of each stage, in the network's order; None: balanced
    pipeline_layers: tuple[int, ...] | None = None
    data_parallel_size: int = Field(1, gt=0)
    sequence_parallel: bool = False
    overlap: bool = True  # overlap gradient reduction and weight gathering with computation
    processes_per_node: int = Field(8, gt=0)

    @property
    def world_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.data_parallel_size
        )


class DataConfig(Section):
    """Sources of problems, such as `curriculum:SPLIT`, `codecontests:PATH` or a JSONL file
    (docs/problems.md lists all)."""

    train: str
    valid: str | None = None
    test: str | None = None


class ServersConfig(Section):
    """SGLang servers, for `rollout.engine = "sglang"`: how `rlef serve` starts them on a node, and
    how training reaches them."""

    # like http://node7:30000; empty: those that `rlef serve` starts here
    urls: tuple[str, ...] = ()
    count: int = Field(1, gt=0)  # servers that `rlef serve` starts on its node
    tensor_parallel_size: int = Field(1, gt=0)  # GPUs of a server
    first_gpu: int = Field(0, ge=0)  # GPU of the first server; the next ones take the GPUs after it
    host: str = "127.0.0.1"  # address to listen on
    port: int = Field(30000, gt=0, lt=65536)  # of the first server; the others follow
    memory_fraction: float = Field(0.8, gt=0, lt=1)  # share of the device for weights and KV cache
    device: Literal["cuda", "cpu"] = "cuda"
    python: str = ".venv-sglang/bin/python"  # the Python of SGLang's own environment
    # servers share the trainer's GPUs and release their memory while it trains
    release_memory: bool = False
    arguments: tuple[str, ...] = ()  # more arguments for each SGLang server
    ready_s: float = Field(1800.0, gt=0)  # timeout for a server to load the model
    # how weights are sent. disk: through the run directory; distributed: by NCCL (gloo on a CPU);
    # tensor: to servers on the same node, by CUDA IPC (shared memory on a CPU)
    publish: Literal["disk", "distributed", "tensor"] = "disk"
    publish_s: float = Field(600.0, gt=0)  # timeout of each request of a publication
    concurrency: int = Field(256, gt=0)  # open requests of each rank to each server
    deadline_s: float = Field(1800.0, gt=0)  # of a request, retries included
    # after this time without any server, the run saves and stops
    lost_s: float = Field(900.0, gt=0)

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.urls or self.own_addresses

    @property
    def own_addresses(self) -> tuple[str, ...]:
        """Return the addresses of the servers that `rlef serve` starts here."""
        host = f"[{self.host}]" if ":" in self.host else self.host  # IPv6
        return tuple(f"http://{host}:{self.port + n}" for n in range(self.count))


class RolloutConfig(Section):
    episodes_per_batch: int = Field(1024, gt=0)
    samples_per_problem: int = Field(1, gt=0)  # dialogues of a batch about the same problem
    turns: int = Field(3, ge=1, le=10)  # 1 is single-turn training
    feedback: Literal["true", "none", "private"] = "true"
    # maximum length of one feedback; None: as many tokens as the context has room for
    feedback_tokens: int | None = Field(None, gt=0)
    # where feedback is cut if it is longer than feedback_tokens or the context allows
    feedback_cut: Literal["middle", "right"] = "middle"
    # which code block of a response is its program
    program: Literal["first", "last", "only"] = "first"
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(1024, gt=0)
    max_context: int = Field(8192, gt=0)  # tokens of a whole dialogue
    # local: sample in each training process, on its device
    engine: Literal["local", "sglang"] = "local"
    servers: ServersConfig = ServersConfig()
    mode: Literal["sync", "async"] = "sync"  # async: sample dialogues while the trainer trains
    # async: versions that training data may be behind the weights
    max_staleness: int = Field(1, ge=0)
    # async: a batch of n dialogues may close without this share of the n oldest ones
    max_passed_over: float = Field(0.1, ge=0, le=1)
    # async: concurrent dialogues of a process; None: as many as servers accept
    open_dialogues: int | None = Field(None, gt=0)
    # dropped share of a batch above which the run stops
    max_drop_fraction: float = Field(0.05, ge=0, le=1)

    @property
    def staleness(self) -> int:
        """Return the staleness that the mode allows."""
        return self.max_staleness if self.mode == "async" else 0


class JudgeConfig(Section):
    """Grading: by servers or, if none are given, in a sandbox of each process."""

    workers: int = Field(1, gt=0)  # sandbox workers per process
    isolation: Literal["default", "minimal"] = "default"
    packages: tuple[str, ...] = ()  # packages that programs may import, like numpy
    servers: tuple[str, ...] = ()  # grading servers, like http://node7:8765
    deadline_s: float = Field(900.0, gt=0)  # of a grading request to servers, retries included


class PPOConfig(Section):
    """RLEF 2.2 and A.1. The ablations are `token_level_value`, `beta = 0`, `rollout.turns = 1` and
    `rollout.feedback = "none"`."""

    beta: float = Field(0.05, ge=0)  # weight of the KL penalty in the reward; 0: none
    # what the reward's KL averages over a turn's tokens. sampled: log-ratios of the sampled tokens,
    # as in the paper; exact: their expectations over the vocabulary
    kl: Literal["sampled", "exact"] = "sampled"
    gamma: float = Field(1.0, ge=0, le=1)
    # what a return is compared with. critic: values; rloo, grpo: other dialogues about the problem
    advantage: Literal["critic", "rloo", "grpo"] = "critic"
    lam: float = Field(1.0, ge=0, le=1)  # of GAE over turns; 1: Monte Carlo returns
    clip_eps: float = Field(0.2, gt=0)
    clip_alpha: float = Field(0.2, gt=0)
    invalid_code_penalty: float = Field(-0.2, le=0)
    # add the penalty to the -1 of a last turn without valid code (the paper does not say)
    penalize_invalid_last_turn: bool = False
    updates_per_batch: int = Field(4, gt=0)
    normalize_advantages: bool = True
    token_level_value: bool = False  # RLEF B.6: one value per response token
    critic_warmup_steps: int = Field(0, ge=0)  # first batches train only the critic

    @model_validator(mode="after")
    def check_reference_and_critic_exist(self) -> Self:
        if self.kl == "exact" and not self.beta:
            raise ValueError(
                'ppo.kl = "exact" needs ppo.beta above 0: without a KL penalty there is no '
                'reference; set ppo.kl = "sampled"'
            )
        for key in ("lam", "token_level_value", "critic_warmup_steps"):
            value = getattr(self, key)
            if self.advantage != "critic" and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"ppo.{key} = {value} needs a critic, and ppo.advantage = {self.advantage!r} "
                    f'has none; remove it, or set ppo.advantage = "critic"'
                )
        if self.lam < 1 and self.token_level_value:
            raise ValueError(
                f"ppo.lam = {self.lam} needs one value per turn; set ppo.token_level_value to false"
            )
        return self


class OptimizerConfig(Section):
    lr: float = Field(2e-7, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    warmup_updates: int = Field(50, ge=0)
    decay_start_update: int | None = None  # None: constant after the warm-up
    decay_updates: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # of lr, after the (linear) decay


class LearnerConfig(Section):
    microbatch_tokens: int = Field(8192, gt=0)  # token budget of a packed micro-batch
    # idle: keep what a phase does not need in pinned host memory
    offload: Literal["none", "idle"] = "none"
    policy: OptimizerConfig = OptimizerConfig()
    critic: OptimizerConfig = OptimizerConfig()


class EvalConfig(Section):
    """Evaluation on data.test before and after training, and on data.valid during it. Turns,
    feedback and sampling are those set here, not those of training."""

    every: int = Field(0, ge=0)  # steps between evaluations on data.valid; 0: never
    problems: int = Field(100, gt=0)  # number of problems of data.valid
    turns: int = Field(3, ge=1, le=10)
    feedback: Literal["true", "none"] = "true"
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class ProfileConfig(Section):
    """Traces of the profiler, in the run's folder profile/: tens of MB per step and rank."""

    steps: tuple[int, ...] = ()  # steps to trace
    ranks: tuple[int, ...] = (0,)
    memory: bool = False  # trace allocations too; on a GPU, a memory snapshot
    stacks: bool = False  # record Python stacks; slow


class GuardConfig(Section):
    """Limits at which a run stops itself."""

    # max |log-prob(engine) - log-prob(trainer)|; 0.01 in float32. One token of thousands may differ
    # by over 1 in bfloat16 where nothing is wrong; other weights move the mean, too
    max_logprob_gap: float = Field(5.0, gt=0)
    mean_logprob_gap: float = Field(0.05, gt=0)  # 0.001 in float32
    # share of turns without valid code, mean of guard.window steps
    max_invalid_fraction: float = Field(0.5, gt=0, le=1)
    # of the ratios pi_old / pi_b, divided by the number of tokens; mean of guard.window steps
    min_effective_sample_size: float = Field(0.5, ge=0, le=1)
    # KL per token between pi_b and pi_old, mean of guard.window steps
    max_behaviour_k3: float = Field(0.2, gt=0)
    window: int = Field(3, gt=0)


class TrackConfig(Section):
    """Experiment trackers, which receive the numbers of metrics.jsonl."""

    tensorboard: bool = False  # write event files into the run's tensorboard/
    wandb_project: str | None = None
    # offline: write into the run's wandb/, for `wandb sync`
    wandb_mode: Literal["online", "offline"] = "online"


class TrainConfig(Section):
    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    # the critic's layout, if it runs on ranks of its own
    critic_parallel: ParallelConfig | None = None
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    judge: JudgeConfig = JudgeConfig()
    ppo: PPOConfig = PPOConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    guard: GuardConfig = GuardConfig()
    profile: ProfileConfig = ProfileConfig()
    track: TrackConfig = TrackConfig()

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the run."""
        own = self.critic_parallel.world_size if self.critic_parallel else 0
        return self.parallel.world_size + own

    @model_validator(mode="before")
    @classmethod
    def lower_float32_guards(cls, given: Any) -> Any:
        """Lower the default limits of log-prob gaps in float32, which rounds less than bfloat16."""
        match given:
            case {"model": {"dtype": "float32"}} if isinstance(given.get("guard", {}), dict):
                limits = {"max_logprob_gap": 0.01, "mean_logprob_gap": 0.001}
                return given | {"guard": limits | given.get("guard", {})}
        return given

    @model_validator(mode="after")
    def check_combinations(self) -> Self:
        """Check settings of different sections that depend on each other."""
        episodes, updates = self.rollout.episodes_per_batch, self.ppo.updates_per_batch
        if episodes % updates:
            raise ValueError(
                f"rollout.episodes_per_batch = {episodes} cannot be divided into "
                f"ppo.updates_per_batch = {updates} equal updates"
            )
        samples = self.rollout.samples_per_problem
        if episodes % samples:
            raise ValueError(
                f"rollout.episodes_per_batch = {episodes} cannot be divided into problems with "
                f"rollout.samples_per_problem = {samples} dialogues each"
            )
        if self.ppo.advantage != "critic":
            if samples == 1:
                raise ValueError(
                    f"ppo.advantage = {self.ppo.advantage!r} compares the dialogues about a "
                    "problem; set rollout.samples_per_problem to 2 or more, such as 8"
                )
            if self.critic_parallel:
                raise ValueError(
                    f"ppo.advantage = {self.ppo.advantage!r} has no critic; remove critic_parallel"
                )
        layouts = {"parallel": self.parallel, "critic_parallel": self.critic_parallel}
        for name, layout in layouts.items():
            if layout and (episodes // updates) % layout.data_parallel_size:
                raise ValueError(
                    f"an update of {episodes // updates} episodes cannot be divided evenly by "
                    f"{name}.data_parallel_size = {layout.data_parallel_size}"
                )
        servers = self.rollout.servers
        if servers.release_memory and (servers.device == "cpu" or self.rollout.mode == "async"):
            raise ValueError(
                "rollout.servers.release_memory needs servers on GPUs and sync mode: a CPU has no "
                "memory saver, and in async mode servers are never idle; set it to false"
            )
        if servers.release_memory and servers.publish == "distributed":
            raise ValueError(
                "rollout.servers.release_memory: servers share the trainer's GPUs, and NCCL takes "
                'one process per GPU; set rollout.servers.publish to "tensor" (one node) or "disk"'
            )
        if self.rollout.mode == "async" and self.rollout.engine == "local":
            raise ValueError(
                'rollout.mode = "async" needs rollout.engine = "sglang": the local engine '
                "computes in the trainer's processes, so nothing would overlap"
            )
        if self.rollout.max_new_tokens >= self.rollout.max_context:
            raise ValueError("rollout.max_new_tokens must be below rollout.max_context")
        return self


class SFTConfig(Section):
    """The supervised stage before RLEF, on generated dialogues. It makes the demo's base model from
    random weights, or trains a pretrained model."""

    dir: str
    model: str = ""  # a folder or a hub name, as model.path; empty: random weights, as below
    dialogues: Literal["curriculum", "functions"] = "curriculum"
    seed: int = 0
    steps: int = Field(gt=0)
    dialogues_per_step: int = Field(32, gt=0)
    checkpoint_every: int = Field(200, gt=0)
    checkpoint_async: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    microbatch_tokens: int = Field(4096, gt=0)
    vocab_size: int = Field(720, gt=0)
    hidden_size: int = Field(96, gt=0)
    num_layers: int = Field(3, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    ffn_hidden_size: int = Field(256, gt=0)
    max_position_embeddings: int = Field(512, gt=0)
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-3, warmup_updates=50)

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of `flops.LlamaShape` for the model that the stage makes."""
        return {
            "layers": self.num_layers,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "heads": self.num_attention_heads,
            "key_value_heads": self.num_key_value_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "vocabulary": self.vocab_size,
        }


def check_placement(config: TrainConfig, ranks: int | None = None) -> None:
    """Raise ConfigError if servers that start on a machine of `ranks` ranks (all of them by
    default) would take GPUs from them."""
    servers, ranks = config.rollout.servers, ranks or config.world_size
    apart = config.rollout.engine == "local" or servers.device == "cpu" or servers.release_memory
    if not apart and servers.first_gpu < ranks:
        raise ConfigError(
            f"the ranks take GPUs 0 to {ranks - 1} of this machine, and the servers' GPUs begin at "
            f"rollout.servers.first_gpu = {servers.first_gpu}; set it to {ranks}, or "
            "rollout.servers.release_memory = true, with which both use the same GPUs in turn"
        )


def find_recipe(name: str) -> Path:
    """Find a recipe by its path, or by its name in the package."""
    for path in (Path(at_home(name)), RECIPES / name, RECIPES / f"{name}.toml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise ConfigError(f"no recipe {name!r}: neither a file nor one of {known}")


def load_config(path: Path, overrides: Sequence[str], model: type[AnyConfig]) -> AnyConfig:
    """Read a TOML recipe and apply `a.b=c` overrides (values in TOML syntax; bare words are
    strings). Raises ConfigError with a line for each invalid setting."""
    tree = read_recipe(path)
    for override in overrides:
        apply_override(tree, override)
    try:
        return model.model_validate(at_home(tree))
    except ValidationError as error:
        raise ConfigError(f"{path}:\n" + "\n".join(explain(error, model))) from None


def read_recipe(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's tables, over those of the recipe that it `extends`."""
    if path in extended_by:
        raise ConfigError(f"{path} extends itself; remove one `extends`")
    try:
        tree = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    base = tree.pop("extends", None)
    if base is None:
        return tree
    return merged(read_recipe(find_recipe(str(base)), (*extended_by, path)), tree)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of both; a key of `above` replaces that of `below`."""
    both = [name for name in above if isinstance(below.get(name), dict)]
    return {**below, **above, **{name: merged(below[name], above[name]) for name in both}}


def apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
    tree[last] = value


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line for each invalid setting; for an unknown key, it lists the known ones."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            section = model
            for part in fault["loc"][:-1]:
                annotation = section.model_fields[str(part)].annotation
                choices = get_args(annotation) or (annotation,)  # an optional section adds None
                section = next(choice for choice in choices if choice is not NoneType)
            lines.append(f"  unknown key {where!r}; known there: {', '.join(section.model_fields)}")
        else:
            lines.append(f"  {where or 'recipe'}: {fault['msg'].removeprefix('Value error, ')}")
    return lines


@contextmanager
def requires_extra(setting: str, extra: str) -> Iterator[None]:
    """Turn the error of a package that is not installed into a ConfigError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{setting} needs {error.name}: pip install 'rlef-mega[{extra}]'"
        ) from None


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return the leaves of nested tables, each under its joined names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner = flatten(value, separator).items()
            flat |= {f"{name}{separator}{below}": leaf for below, leaf in inner}
        else:
            flat[name] = value
    return flat


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the keys of `asked` whose values in `found` differ, with both values; empty if none
    does."""
    return "; ".join(
        f"{key} = {found.get(key)!r} there, {value!r} here"
        for key, value in asked.items()
        if found.get(key) != value
    )


def dump_toml(config: Section) -> str:
    """Return the resolved config as TOML, which `load_config` reads back to an equal one."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
