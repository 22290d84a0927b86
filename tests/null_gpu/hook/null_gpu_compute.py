"""Computes small tensors on the null GPU, so that what a host reads from a device is true.

Theory of operation. A device's memory is memory of the host. So after each CUDA kernel of a PyTorch
operation (registered with the dispatcher, in every thread) this module runs PyTorch's CPU kernel of
the same operation on the same memory: first the CUDA kernel, which makes its checks, allocates its
results and launches nothing, then the CPU kernel, whose results are written into those. A Triton
kernel is compiled and launched as usual, and then run by Triton's interpreter on the same memory.

An operation with a tensor above NULL_GPU_COMPUTE_MIB is not computed, and its new results are zero:
so no run depends on what memory held before, and pages that nobody wrote take no room. `skipped`
counts such operations by name. From then on NaN and infinities that an operation makes of finite
numbers become zero too, or 0 / 0 would end a run. An operation that the CPU does not have is an
error.

What this cannot show: speed, the rounding of GPU kernels, races between streams.
"""

import atexit
import collections
import contextlib
import ctypes
import functools
import itertools
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

LIMIT = int(os.environ.get("NULL_GPU_COMPUTE_MIB", "4")) << 20
skipped: collections.Counter[str] = collections.Counter()
runtime = ctypes.CDLL(None)
zero = runtime.null_gpu_zero
zero.argtypes = ctypes.c_void_p, ctypes.c_size_t

# The shape or value of their result is computed, so the CUDA kernel is not even called.
HOST_ONLY = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave", "equal", "_assert_async",
}  # fmt: skip
FILLS = {"copy_", "zero_", "fill_", "normal_", "uniform_"}  # in place, whatever was there before
NUMBERS = (bool, int, float, complex)
# Zero as well, for a Triton kernel that is not computed leaves its results as they are.
ALLOCATIONS = {"empty", "empty_strided"}
# They change a tensor's size, or make a second tensor of the same memory: nothing to compute.
UNTOUCHED = {
    "resize_", "set_", "set_data", "record_stream", "_pin_memory",
    "is_pinned", "is_set_to", "_fused_sdp_choice", "_local_scalar_dense", "_resize_output_",
    "_efficientzerotensor", "_cudnn_rnn_flatten_weight", "_efficient_attention_forward",
    "_efficient_attention_backward",
}  # fmt: skip


def prepare(module: ModuleType) -> None:
    forms = {"torch": prepare_torch, "triton.runtime.jit": prepare_triton}
    forms.get(module.__name__, prepare_inductor)(module)


# ---------------------------------------------------------------------------- tensors


def on_host(tensor: Any) -> Any:
    """Return a CPU tensor of the same memory."""
    import torch

    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    if not count:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count)
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of lists, tuples and dictionaries."""
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def host_argument(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return on_host(value) if value.device.type == "cuda" else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return None if isinstance(value, torch.Generator) else value


def is_small(values: Any) -> bool:
    import torch

    tensors = (value for value in leaves(values) if isinstance(value, torch.Tensor))
    return all(tensor.numel() * tensor.element_size() <= LIMIT for tensor in tensors)


def is_same_memory(first: Any, second: Any) -> bool:
    return (first.data_ptr(), first.dtype) == (second.data_ptr(), second.dtype)


def clear(values: Any) -> None:
    """Zero device tensors."""
    import torch

    for value in leaves(values):
        if isinstance(value, torch.Tensor) and value.device.type == "cuda" and value.numel():
            if value.is_contiguous():
                zero(value.data_ptr(), value.numel() * value.element_size())
            elif is_small(value):
                on_host(value).zero_()


def write(results: Any, computed: Any) -> None:
    """Write what the CPU computed to the results that the CUDA kernel allocated."""
    import torch

    for result, value in zip(leaves(results), leaves(computed), strict=True):
        if isinstance(result, torch.Tensor) and isinstance(value, torch.Tensor) and value.numel():
            on_host(result).copy_(value)


def is_non_finite(value: Any) -> bool:
    """Return whether a tensor has, or a number is, an infinity or NaN."""
    import torch

    if isinstance(value, torch.Tensor):
        known = value.is_floating_point() and value.device.type in ("cuda", "cpu")
        return known and not bool(host_argument(value).isfinite().all())
    return isinstance(value, float) and not math.isfinite(value)


def clear_non_finite(results: Any) -> None:
    """Replace what an operation makes of finite numbers: 0 / 0, when an operand was not computed,
    would end a run that checks its losses."""
    import torch

    for result in leaves(results):
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel():
            host_argument(result).nan_to_num_(0.0, 0.0, 0.0)


@contextlib.contextmanager
def device_randomness(generator: Any) -> Iterator[None]:
    """Let the CPU draw numbers that follow from the CUDA generator's seed and offset alone."""
    import torch

    seed = generator.initial_seed() * 0x9E3779B1 + generator.get_offset()
    kept = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed % 2**63)
    yield
    torch.default_generator.set_state(kept)


