"""Launchers of the Elman recurrence kernels (elman_kernels.py has the algorithm, elman_tiles.py the choice of a tile).

    forward    pre_t = x_t + b + h_{t-1} @ W^T      h_t = tanh(pre_t) or relu(pre_t)
    backward   d_t = (g_t + c_t) * f'(h_t)          c_{t-1} = d_t @ W        grad_W = sum_t d_t^T @ h_{t-1}

T time steps, B batch, H hidden units, V vocabulary, D directions, N packed rows. Strides are free, except that the last
one is 1 (a table of tokens has any). Nothing here validates token ids: an id outside 0..V-1 counts as a zero row and
adds to no gradient of the table. Every result is bitwise repeatable.
"""

import functools
from dataclasses import replace
from typing import Any

import torch

from . import elman_grid, elman_tiles
from .elman_forms import Form
from .elman_kernels import elman_backward_kernel, elman_forward_kernel
from .elman_sums import sum_gradients
from .elman_tiles import Tile, next_power_of_2
from .launch import INTERPRETED, KINDS, TYPES, Launch, Pass, device_limits, processors_of, target_of
from .targets import AMD


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
def _pass_of(
    kernel: Any,
    tile: Tile,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    ids: torch.dtype | None = None,
    **options: Any,
) -> Pass:
    """One for all numbers of rows that get this tile: what was compiled for a launch is known to that launch alone."""
    form = Form.of(tile, hidden_size, TYPES[dtype], **options)
    compiler = tile.launch_options(target_of(device)[0])
    narrow, wide = (Launch(kernel, F=each, **compiler) for each in (form, replace(form, wide=True)))
    return Pass(tile.rows, narrow, wide)


@functools.lru_cache(4096)  # batch sizes may be any number of numbers
def _forward_pass(
    hidden_size: int,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    rows: int,
    tanh: bool,
    features: int,
    ids: torch.dtype | None,
) -> Pass:
    """features: I where the kernel makes the input's product, else 0. ids: the type of token ids."""
    tile = choose_tile(hidden_size, dtype, precision, device, rows)
    if tile is None:
        return elman_grid.choose_grid_pass(True, hidden_size, dtype, precision, device, rows, tanh)
    ahead = tile.ahead_inputs if features else tile.ahead
    options = {"ahead": ahead, "tanh": tanh, "inputs": features}
    return _pass_of(elman_forward_kernel, tile, hidden_size, dtype, device, ids, **options)


