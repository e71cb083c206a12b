"""Gradients of linear head and cross-entropy (linear_cross_entropy_kernels.py has the formulas and the rest)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .linear_cross_entropy_kernels import add_bias, load_targets, load_tile, logits_of
from .numerics import cast, dot, tf32_high


class Rows(NamedTuple):
    """What the gradients of a tile's logits are made from, but the logits themselves; see the kernels' arguments."""

    lse_ptr: tl.tensor
    target_ptr: tl.tensor
    grad_loss_ptr: tl.tensor
    count_ptr: tl.tensor
    ignore_index: tl.tensor
    stride_target: tl.tensor
    stride_grad_loss: tl.tensor


@triton.jit
def _halves(x, F: tl.constexpr):
    """x rounded to what tf32 multiplies, and what that leaves; without F.halves x itself twice."""
    if F.halves:
        high = tf32_high(x)
        return high, x - high
    else:
        return x, x


@triton.jit
def _dot(a_high, a_low, b_high, b_low, acc, F: tl.constexpr):
    """acc + a b, with F.halves from those of both: Triton's own tf32x3 guards every sum of it against NaN, too."""
    PRECISION: tl.constexpr = F.precision
    if F.halves:
        acc = dot(a_low, b_high, acc, "tf32")
        acc = dot(a_high, b_low, acc, "tf32")
        return dot(a_high, b_high, acc, "tf32")
    else:
        return dot(a_high, b_high, acc, PRECISION)


@triton.jit
def _rows_from(first_row, rows):
    """Of the tile that begins at a row."""
    return Rows(
        rows.lse_ptr + first_row,
        rows.target_ptr + first_row * rows.stride_target,
        rows.grad_loss_ptr + first_row * rows.stride_grad_loss,
        rows.count_ptr,
        rows.ignore_index,
        rows.stride_target,
        rows.stride_grad_loss,
    )


@triton.jit
def _grad_logits(logits, rows, rows_left, first_class, MEAN: tl.constexpr, F: tl.constexpr):
    """g (rows, classes) of a tile; for rows that do not count zero or, as in torch, NaN where the softmax is.

    A tile with all classes is normalized by its own sum: lse comes from logits that were rounded in another way, which
    shows where one class has nearly all of the probability.
    """
    offs_n = tl.arange(0, F.block_n)
    target, counted = load_targets(rows.target_ptr, rows_left, rows.stride_target, rows.ignore_index, F.block_n)
    if F.block_v >= F.V:
        exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
        softmax = exponentials / tl.sum(exponentials, 1)[:, None]
    else:
        softmax = tl.exp(logits - tl.load(rows.lse_ptr + offs_n, mask=offs_n < rows_left, other=0.0)[:, None])
    factor = tl.load(rows.grad_loss_ptr + offs_n * rows.stride_grad_loss, mask=counted, other=0.0).to(logits.dtype)
    if MEAN:
        factor = factor / tl.maximum(tl.load(rows.count_ptr), 1.0)
    is_target = (target - first_class)[:, None] == tl.arange(0, F.block_v)[None, :]
    g = (softmax - is_target.to(logits.dtype)) * factor[:, None]
    return tl.where((offs_n < rows_left)[:, None], g, 0.0)