# ---------------------------------------------------------------------------- PyTorch


class Operation:
    """An operation of ATen, on CUDA and then on the CPU."""

    def __init__(self, operation: Any, kernel: Any, full_name: str) -> None:
        import torch

        self.operation, self.kernel = operation, kernel
        self.on_cpu: Callable = CPU_FORMS.get(full_name, operation)
        self.on_device: Callable | None = DEVICE_FORMS.get(full_name)
        schema = operation._schema
        self.name = schema.name.removeprefix("aten::")
        self.is_random = torch.Tag.nondeterministic_seeded in operation.tags
        self.fills = {a.name for a in schema.arguments if a.alias_info and a.kwarg_only}
        self.makes = not any(result.alias_info for result in schema.returns)
        self.operands = [
            place
            for place, argument in enumerate(schema.arguments)
            if str(argument.type) == "Tensor" and argument.name != "condition"
        ]

    def __call__(self, keys: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        with torch._C.DisableTorchFunction():  # torch.device("cuda"), under which ours would be too
            return self.compute(keys, args, kwargs)

    def compute(self, keys: Any, args: Any, kwargs: Any) -> Any:
        if self.on_device is not None:
            return self.on_device(*args, **kwargs)
        if self.name in HOST_ONLY:
            return self.host_only(args, kwargs)
        if self.name in ALLOCATIONS:
            results = self.on_cuda(keys, args, kwargs)
            clear(results)
            return results
        if not is_small((args, kwargs)):
            return self.skip(keys, args, kwargs)
        if getattr(inside, "operation", None):  # which the CPU computes as a whole
            results = self.on_cuda(keys, args, kwargs)
            if self.makes:
                clear(results)
            return results
        finite = skipped and not any(is_non_finite(value) for value in leaves((args, kwargs)))
        generator = self.generator(args, kwargs) if self.is_random else None
        randomness = device_randomness(generator) if generator else contextlib.nullcontext()
        with randomness:
            results = self.on_cuda(keys, args, kwargs)
            if self.makes and not is_small(results):
                skipped[self.name] += 1
                clear(results)
                return results
            try:
                computed = self.on_host(args, kwargs)
            except NotImplementedError as error:  # rather than a wrong number that looks right
                raise NotImplementedError(
                    f"the null GPU cannot compute {self.operation}; add it to CPU_FORMS, {__file__}"
                ) from error
        if self.makes:
            write(results, computed)
        if finite:
            clear_non_finite(results)
        return results

    def on_host(self, args: Any, kwargs: Any) -> Any:
        kwargs = mapped(kwargs, host_argument)
        try:
            return self.on_cpu(*mapped(args, host_argument), **kwargs)
        except RuntimeError as error:
            if "Unable to cast" not in str(error):
                raise
            return self.on_cpu(*mapped(self.without_numbers(args), host_argument), **kwargs)

    def without_numbers(self, args: Any) -> Any:
        """Replace a number in a tensor's place by a tensor that gives the result the same type."""
        import torch

        given = {place: args[place] for place in self.operands if place < len(args)}
        numbers = {place for place, value in given.items() if isinstance(value, NUMBERS)}
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        changed = list(args)
        for place in numbers:
            dtype = torch.result_type(tensors[0], args[place]) if tensors else None
            changed[place] = torch.tensor(args[place], dtype=dtype)
        return changed

    def on_cuda(self, keys: Any, args: Any, kwargs: Any) -> Any:
        args = self.without_numbers(args)
        outer = getattr(inside, "operation", None)
        inside.operation = outer or self.name
        try:
            return self.kernel.call_boxed(keys, *args, **kwargs)
        finally:
            inside.operation = outer

    def host_only(self, args: Any, kwargs: Any) -> Any:
        import torch

        if self.name != "_assert_async":
            runtime.null_gpu_wait()
        if self.name == "equal" and not is_small(args):
            skipped[self.name] += 1
            return args[0].shape == args[1].shape
        device = next(value.device for value in leaves(args) if isinstance(value, torch.Tensor))
        computed = self.on_host(args, kwargs)

        def to_device(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            result = torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device=device
            )
            write(result, value)
            return result

        return mapped(computed, to_device)

    def skip(self, keys: Any, args: Any, kwargs: Any) -> Any:
        skipped[self.name] += 1
        if self.name in FILLS and not (self.name == "copy_" and is_same_memory(*args[:2])):
            clear(args[0])  # of copies, those that need no kernel are made
        results = self.on_cuda(keys, args, kwargs)
        if self.makes:
            clear(results)
        else:
            clear([value for name, value in kwargs.items() if name in self.fills])
        return results

    def generator(self, args: Any, kwargs: Any) -> Any:
        import torch

        given = [value for value in leaves((args, kwargs)) if isinstance(value, torch.Generator)]
        if given:
            return given[0].clone_state() if given[0].device.type == "cuda" else None
        return torch.cuda.default_generators[torch.cuda.current_device()].clone_state()


inside = threading.local()  # .operation: the one whose CUDA kernel this thread is in
library: Any = None  # registrations last as long as this


def prepare_torch(torch: Any) -> None:
    global library
    library = torch.library.Library("aten", "IMPL")
    names = set(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"))
    names = {name.removeprefix("aten::") for name in names if name.startswith("aten::")}
    for full_name in sorted(names | {"copy_"}):
        name, _, overload = full_name.partition(".")
        operation = getattr(getattr(torch.ops.aten, name), overload or "default")
        schema = operation._schema
        views = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if views or name in UNTOUCHED or "quantize" in full_name:
            continue
        kernel = torch.library.get_kernel(operation, "CUDA")
        wrapped = Operation(operation, kernel, full_name)
        with warnings.catch_warnings(action="ignore"):  # that a kernel is overridden
            library.impl(full_name, wrapped, "CUDA", with_keyset=True, allow_override=True)
    if os.environ.get("NULL_GPU_VERBOSE"):
        atexit.register(report)


def report() -> None:
    print(f"null GPU: not computed: {dict(skipped.most_common(20))}", file=sys.stderr)


# ---------------------------------------------------------------------------- forms for the CPU


def wide_product(left: Any, right: Any, out_dtype: Any, *, out: Any = None) -> Any:
    result = (left.double() @ right.double()).to(out_dtype)
    return result if out is None else out.copy_(result)


def wide_sum(
    summand: Any, left: Any, right: Any, out_dtype: Any, *, beta=1, alpha=1, out: Any = None
) -> Any:
    result = alpha * (left.double() @ right.double())
    if beta:
        result += beta * summand.double()
    result = result.to(out_dtype)
    return result if out is None else out.copy_(result)


def scores(query: Any, key: Any, bias: Any, causal: bool, scale: float | None) -> Any:
    """Scaled scores [.., H, Q, K] of queries [.., H, Q, D] and as many heads of keys."""
    import torch

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result = scale * (query.float() @ key.float().mT)
    if bias is not None:
        result = result + bias.float()
    if causal:
        hidden = torch.ones(result.shape[-2:], dtype=torch.bool).triu(1)
        result = result.masked_fill(hidden, -torch.inf)
    return result


def attend(query, key, value, bias, causal, scale) -> tuple[Any, Any]:
    """Return the output [.., H, Q, D] and the log of each row's sum [.., H, Q]."""
    import torch

    group = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(group, -3) for x in (key, value))
    logits = scores(query, key, bias, causal, scale)
    sums = logits.logsumexp(-1)
    probabilities = torch.nan_to_num((logits - sums[..., None]).exp())
    return (probabilities @ value.float()).to(query.dtype), sums


def attend_backward(grad, query, key, value, bias, causal, scale) -> tuple[Any, Any, Any, Any]:
    """Return the gradients of query, key, value and scores."""
    import torch

    group, heads = query.shape[-3] // key.shape[-3], key.shape[-3]
    keys, values = (x.repeat_interleave(group, -3).float() for x in (key, value))
    logits, grad = scores(query, keys, bias, causal, scale), grad.float()
    probabilities = torch.nan_to_num(logits.softmax(-1))
    grad_probabilities = grad @ values.mT
    delta = (grad_probabilities * probabilities).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - delta)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def grouped(x: Any) -> Any:
        return x.unflatten(-3, (heads, group)).sum(-3)

    return (
        (scale * (grad_scores @ keys)).to(query.dtype),
        grouped(scale * (grad_scores.mT @ query.float())).to(key.dtype),
        grouped(probabilities.mT @ grad).to(value.dtype),
        grad_scores,
    )


