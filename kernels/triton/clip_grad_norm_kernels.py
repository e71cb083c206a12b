"""Clipping by the global norm over many tensors at once. Imports Triton alone: it compiles where torch is missing.

    norm = sqrt(sum of g^2 over all tensors)      scale = min(1, max_norm / (norm + 1e-6))
    clip:  g <- scale g                           clip and step:  p <- p - lr (scale g), g stays as it was

A chunk is a run of at most BLOCK elements of one tensor. Few elements: one program walks all chunks twice, and the
second walk finds them in its cache (clip_small_kernel). Many: norm_kernel leaves one sum for each program, and every
program of scale_kernel adds up all of them before it scales its own chunks. Chunks are dealt to programs, and sums
added, in an order that the sizes alone decide: no atomics, the same bits each time.

Where the tensors are: up to a few dozen come as pointer arguments, which a captured CUDA graph keeps by value. More
come in a table with one row for each chunk.

Squares are summed in float32 (float64 for float64 tensors) within a program, and in float64 beyond. The norm is rounded
to the dtype that it is returned in before the scale is taken from it, so the two always fit. Scalars of double
precision come as their 64 bits: a Python float would arrive as a float32.
"""

import triton
import triton.language as tl

from .numerics import cast

KINDS = ("fp64", "fp32", "fp16", "bf16")  # a tensor's kind is the place of its dtype in here
COLUMNS = tl.constexpr(4)  # of the table: address of gradients and of parameters (or 0), number of elements, kind

BLOCK = 4096  # elements of a chunk in norm_kernel and scale_kernel: 16 KB in fp32
WARPS = 8  # of these
MAX_PROGRAMS = 1024  # sums that every program of scale_kernel adds up


def small_tile(elements: int) -> tuple[int, int]:
    """Elements of a chunk and warps of clip_small_kernel: four elements a thread, or eight."""
    return (1024, 8) if elements <= 8192 else (4096, 16)


