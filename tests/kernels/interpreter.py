"""Correct Triton's interpreter: its bf16 arithmetic, and 3.6.0 with NumPy 2.4 or newer.

bf16 is stored as 16-bit integers.

`tl.dot` multiplies those integers as if they were the numbers, and fp32 is truncated to bf16, not
rounded to nearest even. This module replaces both operations with what the hardware does. Import it
in a process with TRITON_INTERPRET=1 before any kernel runs. Triton 3.6.0 and 3.9.0 need it.
"""

import numpy
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

original_cast = InterpreterBuilder.cast_impl
original_patch = interpreter._patch_lang_tensor


def widened(handle: TensorHandle) -> numpy.ndarray:
    """Convert bf16 and fp16 to fp32, exactly."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(numpy.uint32) << 16).view(numpy.float32)
    return handle.data.astype(numpy.float32) if handle.dtype.scalar == tl.float16 else handle.data


def rounded_to_bf16(data: numpy.ndarray) -> numpy.ndarray:
    """Round to nearest, ties to even: add half of the last bit kept, minus one if it is even."""
    bits = numpy.ascontiguousarray(data).view(numpy.uint32)
    half = numpy.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = ((bits + half) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(data), numpy.uint16(0x7FC0), rounded)


def cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return TensorHandle(rounded_to_bf16(source.data), tl.bfloat16)
    return original_cast(self, source, target)


def dot(
    self: InterpreterBuilder,
    left: TensorHandle,
    right: TensorHandle,
    summand: TensorHandle,
    input_precision: object,
    max_num_imprecise_acc: object,
) -> TensorHandle:
    """Multiply in fp32, as tensor cores accumulate."""
    product = numpy.matmul(widened(left), widened(right), dtype=summand.data.dtype)
    return TensorHandle(product + summand.data, summand.dtype.scalar)


def patch_tensor(tensor: type, scope: object) -> None:
    """Let a tensor of one element be an index, as in a loop's range: NumPy 2.4 no longer converts
    such an array with int(), which Triton 3.6.0 calls."""
    original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_tensor
InterpreterBuilder.cast_impl = cast
InterpreterBuilder.create_fp_trunc = cast
InterpreterBuilder.create_dot = dot