def spans(ends: Any) -> list[slice]:
    bounds = ends.tolist()
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def heads_first(x: Any, rows: slice) -> Any:
    return x[rows].transpose(0, 1)


def flash_forward(
    query, key, value, ends_q, ends_k, max_q, max_k, dropout, causal, debug, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
) -> tuple:  # fmt: skip
    import torch

    windows = (window_size_left, window_size_right)
    causal = causal or windows in ((-1, 0), (None, 0))
    if ends_q is None or dropout or windows[0] not in (None, -1) or seqused_k is not None:
        raise NotImplementedError
    output = torch.empty_like(query)
    sums = torch.zeros(query.shape[1], query.shape[0])
    for rows, columns in zip(spans(ends_q), spans(ends_k), strict=True):
        q, k, v = heads_first(query, rows), heads_first(key, columns), heads_first(value, columns)
        result, sums[:, rows] = attend(q, k, v, None, causal, scale)
        output[rows] = result.transpose(0, 1)
    return output, sums, None, None, None


def flash_backward(
    grad, query, key, value, out, sums, ends_q, ends_k, max_q, max_k, dropout, causal, state, skip,
    *, scale=None, window_size_left=None, window_size_right=None,
) -> tuple:  # fmt: skip
    import torch

    windows = (window_size_left, window_size_right)
    causal = causal or windows in ((-1, 0), (None, 0))
    if ends_q is None or dropout or windows[0] not in (None, -1):
        raise NotImplementedError
    grads = tuple(torch.zeros_like(x) for x in (query, key, value))
    for rows, columns in zip(spans(ends_q), spans(ends_k), strict=True):
        q, k, v = heads_first(query, rows), heads_first(key, columns), heads_first(value, columns)
        parts = attend_backward(heads_first(grad, rows), q, k, v, None, causal, scale)
        for total, part, where in zip(grads, parts[:3], (rows, columns, columns), strict=True):
            total[where] = part.transpose(0, 1)
    return grads


