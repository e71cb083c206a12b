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
from dataclasses import dataclass

import torch
import triton

from .launch import KINDS, precision_of, start, target_of
from .linear_cross_entropy_grad_kernels import (
    grad_by_classes_kernel,
    grad_by_rows_kernel,
    grad_logits_kernel,
    sum_partials_kernel,
)
from .linear_cross_entropy_kernels import loss_kernel, loss_of_splits_kernel, total_kernel
from .linear_cross_entropy_tiles import SUM_COLUMNS, SUM_PROGRAMS, SUM_WARPS, Tile, find_tile
from .targets import AMD, launch_options

# GEMMs are efficient from some hundred rows on, and 2^22 logits in float32 stay in the level 2 cache.
MIN_ROWS = 512
MAX_LOGITS = 1 << 22
# Classes of one row block are split over programs in parts of at least so many tiles.
MIN_TILES_PER_SPLIT = 4
# Device assertions are compiled on request alone, and with them, unless refused, checks of every integer sum.
ASSERTIONS = {"debug": True, "sanitize_overflow": False}


def linear_cross_entropy_limits(dtype: torch.dtype, device: torch.device | str = "cpu") -> str | None:
    """None if the kernels run on this device with inputs of this dtype, else one clause that says why not."""
    device = torch.device(device)
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"no kernel for device type {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if not target_of(device)[0]:
        return f"no tile sizes for {torch.cuda.get_device_name(device)}"
    return None


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
    problem = _Problem(hidden, weight, bias, target, ignore_index, reduction, precision)
    tile = problem.tile("loss")
    blocks, rows = triton.cdiv(problem.N, tile.block_n), reduction == "none"
    splits, tiles_per_split = problem.splits(tile)
    totals, lse, count = problem.empty(3, blocks), problem.empty(problem.N), problem.empty()
    partial_lse, chosen = (problem.empty(splits, problem.N) for _ in range(2)) if splits > 1 else (lse, None)
    loss = torch.empty((problem.N,) if rows else (), dtype=loss_dtype or hidden.dtype, device=hidden.device)
    start(
        loss_kernel,
        (blocks, splits, 1),
        hidden.device,
        *problem.tensors,
        partial_lse,
        chosen,
        loss if rows else None,
        totals,
        problem.N,
        ignore_index,
        tiles_per_split,
        *problem.strides,
        SPLIT=splits > 1,
        LOSS_ROWS=rows,
        **problem.constants(tile),
    )
    if splits > 1:
        start(
            loss_of_splits_kernel,
            (blocks, 1, 1),
            hidden.device,
            partial_lse,
            chosen,
            problem.target,
            lse,
            loss if rows else None,
            totals,
            problem.N,
            problem.V,
            ignore_index,
            splits,
            problem.target.stride(0),
            BLOCK_N=tile.block_n,
            LOSS_ROWS=rows,
            **launch_options(4, problem.target_name, all_registers=False),
        )
    start(
        total_kernel,
        (1, 1, 1),
        hidden.device,
        totals,
        None if rows else loss,
        count,
        blocks,
        BLOCK=1024,
        LOSS=not rows,
        MEAN=problem.mean,
        **launch_options(4, problem.target_name, all_registers=False),
        **ASSERTIONS if problem.target_name not in AMD else {},
    )
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
    problem = _Problem(hidden, weight, bias, target, ignore_index, reduction, precision)
    upstream = _Upstream(lse, grad_loss.expand(problem.N), count)
    if problem.find_tile("rows") is None or problem.find_tile("classes") is None:
        return _grad_by_gemm(problem, upstream, need_hidden, need_weight)
    grad_hidden, grad_weight, grad_bias = None, None, None
    if need_weight:
        grad_hidden, grad_weight, grad_bias = _grad_by_classes(problem, upstream, need_hidden)
    if need_hidden and grad_hidden is None:
        grad_hidden = _grad_by_rows(problem, upstream)
    return grad_hidden, grad_weight, grad_bias


