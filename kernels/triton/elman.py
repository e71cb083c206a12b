"""Launchers of the Elman recurrence kernels (elman_kernels.py has the algorithm, elman_tiles.py the choice of a tile).

    forward    pre_t = x_t + b + h_{t-1} @ W^T      h_t = tanh(pre_t) or relu(pre_t)
    backward   d_t = (g_t + c_t) * f'(h_t)          c_{t-1} = d_t @ W        grad_W = sum_t d_t^T @ h_{t-1}

Time-major views: T time steps, B batch, H hidden units, V vocabulary, D directions, N packed rows. Strides are free,
except that the last one is 1 (a table of tokens has any); so a (B, T, C) buffer is passed as its transpose. Nothing
here validates token ids: an id outside 0..V-1 counts as a zero row and adds to no gradient of the table. Every result
is bitwise repeatable: sums across programs are made by a second reduction or a GEMM, never by atomics.
"""

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..sums_by_id import sum_by_id
from . import elman_tiles
from .elman_forms import Form
from .elman_kernels import elman_backward_kernel, elman_forward_kernel
from .elman_sums_kernels import rows_by_token_kernel, sum_partials_kernel
from .elman_tiles import (
    PARTIAL_ELEMENTS,
    PARTIAL_SUMS,
    PARTIAL_WARPS,
    TOKEN_ROWS,
    TOKEN_WARPS,
    Tile,
    next_power_of_2,
    token_blocks,
)
from .launch import INTERPRETED, KINDS, on_device, processors_of, target_of
from .targets import AMD, launch_options

