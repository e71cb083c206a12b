"""Gradients of linear head and cross-entropy (linear_cross_entropy_kernels.py has the formulas and the rest)."""

import triton
import triton.language as tl

from .linear_cross_entropy_kernels import add_bias, load_targets, load_tile, logits_of
from .numerics import cast, dot, tf32_high


@triton.jit
def _halves(x, HALVES: tl.constexpr):
    """x rounded to what tf32 multiplies, and what that leaves; without HALVES x itself twice."""
    if HALVES:
        high = tf32_high(x)
        return high, x - high
    else:
        return x, x


@triton.jit
def _dot(a_high, a_low, b_high, b_low, acc, PRECISION: tl.constexpr, HALVES: tl.constexpr):
    """acc + a b, with HALVES from those of both: Triton's own tf32x3 guards every sum of it against NaN, too."""
    if HALVES:
        acc = dot(a_low, b_high, acc, "tf32")
        acc = dot(a_high, b_low, acc, "tf32")
        return dot(a_high, b_high, acc, "tf32")
    else:
        return dot(a_high, b_high, acc, PRECISION)


@triton.jit
def _grad_logits(
    logits,
    lse_ptr,
    target_ptr,
    grad_loss_ptr,
    count_ptr,
    rows_left,
    first_class,
    ignore_index,
    stride_target,
    stride_grad_loss,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MEAN: tl.constexpr,
):
    """g (BLOCK_N, BLOCK_V) of a tile, the pointers standing at its rows; for those that do not count zero or, as in
    torch, NaN where the softmax is.

    A tile with all classes is normalized by its own sum: lse comes from logits that were rounded in another way, which
    shows where one class has nearly all of the probability.
    """
    offs_n = tl.arange(0, BLOCK_N)
    target, counted = load_targets(target_ptr, rows_left, stride_target, ignore_index, BLOCK_N)
    if V <= BLOCK_V:
        exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
        softmax = exponentials / tl.sum(exponentials, 1)[:, None]
    else:
        softmax = tl.exp(logits - tl.load(lse_ptr + offs_n, mask=offs_n < rows_left, other=0.0)[:, None])
    factor = tl.load(grad_loss_ptr + offs_n * stride_grad_loss, mask=counted, other=0.0).to(logits.dtype)
    if MEAN:
        factor = factor / tl.maximum(tl.load(count_ptr), 1.0)
    is_target = (target - first_class)[:, None] == tl.arange(0, BLOCK_V)[None, :]
    g = (softmax - is_target.to(logits.dtype)) * factor[:, None]
    return tl.where((offs_n < rows_left)[:, None], g, 0.0)