def flash_sdpa(query, key, value, dropout=0.0, causal=False, debug=False, *, scale=None) -> tuple:
    if dropout:
        raise NotImplementedError
    return (*attend(query, key, value, None, causal, scale), *(None,) * 7)


def flash_sdpa_backward(
    grad, query, key, value, out, sums, ends_q, ends_k, max_q, max_k, dropout, causal, seed, offset,
    *, scale=None,
) -> tuple:  # fmt: skip
    if dropout:
        raise NotImplementedError
    return attend_backward(grad, query, key, value, None, causal, scale)[:3]


def efficient_sdpa(
    query, key, value, bias, with_sums, dropout=0.0, causal=False, *, scale=None
) -> tuple:
    import torch

    if dropout:
        raise NotImplementedError
    output, sums = attend(query, key, value, bias, causal, scale)
    padded = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % 32)) if with_sums else None
    return output, padded, None, None


def efficient_sdpa_backward(
    grad, query, key, value, bias, out, sums, seed, offset, dropout, wanted, causal=False, *,
    scale=None,
) -> tuple:  # fmt: skip
    if dropout:
        raise NotImplementedError
    grads = attend_backward(grad, query, key, value, bias, causal, scale)
    return tuple(value if need else None for value, need in zip(grads, wanted, strict=True))