@triton.jit
def _store_grad_hidden(ptr, g_high, g_low, w_high, w_low, rows_left, F: tl.constexpr):
    """g W of a tile of rows, which ptr stands at."""
    acc_type: tl.constexpr = tl.float64 if g_high.dtype == tl.float64 else tl.float32
    grad_h = _dot(g_high, g_low, w_high, w_low, tl.full((F.block_n, F.block_h), 0, acc_type), F)
    offs_n = tl.arange(0, F.block_n)[:, None]
    offs_h = tl.arange(0, F.block_h)[None, :]
    mask = (offs_n < rows_left) & (offs_h < F.H)
    tl.store(ptr + offs_n * F.H + offs_h, cast(grad_h, g_high.dtype), mask=mask)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def grad_by_classes_kernel(
    # pointers
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) contiguous; read with F.has_bias
    target_ptr,  # (N,) int64
    lse_ptr,  # (N,) fp32 or fp64; read where V is larger than F.block_v
    grad_loss_ptr,  # (N,) any float, factor of each row; stride 0 for one factor
    count_ptr,  # () fp32 or fp64, rows that count; read with MEAN
    grad_hidden_ptr,  # (N, H) contiguous; written with GRAD_HIDDEN
    grad_weight_ptr,  # (V, H) contiguous, or with PARTIAL (programs along 1, V*H + V) fp32 or fp64, with grad_bias
    grad_bias_ptr,  # (V,); written with F.has_bias, without PARTIAL
    # sizes
    N,
    ignore_index,
    # strides
    stride_hidden_n,
    stride_weight_v,
    stride_target,
    stride_grad_loss,
    # meta-parameters
    MEAN: tl.constexpr,
    GRAD_HIDDEN: tl.constexpr,  # only where a tile has all classes
    PARTIAL: tl.constexpr,
    F: tl.constexpr,  # Form, with all of H in a tile
):
    """A program owns a tile's classes and walks every num_programs(1)-th tile of rows."""
    operand_type = weight_ptr.dtype.element_ty
    acc_type = lse_ptr.dtype.element_ty
    first_class = tl.program_id(0).to(tl.int64) * F.block_v
    classes_left = F.V - first_class
    weight_ptr += first_class * stride_weight_v
    if F.has_bias:
        bias_ptr += first_class
    w = load_tile(weight_ptr, classes_left, stride_weight_v, 0, F.block_v, F)
    w_high, w_low = _halves(w, F)
    grad_weight = tl.full((F.block_v, F.block_h), 0, acc_type)
    grad_bias = tl.full((F.block_v,), 0, acc_type)
    rows = Rows(lse_ptr, target_ptr, grad_loss_ptr, count_ptr, ignore_index, stride_target, stride_grad_loss)
    for tile in range(tl.program_id(1), tl.cdiv(N, F.block_n), tl.num_programs(1)):
        first_row = tl.cast(tile, tl.int64) * F.block_n
        rows_left = N - first_row
        h = load_tile(hidden_ptr + first_row * stride_hidden_n, rows_left, stride_hidden_n, 0, F.block_n, F)
        h_high, h_low = _halves(h, F)
        products = tl.full((F.block_n, F.block_v), 0, acc_type)
        products = _dot(h_high, h_low, tl.trans(w_high), tl.trans(w_low), products, F)
        logits = add_bias(products, bias_ptr, classes_left, F)
        g = _grad_logits(logits, _rows_from(first_row, rows), rows_left, first_class, MEAN, F)
        g_high, g_low = _halves(cast(g, operand_type), F)
        grad_hidden_at = grad_hidden_ptr + first_row * F.H if GRAD_HIDDEN else None
        if GRAD_HIDDEN and F.halves:  # first: fewer registers, and none of this tile's are spilled
            _store_grad_hidden(grad_hidden_at, g_high, g_low, w_high, w_low, rows_left, F)
        grad_weight = _dot(tl.trans(g_high), tl.trans(g_low), h_high, h_low, grad_weight, F)
        if F.has_bias:
            grad_bias += tl.sum(g, 0)
        if GRAD_HIDDEN and not F.halves:
            _store_grad_hidden(grad_hidden_at, g_high, g_low, w_high, w_low, rows_left, F)
    offs_v = tl.arange(0, F.block_v)
    offs_h = tl.arange(0, F.block_h)[None, :]
    if PARTIAL:
        grad_weight_ptr += tl.program_id(1).to(tl.int64) * (F.V * F.H + F.V)
        grad_bias_ptr = grad_weight_ptr + F.V * F.H
    out_type = grad_weight_ptr.dtype.element_ty
    tl.store(
        grad_weight_ptr + first_class * F.H + offs_v[:, None] * F.H + offs_h,
        cast(grad_weight, out_type),
        mask=(offs_v[:, None] < classes_left) & (offs_h < F.H),
    )
    if F.has_bias:
        tl.store(grad_bias_ptr + first_class + offs_v, cast(grad_bias, out_type), mask=offs_v < classes_left)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    # pointers
    partial_ptr,  # (programs, V*H + V) fp32 or fp64, what grad_by_classes_kernel left with PARTIAL
    grad_weight_ptr,  # (V*H,) any float
    grad_bias_ptr,  # (V,) any float; written with HAS_BIAS
    # sizes
    programs,
    # meta-parameters
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK_P):
        rows = (start + offs_p)[:, None]
        mask = (rows < programs) & (columns < V * H + V)[None, :]
        total += tl.sum(tl.load(partial_ptr + rows * (V * H + V) + columns[None, :], mask=mask, other=0.0), 0)
    result = cast(total, grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + columns, result, mask=columns < V * H)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + columns - V * H, result, mask=(columns >= V * H) & (columns < V * H + V))