@functools.lru_cache(4096)
def _backward_pass(
    hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device, rows: int, directions: int, tanh: bool
) -> Pass:
    tile = choose_tile(hidden_size, dtype, precision, device, rows)
    if tile is None:
        return elman_grid.choose_grid_pass(False, hidden_size, dtype, precision, device, rows, tanh)
    of_tile = functools.partial(_pass_of, elman_backward_kernel, tile, hidden_size, dtype, device, tanh=tanh)
    programs = directions * -(-(rows // directions) // tile.rows)
    steps = elman_tiles.sum_steps(tile, hidden_size, programs, processors_of(device))
    return replace(of_tile(), sum_steps=steps, sums=of_tile(ahead=tile.ahead_sums)) if steps else of_tile()


def elman_limits(
    hidden_size: int, dtype: torch.dtype, precision: str = "ieee", device: torch.device | str = "cpu"
) -> str | None:
    """None if one program can hold this hidden size, or a grid of them is faster than cuDNN; else a clause why not.

    hidden_size: H; dtype: of the input and the weights; precision: of float32 products, "ieee" or, if allowed, "tf32";
    device: where it would run ("cpu": interpreter, with sm_90's tiles).
    """
    device = torch.device(device)
    if (why := device_limits(dtype, device)) is not None:
        return why
    if choose_tile(hidden_size, dtype, precision, device) is None:
        return elman_grid.grid_limits(hidden_size, dtype, precision, device)
    return None


def most_rows(hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device) -> float:
    """Batch rows times directions up to which the kernels are known to be faster than cuDNN; infinite for one program.

    For a hidden size that elman_limits allows.
    """
    if choose_tile(hidden_size, dtype, precision, device) is not None:
        return float("inf")
    return elman_grid.grid_most_rows(hidden_size, dtype, precision, device)


def projected_steps(
    features: int, hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device, rows: int
) -> int:
    """The most steps for which elman_forward takes features and W_ih in place of projected input; 0: for none.

    rows: batch times directions.
    """
    tile = choose_tile(hidden_size, dtype, precision, device, rows)
    return 0 if tile is None else elman_tiles.projected_steps(tile, features)


def forget_tiles() -> None:
    """Choose tiles anew: what was chosen is kept, and the table has changed."""
    for kept in (choose_tile, _forward_pass, _backward_pass):
        kept.cache_clear()


def elman_reason(
    hidden_size: int, dtype: torch.dtype, precision: str = "ieee", device: torch.device | str = "cpu", rows: int = 1
) -> str:
    """The tile for a hidden size that elman_limits allows, and why it is that one. rows: batch times directions."""
    tile = choose_tile(hidden_size, dtype, precision, torch.device(device), rows)
    if tile is None:
        return elman_grid.grid_reason(hidden_size, dtype, precision, device, rows)
    name = {"fma": "FMA", "mma": "tensor cores", "mma3": "tensor cores in three products"}[tile.form]
    return f"{name}, {tile.rows} rows and {tile.warps} warps a program ({tile.why})"


def _check(device: torch.device, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: expected a last stride of 1, got strides {tensor.stride()}")


def _steps_table(batch_sizes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(2, T): packed rows before each step, rows active in it."""
    before = torch.cumsum(batch_sizes, 0) - batch_sizes
    return torch.stack((before, batch_sizes)).to(device, non_blocking=True)


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
    how: Pass | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = f(x_t + bias_ih[d] + bias_hh[d] + h_{t-1} @ weight_hh[d]^T) over all steps of D directions, in one launch.

    x: (T, B, D*H) or packed (N, D*H), projected input; with tokens: the table (V, D*H), of any strides.
    weight_ih: D tensors (H, I), for at most projected_steps steps: x is then (T, B, I) or (N, I), x_t W_ih^T is added.
    weight_hh: D tensors (H, H). h0: (D, B, H), None for zeros. bias_ih, bias_hh: D tensors (H,), or None.
    tokens: (T, B) or packed (N,), int64 or int32. batch_sizes: (T,) int64 on the CPU, active rows of each step,
    non-increasing; None for padded input. reverse: D bools. out: buffer for the result, may be x.
    precision: of float32 products, "ieee" or, where ten bits of mantissa are allowed, "tf32", which is used where it is
    faster. One dtype for all floats; sums and tanh of 16-bit floats are taken in float32. how: in place of what the
    tables choose, as elman_grid.grid_pass makes it.

    Returns out (T, B, D*H) or (N, D*H), direction d in columns d*H:(d+1)*H, and h_n (D, B, H), the state after each
    row's own last step of the walk.
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past elman_limits.
    """
    D, H = len(weight_hh), weight_hh[0].shape[0]
    dtype, device = x.dtype, x.device
    _check(device, x=None if tokens is not None else x, h0=h0, out=out)
    rows = x if tokens is None else tokens
    T = rows.shape[0] if batch_sizes is None else len(batch_sizes)
    B = rows.shape[1] if batch_sizes is None else int(batch_sizes[0]) if T else 0
    empty, features = T * B * H == 0, 0 if weight_ih is None else x.shape[-1]
    ids = None if tokens is None else tokens.dtype
    if how is None and not empty:
        how = _forward_pass(H, dtype, precision, device, B * D, nonlinearity == "tanh", features, ids)
    if out is None:
        shape = (*(x.shape[:-1] if tokens is None else tokens.shape), D * H)
        out = torch.empty(shape, dtype=dtype, device=device)
    h_n = torch.empty((D, B, H), dtype=dtype, device=device)
    if empty or how is None:
        return out, h_n.zero_() if h0 is None else h_n.copy_(h0)

    if tokens is None:
        x_strides, reach = (x.stride(0), x.stride(-2), 1), x.stride(-2) * how.rows
    else:
        x_strides, reach = (x.stride(0), 0, x.stride(1)), x.shape[0] * x.stride(0)
    wide = max(reach, how.rows * out.stride(-2), 0 if h0 is None else how.rows * h0.stride(-2)) >= 2**31
    of_directions: list[torch.Tensor | None] = []
    for tensors in (weight_hh, weight_ih, bias_ih, bias_hh):  # the last serves for those that are not there
        of_directions += (None, None) if tensors is None else (tensors[0].contiguous(), tensors[-1].contiguous())
    (how.wide if wide else how.narrow)(
        (-(-B // how.rows), D, 1),
        device,
        x,
        tokens,
        *of_directions,
        h0,
        None if batch_sizes is None else _steps_table(batch_sizes, device),
        out,
        h_n,
        T,
        B,
        x.shape[0],
        int(reverse[0]) | (int(reverse[-1]) << (D - 1)),
        *x_strides,
        *((0, 0) if tokens is None else (tokens.stride(0), tokens.stride(-1))),
        *((0, 0) if h0 is None else h0.stride()[:2]),
        out.stride(0),
        out.stride(-2),
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
    how: Pass | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, torch.Tensor, torch.Tensor | None]:
    """Gradients of elman_forward, from its results alone: f'(pre_t) is 1 - h_t^2, or [h_t > 0] for relu.

    grad_out: like out, or None. grad_h_n: (D, B, H), or None. out: what elman_forward returned first.
    weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse, precision: as given to elman_forward.
    num_tokens: V, needed with tokens. need_weight_grad, need_bias_grad: False leaves the gradient out.

    Returns grad_x, the gradient of the pre-activations, shaped like out, contiguous (with tokens: the
    gradient of the table, (V, D*H)); the D gradients of weight_hh, or None; grad_h0 (D, B, H); the gradient of either
    bias, (D*H,), or None.
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past elman_limits.
    """
    D, H = len(weight_hh), weight_hh[0].shape[0]
    dtype, device = out.dtype, out.device
    _check(device, grad_out=grad_out, grad_h_n=grad_h_n, h0=h0)
    out = out.contiguous()  # grad_x has its strides, which the kernel counts on
    if tokens is not None and num_tokens is None:
        raise ValueError("num_tokens: expected the rows of the table with tokens, got None")
    V = num_tokens or 0
    T = out.shape[0] if batch_sizes is None else len(batch_sizes)
    B = out.shape[1] if batch_sizes is None else int(batch_sizes[0]) if T else 0
    empty = T * B * H == 0
    if how is None and not empty:
        how = _backward_pass(H, dtype, precision, device, B * D, D, nonlinearity == "tanh")
    grad_h0 = torch.empty((D, B, H), dtype=dtype, device=device)
    if empty or how is None:
        grad_x = torch.zeros_like(out) if tokens is None else out.new_zeros((V, D * H))
        grad_weight = tuple(torch.zeros_like(w) for w in weight_hh) if need_weight_grad else None
        grad_bias = out.new_zeros(D * H) if need_bias_grad else None
        return grad_x, grad_weight, grad_h0.zero_() if grad_h_n is None else grad_h0.copy_(grad_h_n), grad_bias

    sum_weight = need_weight_grad and how.sum_steps >= T
    if sum_weight and how.sums is not None:
        how = how.sums
    programs = -(-B // how.rows)
    acc_type = torch.float64 if dtype == torch.float64 else torch.float32
    grad_x = torch.empty(out.shape, dtype=dtype, device=device)
    h_prev = torch.empty_like(grad_x) if need_weight_grad and not sum_weight and batch_sizes is not None else None
    partial_bias = torch.empty((programs, D * H), dtype=acc_type, device=device)
    partial_weight = torch.empty((programs, D, H, H), dtype=acc_type, device=device) if sum_weight else None
    reach = D * H
    for tensor in (grad_out, grad_h_n, h0):
        if tensor is not None:
            reach = max(reach, tensor.stride(-2))
    (how.wide if how.rows * reach >= 2**31 else how.narrow)(
        (programs, D, 1),
        device,
        grad_out,
        grad_h_n,
        out,
        weight_hh[0].contiguous(),
        weight_hh[-1].contiguous(),
        h0,
        None if batch_sizes is None else _steps_table(batch_sizes, device),
        grad_x,
        h_prev,
        grad_h0,
        partial_bias,
        partial_weight,
        T,
        B,
        int(reverse[0]) | (int(reverse[-1]) << (D - 1)),
        *((0, 0) if grad_out is None else (grad_out.stride(0), grad_out.stride(-2))),
        *((0, 0) if grad_h_n is None else grad_h_n.stride()[:2]),
        out.stride(0),
        out.stride(-2),
        *((0, 0) if h0 is None else h0.stride()[:2]),
    )
    grad_x, grad_weight, grad_bias = sum_gradients(
        grad_x,
        out,
        h0,
        h_prev,
        partial_bias,
        partial_weight,
        tokens=tokens,
        num_tokens=V,
        reverse=reverse,
        need_weight_grad=need_weight_grad,
        need_bias_grad=need_bias_grad,
    )
    return grad_x, grad_weight, grad_h0, grad_bias