class _Problem:
    """Arguments of one call as the kernels take them, and what the launches derive from their sizes."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        ignore_index: int,
        reduction: str,
        precision: str,
    ):
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        why = linear_cross_entropy_limits(hidden.dtype, hidden.device)
        if why is not None:
            raise RuntimeError(f"linear_cross_entropy: {why}")
        self.hidden, self.weight, self.target = _within_reach(hidden), _within_reach(weight), target
        self.bias = None if bias is None else bias.contiguous()
        self.ignore_index, self.mean = ignore_index, reduction == "mean"
        (self.N, self.H), self.V = hidden.shape, weight.shape[0]
        self.dtype, self.device = hidden.dtype, hidden.device
        self.accumulator = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.precision = precision_of(self.dtype, precision, self.device)
        self.target_name, _ = target_of(self.device)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.target

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.hidden.stride(0), self.weight.stride(0), self.target.stride(0)

    def empty(self, *shape: int) -> torch.Tensor:
        """A tensor of the accumulator's dtype."""
        return torch.empty(shape, dtype=self.accumulator, device=self.device)

    def find_tile(self, step: str) -> Tile | None:
        kind = KINDS.get(self.dtype, self.precision)
        return find_tile(step, kind, self.H, self.V, self.target_name)

    def tile(self, step: str) -> Tile:
        tile = self.find_tile(step)
        if tile is None:
            raise RuntimeError(f"linear_cross_entropy: no tile for {step}, {self.dtype}, {self.precision}")
        return tile

    def constants(self, tile: Tile) -> dict[str, object]:
        """Meta-parameters that all kernels over tiles of logits have, and compiler options."""
        return {
            "H": self.H,
            "V": self.V,
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "BLOCK_H": tile.block_h,
            "HAS_BIAS": self.bias is not None,
            "PRECISION": self.precision,
            **tile.launch_options(self.target_name),
        }

    def splits(self, tile: Tile) -> tuple[int, int]:
        """Programs over which the classes of a block of rows are split, to fill the device, and tiles of each."""
        tiles = triton.cdiv(self.V, tile.block_v)
        programs = _cores(self.device) * tile.programs_per_core
        splits = min(programs // triton.cdiv(self.N, tile.block_n), tiles // MIN_TILES_PER_SPLIT)
        tiles_per_split = triton.cdiv(tiles, max(1, splits))
        return triton.cdiv(tiles, tiles_per_split), tiles_per_split


@dataclass(frozen=True)
class _Upstream:
    """What each row's gradient is made from beside its logits: lse (N,), grad_loss (N,), count ()."""

    lse: torch.Tensor
    grad_loss: torch.Tensor
    count: torch.Tensor


def _within_reach(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself if its last stride is 1 and the rows of a tile are within int32 of each other, else a copy."""
    unit = matrix.shape[1] == 1 or matrix.stride(1) == 1
    return matrix if unit and abs(matrix.stride(0)) < 1 << 23 else matrix.contiguous()


@functools.cache
def _cores(device: torch.device) -> int:
    """Multiprocessors; for the interpreter few, so that small problems have all paths."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _grad_by_classes(
    p: _Problem, upstream: _Upstream, need_hidden: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Gradients of weight and bias and, if need_hidden and one tile has all classes, of hidden."""
    tile = p.tile("classes")
    tiles, blocks = triton.cdiv(p.V, tile.block_v), triton.cdiv(p.N, tile.block_n)
    groups = max(1, min(blocks, _cores(p.device) * tile.programs_per_core // tiles, SUM_PROGRAMS))
    has_hidden = need_hidden and tiles == 1
    grad_hidden = torch.empty((p.N, p.H), dtype=p.dtype, device=p.device) if has_hidden else None
    grad_weight = torch.empty((p.V, p.H), dtype=p.dtype, device=p.device)
    grad_bias = None if p.bias is None else torch.empty_like(p.bias)
    partial = p.empty(groups, p.V * p.H + p.V) if groups > 1 else None
    start(
        grad_by_classes_kernel,
        (tiles, groups, 1),
        p.device,
        *p.tensors,
        upstream.lse,
        upstream.grad_loss,
        upstream.count,
        grad_hidden,
        grad_weight if partial is None else partial,
        grad_bias,
        p.N,
        p.ignore_index,
        *p.strides,
        upstream.grad_loss.stride(0),
        MEAN=p.mean,
        GRAD_HIDDEN=has_hidden,
        PARTIAL=groups > 1,
        HALVES=tile.halves,
        **p.constants(tile),
    )
    if partial is not None:
        start(
            sum_partials_kernel,
            (-(-partial.shape[1] // SUM_COLUMNS), 1, 1),
            p.device,
            partial,
            grad_weight,
            grad_bias,
            groups,
            H=p.H,
            V=p.V,
            BLOCK_P=SUM_PROGRAMS,
            BLOCK=SUM_COLUMNS,
            HAS_BIAS=p.bias is not None,
            **launch_options(SUM_WARPS, p.target_name, all_registers=False),
        )
    return grad_hidden, grad_weight, grad_bias


def _grad_by_rows(p: _Problem, upstream: _Upstream) -> torch.Tensor:
    """Gradient of hidden."""
    tile = p.tile("rows")
    splits, tiles_per_split = p.splits(tile)
    grad_hidden = torch.empty((p.N, p.H), dtype=p.dtype, device=p.device)
    partial = p.empty(splits, p.N, p.H) if splits > 1 else None
    start(
        grad_by_rows_kernel,
        (-(-p.N // tile.block_n), splits, 1),
        p.device,
        *p.tensors,
        upstream.lse,
        upstream.grad_loss,
        upstream.count,
        grad_hidden if partial is None else partial,
        p.N,
        p.ignore_index,
        tiles_per_split,
        *p.strides,
        upstream.grad_loss.stride(0),
        MEAN=p.mean,
        SPLIT=splits > 1,
        **p.constants(tile),
    )
    return grad_hidden if partial is None else partial.sum(0).to(p.dtype)


def _grad_by_gemm(
    p: _Problem, upstream: _Upstream, need_hidden: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias, from the gradients of some rows' logits at a time."""
    tile = p.tile("logits")
    rows = min(p.N, max(MIN_ROWS, MAX_LOGITS // p.V))
    memory = torch.empty((rows, p.V), dtype=p.dtype, device=p.device)
    grad_hidden = torch.empty((p.N, p.H), dtype=p.dtype, device=p.device) if need_hidden else None
    grad_weight = torch.zeros((p.V, p.H), dtype=p.accumulator, device=p.device) if need_weight else None
    grad_bias = p.empty(p.V).zero_() if need_weight and p.bias is not None else None
    for first in range(0, p.N, rows):
        chunk = slice(first, min(first + rows, p.N))
        hidden, grads = p.hidden[chunk], memory[: chunk.stop - first]
        start(
            grad_logits_kernel,
            (-(-len(grads) // tile.block_n), -(-p.V // tile.block_v), 1),
            p.device,
            hidden,
            p.weight,
            p.bias,
            p.target[chunk],
            upstream.lse[chunk],
            upstream.grad_loss[chunk],
            upstream.count,
            grads,
            len(grads),
            p.ignore_index,
            *p.strides,
            upstream.grad_loss.stride(0),
            MEAN=p.mean,
            **p.constants(tile),
        )
        if grad_hidden is not None:
            torch.mm(grads, p.weight, out=grad_hidden[chunk])
        if grad_weight is not None:
            if p.dtype == p.accumulator:
                grad_weight.addmm_(grads.t(), hidden)
            else:
                grad_weight += grads.t() @ hidden
        if grad_bias is not None:
            grad_bias += grads.sum(0, dtype=p.accumulator)
    grad_weight, grad_bias = (None if g is None else g.to(p.dtype) for g in (grad_weight, grad_bias))
    return grad_hidden, grad_weight, grad_bias
