"""Launchers of the Elman recurrence kernels (elman_kernels.py has the algorithm, elman_tiles.py the tile sizes).

    forward    pre_t = x_t + h_{t-1} @ W^T          h_t = tanh(pre_t) or relu(pre_t)
    backward   d_t = (g_t + c_t) * f'(h_t)          c_{t-1} = d_t @ W        grad_W = sum_t d_t^T @ h_{t-1}

Time-major views: T time steps, B batch, H hidden units, V vocabulary, D directions, N packed rows. Strides are free,
except that the last one is 1; so a (B, T, C) buffer is passed as its transpose. Nothing here validates token ids: an id
outside 0..V-1 counts as a zero row and adds to no gradient. Every result is bitwise repeatable: sums across programs
are made by a second reduction or a GEMM, never by atomics.
"""

import torch
import triton

from .elman_kernels import elman_backward_kernel, elman_forward_kernel
from .elman_tiles import (
    MAX_SUM_STEPS,
    MAX_SUM_VOCAB,
    SUM_TILES,
    TILES,
    Tile,
    block_width,
    find_tile,
    next_power_of_2,
)
from .launch import KINDS, on_device, precision_of, target_of


def _find_tile(tiles: dict, hidden_size: int, dtype: torch.dtype, precision: str, device: torch.device) -> Tile | None:
    kind = KINDS.get(dtype) or precision_of(dtype, precision, device)
    return find_tile(tiles, kind, hidden_size, *target_of(device))


