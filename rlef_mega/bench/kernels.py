"""`rlef bench kernels`: the head's kernels beside what others publish, on one GPU, in one run.

`rlef bench kernels cpu` measures, on the CPU, the PyTorch forms that the learner uses there, beside
logits stored whole.

Theory of operation. One process. Cases (a shape, a number of tokens, masked or not) run in order of
importance until the time is up; what was left out, and which baseline could not run and why, goes
into the report. Each method is warmed up first, which compiles it. A GPU's times are taken by its
own events, its memory by PyTorch's allocator; a CPU's by the clock, its memory by counting tensors.
Names of figures are "shape | tokens | masked | method | quantity", which `bench/roofline.py` reads.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from rlef_mega.bench import kernel_small
from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.kernel_methods import METHODS, Method, Problem, UnavailableError
from rlef_mega.bench.measure import Measurement, measure_call
from rlef_mega.config import ConfigError

TIME_LIMIT_S = 420.0  # of the 8 minutes that the whole command may take


@dataclass(frozen=True)
class Shape:
    name: str
    width: int
    vocabulary: int


LLAMA_8B = Shape("8B", 4096, 128256)
LLAMA_70B_TP8 = Shape("70B, TP8", 8192, 16032)
SMOLLM2 = Shape("SmolLM2", 576, 49152)


@dataclass(frozen=True)
class Case:
    shape: Shape
    tokens: int
    masked: float = 0.0


# most important first
GPU_CASES = (
    Case(LLAMA_8B, 8192),
    Case(LLAMA_8B, 8192, masked=0.5),
    Case(LLAMA_70B_TP8, 8192),
    Case(LLAMA_8B, 2048),
    Case(LLAMA_70B_TP8, 2048),
    Case(SMOLLM2, 8192),
    Case(SMOLLM2, 2048),
    Case(LLAMA_8B, 32768),
    Case(LLAMA_70B_TP8, 32768),
    Case(SMOLLM2, 32768),
    Case(LLAMA_70B_TP8, 8192, masked=0.5),
    Case(SMOLLM2, 8192, masked=0.5),
)
CPU_CASES = (
    Case(Shape("demo", 128, 640), 2048),
    Case(Shape("demo", 128, 640), 2048, masked=0.5),
    Case(SMOLLM2, 1024),
)


@dataclass
class Run:
    """What was measured, and why the rest was not."""

    device: torch.device
    dtype: torch.dtype
    limit_s: float
    sample_s: float = 0.4
    started: float = field(default_factory=time.monotonic)
    figures: list[Figure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.started > self.limit_s


def benchmark(where: str) -> Report:
    """`where`: "cpu", or anything else for the GPU."""
    if where == "cpu":
        run = Run(torch.device("cpu"), torch.float32, TIME_LIMIT_S)
        return compare(run, CPU_CASES, METHODS, "rlef bench kernels cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "`rlef bench kernels` needs an NVIDIA GPU, and PyTorch finds none here; "
            "`rlef bench kernels cpu` measures the forms that CPUs use"
        )
    run = Run(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, TIME_LIMIT_S)
    return compare(run, GPU_CASES, METHODS, "rlef bench kernels")


def compare(run: Run, cases: tuple[Case, ...], methods: tuple[Method, ...], title: str) -> Report:
    ready = dict(prepared(run, methods))
    for case in cases:
        measure_case(run, case, ready)
    try:
        run.figures += kernel_small.figures(run.device, run.sample_s)
    except Exception as error:  # the heads' figures are not lost with it
        run.skipped["small kernels"] = f"{type(error).__name__}: {error}"[:300]
    notes = tuple(f"not measured: {name}: {reason}" for name, reason in run.skipped.items())
    shapes = {case.shape.name: [case.shape.width, case.shape.vocabulary] for case in cases}
    about = describe_benchmark(
        dtype=str(run.dtype).removeprefix("torch."),
        shapes=shapes,
        products={method.name: list(method.products) for method in methods},
        gpu=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None,
    )
    return Report(title, about, tuple(run.figures), notes)


def prepared(
    run: Run, methods: tuple[Method, ...]
) -> Iterator[tuple[Method, Callable[[Problem], torch.Tensor]]]:
    for method in methods:
        try:
            yield method, method.prepare(run.device)
        except UnavailableError as reason:
            run.skipped[method.name] = str(reason)


def measure_case(
    run: Run, case: Case, ready: dict[Method, Callable[[Problem], torch.Tensor]]
) -> None:
    label = f"{case.shape.name} | {case.tokens} | {case.masked:.0%}"
    if run.is_over:
        run.skipped[label] = "the time was up"
        return
    problem = make_problem(run, case)
    for method, function in ready.items():
        if case.masked and not method.masks:
            continue
        if run.is_over:
            run.skipped[f"{label} | {method.name}"] = "the time was up"
            continue
        try:
            measure_method(run, f"{label} | {method.name}", method, function, problem)
        # a baseline may fail on a shape in its own ways, running out of memory among them
        except Exception as error:
            run.skipped[f"{label} | {method.name}"] = f"{type(error).__name__}: {error}"[:300]
        forget_gradients(problem)


def measure_method(
    run: Run,
    label: str,
    method: Method,
    function: Callable[[Problem], torch.Tensor],
    problem: Problem,
) -> None:
    def forward() -> None:
        with torch.no_grad():
            function(problem)

    def train() -> None:
        function(problem).backward()
        forget_gradients(problem)

    run.figures += as_figures(label, "forward", measure_call(forward, run.device, run.sample_s))
    if method.products[1] is not None:
        whole = measure_call(train, run.device, run.sample_s)
        run.figures += as_figures(label, "forward and backward", whole)


def as_figures(label: str, what: str, measured: Measurement) -> list[Figure]:
    return [
        Figure(f"{label} | {what}", "ms", tuple(1e3 * s for s in measured.seconds)),
        Figure(f"{label} | {what}, memory", "MiB", (measured.peak_bytes / 2**20,)),
    ]


def forget_gradients(problem: Problem) -> None:
    problem.hidden_TD.grad = problem.weight_VD.grad = None


def make_problem(run: Run, case: Case) -> Problem:
    """Random, with logits of spread 1 or so and tokens at random masked."""
    generator = torch.Generator(run.device).manual_seed(0)
    tokens, width, vocabulary = case.tokens, case.shape.width, case.shape.vocabulary

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=run.device)

    hidden_TD = normal(tokens, width).to(run.dtype).requires_grad_()
    weight_VD = torch.empty(vocabulary, width, dtype=run.dtype, device=run.device)
    for part in weight_VD.split(4096):  # not all of it in fp32 at once
        part.copy_(normal(*part.shape) / width**0.5)
    weight_VD.requires_grad_()
    weight_VD.main_grad = torch.zeros(  # type: ignore[attr-defined]
        vocabulary, width, dtype=torch.float32, device=run.device
    )
    target_T = torch.randint(vocabulary, (tokens,), generator=generator, device=run.device)
    uniform_T = torch.rand(tokens, generator=generator, device=run.device)
    noise, usual = normal(4, tokens), math.log(vocabulary)
    return Problem(
        hidden_TD,
        weight_VD,
        target_T,
        uniform_T >= case.masked if case.masked else None,
        noise[0] / tokens,
        (0.2 * noise[1] - usual, 0.2 * noise[2] - usual, noise[3]),
    )
