"""The Elman recurrence on a CPU: tensors in, tensors out; kernels.h has the records that C is given.

forward    h_t = f(x_t + h_{t-1} W^T)             f = tanh or relu
backward   g_t = (grad_out_t + g_{t+1} W) f'(h_t)  f' = 1 - h^2 or [h > 0]
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .memory import COMPUTE, buffers_of, computed, require_one_type


def elman_limits(hidden_size: int, dtype: torch.dtype) -> str | None:
    """None if elman_forward and elman_backward can run this size and type, else one clause saying why not."""
    if library.missing:
        return library.missing
    if dtype not in library.DTYPES:
        return f"dtype {dtype} is not among float32, float64, bfloat16, float16"
    if hidden_size < 1:
        return f"hidden size {hidden_size} is below 1"
    return None


class _Walk:
    """One call's sizes, and its tensors as C reads them; kept until the call returns, as C is given addresses."""

    __slots__ = (
        *("B", "D", "H", "T", "batch_sizes", "dtype", "h0", "of_one_type", "offsets", "relu", "reverse", "tokens"),
        "weights",
    )

    def __init__(
        self,
        rows: Tensor,  # (T, B, ...) or packed (N, ...): the tokens, else the input or the output
        weight_hh: Sequence[Tensor],
        h0: Tensor | None,
        tokens: Tensor | None,
        batch_sizes: Tensor | None,
        nonlinearity: str,
        reverse: Sequence[bool],
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        if rows.device.type != "cpu":
            raise ValueError(f"expected tensors on the CPU, got {rows.device}")
        self.weights = list(weight_hh)
        for i, weight in enumerate(weight_hh):
            if weight.dtype not in COMPUTE or not weight.is_contiguous():
                self.weights[i] = computed(weight)
        self.dtype = self.weights[0].dtype
        self.h0 = h0 if h0 is None or (h0.dtype in COMPUTE and h0.is_contiguous()) else computed(h0)
        self.of_one_type = self.weights[-1].dtype == self.dtype and (self.h0 is None or self.h0.dtype == self.dtype)
        self.D, self.H = len(self.weights), self.weights[0].shape[0]
        self.tokens = tokens if tokens is None or tokens.dtype == torch.int64 else tokens.to(torch.int64)
        if batch_sizes is None:
            self.T, self.B = rows.shape[0], rows.shape[1]
            self.batch_sizes = self.offsets = None
        else:
            self.T = batch_sizes.shape[0]
            self.batch_sizes = batch_sizes.to(torch.int64).contiguous()
            self.offsets = self.batch_sizes.cumsum(0) - self.batch_sizes
            self.B = int(self.batch_sizes[0]) if self.T else 0
        self.relu = int(nonlinearity == "relu")
        self.reverse = (int(reverse[0]), int(reverse[-1]) if self.D > 1 else 0)

    def record(self, out: Tensor, num_tokens: int, threads: int, columns: int, others: Sequence[Tensor | None]):
        """The fields of elman_shape in kernels.h, and address and bytes of each of ``others``."""
        tokens, weights, h0 = self.tokens, self.weights, self.h0
        second = weights[1] if self.D > 1 else None
        fields = buffers_of((self.batch_sizes, self.offsets, tokens, weights[0], second, h0, out, *others))
        sizes, of_offsets, of_tokens, first, last, of_h0, of_out = fields[:7]
        shape = (
            *(self.T, self.B, self.H, self.D, num_tokens, threads, columns, self.relu, *self.reverse),
            *(*sizes, *of_offsets, *of_tokens),
            *((0, 0) if tokens is None else (tokens.stride(0) if tokens.dim() == 2 else 0, tokens.stride(-1))),
            *(first[0], last[0], first[1], last[1]),
            *(weights[0].stride(0), 0 if second is None else second.stride(0)),
            *(*of_h0, *((0, 0) if h0 is None else h0.stride()[:2])),
            *(*of_out, *(out.stride()[:2] if out.dim() == 3 else (0, out.stride(0)))),
        )
        return shape, fields[7:]


ONE_THREADS_WORK = 1 << 19  # a walk of fewer multiplications: waking another thread would take longer


def _threads(B: int, H: int, D: int, T: int) -> tuple[int, int]:
    """Threads for more than ONE_THREADS_WORK, and whether columns (1) or rows (0) are split over them.

    Measured on 2 cores with AVX-512. Rows, where a thread gets enough of them to hide the reading of W (4 from level 2,
    1 when W fits level 1); else columns, where a step's share outweighs the barrier (0.2 us, more on a busy machine).
    """
    threads = torch.get_num_threads()
    step = B * H * H * D
    if threads == 1:
        return 1, 0
    rows = B * D // threads
    if rows >= (1 if H <= 64 else 4):
        return threads, 0
    if step < 1 << 15:
        return 1, 0
    return min(threads, D * -(-H // 32)), 1


def elman_forward(
    x: Tensor,  # (T, B, D*H) or packed (N, D*H): projected input; with tokens the table (V, D*H)
    weight_hh: Sequence[Tensor],  # D tensors (H, H)
    h0: Tensor | None = None,  # (D, B, H)
    *,
    tokens: Tensor | None = None,  # (T, B) or packed (N), int64 or int32
    batch_sizes: Tensor | None = None,  # (T) int64, rows active at each step; None: all B
    nonlinearity: str = "tanh",
    reverse: Sequence[bool] = (False,),  # D: does direction d walk time backwards
    out: Tensor | None = None,  # like the result; may be x itself
) -> tuple[Tensor, Tensor]:
    """h_t = f(x_t + h_{t-1} W^T) over all steps. Returns out (T, B, D*H) or (N, D*H), and h_n (D, B, H).

    Row v of the table is W_ih[:, v] + b_ih + b_hh. h_n is the state after each sequence's own last step. Float tensors
    have one dtype among float32, float64, bfloat16, float16; a token outside the table is an IndexError.
    """
    walk = _Walk(x if tokens is None else tokens, weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse)
    dtype, width = walk.dtype, walk.D * walk.H
    source = x if x.dtype == dtype and x.stride(-1) == 1 and not x.is_neg() else computed(x)
    if not walk.of_one_type or source.dtype != dtype:
        require_one_type(source, walk.h0, *walk.weights)
    shape = (*x.shape[:-1], width) if tokens is None else (*tokens.shape, width)
    if out is not None and (out.shape != shape or (walk.H > 1 and out.stride(-1) != 1)):
        raise ValueError(
            f"out: expected {tuple(shape)} with last stride 1, got {tuple(out.shape)} with strides {out.stride()}"
        )
    if out is not None and out.dtype == dtype:
        result = out
    elif tokens is None:
        result = torch.empty_like(source)
    else:
        result = torch.empty(shape, dtype=dtype, device="cpu")
    if walk.T == 0 or walk.B == 0:
        h_n = torch.zeros((walk.D, walk.B, walk.H), dtype=x.dtype, device="cpu") if h0 is None else h0.clone()
        return (result if out is None else out).to(x.dtype), h_n
    h_n = torch.empty((walk.D, walk.B, walk.H), dtype=dtype, device="cpu")
    B, H, D, T = walk.B, walk.H, walk.D, walk.T
    threads, columns = (1, 0) if B * H * H * D * T < ONE_THREADS_WORK else _threads(B, H, D, T)
    record, (of_x, of_h_n) = walk.record(
        result, 0 if tokens is None else source.shape[0], threads, columns, (source, h_n)
    )
    strides = source.stride()[:2] if source.dim() == 3 else (0, source.stride(0))
    library.extension.elman_forward(library.isa_number(), COMPUTE[dtype], *record, *of_x, *strides, *of_h_n)
    if dtype != x.dtype:
        return result.to(x.dtype) if out is None else out.copy_(result), h_n.to(x.dtype)
    return result, h_n


def elman_backward(
    grad_out: Tensor | None,  # like out
    grad_h_n: Tensor | None,  # (D, B, H)
    out: Tensor,  # (T, B, D*H) or (N, D*H): what forward returned
    weight_hh: Sequence[Tensor],  # D tensors (H, H)
    h0: Tensor | None = None,  # (D, B, H)
    *,
    tokens: Tensor | None = None,  # (T, B) or packed (N), int64 or int32
    num_tokens: int | None = None,  # V, the rows of the table
    batch_sizes: Tensor | None = None,  # (T) int64, rows active at each step; None: all B
    nonlinearity: str = "tanh",
    reverse: Sequence[bool] = (False,),
    need_weight_grad: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor]:
    """g_t = (grad_out_t + g_{t+1} W) f'(h_t), f' = 1 - h^2 or [h > 0]. Returns (grad_x, grad_weight_hh, grad_h0).

    grad_x is g, like out; with tokens the table's gradient (V, D*H), the sum of g over the positions of each token.
    grad_weight_hh: D tensors (H, H), or None. grad_h0 (D, B, H) always.
    """
    walk = _Walk(out, weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse)
    dtype, B, H, D = walk.dtype, walk.B, walk.H, walk.D
    states = out if out.dtype == dtype and out.stride(-1) == 1 and not out.is_neg() else computed(out)
    # One element in place of many, as the gradient of a sum is, is no plain memory to C either.
    if grad_out is not None and (grad_out.dtype != dtype or not grad_out.is_contiguous()):
        grad_out = computed(grad_out)
    if grad_h_n is not None and (grad_h_n.dtype != dtype or not grad_h_n.is_contiguous()):
        grad_h_n = computed(grad_h_n)
    if not (
        walk.of_one_type
        and states.dtype == dtype
        and (grad_out is None or grad_out.dtype == dtype)
        and (grad_h_n is None or grad_h_n.dtype == dtype)
    ):
        require_one_type(states, grad_out, grad_h_n, walk.h0, *walk.weights)
    grad_h0 = torch.empty((D, B if h0 is None else h0.shape[1], H), dtype=dtype, device="cpu")
    table = None if tokens is None else torch.empty((num_tokens or 0, D * H), dtype=dtype, device="cpu")
    weights = [torch.empty((H, H), dtype=dtype, device="cpu") for _ in weight_hh] if need_weight_grad else None
    fused = _fused(B, H, num_tokens or 0)
    grad_x = None if fused and tokens is not None else torch.empty_like(states)
    if walk.T == 0 or B == 0:
        for tensor in (table, grad_h0, *(weights or ())):
            if tensor is not None:
                tensor.zero_()
        if grad_h_n is not None:
            grad_h0.copy_(grad_h_n)
    else:
        threads, columns = (1, 0) if B * H * H * D * walk.T < ONE_THREADS_WORK else _threads(B, H, D, walk.T)
        grad_weights = (None, None) if weights is None else (weights[0], weights[1] if D > 1 else None)
        record, (of_grad_out, of_grad_h_n, of_grad_x, of_table, first, second, of_grad_h0) = walk.record(
            *(states, num_tokens or 0, threads, 0 if fused else columns),
            (grad_out, grad_h_n, grad_x, table, *grad_weights, grad_h0),
        )
        library.extension.elman_backward(
            *(library.isa_number(), COMPUTE[dtype], *record, int(fused)),
            *(*of_grad_out, *_sequence_strides(grad_out)),
            *(*of_grad_h_n, *((0, 0) if grad_h_n is None else grad_h_n.stride()[:2])),
            *(*of_grad_x, *_sequence_strides(grad_x), *of_table),
            *(first[0], second[0], first[1], second[1], *of_grad_h0),
        )
    result = grad_x if table is None else table
    assert result is not None
    if dtype != out.dtype:
        result, grad_h0 = result.to(out.dtype), grad_h0.to(out.dtype)
        weights = None if weights is None else [w.to(out.dtype) for w in weights]
    return result, None if weights is None else tuple(weights), grad_h0


def _sequence_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides from step to step and from row to row of a sequence (T, B, C), or packed (N, C)."""
    if tensor is None:
        return 0, 0
    return tensor.stride()[:2] if tensor.dim() == 3 else (0, tensor.stride(0))


def _fused(B: int, H: int, V: int) -> bool:
    """Whether weight and table gradients are summed while the recurrence runs, in a partial sum for each few rows.

    Depends on the shape alone: the order of the sums must not change with the thread count.
    """
    return B >= 64 and H <= 64 and V <= 256