MAX_SUM_VOCAB = 256  # the most classes whose rows are summed by a kernel of this folder
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@functools.lru_cache(4096)  # batch sizes may be any number of numbers
def choose_tile(
    hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device, rows: int = 1
) -> Tile | None:
    """The tile for so many rows (batch times directions), or None if no program can hold this hidden size.

    The interpreter, which handles one operation on a tile in a time of its own, gets tiles of more rows in one piece.
    """
    target, shared_kb = target_of(device)
    kind = KINDS.get(dtype) or ("tf32" if precision == "tf32" and target not in AMD else "fp32")
    tile = elman_tiles.find_tile(kind, hidden_size, target, rows / processors_of(device), shared_kb)
    if tile is not None and INTERPRETED and tile.form == "fma":
        width = max(16, next_power_of_2(hidden_size))
        tile = replace(tile, rows=16, lanes_n=width, lanes_k=width // (2 if dtype == torch.float64 else 4), warps=1)
    return tile


@functools.cache
def _form(tile: Tile, hidden_size: int, dtype: torch.dtype, tanh: bool, wide: bool, features: int = 0) -> Form:
    return Form(
        hidden=hidden_size,
        rows=tile.rows,
        lanes_n=tile.lanes_n,
        lanes_k=tile.lanes_k,
        warps=tile.warps,
        dtype=_TYPES[dtype],
        mma=tile.form != "fma",
        three=tile.form == "mma3",
        in_shared=tile.in_shared,
        inputs=features,
        ahead=tile.ahead,
        tanh=tanh,
        wide=wide,
    )


def elman_limits(
    hidden_size: int, dtype: torch.dtype, precision: str = "ieee", device: torch.device | str = "cpu"
) -> str | None:
    """None if one program can hold this hidden size, else one clause that says why not.

    hidden_size: H; dtype: of the input and the weights; precision: of float32 products, "ieee" or, if allowed, "tf32";
    device: where it would run ("cpu": interpreter, with sm_90's tiles).
    """
    device = torch.device(device)
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"no kernel for device type {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if not target_of(device)[0]:
        return f"no tile sizes for {torch.cuda.get_device_name(device)}"
    if choose_tile(hidden_size, dtype, precision, device) is None:
        return f"hidden size {hidden_size} is too large for one program ({dtype})"
    return None


def makes_projection(
    features: int, hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device, rows: int, steps: int
) -> bool:
    """Whether elman_forward takes features and W_ih in place of projected input. rows: batch times directions."""
    tile = choose_tile(hidden_size, dtype, precision, device, rows)
    return tile is not None and elman_tiles.projects_input(tile, features, steps)


def elman_reason(
    hidden_size: int, dtype: torch.dtype, precision: str = "ieee", device: torch.device | str = "cpu", rows: int = 1
) -> str:
    """The tile for a hidden size that elman_limits allows, and why it is that one. rows: batch times directions."""
    tile = choose_tile(hidden_size, dtype, precision, torch.device(device), rows)
    if tile is None:
        raise RuntimeError(f"elman_reason: {elman_limits(hidden_size, dtype, precision, device)}")
    name = {"fma": "FMA", "mma": "tensor cores", "mma3": "tensor cores in three products"}[tile.form]
    return f"{name}, {tile.rows} rows and {tile.warps} warps a program ({tile.why})"


def _check(tensors: dict[str, torch.Tensor | None], device: torch.device, unit_stride: bool = True) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
        if unit_stride and tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected a last stride of 1, got strides {tensor.stride()}")


def _steps_table(batch_sizes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(2, T): packed rows before each step, rows active in it."""
    before = torch.cumsum(batch_sizes, 0) - batch_sizes
    return torch.stack((before, batch_sizes)).to(device, non_blocking=True)


def _row_strides(tensor: torch.Tensor | None, packed: bool) -> tuple[int, int]:
    """Strides from step to step and from row to row; a packed tensor has one for both."""
    if tensor is None:
        return 0, 0
    return (tensor.stride(0), tensor.stride(0)) if packed else (tensor.stride(0), tensor.stride(1))


def _like_rows(rows: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """New (..., columns) tensor in the memory order of `rows`."""
    if rows.dim() == 3 and rows.stride(0) < rows.stride(1):
        steps, batch = rows.shape[:2]
        return torch.empty((batch, steps, columns), dtype=dtype, device=rows.device).transpose(0, 1)
    return torch.empty((*rows.shape[:-1], columns), dtype=dtype, device=rows.device)


def _is_wide(block_b: int, rows: tuple[torch.Tensor | None, ...], table: torch.Tensor | None = None) -> bool:
    """Whether int32 is too small for the offsets inside a tile of rows (second last dimension) or inside the table."""
    reach = [block_b * tensor.stride(-2) for tensor in rows if tensor is not None and tensor.dim() > 1]
    if table is not None:
        reach.append(table.shape[0] * table.stride(0))
    return max(reach, default=0) >= 2**31


def _mask(reverse) -> int:
    return sum(1 << d for d, flag in enumerate(reverse) if flag)


def _of_direction(tensors, direction: int) -> torch.Tensor | None:
    """tensors: one for each direction, or None; the last serves for those that are not there."""
    return None if tensors is None else tensors[min(direction, len(tensors) - 1)].contiguous()


def elman_forward(
    x: torch.Tensor,
    weight_hh,
    h0: torch.Tensor | None = None,
    *,
    weight_ih=None,
    bias_ih=None,
    bias_hh=None,
    tokens: torch.Tensor | None = None,
    batch_sizes: torch.Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse=(False,),
    out: torch.Tensor | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = f(x_t + bias_ih[d] + bias_hh[d] + h_{t-1} @ weight_hh[d]^T) over all steps of D directions, in one launch.

    x: (T, B, D*H) or packed (N, D*H), projected input; with tokens: the table (V, D*H), of any strides.
    weight_ih: D tensors (H, I), where makes_projection says so: x is then (T, B, I) or (N, I), and x_t W_ih^T is added.
    weight_hh: D tensors (H, H). h0: (D, B, H), None for zeros. bias_ih, bias_hh: D tensors (H,), or None.
    tokens: (T, B) or packed (N,), int64 or int32. batch_sizes: (T,) int64 on the CPU, active rows of each step,
    non-increasing; None for padded input. reverse: D bools. out: buffer for the result, may be x.
    precision: of float32 products, "ieee" or, where ten bits of mantissa are allowed, "tf32", which is used where it is
    faster. One dtype for all floats; sums and tanh of 16-bit floats are taken in float32.

    Returns out (T, B, D*H) or (N, D*H), direction d in columns d*H:(d+1)*H, and h_n (D, B, H), the state after each
    row's own last step of the walk.
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past elman_limits.
    """
    packed = batch_sizes is not None
    D, H = len(weight_hh), weight_hh[0].shape[0]
    rows = x if tokens is None else tokens
    _check({"x": x}, x.device, unit_stride=tokens is None)
    _check({"h0": h0, "out": out}, x.device)
    T = rows.shape[0] if batch_sizes is None else len(batch_sizes)
    B = rows.shape[1] if batch_sizes is None else int(batch_sizes[0]) if T else 0
    tile = choose_tile(H, x.dtype, precision, x.device, B * D)
    if tile is None:
        raise RuntimeError(f"elman_forward: {elman_limits(H, x.dtype, precision, x.device)}")
    features = 0
    if weight_ih is not None:
        features = x.shape[-1]
        tile = replace(tile, ahead=tile.ahead_inputs)
    if out is None:
        out = _like_rows(x if tokens is None else tokens.unsqueeze(-1), D * H, x.dtype)
    h_n = torch.empty((D, B, H), dtype=x.dtype, device=x.device)
    if T == 0 or B == 0 or H == 0:
        return out, h_n.zero_() if h0 is None else h_n.copy_(h0)

    stride_x = _row_strides(x, packed) if tokens is None else (x.stride(0), 0)
    wide = _is_wide(tile.rows, (None if tokens is not None else x, h0, out), None if tokens is None else x)
    with on_device(x.device):
        elman_forward_kernel[(triton.cdiv(B, tile.rows), D)](
            x,
            tokens,
            _of_direction(weight_hh, 0),
            _of_direction(weight_hh, 1),
            _of_direction(weight_ih, 0),
            _of_direction(weight_ih, 1),
            _of_direction(bias_ih, 0),
            _of_direction(bias_ih, 1),
            _of_direction(bias_hh, 0),
            _of_direction(bias_hh, 1),
            h0,
            None if batch_sizes is None else _steps_table(batch_sizes, x.device),
            out,
            h_n,
            T,
            B,
            x.shape[0],
            _mask(reverse),
            *stride_x,
            1 if tokens is None else x.stride(1),
            *_row_strides(tokens, packed),
            *(h0.stride()[:2] if h0 is not None else (0, 0)),
            *_row_strides(out, packed),
            F=_form(tile, H, x.dtype, nonlinearity == "tanh", wide, features),
            **tile.launch_options(target_of(x.device)[0]),
        )
    return out, h_n


def elman_backward(
    grad_out: torch.Tensor | None,
    grad_h_n: torch.Tensor | None,
    out: torch.Tensor,
    weight_hh,
    h0: torch.Tensor | None = None,
    *,
    tokens: torch.Tensor | None = None,
    num_tokens: int | None = None,
    batch_sizes: torch.Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse=(False,),
    need_weight_grad: bool = True,
    need_bias_grad: bool = True,
    precision: str = "ieee",
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, torch.Tensor, torch.Tensor | None]:
    """Gradients of elman_forward, from its results alone: f'(pre_t) is 1 - h_t^2, or [h_t > 0] for relu.

    grad_out: like out, or None. grad_h_n: (D, B, H), or None. out: what elman_forward returned first.
    weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse, precision: as given to elman_forward.
    num_tokens: V, needed with tokens. need_weight_grad, need_bias_grad: False leaves the gradient out.

    Returns grad_x, the gradient of the pre-activations, shaped and laid out in memory like out (with tokens: the
    gradient of the table, (V, D*H)); the D gradients of weight_hh, or None; grad_h0 (D, B, H); the gradient of either
    bias, (D*H,), or None.
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past elman_limits.
    """
    packed = batch_sizes is not None
    D, H = len(weight_hh), weight_hh[0].shape[0]
    dtype, device = out.dtype, out.device
    _check({"grad_out": grad_out, "grad_h_n": grad_h_n, "out": out, "h0": h0}, device)
    if tokens is not None and num_tokens is None:
        raise ValueError("num_tokens: expected the rows of the table with tokens, got None")
    V = num_tokens or 0
    T = out.shape[0] if batch_sizes is None else len(batch_sizes)
    B = out.shape[1] if batch_sizes is None else int(batch_sizes[0]) if T else 0
    tile = choose_tile(H, dtype, precision, device, B * D)
    if tile is None:
        raise RuntimeError(f"elman_backward: {elman_limits(H, dtype, precision, device)}")
    grad_h0 = torch.empty((D, B, H), dtype=dtype, device=device)
    if T == 0 or B == 0 or H == 0:
        grad_x = torch.zeros_like(out) if tokens is None else out.new_zeros((V, D * H))
        zeros = tuple(torch.zeros_like(w) for w in weight_hh) if need_weight_grad else None
        grad_bias = out.new_zeros(D * H) if need_bias_grad else None
        return grad_x, zeros, grad_h0.zero_() if grad_h_n is None else grad_h0.copy_(grad_h_n), grad_bias

    # grad_x has out's strides, which the kernel counts on; where a buffer has gaps, a copy of it has none.
    grad_x = _like_rows(out, D * H, dtype)
    if grad_x.stride() != out.stride():
        out = grad_x.new_empty(grad_x.shape).copy_(out) if packed else torch.empty_like(grad_x).copy_(out)
    programs = triton.cdiv(B, tile.rows)
    sum_weight = need_weight_grad and elman_tiles.sums_weight(tile, H, T, programs * D, processors_of(device))
    in_order = not packed and (T == 1 or out.stride(0) == B * out.stride(1))  # so a step is B rows of one matrix
    acc_type = torch.float64 if dtype == torch.float64 else torch.float32
    h_prev = torch.empty_like(grad_x) if need_weight_grad and not sum_weight and not in_order else None
    partial_bias = torch.empty((programs, D * H), dtype=acc_type, device=device)
    partial_weight = torch.empty((programs, D, H, H), dtype=acc_type, device=device) if sum_weight else None
    target = target_of(device)[0]
    wide = _is_wide(tile.rows, (grad_out, grad_h_n, out, h0))
    form_tile = replace(tile, ahead=tile.ahead_sums) if sum_weight else tile
    with on_device(device):
        elman_backward_kernel[(programs, D)](
            grad_out,
            grad_h_n,
            out,
            _of_direction(weight_hh, 0),
            _of_direction(weight_hh, 1),
            h0,
            None if batch_sizes is None else _steps_table(batch_sizes, device),
            grad_x,
            h_prev,
            grad_h0,
            partial_bias,
            partial_weight,
            T,
            B,
            _mask(reverse),
            *_row_strides(grad_out, packed),
            *(grad_h_n.stride()[:2] if grad_h_n is not None else (0, 0)),
            *_row_strides(out, packed),
            *(h0.stride()[:2] if h0 is not None else (0, 0)),
            F=_form(form_tile, H, dtype, nonlinearity == "tanh", wide),
            **tile.launch_options(target),
        )
        partial_table = None
        if tokens is not None and V <= MAX_SUM_VOCAB:
            partial_table = _rows_by_token(grad_x, tokens, V, acc_type, target)
        grad_bias, grad_weight, grad_table = _sum_partials(partial_bias, partial_weight, partial_table, dtype, target)
    weights = None if grad_weight is None else tuple(grad_weight)
    if need_weight_grad and weights is None:
        states = out if h_prev is None else h_prev
        weights = tuple(_weight_gradient(grad_x, states, h0, d, H, reverse[d], shifted=in_order) for d in range(D))
    if tokens is not None:
        grad_x = _table_gradient(grad_x, tokens, V) if grad_table is None else grad_table
    return grad_x, weights, grad_h0, grad_bias if need_bias_grad else None


def _weight_gradient(
    grad_x: torch.Tensor,
    states: torch.Tensor,
    h0: torch.Tensor | None,
    direction: int,
    hidden_size: int,
    backwards: bool,
    shifted: bool,
) -> torch.Tensor:
    """sum_t d_t^T @ h_{t-1} of one direction, by a matrix product over all rows.

    states: h_{t-1} in grad_x's rows; or, shifted, h_t, and what precedes a step lies B rows before it (behind it, if
    the walk goes backwards), but for the first step's, which is h0.
    """
    columns = slice(direction * hidden_size, (direction + 1) * hidden_size)
    if not shifted:
        order = (lambda t: t) if grad_x.dim() == 2 or grad_x.is_contiguous() else (lambda t: t.transpose(0, 1))
        d, h_prev = (order(t).reshape(-1, t.shape[-1])[:, columns] for t in (grad_x, states))
        return d.t() @ h_prev
    steps, batch, width = grad_x.shape
    d, h = (t.view(steps * batch, width)[:, columns] for t in (grad_x, states))
    gradient = d[:-batch].t() @ h[batch:] if backwards else d[batch:].t() @ h[:-batch]
    if h0 is not None:
        gradient.addmm_((d[-batch:] if backwards else d[:batch]).t(), h0[direction])
    return gradient


def _rows_by_token(
    grad_x: torch.Tensor, tokens: torch.Tensor, V: int, acc_type: torch.dtype, target: str
) -> torch.Tensor:
    """Partial sums of grad_x's rows by token id, (chunks of rows, V, D*H)."""
    if grad_x.dim() == 3:
        if not grad_x.is_contiguous():
            grad_x, tokens = grad_x.transpose(0, 1), tokens.transpose(0, 1)
        grad_x = grad_x.reshape(-1, grad_x.shape[-1])
    tokens = tokens.reshape(-1)
    num_rows, C = grad_x.shape
    blocks = triton.cdiv(num_rows, TOKEN_ROWS)
    chunk = triton.cdiv(blocks, 2 * processors_of(grad_x.device)) * TOKEN_ROWS
    chunks = triton.cdiv(num_rows, chunk)
    partial = torch.empty((chunks, V, C), dtype=acc_type, device=grad_x.device)
    block_v, block_c = token_blocks(V, C)
    rows_by_token_kernel[(chunks, triton.cdiv(V, block_v), triton.cdiv(C, block_c))](
        grad_x,
        tokens,
        partial,
        num_rows,
        V,
        C,
        chunk,
        grad_x.stride(0),
        tokens.stride(0),
        BLOCK_N=TOKEN_ROWS,
        BLOCK_V=block_v,
        BLOCK_C=block_c,
        PRECISION="tf32x3" if grad_x.dtype == torch.float32 and target not in AMD else "ieee",
        **launch_options(TOKEN_WARPS, target),
    )
    return partial


def _sum_partials(
    bias: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor | None, dtype: torch.dtype, target: str
) -> list[torch.Tensor | None]:
    """Partial sums added along their first dimension, in one launch; None for what is None."""
    block_p, block = (16, 4096) if INTERPRETED else (PARTIAL_SUMS, PARTIAL_ELEMENTS)  # few programs to interpret
    partials = (bias, weight, table)
    totals = [None if t is None else torch.empty(t.shape[1:], dtype=dtype, device=t.device) for t in partials]
    numels = [0 if total is None else total.numel() for total in totals]
    sum_partials_kernel[(sum(triton.cdiv(n, block) for n in numels),)](
        *partials,
        *totals,
        bias.shape[0],
        0 if table is None else table.shape[0],
        *numels,
        BLOCK_P=block_p,
        BLOCK=block,
        **launch_options(PARTIAL_WARPS, target),
    )
    return totals


def _table_gradient(grad_x: torch.Tensor, tokens: torch.Tensor, V: int) -> torch.Tensor:
    """Sum of grad_x's rows by token id, (V, columns)."""
    if grad_x.dim() == 3 and not grad_x.is_contiguous():  # batch-first: the order in memory, or it would be copied
        grad_x, tokens = grad_x.transpose(0, 1), tokens.transpose(0, 1)
    return sum_by_id(grad_x, tokens, V)
