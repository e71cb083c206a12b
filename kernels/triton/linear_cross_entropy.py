"""Launchers of linear head and cross-entropy (the kernels files have the algorithm, the tiles file the tile sizes).

    o = h W^T + b         loss_n = lse_n - o_n[target_n],   lse_n = log sum_v exp(o_nv)
    g = factor_n (exp(o - lse) - one_hot(target))           grad_h = g W,   grad_W = g^T h,   grad_b = sum_n g_n

N rows, H inputs, V classes. Forward is two launches and leaves lse (N,), from which backward makes the logits again:
two launches where V and H fit one tile, three where H alone does. A larger H takes GEMMs over the gradients of a few
rows' logits at a time: MAX_LOGITS of them, or those of MIN_ROWS rows where that is more. Nothing waits for the device
and no decision is made from data, so a CUDA graph can hold all of it. Every result is bitwise repeatable on a device:
sums across programs are made by a second reduction, never by atomics.
"""

import functools
from typing import Any, NamedTuple

import torch

from .launch import KINDS, Launch, device_limits, precision_of, target_of
from .linear_cross_entropy_grad_kernels import (
    grad_by_classes_kernel,
    grad_by_rows_kernel,
    grad_logits_kernel,
    sum_partials_kernel,
)
from .linear_cross_entropy_kernels import Form, loss_kernel, loss_of_splits_kernel, total_kernel
from .linear_cross_entropy_tiles import SUM_COLUMNS, SUM_PROGRAMS, SUM_WARPS, Tile, find_tile
from .targets import AMD, launch_options

# GEMMs are efficient from some hundred rows on, and 2^22 logits in float32 stay in the level 2 cache.
MIN_ROWS = 512
MAX_LOGITS = 1 << 22
# Classes of one row block are split over programs in parts of at least so many tiles.
MIN_TILES_PER_SPLIT = 4
MAX_STRIDE = 1 << 23  # of rows, so that those of a tile are within int32 of each other
# Device assertions are compiled on request alone, and with them, unless refused, checks of every integer sum.
ASSERTIONS = {"debug": True, "sanitize_overflow": False}