@triton.jit
def _double(bits):
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _store(ptr, x, mask):
    tl.store(ptr, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_of(sum_squares, norm_ptr, max_norm_bits, writes, CLIP: tl.constexpr):
    """The scale in fp64 from the sum of squares; the norm is stored if `writes`. NaN stays NaN, as in torch.clamp."""
    norm = tl.sqrt(sum_squares)
    dtype: tl.constexpr = norm_ptr.dtype.element_ty
    if dtype != tl.float64:
        norm = cast(norm.to(tl.float32), dtype)
    tl.store(norm_ptr, norm, mask=writes)
    scale = _double(max_norm_bits) / (norm.to(tl.float64) + 1e-6)
    return tl.where(scale > 1.0, 1.0, scale) if CLIP else tl.full((), 1.0, tl.float64)


@triton.jit
def _learning_rate(lr_ptr, lr_bits):
    """From the device if there is a pointer, so that a captured graph follows its changes, or else the argument."""
    if lr_ptr is None:
        return _double(lr_bits)
    else:
        return tl.load(lr_ptr).to(tl.float64)


@triton.jit
def _square(ptr, offs, count, acc_type: tl.constexpr, BLOCK: tl.constexpr):
    """g^2 of one chunk, zero from `count` on. A mask of unknown length would break up the wide loads of full chunks."""
    if count >= BLOCK:
        grad = tl.load(ptr + offs).to(acc_type)
    else:
        grad = tl.load(ptr + offs, mask=offs < count, other=0.0).to(acc_type)
    return grad * grad


@triton.jit
def _update_masked(grad_ptr, param_ptr, mask, scale, lr, STEP: tl.constexpr):
    grad = tl.load(grad_ptr, mask=mask)
    acc_type: tl.constexpr = tl.float64 if grad.dtype == tl.float64 else tl.float32
    clipped = grad.to(acc_type) * scale.to(acc_type)
    if STEP:
        param = tl.load(param_ptr, mask=mask).to(acc_type)
        _store(param_ptr, param - lr.to(acc_type) * clipped, mask)
    else:
        _store(grad_ptr, clipped, mask)


@triton.jit
def _update(grad_ptr, param_ptr, offs, count, scale, lr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """g <- scale g, or with STEP p <- p - lr (scale g), for one chunk."""
    param_at = param_ptr + offs if STEP else None
    if count >= BLOCK:
        _update_masked(grad_ptr + offs, param_at, None, scale, lr, STEP)
    else:
        _update_masked(grad_ptr + offs, param_at, offs < count, scale, lr, STEP)


@triton.jit
def _add_squares(squares, ptr, offs, NUMEL: tl.constexpr, BLOCK: tl.constexpr):
    """squares + g^2 of all chunks of one tensor."""
    for start in tl.static_range(0, NUMEL, BLOCK):
        squares += _square(ptr + start, offs, NUMEL - start, squares.dtype, BLOCK)
    return squares


@triton.jit
def _update_tensor(
    grad_ptr,
    param_ptr,
    offs,
    scale,
    lr,
    NUMEL: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """_update for all chunks of one tensor."""
    for start in tl.static_range(0, NUMEL, BLOCK):
        param_at = param_ptr + start if STEP else None
        _update(grad_ptr + start, param_at, offs, NUMEL - start, scale, lr, STEP, BLOCK)


@triton.jit(do_not_specialize=["max_norm_bits", "lr_bits"])
def clip_small_kernel(
    # pointers
    grad_ptrs,  # tuple of N pointers to the gradients, each with the elements of its tensor side by side
    param_ptrs,  # tuple of N pointers to the parameters, laid out alike; used with STEP
    norm_ptr,  # () the norm before clipping
    lr_ptr,  # () learning rate on the device, or None
    # scalars
    max_norm_bits: tl.int64,
    lr_bits: tl.int64,
    # meta-parameters
    NUMELS: tl.constexpr,  # tuple of N sizes
    BLOCK: tl.constexpr,
    CLIP: tl.constexpr,  # False: the norm alone is wanted, and the scale is 1
    STEP: tl.constexpr,
    DOUBLE: tl.constexpr,  # sum in fp64
):
    acc_type: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), acc_type)
    for i in tl.static_range(len(NUMELS)):
        squares = _add_squares(squares, grad_ptrs[i], offs, NUMELS[i], BLOCK)
    sum_squares = tl.sum(squares.to(tl.float64))
    scale = _scale_of(sum_squares, norm_ptr, max_norm_bits, True, CLIP)
    lr = _learning_rate(lr_ptr, lr_bits) if STEP else 0.0
    if (scale != 1.0) | STEP:
        for i in tl.static_range(len(NUMELS)):
            param_ptr = param_ptrs[i] if STEP else None
            _update_tensor(grad_ptrs[i], param_ptr, offs, scale, lr, NUMELS[i], STEP, BLOCK)


@triton.jit
def _find_chunk(
    grad_ptrs,
    param_ptrs,
    table_ptr,
    c,
    NUMELS: tl.constexpr,
    FIRSTS: tl.constexpr,
    KIND_OF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of chunk c: addresses of its gradients and parameters (int64), number of elements, kind."""
    if table_ptr is not None:
        row = table_ptr + tl.cast(c, tl.int64) * COLUMNS
        return tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    else:
        grad, param = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        count, kind = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for i in tl.static_range(len(NUMELS)):
            inside = c >= FIRSTS[i]
            start = tl.cast(c - FIRSTS[i], tl.int64) * BLOCK
            grad = tl.where(inside, (grad_ptrs[i] + start).to(tl.int64), grad)
            if len(param_ptrs) > 0:
                param = tl.where(inside, (param_ptrs[i] + start).to(tl.int64), param)
            count = tl.where(inside, tl.minimum(NUMELS[i] - start, BLOCK).to(tl.int32), count)
            kind = tl.where(inside, KIND_OF[i], kind)
        return grad, param, count, kind


@triton.jit
def _pointer(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    if KIND == 0:
        ptr = address.to(tl.pointer_type(tl.float64))
    elif KIND == 1:
        ptr = address.to(tl.pointer_type(tl.float32))
    elif KIND == 2:
        ptr = address.to(tl.pointer_type(tl.float16))
    else:
        ptr = address.to(tl.pointer_type(tl.bfloat16))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def norm_kernel(
    # pointers
    grad_ptrs,  # tuple of N pointers to the gradients, or () with a table
    table_ptr,  # (chunks, COLUMNS) int64, or None
    partial_ptr,  # (programs) fp64, sums of squares
    # sizes
    chunks,
    # meta-parameters
    NUMELS: tl.constexpr,  # tuples of N: sizes,
    FIRSTS: tl.constexpr,  # first chunks,
    KIND_OF: tl.constexpr,  # kinds
    PRESENT: tl.constexpr,  # tuple of the kinds that there are
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    DOUBLE: tl.constexpr,
):
    acc_type: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), acc_type)
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        grad_at, _, count, kind = _find_chunk(grad_ptrs, (), table_ptr, c, NUMELS, FIRSTS, KIND_OF, BLOCK)
        for i in tl.static_range(len(PRESENT)):
            if kind == PRESENT[i]:
                squares += _square(_pointer(grad_at, PRESENT[i], ALIGNED), offs, count, acc_type, BLOCK)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares.to(tl.float64)))


@triton.jit(do_not_specialize=["max_norm_bits", "lr_bits"])
def scale_kernel(
    # pointers
    grad_ptrs,  # as in norm_kernel
    param_ptrs,  # tuple of N pointers to the parameters, or (); used with STEP
    table_ptr,  # (chunks, COLUMNS) int64, or None
    partial_ptr,  # (programs) fp64, what norm_kernel has left
    norm_ptr,  # () the norm before clipping
    lr_ptr,  # () learning rate on the device, or None
    # scalars
    chunks,
    max_norm_bits: tl.int64,
    lr_bits: tl.int64,
    # meta-parameters
    NUMELS: tl.constexpr,
    FIRSTS: tl.constexpr,
    KIND_OF: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,  # power of two, at least the number of programs
    ALIGNED: tl.constexpr,
    CLIP: tl.constexpr,
    STEP: tl.constexpr,
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs_p, offs = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK)
    sum_squares = tl.sum(tl.load(partial_ptr + offs_p, mask=offs_p < programs, other=0.0))
    scale = _scale_of(sum_squares, norm_ptr, max_norm_bits, pid == 0, CLIP)
    lr = _learning_rate(lr_ptr, lr_bits) if STEP else 0.0
    if (scale != 1.0) | STEP:
        for c in range(pid, chunks, programs):
            grad_at, param_at, count, kind = _find_chunk(
                grad_ptrs, param_ptrs, table_ptr, c, NUMELS, FIRSTS, KIND_OF, BLOCK
            )
            for i in tl.static_range(len(PRESENT)):
                if kind == PRESENT[i]:
                    grad_ptr = _pointer(grad_at, PRESENT[i], ALIGNED)
                    param_ptr = _pointer(param_at, PRESENT[i], ALIGNED) if STEP else None
                    _update(grad_ptr, param_ptr, offs, count, scale, lr, STEP, BLOCK)
