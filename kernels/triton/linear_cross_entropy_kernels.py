"""Linear head and cross-entropy that keep no logits. Imports Triton alone: it compiles where torch is missing.

    o = h W^T + b         loss_n = lse_n - o_n[target_n],   lse_n = log sum_v exp(o_nv)
    g = factor_n (exp(o - lse) - one_hot(target))           grad_h = g W,   grad_W = g^T h,   grad_b = sum_n g_n

Forward walks the classes a tile at a time with a running maximum and sum (Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax") and leaves lse. Backward makes each tile of logits again and needs no reduction
over the classes. Where H fits one tile, one kernel owns classes and walks the rows (grad_W, grad_b and, if it owns all
classes, grad_h) and one owns rows and walks the classes (grad_h). Where it does not, a third writes g for a few rows
at a time, for a GEMM.

A row whose target is ignore_index, or that is beyond N, counts nowhere. One whose target is no class has the loss NaN.
Where a program's rows and classes begin is computed in int64; inside a tile int32 is enough.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .numerics import cast, dot


@dataclass(frozen=True)
class Form:
    """Sizes, tile and arithmetic of the kernels that make logits; a compile-time argument."""

    H: int
    V: int
    block_n: int  # rows of a tile
    block_v: int  # its classes
    block_h: int  # of H at a time
    has_bias: bool
    precision: str  # of the dots: "ieee", "tf32x3" or "tf32"
    halves: bool = False  # three products of halves for "tf32x3": a row that is not finite makes its products NaN

    @classmethod
    def of(cls, tile, H: int, V: int, has_bias: bool, precision: str) -> "Form":
        """That of a tile of linear_cross_entropy_tiles.py."""
        return cls(H, V, tile.block_n, tile.block_v, tile.block_h, has_bias, precision, tile.halves)


@triton.jit
def load_tile(ptr, rows_left, stride, first_col, ROWS: tl.constexpr, F: tl.constexpr):
    """(ROWS, F.block_h) from column `first_col` on of a matrix with H columns and `rows_left` rows, zero outside."""
    offs_r = tl.arange(0, ROWS)[:, None]
    offs_h = first_col + tl.arange(0, F.block_h)[None, :]
    mask = offs_r < rows_left
    if F.H % F.block_h != 0:
        mask = mask & (offs_h < F.H)
    return tl.load(ptr + offs_r * stride + offs_h, mask=mask, other=0.0)


@triton.jit
def add_bias(products, bias_ptr, classes_left, F: tl.constexpr):
    """Logits from h W^T: the bias added, and -inf for classes that there are not."""
    offs_v = tl.arange(0, F.block_v)
    if F.has_bias:
        products += tl.load(bias_ptr + offs_v, mask=offs_v < classes_left, other=0.0).to(products.dtype)[None, :]
    return tl.where((offs_v < classes_left)[None, :], products, float("-inf"))


@triton.jit
def logits_of(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows_left,
    classes_left,
    stride_hidden_n,
    stride_weight_v,
    F: tl.constexpr,
):
    """Logits (rows, classes) of those that the pointers stand at, a part of H at a time."""
    PRECISION: tl.constexpr = F.precision
    acc_type = tl.float64 if hidden_ptr.dtype.element_ty == tl.float64 else tl.float32
    products = tl.full((F.block_n, F.block_v), 0, acc_type)
    for first_col in range(0, F.H, F.block_h):
        h = load_tile(hidden_ptr, rows_left, stride_hidden_n, first_col, F.block_n, F)
        w = load_tile(weight_ptr, classes_left, stride_weight_v, first_col, F.block_v, F)
        products = dot(h, tl.trans(w), products, PRECISION)
    return add_bias(products, bias_ptr, classes_left, F)


@triton.jit
def _add_exponentials(highest, total, logits):
    """The running maximum and sum of exponentials relative to it, (BLOCK_N,) each, over one more tile of logits."""
    new = tl.maximum(highest, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(highest - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
    return new, total


@triton.jit
def load_targets(target_ptr, rows_left, stride_target, ignore_index, BLOCK_N: tl.constexpr):
    """Targets of a tile's rows, and whether each row counts."""
    offs_n = tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + offs_n * stride_target, mask=offs_n < rows_left, other=0)
    return target, (offs_n < rows_left) & (target != ignore_index)