def cudnn_sdpa(
    query, key, value, bias, with_sums, dropout=0.0, causal=False, debug=False, *, scale=None
) -> tuple:
    """cuDNN's attention, whose library does not work here: what it would allocate, and no more."""
    import torch

    output, sums = torch.empty_like(query), query.new_empty(0, dtype=torch.float32)
    if with_sums:
        sums = query.new_empty(*query.shape[:-1], 1, dtype=torch.float32)
    state = [torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2)]
    inputs = [None if x is None else on_host(x) for x in (query, key, value, bias)]
    if not is_small((query, key, value, bias)):
        skipped["_scaled_dot_product_cudnn_attention"] += 1
        clear([output, sums])
    elif dropout:
        raise NotImplementedError
    else:
        computed, computed_sums = attend(*inputs, causal, scale)
        write([output, sums], [computed, computed_sums[..., None] if with_sums else None])
    sizes = query.shape[-2], key.shape[-2]
    return output, sums, None, None, *sizes, *state, None


def cudnn_sdpa_backward(
    grad, query, key, value, out, sums, seed, offset, bias, ends_q, ends_k, max_q, max_k, dropout,
    causal, *, scale=None,
) -> tuple:  # fmt: skip
    import torch

    grads = [torch.empty_like(x) for x in (query, key, value)]
    if not is_small((query, key, value, bias)):
        skipped["_scaled_dot_product_cudnn_attention_backward"] += 1
        clear(grads)
    elif dropout:
        raise NotImplementedError
    else:
        inputs = [None if x is None else on_host(x) for x in (grad, query, key, value, bias)]
        write(grads, attend_backward(*inputs, causal, scale)[:3])
    return tuple(grads)


def power_of_number(base: Any, exponent: Any, *, out: Any = None) -> Any:
    """PyTorch makes the base a number on the device, which no kernel in Python can be given."""
    import torch

    dtype = torch.result_type(base, exponent)
    return torch.pow(torch.tensor(base, dtype=dtype), exponent, out=out)


DEVICE_FORMS: dict[str, Callable] = {
    "pow.Scalar": power_of_number,
    "pow.Scalar_out": power_of_number,
    "_scaled_dot_product_cudnn_attention": cudnn_sdpa,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_sdpa_backward,
}


def rms_norm_backward(grad, x, shape, scale, weight, wanted) -> tuple:
    """y = x scale weight, scale = (mean x^2 + eps)^-1/2, over the last dimensions `shape`."""
    own = tuple(range(-len(shape), 0))
    rows = tuple(range(x.dim() - len(shape)))
    normal, grad = x.float() * scale.float(), grad.float()
    grad_normal = grad if weight is None else grad * weight.float()
    along = (grad_normal * normal).mean(own, keepdim=True)
    grad_x = (scale.float() * (grad_normal - normal * along)).to(x.dtype)
    grad_weight = (grad * normal).sum(rows).to(weight.dtype) if wanted[1] else None
    return grad_x if wanted[0] else None, grad_weight