@triton.jit(do_not_specialize=["N", "ignore_index", "tiles_per_split"])
def grad_by_rows_kernel(
    # pointers
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) contiguous; read with F.has_bias
    target_ptr,  # (N,) int64
    lse_ptr,  # (N,) fp32 or fp64
    grad_loss_ptr,  # (N,) any float, factor of each row; stride 0 for one factor
    count_ptr,  # () fp32 or fp64, rows that count; read with MEAN
    grad_hidden_ptr,  # (N, H) contiguous; with SPLIT (programs along 1, N, H) fp32 or fp64
    # sizes
    N,
    ignore_index,
    tiles_per_split,  # tiles of classes that a program walks; read with SPLIT
    # strides
    stride_hidden_n,
    stride_weight_v,
    stride_target,
    stride_grad_loss,
    # meta-parameters
    MEAN: tl.constexpr,
    SPLIT: tl.constexpr,
    F: tl.constexpr,  # Form, with all of H in a tile
):
    """A program owns a tile's rows and walks the classes, all of them or, with SPLIT, a part."""
    PRECISION: tl.constexpr = F.precision
    operand_type = weight_ptr.dtype.element_ty
    acc_type = lse_ptr.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * F.block_n
    rows_left = N - first_row
    rows = Rows(lse_ptr, target_ptr, grad_loss_ptr, count_ptr, ignore_index, stride_target, stride_grad_loss)
    rows = _rows_from(first_row, rows)
    h = load_tile(hidden_ptr + first_row * stride_hidden_n, rows_left, stride_hidden_n, 0, F.block_n, F)
    grad_h = tl.full((F.block_n, F.block_h), 0, acc_type)
    first_tile = tl.program_id(1) * tiles_per_split if SPLIT else 0
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(F.V, F.block_v)) if SPLIT else tl.cdiv(F.V, F.block_v)
    for tile in range(first_tile, end_tile):
        first_class = tl.cast(tile, tl.int64) * F.block_v
        w = load_tile(weight_ptr + first_class * stride_weight_v, F.V - first_class, stride_weight_v, 0, F.block_v, F)
        products = dot(h, tl.trans(w), tl.full((F.block_n, F.block_v), 0, acc_type), PRECISION)
        logits = add_bias(products, bias_ptr + first_class if F.has_bias else bias_ptr, F.V - first_class, F)
        g = _grad_logits(logits, rows, rows_left, first_class, MEAN, F)
        grad_h = dot(cast(g, operand_type), w, grad_h, PRECISION)
    if SPLIT:
        grad_hidden_ptr += tl.program_id(1).to(tl.int64) * N * F.H
    offs_n = tl.arange(0, F.block_n)[:, None]
    offs_h = tl.arange(0, F.block_h)[None, :]
    tl.store(
        grad_hidden_ptr + first_row * F.H + offs_n * F.H + offs_h,
        cast(grad_h, grad_hidden_ptr.dtype.element_ty),
        mask=(offs_n < rows_left) & (offs_h < F.H),
    )


@triton.jit(do_not_specialize=["N", "ignore_index"])
def grad_logits_kernel(
    # pointers
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) contiguous; read with F.has_bias
    target_ptr,  # (N,) int64
    lse_ptr,  # (N,) fp32 or fp64
    grad_loss_ptr,  # (N,) any float, factor of each row; stride 0 for one factor
    count_ptr,  # () fp32 or fp64, rows that count; read with MEAN
    grad_logits_ptr,  # (N, V) contiguous
    # sizes
    N,
    ignore_index,
    # strides
    stride_hidden_n,
    stride_weight_v,
    stride_target,
    stride_grad_loss,
    # meta-parameters
    MEAN: tl.constexpr,
    F: tl.constexpr,  # Form
):
    """g of a few rows, for a GEMM: a program has one tile of it. Programs beside each other share their classes."""
    first_row = tl.program_id(0).to(tl.int64) * F.block_n
    first_class = tl.program_id(1).to(tl.int64) * F.block_v
    rows_left = N - first_row
    classes_left = F.V - first_class
    logits = logits_of(
        hidden_ptr + first_row * stride_hidden_n,
        weight_ptr + first_class * stride_weight_v,
        bias_ptr + first_class if F.has_bias else bias_ptr,
        rows_left,
        classes_left,
        stride_hidden_n,
        stride_weight_v,
        F,
    )
    rows = Rows(lse_ptr, target_ptr, grad_loss_ptr, count_ptr, ignore_index, stride_target, stride_grad_loss)
    g = _grad_logits(logits, _rows_from(first_row, rows), rows_left, first_class, MEAN, F)
    offs_n = tl.arange(0, F.block_n)[:, None]
    offs_v = tl.arange(0, F.block_v)[None, :]
    tl.store(
        grad_logits_ptr + first_row * F.V + first_class + offs_n * F.V + offs_v,
        cast(g, grad_logits_ptr.dtype.element_ty),
        mask=(offs_n < rows_left) & (offs_v < classes_left),
    )