@triton.jit
def _store_losses(
    lse_ptr,  # (N,)
    loss_ptr,  # (N,) any float; written with LOSS_ROWS
    totals_ptr,  # (3, programs): sum of the losses, rows that count, and those of them whose target is no class
    first_row,
    rows_left,
    lse,
    chosen,
    target,
    counted,
    V,
    LOSS_ROWS: tl.constexpr,
):
    lse_ptr += first_row
    if LOSS_ROWS:
        loss_ptr += first_row
    offs_n = tl.arange(0, lse.shape[0])
    outside = counted & ((target < 0) | (target >= V))
    loss = tl.where(counted, tl.where(outside, float("nan"), lse - chosen), 0.0)
    tl.store(lse_ptr + offs_n, lse, mask=offs_n < rows_left)
    if LOSS_ROWS:
        tl.store(loss_ptr + offs_n, cast(loss, loss_ptr.dtype.element_ty), mask=offs_n < rows_left)
    programs = tl.num_programs(0)
    totals_ptr += tl.program_id(0)
    tl.store(totals_ptr, tl.sum(loss))
    tl.store(totals_ptr + programs, tl.sum(counted.to(lse.dtype)))
    tl.store(totals_ptr + 2 * programs, tl.sum(outside.to(lse.dtype)))


@triton.jit(do_not_specialize=["N", "ignore_index", "tiles_per_split"])
def loss_kernel(
    # pointers
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) contiguous; read with F.has_bias
    target_ptr,  # (N,) int64
    lse_ptr,  # (N,) fp32 or fp64; with SPLIT (programs along 1, N), over the program's classes
    chosen_ptr,  # like lse_ptr: the target's logit, or 0 if it is none of those classes; written with SPLIT
    loss_ptr,  # (N,) any float; written with LOSS_ROWS
    totals_ptr,  # (3, programs) fp32 or fp64, as in _store_losses; written without SPLIT
    # sizes
    N,
    ignore_index,
    tiles_per_split,  # tiles of classes that a program walks; read with SPLIT
    # strides
    stride_hidden_n,
    stride_weight_v,
    stride_target,
    # meta-parameters
    SPLIT: tl.constexpr,
    LOSS_ROWS: tl.constexpr,
    F: tl.constexpr,  # Form
):
    first_row = tl.program_id(0).to(tl.int64) * F.block_n
    rows_left = N - first_row
    hidden_ptr += first_row * stride_hidden_n
    target, counted = load_targets(
        target_ptr + first_row * stride_target, rows_left, stride_target, ignore_index, F.block_n
    )
    first_tile = tl.program_id(1) * tiles_per_split if SPLIT else 0
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(F.V, F.block_v)) if SPLIT else tl.cdiv(F.V, F.block_v)
    acc_type = lse_ptr.dtype.element_ty
    highest = tl.full((F.block_n,), float("-inf"), acc_type)
    total = tl.full((F.block_n,), 0, acc_type)
    chosen = tl.full((F.block_n,), 0, acc_type)
    for tile in range(first_tile, end_tile):
        first_class = tl.cast(tile, tl.int64) * F.block_v
        logits = logits_of(
            hidden_ptr,
            weight_ptr + first_class * stride_weight_v,
            bias_ptr + first_class if F.has_bias else bias_ptr,
            rows_left,
            F.V - first_class,
            stride_hidden_n,
            stride_weight_v,
            F,
        )
        highest, total = _add_exponentials(highest, total, logits)
        is_target = (target - first_class)[:, None] == tl.arange(0, F.block_v)[None, :]
        chosen += tl.sum(tl.where(is_target, logits, 0.0), 1)
    lse = highest + tl.log(total)
    if SPLIT:
        offs_n = tl.program_id(1).to(tl.int64) * N + first_row + tl.arange(0, F.block_n)
        mask = tl.arange(0, F.block_n) < rows_left
        tl.store(lse_ptr + offs_n, lse, mask=mask)
        tl.store(chosen_ptr + offs_n, chosen, mask=mask)
    else:
        _store_losses(lse_ptr, loss_ptr, totals_ptr, first_row, rows_left, lse, chosen, target, counted, F.V, LOSS_ROWS)