CPU_FORMS: dict[str, Callable] = {
    "_fused_rms_norm_backward": rms_norm_backward,
    "mm.dtype": wide_product,
    "mm.dtype_out": wide_product,
    "bmm.dtype": wide_product,
    "bmm.dtype_out": wide_product,
    "addmm.dtype": wide_sum,
    "addmm.dtype_out": wide_sum,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
    "_scaled_dot_product_flash_attention": flash_sdpa,
    "_scaled_dot_product_flash_attention_backward": flash_sdpa_backward,
    "_scaled_dot_product_efficient_attention": efficient_sdpa,
    "_scaled_dot_product_efficient_attention_backward": efficient_sdpa_backward,
}


# ---------------------------------------------------------------------------- Triton


interpreting = threading.RLock()
depth = 0


def prepare_triton(jit: Any) -> None:
    launch, call = jit.JITFunction.run, jit.JITFunction.__call__

    @functools.wraps(launch)
    def run(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup and kernel is not None:
            interpret(self, args, grid, kwargs)
        return kernel

    def called(self, *args, **kwargs):
        if not depth:
            return call(self, *args, **kwargs)
        return interpreted(self.fn).rewrite()(*args, **kwargs)

    jit.JITFunction.run, jit.JITFunction.__call__ = run, called


def prepare_inductor(heuristics: Any) -> None:
    """Compute the kernels that torch.compile generates: it launches them by itself."""
    launch = heuristics.CachingAutotuner.run

    @functools.wraps(launch)
    def run(self, *args, stream, benchmark_run=False, **kwargs):
        result = launch(self, *args, stream=stream, benchmark_run=benchmark_run, **kwargs)
        if not benchmark_run:
            config = self.launchers[0].config
            given, grid = self._interpret_args_grid(args, config)
            kernel = self.fn
            if kernel.fn is None:  # from a cache, which has only machine code
                kernel = generated_kernel(self.filename, self.inductor_meta["kernel_name"])
            with patched(kernel.fn.__globals__, "libdevice", LibDevice()):
                computed = interpret(kernel, given, grid, {**kwargs, **config.kwargs})
            if not computed:
                named = zip(kernel.arg_names, args, strict=False)
                clear([value for name, value in named if name.startswith("out_ptr")])
        return result

    heuristics.CachingAutotuner.run = run


@functools.cache
def generated_kernel(path: str, name: str) -> Any:
    names = {"__file__": path, "__name__": "generated_kernel"}
    exec(compile(Path(path).read_text(), path, "exec"), names)
    return names[name].fn  # type: ignore[attr-defined]


@contextlib.contextmanager
def patched(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names.get(name)
    names[name] = value
    yield
    names[name] = before


class LibDevice:
    """The functions of NVIDIA's library that Triton's interpreter has under another name."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        return getattr(tl.math, name)


@functools.cache
def interpreted(function: Callable) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def interpret(kernel: Any, args: Any, grid: Any, kwargs: dict[str, Any]) -> bool:
    """Run a kernel on the memory of its tensors, if they are small. Returns whether it ran."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    global depth

    def base(value: Any) -> Any:
        return value.base if isinstance(value, TensorDescriptor) else value

    def to_host(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            parts = value.shape, value.strides, value.block_shape, value.padding
            return TensorDescriptor(to_host(value.base), *parts)
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            return on_host(value)
        return value

    name = f"triton {kernel.fn.__name__}"
    operands = mapped((args, kwargs), base)
    if not is_small(operands):
        skipped[name] += 1
        return False
    finite = skipped and not any(is_non_finite(value) for value in leaves(operands))
    import null_gpu_interpreter  # noqa: F401 - its corrections
    from triton.language import standard
    from triton.runtime.interpreter import _patch_lang

    with interpreting:
        depth += 1
        library_functions = _patch_lang(standard.cdiv.fn)  # these see another module than kernels
        try:
            interpreted(kernel.fn).run(
                *mapped(args, to_host), grid=grid, warmup=False, **mapped(kwargs, to_host)
            )
        finally:
            library_functions.restore()
            depth -= 1
    if finite:
        clear_non_finite(operands)
    return True
