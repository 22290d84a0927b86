"""`rlef bench kernels`: compare the output head's kernels with published ones, on one GPU.

`rlef bench kernels cpu` compares the PyTorch implementations that the learner uses on a CPU with
one that stores all logits.

Theory of operation. One process. Cases (a shape, a number of tokens, masked or not) run in order of
importance until the time is up. Skipped measurements, and peers that cannot run, are listed in the
results with their reasons. On a GPU, CUDA events measure time and PyTorch's allocator memory; on a
CPU, the clock measures time, and the bytes of tensors are counted. Figures are named
"shape | tokens | masked | method | quantity"; the rate counts the method's matrix products
(`Method.products`) for unmasked tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from rlef_mega.bench.kernel_methods import METHODS, HeadInputs, Method
from rlef_mega.bench.measure import measure_call
from rlef_mega.bench.results import Figure, Results, describe_benchmark
from rlef_mega.config import ConfigError

MINUTES = 7.0  # after which no measurement is started; the command ends about one minute later


@dataclass(frozen=True)
class HeadCase:
    shape: str  # name of the shape
    width: int
    vocabulary: int
    tokens: int
    masked: float = 0.0  # the fraction of tokens

    @property
    def label(self) -> str:
        return f"{self.shape} | {self.tokens} | {self.masked:.0%}"


LLAMA_8B, LLAMA_70B_TP8 = ("8B", 4096, 128256), ("70B, TP8", 8192, 16032)
SMOLLM2, DEMO = ("SmolLM2", 576, 49152), ("demo", 128, 640)
# most important first
GPU_CASES = (
    HeadCase(*LLAMA_8B, 8192),
    HeadCase(*LLAMA_8B, 8192, masked=0.5),
    *(HeadCase(*shape, 8192) for shape in (LLAMA_70B_TP8, SMOLLM2)),
    *(HeadCase(*LLAMA_8B, tokens) for tokens in (2048, 32768)),
)
CPU_CASES = (HeadCase(*DEMO, 2048), HeadCase(*DEMO, 2048, masked=0.5), HeadCase(*SMOLLM2, 1024))


@dataclass
class Measurements:
    """The figures of one run, and the reasons for those that are missing."""

    device: torch.device
    dtype: torch.dtype
    limit_s: float = 60 * MINUTES
    sample_s: float = 0.4
    started: float = field(default_factory=time.monotonic)
    figures: list[Figure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, measure: Callable[[], None]) -> None:
        """Measure unless the time is up. A method that fails on a shape, for example by running
        out of memory, loses only its own figures."""
        if time.monotonic() - self.started > self.limit_s:
            self.skipped[name] = "the time was up"
            return
        try:
            measure()
        except Exception as error:
            self.skipped[name] = f"{type(error).__name__}: {error}"[:300]

    def add(self, name: str, call: Callable[[], object], flops: float) -> None:
        """Add the call's time and memory, and its rate."""
        measured = measure_call(call, self.device, self.sample_s)
        self.figures += [
            Figure(name, "ms", tuple(1e3 * s for s in measured.seconds)),
            Figure(f"{name}, memory", "MiB", (measured.peak_bytes / 2**20,)),
            Figure(f"{name}, rate", "TFLOP/s", tuple(flops / s / 1e12 for s in measured.seconds)),
        ]


def benchmark(
    where: str, *, cases: str = "", methods: str = "", minutes: float = MINUTES
) -> Results:
    """Measure on the CPU if `where` is "cpu", else on the GPU. `cases` and `methods` select by
    parts of names, separated by commas; "" selects all. Raises ConfigError without a GPU, or if no
    name has such a part."""
    known: Sequence[HeadCase] = CPU_CASES
    device, dtype = torch.device("cpu"), torch.float32
    if where != "cpu":
        if not torch.cuda.is_available():
            raise ConfigError(
                "`rlef bench kernels` needs an NVIDIA GPU, and PyTorch finds none; "
                "`rlef bench kernels cpu` measures the CPU implementations"
            )
        device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
        known = GPU_CASES
    labels = named("case", cases, [case.label for case in known])
    names = named("method", methods, [method.name for method in METHODS])
    return measure_heads(
        Measurements(device, dtype, 60 * minutes),
        [case for case in known if case.label in labels],
        [method for method in METHODS if method.name in names],
        "rlef bench kernels" + (" cpu" if where == "cpu" else ""),
    )


def named(what: str, parts: str, names: Sequence[str]) -> list[str]:
    """Return the names that contain one of the parts. Raises ConfigError if none does."""
    words = [word.strip() for word in parts.split(",")]
    chosen = [name for name in names if any(word in name for word in words)]
    if not chosen:
        known = ", ".join(map(repr, names))
        raise ConfigError(f"--{what}s {parts!r} is in no {what}'s name; they are {known}")
    return chosen


def measure_heads(
    run: Measurements, cases: Sequence[HeadCase], methods: Sequence[Method], title: str
) -> Results:
    run.skipped = {m.name: reason for m in methods if (reason := m.unavailable(run.device))}
    available = [method for method in methods if method.name not in run.skipped]
    for case in cases:
        run.attempt(case.label, partial(measure_case, run, case, available))
    about = describe_benchmark(
        dtype=str(run.dtype).removeprefix("torch."),
        shapes={case.shape: [case.width, case.vocabulary] for case in cases},
        products={method.name: list(method.products) for method in methods},
    )
    notes = tuple(f"not measured: {name}: {reason}" for name, reason in run.skipped.items())
    return Results(title, about, tuple(run.figures), notes)


def measure_case(run: Measurements, case: HeadCase, methods: Sequence[Method]) -> None:
    inputs = make_inputs(run.device, run.dtype, case)
    # FLOPs of one product of the unmasked tokens with the head
    product = 2.0 * case.tokens * (1 - case.masked) * case.width * case.vocabulary

    def measure(method: Method, name: str) -> None:
        def forward() -> None:
            with torch.no_grad():
                method.loss(inputs)

        def train() -> None:
            method.loss(inputs).backward()
            inputs.forget_gradients()

        once, whole = method.products
        run.add(f"{name} | forward", forward, once * product)
        if whole is not None:
            run.add(f"{name} | forward and backward", train, whole * product)

    for method in methods:
        if method.masks or not case.masked:
            name = f"{case.label} | {method.name}"
            run.attempt(name, partial(measure, method, name))
            inputs.forget_gradients()


def make_inputs(device: torch.device, dtype: torch.dtype, case: HeadCase) -> HeadInputs:
    """Make random inputs with logits of spread about 1; masked tokens are chosen at random."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, width, vocabulary = case.tokens, case.width, case.vocabulary

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden_TD = normal(tokens, width).to(dtype).requires_grad_()
    weight_VD = torch.empty(vocabulary, width, dtype=dtype, device=device)
    for part in weight_VD.split(4096):  # not all of it in fp32 at once
        part.copy_(normal(*part.shape) / width**0.5)
    weight_VD.requires_grad_()
    weight_VD.main_grad = torch.zeros(  # type: ignore[attr-defined]
        vocabulary, width, dtype=torch.float32, device=device
    )
    target_T = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    uniform_T = torch.rand(tokens, generator=generator, device=device)
    noise, usual = normal(4, tokens), math.log(vocabulary)
    return HeadInputs(
        hidden_TD,
        weight_VD,
        target_T,
        uniform_T >= case.masked if case.masked else None,
        noise[0] / tokens,
        (0.2 * noise[1] - usual, 0.2 * noise[2] - usual, noise[3]),
    )