@triton.jit(do_not_specialize=["N", "ignore_index", "splits"])
def loss_of_splits_kernel(
    # pointers
    partial_lse_ptr,  # (splits, N) fp32 or fp64, what loss_kernel left with SPLIT
    chosen_ptr,  # (splits, N) fp32 or fp64, likewise
    target_ptr,  # (N,) int64
    lse_ptr,  # (N,) fp32 or fp64
    loss_ptr,  # (N,) any float; written with LOSS_ROWS
    totals_ptr,  # (3, programs) fp32 or fp64, as in _store_losses
    # sizes
    N,
    V,
    ignore_index,
    splits,
    # strides
    stride_target,
    # meta-parameters
    BLOCK_N: tl.constexpr,
    LOSS_ROWS: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows_left = N - first_row
    target, counted = load_targets(
        target_ptr + first_row * stride_target, rows_left, stride_target, ignore_index, BLOCK_N
    )
    acc_type = lse_ptr.dtype.element_ty
    highest = tl.full((BLOCK_N,), float("-inf"), acc_type)
    total = tl.zeros((BLOCK_N,), acc_type)
    chosen = tl.zeros((BLOCK_N,), acc_type)
    mask = tl.arange(0, BLOCK_N) < rows_left
    for split in range(splits):
        offs_n = tl.cast(split, tl.int64) * N + first_row + tl.arange(0, BLOCK_N)
        partial = tl.load(partial_lse_ptr + offs_n, mask=mask, other=0.0)
        highest, total = _add_exponentials(highest, total, partial[:, None])
        chosen += tl.load(chosen_ptr + offs_n, mask=mask, other=0.0)
    lse = highest + tl.log(total)
    _store_losses(lse_ptr, loss_ptr, totals_ptr, first_row, rows_left, lse, chosen, target, counted, V, LOSS_ROWS)


@triton.jit(do_not_specialize=["programs"])
def total_kernel(
    # pointers
    totals_ptr,  # (3, programs) fp32 or fp64, as in _store_losses
    loss_ptr,  # () any float, sum or mean of the losses; written with LOSS
    count_ptr,  # () fp32 or fp64, rows that count
    # sizes
    programs,
    # meta-parameters
    BLOCK: tl.constexpr,
    LOSS: tl.constexpr,
    MEAN: tl.constexpr,
):
    """One program adds up what those of the loss left; here and not there, so that the assertion costs them nothing."""
    acc_type = totals_ptr.dtype.element_ty
    loss = tl.zeros((BLOCK,), acc_type)
    count = tl.zeros((BLOCK,), acc_type)
    outside = tl.zeros((BLOCK,), acc_type)
    for start in range(0, programs, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < programs
        loss += tl.load(totals_ptr + offsets, mask=mask, other=0.0)
        count += tl.load(totals_ptr + programs + offsets, mask=mask, other=0.0)
        outside += tl.load(totals_ptr + 2 * programs + offsets, mask=mask, other=0.0)
    tl.device_assert(tl.sum(outside) == 0, "linear_cross_entropy: a target is out of bounds")
    rows = tl.sum(count)
    tl.store(count_ptr, rows)
    if LOSS:
        result = tl.sum(loss)
        if MEAN:
            result = result / rows
        tl.store(loss_ptr, cast(result, loss_ptr.dtype.element_ty))