@triton.jit
def _store_grad_hidden(
    ptr,
    g_high,
    g_low,
    w_high,
    w_low,
    rows_left,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
):
    """g W of a tile of rows, which ptr stands at."""
    BLOCK_N: tl.constexpr = g_high.shape[0]
    acc_type: tl.constexpr = tl.float64 if g_high.dtype == tl.float64 else tl.float32
    grad_h = _dot(g_high, g_low, w_high, w_low, tl.zeros((BLOCK_N, BLOCK_H), acc_type), PRECISION, HALVES)
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_h = tl.arange(0, BLOCK_H)[None, :]
    mask = (offs_n < rows_left) & (offs_h < H)
    tl.store(ptr + offs_n * H + offs_h, cast(grad_h, g_high.dtype), mask=mask)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def grad_by_classes_kernel(
    # pointers
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) contiguous; read with HAS_BIAS
    target_ptr,  # (N,) int64
    lse_ptr,  # (N,) fp32 or fp64; read where V is larger than BLOCK_V
    grad_loss_ptr,  # (N,) any float, factor of each row; stride 0 for one factor
    count_ptr,  # () fp32 or fp64, rows that count; read with MEAN
    grad_hidden_ptr,  # (N, H) contiguous; written with GRAD_HIDDEN
    grad_weight_ptr,  # (V, H) contiguous, or with PARTIAL (programs along 1, V*H + V) fp32 or fp64, with grad_bias
    grad_bias_ptr,  # (V,); written with HAS_BIAS, without PARTIAL
    # sizes
    N,
    ignore_index,
    # strides
    stride_hidden_n,
    stride_weight_v,
    stride_target,
    stride_grad_loss,
    # meta-parameters
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
    HAS_BIAS: tl.constexpr,
    MEAN: tl.constexpr,
    GRAD_HIDDEN: tl.constexpr,  # only where BLOCK_V is at least V
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,  # of the dots: "ieee", "tf32x3" or "tf32"
    HALVES: tl.constexpr,  # three products of halves for "tf32x3": a row that is not finite makes its products NaN
):
    """A program owns BLOCK_V classes and walks every num_programs(1)-th tile of rows."""
    operand_type = weight_ptr.dtype.element_ty
    acc_type = lse_ptr.dtype.element_ty
    first_class = tl.program_id(0).to(tl.int64) * BLOCK_V
    classes_left = V - first_class
    weight_ptr += first_class * stride_weight_v
    if HAS_BIAS:
        bias_ptr += first_class
    w = load_tile(weight_ptr, classes_left, stride_weight_v, 0, H, BLOCK_V, BLOCK_H)
    w_high, w_low = _halves(w, HALVES)
    grad_weight = tl.zeros((BLOCK_V, BLOCK_H), acc_type)
    grad_bias = tl.zeros((BLOCK_V,), acc_type)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        first_row = tl.cast(tile, tl.int64) * BLOCK_N
        rows_left = N - first_row
        h = load_tile(hidden_ptr + first_row * stride_hidden_n, rows_left, stride_hidden_n, 0, H, BLOCK_N, BLOCK_H)
        h_high, h_low = _halves(h, HALVES)
        products = tl.zeros((BLOCK_N, BLOCK_V), acc_type)
        products = _dot(h_high, h_low, tl.trans(w_high), tl.trans(w_low), products, PRECISION, HALVES)
        g = _grad_logits(
            add_bias(products, bias_ptr, classes_left, BLOCK_V, HAS_BIAS),
            lse_ptr + first_row,
            target_ptr + first_row * stride_target,
            grad_loss_ptr + first_row * stride_grad_loss,
            count_ptr,
            rows_left,
            first_class,
            ignore_index,
            stride_target,
            stride_grad_loss,
            V,
            BLOCK_N,
            BLOCK_V,
            MEAN,
        )
        g_high, g_low = _halves(cast(g, operand_type), HALVES)
        grad_hidden_at = grad_hidden_ptr + first_row * H if GRAD_HIDDEN else None
        if GRAD_HIDDEN and HALVES:  # first: fewer registers, and none of this tile's are spilled
            _store_grad_hidden(grad_hidden_at, g_high, g_low, w_high, w_low, rows_left, H, BLOCK_H, PRECISION, HALVES)
        grad_weight = _dot(tl.trans(g_high), tl.trans(g_low), h_high, h_low, grad_weight, PRECISION, HALVES)
        if HAS_BIAS:
            grad_bias += tl.sum(g, 0)
        if GRAD_HIDDEN and not HALVES:
            _store_grad_hidden(grad_hidden_at, g_high, g_low, w_high, w_low, rows_left, H, BLOCK_H, PRECISION, HALVES)
    offs_v = tl.arange(0, BLOCK_V)
    offs_h = tl.arange(0, BLOCK_H)[None, :]
    if PARTIAL:
        grad_weight_ptr += tl.program_id(1).to(tl.int64) * (V * H + V)
        grad_bias_ptr = grad_weight_ptr + V * H
    out_type = grad_weight_ptr.dtype.element_ty
    tl.store(
        grad_weight_ptr + first_class * H + offs_v[:, None] * H + offs_h,
        cast(grad_weight, out_type),
        mask=(offs_v[:, None] < classes_left) & (offs_h < H),
    )
    if HAS_BIAS:
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
    bias_ptr,  # (V,) contiguous; read with HAS_BIAS
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
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
    HAS_BIAS: tl.constexpr,
    MEAN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,  # of the dots: "ieee", "tf32x3" or "tf32"
):
    """A program owns BLOCK_N rows and walks the classes, all of them or, with SPLIT, a part."""
    operand_type = weight_ptr.dtype.element_ty
    acc_type = lse_ptr.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows_left = N - first_row
    lse_ptr += first_row
    target_ptr += first_row * stride_target
    grad_loss_ptr += first_row * stride_grad_loss
    h = load_tile(hidden_ptr + first_row * stride_hidden_n, rows_left, stride_hidden_n, 0, H, BLOCK_N, BLOCK_H)
    grad_h = tl.zeros((BLOCK_N, BLOCK_H), acc_type)
    first_tile = tl.program_id(1) * tiles_per_split if SPLIT else 0
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(V, BLOCK_V)) if SPLIT else tl.cdiv(V, BLOCK_V)
    for tile in range(first_tile, end_tile):
        first_class = tl.cast(tile, tl.int64) * BLOCK_V
        w = load_tile(
            weight_ptr + first_class * stride_weight_v, V - first_class, stride_weight_v, 0, H, BLOCK_V, BLOCK_H
        )
        products = dot(h, tl.trans(w), tl.zeros((BLOCK_N, BLOCK_V), acc_type), PRECISION)
        g = _grad_logits(
            add_bias(products, bias_ptr + first_class if HAS_BIAS else bias_ptr, V - first_class, BLOCK_V, HAS_BIAS),
            lse_ptr,
            target_ptr,
            grad_loss_ptr,
            count_ptr,
            rows_left,
            first_class,
            ignore_index,
            stride_target,
            stride_grad_loss,
            V,
            BLOCK_N,
            BLOCK_V,
            MEAN,
        )
        grad_h = dot(cast(g, operand_type), w, grad_h, PRECISION)
    if SPLIT:
        grad_hidden_ptr += tl.program_id(1).to(tl.int64) * N * H
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_h = tl.arange(0, BLOCK_H)[None, :]
    tl.store(
        grad_hidden_ptr + first_row * H + offs_n * H + offs_h,
        cast(grad_h, grad_hidden_ptr.dtype.element_ty),
        mask=(offs_n < rows_left) & (offs_h < H),
    )


