"""Launcher of the decoding kernel (generate_kernels.py has the algorithm, generate_tiles.py the tile sizes).

    greedy:   x_{t+1} = argmax o_t
    sampled:  q ~ softmax(o_t / temperature)^alpha, x_{t+1} = the first id whose cumulated q exceeds u_t

One launch, one program for each sequence, whatever their number and length; or, for a wide layer and few sequences, a
team of programs for each (generate_grid.py). For one program the weights are copied once, transposed and padded to
whole tiles. Nothing waits for the device.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .generate_grid import generate_grid, generate_grid_limits, generate_grid_reason
from .generate_kernels import generate_kernel
from .generate_tiles import MAX_VOCAB, GenerateTile, generate_tile
from .generate_types import Decoding
from .launch import TYPES, start, target_of


def generate_limits(vocab: int, dtype: torch.dtype) -> str | None:
    """None if the kernel can decode with V ids and weights of this dtype, else one clause that says why not."""
    if dtype not in TYPES:
        return f"no kernel for {dtype}"
    if vocab > MAX_VOCAB:
        return f"vocabulary {vocab} is above {MAX_VOCAB}"
    return None


def generate_reason(
    hidden_size: int, vocab: int, num_layers: int, batch: int, dtype: torch.dtype, device: torch.device | str
) -> str:
    """Which of the two kernels decodes, and why that one, for sizes that generate_limits allows."""
    device = torch.device(device)
    why_not = generate_grid_limits(hidden_size, vocab, num_layers, batch, dtype, device)
    if why_not is None:
        return generate_grid_reason(hidden_size, num_layers, batch, dtype, device)
    return f"one program a sequence; {why_not}"


def _transposed(matrices: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """(N, rows, columns): the transposed matrices, zeros around them."""
    out = matrices[0].new_zeros(len(matrices), rows, columns)
    for corner, matrix in zip(out, matrices, strict=True):
        corner[: matrix.shape[1], : matrix.shape[0]] = matrix.t()
    return out


def generate(
    prompt: Tensor,
    num_tokens: int,
    table: Tensor,
    weight_ih: Sequence[Tensor | None],
    weight_hh: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Continue the prompts by num_tokens ids, num_tokens >= 1.

    prompt: (B, P) int64, P >= 1; an id outside 0..V-1 counts as a zero row of the table.
    table: (V, H), row v = W_ih[:, v] + b_ih + b_hh of layer 0.
    weight_ih, weight_hh, bias: of the L layers, (H, H), (H, H) and (H,); weight_ih[0] and bias[0] are not read.
    head_weight: (V, H). head_bias: (V,). state: (L, B, H), None for zeros. One dtype for all these; products, state and
    nonlinearity are in float32, or float64 for float64.
    uniforms: (B, num_tokens) in [0, 1), None for greedy. temperature, alpha: above 0. top_k: at least 1: sample among
    the k largest logits and those equal to the k-th.

    Returns the ids (B, num_tokens) int64 and the state (L, B, H) after the last id that was read, the one before the
    last returned. Raises ValueError for an option out of range or tensors on several devices, RuntimeError past
    generate_limits.
    """
    (B, P), (V, H), L = prompt.shape, table.shape, len(weight_hh)
    device, dtype = table.device, table.dtype
    if P < 1 or num_tokens < 1:
        raise ValueError(f"expected at least one id to read and one to append, got {P} and {num_tokens}")
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    if uniforms is not None:
        _check_sampling(uniforms, (B, num_tokens), temperature, alpha, top_k)
    for tensor in (prompt, *weight_ih[1:], *weight_hh, *bias[1:], head_weight, head_bias, state, uniforms):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"expected all tensors on {device}, got one on {tensor.device}")
    if (why := generate_limits(V, dtype)) is not None:
        raise RuntimeError(f"generate: {why}")
    if B == 0:
        empty = torch.empty((0, num_tokens), dtype=torch.int64, device=device)
        return empty, torch.empty((L, 0, H), dtype=dtype, device=device)
    sharpness = struct.unpack("q", struct.pack("d", alpha / temperature))[0]
    k = top_k if uniforms is not None and top_k is not None and top_k < V else None
    weights = (table, weight_ih, weight_hh, bias, head_weight, head_bias)
    call = Decoding(prompt, num_tokens, *weights, state, uniforms, sharpness, k, nonlinearity == "tanh")
    across = generate_grid_limits(H, V, L, B, dtype, device) is None
    found = generate_grid(call, one_by_one=False) if across else None
    return one_program(call) if found is None else found


def one_program(call: Decoding) -> tuple[Tensor, Tensor]:
    """As generate, each sequence by a program of its own."""
    (B, P, V, H, L), device, uniforms = call.sizes, call.table.device, call.uniforms
    tile = generate_tile(H, V, L, call.acc_type.itemsize)
    ids, states = call.new_ids(), call.new_states(tile.depth)
    start(
        generate_kernel,
        (B, 1, 1),
        device,
        call.prompt.to(torch.int64).contiguous(),
        *_weights(tile, call),
        None if uniforms is None else uniforms.to(torch.float64).contiguous(),
        states,
        None if call.top_k is None else torch.empty((B, tile.head.n), dtype=call.acc_type, device=device),
        ids,
        P,
        call.num_tokens,
        V,
        L,
        call.top_k or 0,
        call.sharpness,
        TANH=call.tanh,
        STACKED=L > 1,
        SAMPLE=uniforms is not None,
        TOP_K=call.top_k is not None,
        F=tile,
        **tile.launch_options(target_of(device)[0]),
    )
    return ids, call.last_state(states)


def _check_sampling(
    uniforms: Tensor, shape: tuple[int, int], temperature: float, alpha: float, top_k: int | None
) -> None:
    if uniforms.shape != shape:
        raise ValueError(f"uniforms: expected shape {shape}, got {tuple(uniforms.shape)}")
    if not (temperature > 0 and alpha >= 0) or (top_k is not None and top_k < 1):
        raise ValueError(
            "expected temperature > 0, alpha >= 0 and top_k >= 1, got "
            f"temperature {temperature}, alpha {alpha}, top_k {top_k}"
        )


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _weights(tile: GenerateTile, call: Decoding) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """rows, weight_ih, weight_hh, head and head_bias as generate_kernel reads them."""
    table, (_, _, V, H, L) = call.table, call.sizes
    rows = table.new_zeros(V + L, tile.width)
    rows[:V, :H] = table
    for layer, row in enumerate(_present(call.bias[1:])):
        rows[V + layer, :H] = row
    logits = table.new_full((tile.head.n,), -torch.inf)
    logits[:V] = 0.0 if call.head_bias is None else call.head_bias
    weight_ih = [table.new_empty(0, 0), *_present(call.weight_ih[1:])]
    return (
        rows,
        _transposed(weight_ih, tile.width, tile.width) if L > 1 else None,
        _transposed(call.weight_hh, tile.width, tile.width),
        _transposed([call.head_weight], tile.depth, tile.head.n),
        logits,
    )