def elman_limits(
    hidden_size: int, dtype: torch.dtype, precision: str = "ieee", device: torch.device | str = "cpu"
) -> str | None:
    """None if one program can hold this hidden size, else one clause that says why not.

    hidden_size: H; dtype: of the input and the weights; precision: of float32 products, "ieee", "tf32x3" or "tf32";
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
    if _find_tile(TILES, hidden_size, dtype, precision, device) is None:
        kind = f"{dtype}, {precision}" if dtype == torch.float32 else f"{dtype}"
        return f"hidden size {hidden_size} is too large for one program ({kind})"
    return None


def _check(tensors: dict[str, torch.Tensor | None], device: torch.device) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
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


def _like_rows(rows: torch.Tensor, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """New (..., columns) tensor in the memory order of `rows`, and its flat (rows, columns) view."""
    if rows.dim() == 3 and rows.stride(0) < rows.stride(1):
        steps, batch = rows.shape[:2]
        memory = torch.empty((batch, steps, columns), dtype=dtype, device=rows.device)
        return memory.transpose(0, 1), memory.view(-1, columns)
    memory = torch.empty((*rows.shape[:-1], columns), dtype=dtype, device=rows.device)
    return memory, memory.view(-1, columns)


def _is_wide(block_b: int, rows: tuple[torch.Tensor | None, ...], table: torch.Tensor | None = None) -> bool:
    """Whether int32 is too small for the offsets inside a tile of rows (second last dimension) or inside the table."""
    reach = [block_b * tensor.stride(-2) for tensor in rows if tensor is not None and tensor.dim() > 1]
    if table is not None:
        reach.append(table.shape[0] * table.stride(0))
    return max(reach, default=0) >= 2**31


def _mask(reverse) -> int:
    return sum(1 << d for d, flag in enumerate(reverse) if flag)


def elman_forward(
    x: torch.Tensor,
    weight_hh,
    h0: torch.Tensor | None = None,
    *,
    tokens: torch.Tensor | None = None,
    batch_sizes: torch.Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse=(False,),
    out: torch.Tensor | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = f(x_t + h_{t-1} @ weight_hh[d]^T) over all steps of D directions, in one launch.

    x: (T, B, D*H) or packed (N, D*H), projected input with the biases; with tokens: the table (V, D*H).
    weight_hh: D tensors (H, H). h0: (D, B, H), None for zeros.
    tokens: (T, B) or packed (N,), int64 or int32. batch_sizes: (T,) int64 on the CPU, active rows of each step,
    non-increasing; None for padded input. reverse: D bools. out: buffer for the result, may be x.
    precision: of float32 products, "ieee", "tf32x3" or "tf32". One dtype for all floats; 16-bit floats are
    multiplied as they are and summed, and their tanh taken, in float32.

    Returns out (T, B, D*H) or (N, D*H), direction d in columns d*H:(d+1)*H, and h_n (D, B, H), the state after each
    row's own last step of the walk.
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past elman_limits.
    """
    packed = batch_sizes is not None
    D, H = len(weight_hh), weight_hh[0].shape[0]
    rows = x if tokens is None else tokens
    _check({"x": x, "h0": h0, "out": out}, x.device)
    tile = _find_tile(TILES, H, x.dtype, precision, x.device)
    if tile is None:
        raise RuntimeError(f"elman_forward: {elman_limits(H, x.dtype, precision, x.device)}")
    T = len(batch_sizes) if packed else rows.shape[0]
    B = (int(batch_sizes[0]) if T else 0) if packed else rows.shape[1]
    if out is None:
        source = x if tokens is None else tokens.unsqueeze(-1)
        out, _ = _like_rows(source, D * H, x.dtype)
    h_n = torch.empty((D, B, H), dtype=x.dtype, device=x.device)
    if T == 0 or B == 0 or H == 0:
        return out, h_n.zero_() if h0 is None else h_n.copy_(h0)

    weights = [w.contiguous() for w in weight_hh]
    stride_x = _row_strides(x, packed) if tokens is None else (x.stride(0), 0)
    wide = _is_wide(tile.block_b, (None if tokens is not None else x, h0, out), None if tokens is None else x)
    options = tile.launch_options(target_of(x.device)[0])
    with on_device(x.device):
        elman_forward_kernel[(triton.cdiv(B, tile.block_b), D)](
            x,
            tokens,
            weights[0],
            weights[-1],
            h0,
            _steps_table(batch_sizes, x.device) if packed else None,
            out,
            h_n,
            T,
            B,
            x.shape[0],
            _mask(reverse),
            *stride_x,
            *_row_strides(tokens, packed),
            *(h0.stride()[:2] if h0 is not None else (0, 0)),
            *_row_strides(out, packed),
            H=H,
            BLOCK_B=tile.block_b,
            BLOCK_H=block_width(H),
            W_LEFT=tile.w_left,
            TANH=nonlinearity == "tanh",
            TOKENS=tokens is not None,
            HAS_H0=h0 is not None,
            PACKED=packed,
            PRECISION=precision_of(x.dtype, precision, x.device),
            WIDE=wide,
            **options,
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
    precision: str = "ieee",
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, torch.Tensor]:
    """Gradients of elman_forward, from its results alone: f'(pre_t) is 1 - h_t^2, or [h_t > 0] for relu.

    grad_out: like out, or None. grad_h_n: (D, B, H), or None. out: what elman_forward returned first.
    weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse, precision: as given to elman_forward.
    num_tokens: V, needed with tokens. need_weight_grad: False leaves out the gradient of weight_hh.

    Returns grad_x, the gradient of the pre-activations, shaped and laid out in memory like out (with tokens: the
    gradient of the table, (V, D*H)); the D gradients of weight_hh, or None; grad_h0 (D, B, H).
    Raises ValueError for a last stride that is not 1 or tensors on several devices, RuntimeError past elman_limits.
    """
    packed = batch_sizes is not None
    D, H = len(weight_hh), weight_hh[0].shape[0]
    dtype, device = out.dtype, out.device
    _check({"grad_out": grad_out, "grad_h_n": grad_h_n, "out": out, "h0": h0}, device)
    tile = _find_tile(TILES, H, dtype, precision, device)
    if tile is None:
        raise RuntimeError(f"elman_backward: {elman_limits(H, dtype, precision, device)}")
    V = 0 if tokens is None else num_tokens
    T = len(batch_sizes) if packed else out.shape[0]
    B = (int(batch_sizes[0]) if T else 0) if packed else out.shape[1]
    grad_h0 = torch.empty((D, B, H), dtype=dtype, device=device)
    if T == 0 or B == 0 or H == 0:
        grad_x = torch.zeros_like(out) if tokens is None else out.new_zeros((V, D * H))
        grad_h0 = grad_h0.zero_() if grad_h_n is None else grad_h0.copy_(grad_h_n)
        return grad_x, tuple(torch.zeros_like(w) for w in weight_hh) if need_weight_grad else None, grad_h0

    summing = _find_tile(SUM_TILES, H, dtype, precision, device)
    sums = (
        summing is not None and T <= MAX_SUM_STEPS and V <= MAX_SUM_VOCAB and (need_weight_grad or tokens is not None)
    )
    tile = summing if sums else tile
    sum_weight, sum_table = sums and need_weight_grad, sums and tokens is not None
    weight_by_gemm = need_weight_grad and not sums
    need_grad_x = not sum_table
    programs = triton.cdiv(B, tile.block_b)
    acc_type = torch.float64 if dtype == torch.float64 else torch.float32
    grad_x, grad_x_rows = _like_rows(out, D * H, dtype) if need_grad_x else (None, None)
    h_prev, h_prev_rows = _like_rows(out, D * H, dtype) if weight_by_gemm else (None, None)
    partial_weight = torch.empty((programs, D, H, H), dtype=acc_type, device=device) if sum_weight else None
    partial_table = torch.empty((programs, D, V, H), dtype=acc_type, device=device) if sum_table else None

    weights = [w.contiguous() for w in weight_hh]
    wide = _is_wide(tile.block_b, (grad_out, grad_h_n, out, h0))
    options = tile.launch_options(target_of(device)[0])
    with on_device(device):
        elman_backward_kernel[(programs, D)](
            grad_out,
            grad_h_n,
            out,
            tokens,
            weights[0],
            weights[-1],
            h0,
            _steps_table(batch_sizes, device) if packed else None,
            grad_x,
            h_prev,
            grad_h0,
            partial_weight,
            partial_table,
            T,
            B,
            V,
            _mask(reverse),
            *_row_strides(grad_out, packed),
            *(grad_h_n.stride()[:2] if grad_h_n is not None else (0, 0)),
            *_row_strides(out, packed),
            *_row_strides(tokens, packed),
            *(h0.stride()[:2] if h0 is not None else (0, 0)),
            *_row_strides(grad_x, packed),
            H=H,
            BLOCK_B=tile.block_b,
            BLOCK_H=block_width(H),
            BLOCK_V=max(16, next_power_of_2(V)) if sum_table else 16,
            W_LEFT=tile.w_left,
            TANH=nonlinearity == "tanh",
            HAS_GRAD_OUT=grad_out is not None,
            HAS_GRAD_H_N=grad_h_n is not None,
            HAS_H0=h0 is not None,
            PACKED=packed,
            GRAD_X=need_grad_x,
            SAVE_H_PREV=weight_by_gemm,
            GRAD_WEIGHT=sum_weight,
            GRAD_TABLE=sum_table,
            PRECISION=precision_of(dtype, precision, device),
            WIDE=wide,
            **options,
        )
    grad_weight = None
    if sum_weight:
        grad_weight = tuple(partial_weight.sum(0).to(dtype).unbind(0))
    elif need_weight_grad:
        columns = [slice(d * H, (d + 1) * H) for d in range(D)]
        grad_weight = tuple(grad_x_rows[:, c].t() @ h_prev_rows[:, c] for c in columns)
    if sum_table:
        grad_x = partial_table.sum(0).transpose(0, 1).reshape(V, D * H).to(dtype)
    elif tokens is not None:
        grad_x = _table_gradient(grad_x, tokens, V)
    return grad_x, grad_weight, grad_h0


def _table_gradient(grad_x: torch.Tensor, tokens: torch.Tensor, V: int) -> torch.Tensor:
    """Sum of grad_x's rows by token id, (V, columns). torch's embedding backward sorts, so the order is fixed."""
    if grad_x.dim() == 3 and not grad_x.is_contiguous():  # batch-first: the order in memory, or it would be copied
        grad_x, tokens = grad_x.transpose(0, 1), tokens.transpose(0, 1)
    outside = (tokens < 0) | (tokens >= V)
    ids = torch.where(outside, V, tokens)
    return torch.ops.aten.embedding_dense_backward(grad_x, ids, V + 1, -1, False)[:V]