@triton.jit(do_not_specialize=["N", "ignore_index"])
def grad_logits_kernel(
    # pointers
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) contiguous; read with HAS_BIAS
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
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MEAN: tl.constexpr,
    PRECISION: tl.constexpr,  # of the dot: "ieee", "tf32x3" or "tf32"
):
    """g of a few rows, for a GEMM: a program has one tile of it. Programs beside each other share their classes."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_class = tl.program_id(1).to(tl.int64) * BLOCK_V
    rows_left = N - first_row
    classes_left = V - first_class
    logits = logits_of(
        hidden_ptr + first_row * stride_hidden_n,
        weight_ptr + first_class * stride_weight_v,
        bias_ptr + first_class if HAS_BIAS else bias_ptr,
        rows_left,
        classes_left,
        stride_hidden_n,
        stride_weight_v,
        H,
        BLOCK_N,
        BLOCK_V,
        BLOCK_H,
        HAS_BIAS,
        PRECISION,
    )
    g = _grad_logits(
        logits,
        lse_ptr + first_row,
        target_ptr + first_row * stride_target,
        grad_loss_ptr + first_row * stride_grad_loss,
        count_ptr,
        rows_left,
        first_class,
        ignore_index,
        stride_target,
        stride_grad_loss,
        V,
        BLOCK_N,
        BLOCK_V,
        MEAN,
    )
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    tl.store(
        grad_logits_ptr + first_row * V + first_class + offs_n * V + offs_v,
        cast(g, grad_logits_ptr.dtype.element_ty),
        mask=(offs_n < rows_left) & (offs_v < classes_left),
    )
