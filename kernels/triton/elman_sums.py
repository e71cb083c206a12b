"""What an Elman backward pass sums after its recurrence: gradients of W_hh, the biases and a table of token ids.

Bitwise repeatable: sums across programs are made by a second reduction or a matrix product, never by atomics.
"""

import torch

from ..sums_by_id import sum_by_id
from .elman_sums_kernels import rows_by_token_kernel, sum_partials_kernel
from .elman_tiles import PARTIAL_ELEMENTS, PARTIAL_SUMS, PARTIAL_WARPS, TOKEN_ROWS, TOKEN_WARPS, token_blocks
from .launch import INTERPRETED, processors_of, start, target_of
from .targets import AMD, launch_options

MAX_SUM_VOCAB = 256  # the most classes whose rows are summed by a kernel of this folder


def sum_gradients(
    grad_x: torch.Tensor,
    out: torch.Tensor,
    h0: torch.Tensor | None,
    h_prev: torch.Tensor | None,
    partial_bias: torch.Tensor,
    partial_weight: torch.Tensor | None,
    *,
    tokens: torch.Tensor | None,
    num_tokens: int,
    reverse,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, torch.Tensor | None]:
    """grad_x or, with tokens, the gradient of the table (V, D*H), if V is small the transpose of one that is contiguous
    as W_ih is; the D gradients of W_hh; that of a bias (D*H,).

    grad_x: (T, B, D*H) or packed (N, D*H), d_t. out: like it, h_t. h0: (D, B, H) or None. h_prev: h_{t-1}, packed.
    partial_bias: (programs, D*H). partial_weight: (programs, D, H, H), or None to make a product of d_t and h_{t-1}.
    """
    dtype, directions = grad_x.dtype, len(reverse)
    hidden = grad_x.shape[-1] // directions
    partial_table = None
    if tokens is not None and num_tokens <= MAX_SUM_VOCAB:
        partial_table = _rows_by_token(grad_x, tokens, num_tokens, partial_bias.dtype)
    grad_bias, weights, grad_table = _sum_partials(partial_bias, partial_weight, partial_table, need_bias_grad, dtype)
    if weights is not None:
        grad_weight: tuple[torch.Tensor, ...] | None = tuple(weights.unbind(0))
    elif not need_weight_grad:
        grad_weight = None
    elif h_prev is None:
        grad_weight = tuple([_weight_gradient(grad_x, out, h0, d, hidden, reverse[d]) for d in range(directions)])
    else:
        columns = [slice(d * hidden, (d + 1) * hidden) for d in range(directions)]
        grad_weight = tuple([torch.mm(grad_x[:, own].t(), h_prev[:, own]) for own in columns])
    if tokens is not None:
        grad_x = sum_by_id(grad_x, tokens, num_tokens) if grad_table is None else grad_table.t()
    return grad_x, grad_weight, grad_bias


def _weight_gradient(
    grad_x: torch.Tensor, out: torch.Tensor, h0: torch.Tensor | None, direction: int, hidden_size: int, backwards: bool
) -> torch.Tensor:
    """sum_t d_t^T @ h_{t-1} of one direction, by a matrix product over all rows.

    What precedes a step lies B rows before it (behind it, if the walk goes backwards), but for the first step's, which
    is h0.
    """
    steps, batch, width = grad_x.shape
    d, h = grad_x.view(steps * batch, width), out.view(steps * batch, width)
    if width != hidden_size:
        columns = slice(direction * hidden_size, (direction + 1) * hidden_size)
        d, h = d[:, columns], h[:, columns]
    gradient = torch.mm(d[:-batch].t(), h[batch:]) if backwards else torch.mm(d[batch:].t(), h[:-batch])
    if h0 is not None:
        gradient.addmm_((d[-batch:] if backwards else d[:batch]).t(), h0[direction])
    return gradient


def _rows_by_token(grad_x: torch.Tensor, tokens: torch.Tensor, V: int, acc_type: torch.dtype) -> torch.Tensor:
    """Partial sums of grad_x's rows by token id, (chunks of rows, D*H, V)."""
    grad_x, tokens = grad_x.view(-1, grad_x.shape[-1]), tokens.reshape(-1)
    num_rows, C = grad_x.shape
    blocks = -(-num_rows // TOKEN_ROWS)
    chunk = -(-blocks // (2 * processors_of(grad_x.device))) * TOKEN_ROWS
    chunks = -(-num_rows // chunk)
    partial = torch.empty((chunks, C, V), dtype=acc_type, device=grad_x.device)
    block_v, block_c = token_blocks(V, C)
    target = target_of(grad_x.device)[0]
    start(
        rows_by_token_kernel,
        (chunks, -(-V // block_v), -(-C // block_c)),
        grad_x.device,
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
    bias: torch.Tensor,
    weight: torch.Tensor | None,
    table: torch.Tensor | None,
    need_bias: bool,
    dtype: torch.dtype,
) -> list[torch.Tensor | None]:
    """Partial sums added along their first dimension, in one launch or, where there is one of each, none; None for what
    is None or not needed.
    """
    programs, chunks = bias.shape[0], 0 if table is None else table.shape[0]
    bare = programs == 1 and chunks <= 1 and bias.dtype == dtype
    totals: list[torch.Tensor | None] = []
    for partial in (bias if need_bias else None, weight, table):
        if partial is None:
            totals.append(None)
        else:
            totals.append(partial[0] if bare else torch.empty(partial.shape[1:], dtype=dtype, device=bias.device))
    if bare or (weight is None and table is None and not need_bias):
        return totals
    block_p, block = (16, 4096) if INTERPRETED else (PARTIAL_SUMS, PARTIAL_ELEMENTS)  # few programs to interpret
    blocks, numels = 0, []
    for total in totals:
        numel = 0 if total is None else total.numel()
        numels.append(numel)
        blocks += -(-numel // block)
    # The kernel takes its types from the bias's, which stands in for itself where no sum of it is needed.
    first = torch.empty(0, dtype=dtype, device=bias.device) if totals[0] is None else totals[0]
    start(
        sum_partials_kernel,
        (blocks, 1, 1),
        bias.device,
        bias,
        weight,
        table,
        first,
        *totals[1:],
        programs,
        chunks,
        *numels,
        BLOCK_P=block_p,
        BLOCK=block,
        **launch_options(PARTIAL_WARPS, target_of(bias.device)[0]),
    )
    return totals