def linear_cross_entropy_limits(dtype: torch.dtype, device: torch.device | str = "cpu") -> str | None:
    """None if the kernels run on this device with inputs of this dtype, else one clause that says why not."""
    return device_limits(dtype, torch.device(device))


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    need_grad: bool = True,
    *,
    grad_loss: torch.Tensor | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Cross-entropy of hidden weight^T + bias, in nats. Returns (loss, grad_hidden, grad_weight, grad_bias).

    Arguments as in `linear_cross_entropy_forward`; grad_loss: the upstream gradient, () or for "none" (N,), 1 if None.
    The gradients are None without need_grad; grad_bias also without bias.
    """
    arguments = (hidden, weight, bias, target, ignore_index, reduction)
    loss, lse, count = linear_cross_entropy_forward(*arguments, precision=precision)
    if not need_grad:
        return loss, None, None, None
    upstream = torch.ones_like(loss) if grad_loss is None else grad_loss
    return loss, *linear_cross_entropy_backward(upstream, *arguments, lse, count, precision=precision)


def linear_cross_entropy_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    precision: str = "ieee",
    loss_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and what backward needs of it.

    hidden: (N, H). weight: (V, H). bias: (V,) or None. target: (N,) int64; rows of ignore_index do not count.
    reduction: "mean" over the rows that count, "sum" or "none". N, H and V are at least 1; one dtype for all floats.
    precision: of float32 products, "ieee", "tf32x3" or "tf32"; 16-bit floats are multiplied as they are and summed,
    and the softmax taken, in float32. loss_dtype: of the loss, hidden's if None.

    Returns loss, () or for "none" (N,), and in float32 (float64 for that) lse (N,) and count (), the number of rows
    that count. Without such rows the mean is NaN. A target outside 0..V-1 makes its row's loss NaN; on an NVIDIA GPU it
    also fails a device assertion, as torch's own does. Raises ValueError for another reduction, RuntimeError past
    linear_cross_entropy_limits.
    """
    plan, hidden, weight, bias = _prepared(hidden, weight, bias, reduction, precision)
    tile, N, rows, device = plan.loss, hidden.shape[0], reduction == "none", plan.device
    blocks = -(-N // tile.block_n)
    splits, tiles_per_split = plan.splits(tile, blocks)
    loss_dtype = loss_dtype or plan.dtype
    of_tiles, of_splits, of_all = _loss_launches(plan, splits > 1, rows, loss_dtype)
    of_sums: Any = {"dtype": plan.accumulator, "device": device}
    totals, lse, count = torch.empty((3, blocks), **of_sums), torch.empty(N, **of_sums), torch.empty((), **of_sums)
    loss = torch.empty((N,) if rows else (), dtype=loss_dtype, device=device)
    partial_lse, chosen, of_rows = lse, None, loss if rows else None
    if of_splits is not None:
        partial_lse, chosen = torch.empty((splits, N), **of_sums), torch.empty((splits, N), **of_sums)
    of_tiles(
        (blocks, splits, 1),
        device,
        *(hidden, weight, bias, target, partial_lse, chosen, of_rows, totals, N, ignore_index, tiles_per_split),
        *(hidden.stride(0), weight.stride(0), target.stride(0)),
    )
    if of_splits is not None:
        of_splits(
            (blocks, 1, 1),
            device,
            *(partial_lse, chosen, target, lse, of_rows, totals, N, plan.V, ignore_index, splits, target.stride(0)),
        )
    of_all((1, 1, 1), device, totals, None if rows else loss, count, blocks)
    return loss, lse, count


def linear_cross_entropy_backward(
    grad_loss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    reduction: str,
    lse: torch.Tensor,
    count: torch.Tensor,
    *,
    precision: str = "ieee",
    need_hidden: bool = True,
    need_weight: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias, in hidden's dtype; need_weight: of the last two.

    grad_loss: () or for "none" (N,), any stride. lse, count: from `linear_cross_entropy_forward`; the others, and what
    is raised, as there.
    """
    plan, hidden, weight, bias = _prepared(hidden, weight, bias, reduction, precision)
    rows = _Rows(hidden, weight, bias, target, lse, grad_loss.expand(hidden.shape[0]), count, ignore_index)
    if plan.rows is None or plan.classes is None:
        return _grad_by_gemm(plan, rows, need_hidden, need_weight)
    grad_hidden, grad_weight, grad_bias = None, None, None
    if need_weight:
        grad_hidden, grad_weight, grad_bias = _grad_by_classes(plan, rows, need_hidden)
    if need_hidden and grad_hidden is None:
        grad_hidden = _grad_by_rows(plan, rows)
    return grad_hidden, grad_weight, grad_bias


class _Plan:
    """What is known before a call, of its sizes without the number of rows: the tiles, and constants of the kernels."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, precision: str, H: int, V: int, has_bias: bool, mean: bool
    ):
        if (why := linear_cross_entropy_limits(dtype, device)) is not None:
            raise RuntimeError(f"linear_cross_entropy: {why}")
        self.dtype, self.device, self.H, self.V, self.has_bias, self.mean = dtype, device, H, V, has_bias, mean
        self.accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        self.target, self.cores = target_of(device)[0], _cores(device)
        precision = precision_of(dtype, precision, device)
        kind = KINDS.get(dtype, precision)
        steps = ("loss", "classes", "rows", "logits")
        tiles = {step: find_tile(step, kind, H, V, self.target) for step in steps}
        loss, self.classes, self.rows, logits = tiles.values()
        if loss is None or logits is None:
            raise RuntimeError(f"linear_cross_entropy: no tile for {dtype}, {precision}")
        self.loss, self.logits = loss, logits
        self.constants: dict[str, dict[str, object]] = {
            step: {"F": Form.of(tile, H, V, has_bias, precision), **tile.launch_options(self.target)}
            for step, tile in tiles.items()
            if tile is not None
        }

    def splits(self, tile: Tile, blocks: int) -> tuple[int, int]:
        """Programs over which the classes of a block of rows are split, to fill the device, and tiles of each."""
        tiles = -(-self.V // tile.block_v)
        splits = min(self.cores * tile.programs_per_core // blocks, tiles // MIN_TILES_PER_SPLIT)
        tiles_per_split = -(-tiles // max(1, splits))
        return -(-tiles // tiles_per_split), tiles_per_split


_plan = functools.lru_cache(4096)(_Plan)


def _prepared(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reduction: str, precision: str
) -> tuple[_Plan, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The plan for these arguments, and they as the kernels take them."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    (V, H), mean = weight.shape, reduction == "mean"
    plan = _plan(hidden.dtype, hidden.device, precision, H, V, bias is not None, mean)
    if not (hidden.is_contiguous() and weight.is_contiguous() and H < MAX_STRIDE):
        hidden, weight = _within_reach(hidden), _within_reach(weight)
    return plan, hidden, weight, None if bias is None else bias.contiguous()


# Launches are kept for each kind of arguments: see launch.Launch.
@functools.lru_cache(4096)
def _loss_launches(
    plan: _Plan, split: bool, rows: bool, loss_dtype: torch.dtype
) -> tuple[Launch, Launch | None, Launch]:
    """Over tiles of logits; over the parts of the classes, if they are split; over all programs' sums."""
    few = launch_options(4, plan.target, all_registers=False)
    assertions = {} if plan.target in AMD else ASSERTIONS
    return (
        Launch(loss_kernel, SPLIT=split, LOSS_ROWS=rows, **plan.constants["loss"]),
        Launch(loss_of_splits_kernel, BLOCK_N=plan.loss.block_n, LOSS_ROWS=rows, **few) if split else None,
        Launch(total_kernel, BLOCK=1024, LOSS=not rows, MEAN=plan.mean, **few, **assertions),
    )


@functools.lru_cache(4096)
def _classes_launches(
    plan: _Plan, has_hidden: bool, partial: bool, grad_dtype: torch.dtype
) -> tuple[Launch, Launch | None]:
    """Over the tiles of classes, and over the partial sums, if there are any."""
    assert plan.classes is not None
    flags = {"MEAN": plan.mean, "GRAD_HIDDEN": has_hidden, "PARTIAL": partial}
    of_tiles = Launch(grad_by_classes_kernel, **flags, **plan.constants["classes"])
    if not partial:
        return of_tiles, None
    blocks = {"H": plan.H, "V": plan.V, "BLOCK_P": SUM_PROGRAMS, "BLOCK": SUM_COLUMNS, "HAS_BIAS": plan.has_bias}
    options = launch_options(SUM_WARPS, plan.target, all_registers=False)
    return of_tiles, Launch(sum_partials_kernel, **blocks, **options)


@functools.lru_cache(4096)
def _rows_launch(plan: _Plan, split: bool, grad_dtype: torch.dtype) -> Launch:
    return Launch(grad_by_rows_kernel, MEAN=plan.mean, SPLIT=split, **plan.constants["rows"])


@functools.lru_cache(4096)
def _logits_launch(plan: _Plan, grad_dtype: torch.dtype) -> Launch:
    return Launch(grad_logits_kernel, MEAN=plan.mean, **plan.constants["logits"])


class _Rows(NamedTuple):
    """What the gradients are made from."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None
    target: torch.Tensor  # (N,)
    lse: torch.Tensor  # (N,)
    grad_loss: torch.Tensor  # (N,)
    counted: torch.Tensor  # (): rows that count
    ignore_index: int

    @property
    def strides(self) -> tuple[int, ...]:
        return self.hidden.stride(0), self.weight.stride(0), self.target.stride(0), self.grad_loss.stride(0)


def _within_reach(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself if its last stride is 1 and the rows of a tile are within int32 of each other, else a copy."""
    unit = matrix.shape[1] == 1 or matrix.stride(1) == 1
    return matrix if unit and abs(matrix.stride(0)) < MAX_STRIDE else matrix.contiguous()


@functools.cache
def _cores(device: torch.device) -> int:
    """Multiprocessors; for the interpreter few, so that small problems have all paths."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _grad_by_classes(
    p: _Plan, rows: _Rows, need_hidden: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Gradients of weight and bias and, if need_hidden and one tile has all classes, of hidden."""
    tile, N = p.classes, rows.hidden.shape[0]
    assert tile is not None
    tiles, blocks = -(-p.V // tile.block_v), -(-N // tile.block_n)
    groups = max(1, min(blocks, p.cores * tile.programs_per_core // tiles, SUM_PROGRAMS))
    has_hidden = need_hidden and tiles == 1
    grad_hidden = torch.empty((N, p.H), dtype=p.dtype, device=p.device) if has_hidden else None
    grad_weight = torch.empty((p.V, p.H), dtype=p.dtype, device=p.device)
    grad_bias = None if rows.bias is None else torch.empty_like(rows.bias)
    of_tiles, of_partials = _classes_launches(p, has_hidden, groups > 1, rows.grad_loss.dtype)
    partial = None
    if of_partials is not None:
        partial = torch.empty((groups, p.V * p.H + p.V), dtype=p.accumulator, device=p.device)
    of_tiles(
        (tiles, groups, 1),
        p.device,
        *rows[:-1],
        *(grad_hidden, grad_weight if partial is None else partial, grad_bias, N, rows.ignore_index, *rows.strides),
    )
    if of_partials is not None and partial is not None:
        programs = -(-partial.shape[1] // SUM_COLUMNS)
        of_partials((programs, 1, 1), p.device, partial, grad_weight, grad_bias, groups)
    return grad_hidden, grad_weight, grad_bias


def _grad_by_rows(p: _Plan, rows: _Rows) -> torch.Tensor:
    """Gradient of hidden."""
    tile, N = p.rows, rows.hidden.shape[0]
    assert tile is not None
    blocks = -(-N // tile.block_n)
    splits, tiles_per_split = p.splits(tile, blocks)
    grad_hidden = torch.empty((N, p.H), dtype=p.dtype, device=p.device)
    partial = torch.empty((splits, N, p.H), dtype=p.accumulator, device=p.device) if splits > 1 else None
    _rows_launch(p, splits > 1, rows.grad_loss.dtype)(
        (blocks, splits, 1),
        p.device,
        *rows[:-1],
        *(grad_hidden if partial is None else partial, N, rows.ignore_index, tiles_per_split, *rows.strides),
    )
    return grad_hidden if partial is None else partial.sum(0).to(p.dtype)


def _grad_by_gemm(
    p: _Plan, rows: _Rows, need_hidden: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias, from the gradients of some rows' logits at a time."""
    tile, N, strides = p.logits, rows.hidden.shape[0], rows.strides
    launch = _logits_launch(p, rows.grad_loss.dtype)
    at_once = min(N, max(MIN_ROWS, MAX_LOGITS // p.V))
    memory = torch.empty((at_once, p.V), dtype=p.dtype, device=p.device)
    grad_hidden = torch.empty((N, p.H), dtype=p.dtype, device=p.device) if need_hidden else None
    grad_weight = torch.zeros((p.V, p.H), dtype=p.accumulator, device=p.device) if need_weight else None
    has_bias = need_weight and rows.bias is not None
    grad_bias = torch.zeros(p.V, dtype=p.accumulator, device=p.device) if has_bias else None
    for first in range(0, N, at_once):
        chunk = slice(first, min(first + at_once, N))
        hidden, grads = rows.hidden[chunk], memory[: chunk.stop - first]
        launch(
            (-(-len(grads) // tile.block_n), -(-p.V // tile.block_v), 1),
            p.device,
            *(hidden, rows.weight, rows.bias, rows.target[chunk], rows.lse[chunk], rows.grad_loss[chunk], rows.counted),
            *(grads, len(grads), rows.ignore_index, *strides),
        )
        if grad_hidden is not None:
            torch.mm(grads, rows.weight, out=grad_hidden[chunk])
        if grad_weight is not None:
            if p.dtype == p.accumulator:
                grad_weight.addmm_(grads.t(), hidden)
            else:
                grad_weight += grads.t() @ hidden
        if grad_bias is not None:
            grad_bias += grads.sum(0, dtype=p.accumulator)
    grad_weight, grad_bias = (None if g is None else g.to(p.dtype) for g in (grad_weight, grad_bias))
    return grad_hidden, grad_weight, grad_bias
