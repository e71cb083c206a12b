"""One Elman layer by a backend's kernels: forward, backward, and the order of memory that they work in.

The input is projected straight into the output's memory, which is (T, B, D*H) whatever the input's strides, and the
kernel walks it in place; token ids need no projection, their input is a row of the table W_ih^T + b_ih + b_hh. No
autograd and no choice of backend here: elman.py has both.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .context import addressable
from .elman_torch import TOKEN_TYPES, of_direction

_ROWS_IN_PLACE = 1024  # rows of a gradient that are replaced at a time: enough for a matrix product at full speed


def layer_forward(
    backend: str,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Project into the output's memory and walk it there; or, for tokens, make the table and walk by it."""
    directions, hidden = len(reverse), weights[1].shape[0]
    # Callers have checked this, except where a compiler could not know the number of packed sequences.
    if h0 is not None and batch_sizes is not None and len(batch_sizes) and h0.shape[1] != batch_sizes[0]:
        expected = (directions, int(batch_sizes[0]), hidden)
        raise RuntimeError(f"Expected hidden size {expected}, got {list(h0.shape)}")
    in_kernel: dict[str, Sequence[Tensor]] = {}
    if _adds_bias(backend) and len(weights) == 3 * directions:
        in_kernel["bias_ih"] = weights[2::3]
    tokens: Tensor | None = None
    if is_tokens(input):
        tokens, x = input, _table(weights, directions, bool(in_kernel))
        if backend != "native":  # which looks at the ids itself, in a fraction of the time
            check_tokens(tokens, x.shape[0])
        out = x.new_empty(*tokens.shape, x.shape[1])
    elif _projects(backend, input, weights, directions, batch_sizes):
        x = input if input.stride(-1) == 1 else input.contiguous()
        out = input.new_empty(*input.shape[:-1], directions * hidden)
        in_kernel["weight_ih"] = weights[:: len(weights) // directions]
    else:
        x = _project(input, weights, directions, bool(in_kernel))
        out = x
    forward, _ = backends.kernels_of(backend, x.device, x.dtype, hidden)
    try:
        return forward(
            x,
            _recurrent(weights, directions),
            _unit_stride(h0),
            tokens=tokens,
            batch_sizes=batch_sizes,
            nonlinearity=nonlinearity,
            reverse=tuple(reverse),
            out=out,
            **in_kernel,
        )
    except IndexError:
        check_tokens(input, x.shape[0])  # names the id
        raise


def layer_backward(
    backend: str,
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    out: Tensor,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: Sequence[bool],
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of (input, h0, *weights), None where ``needs_grad`` does not ask."""
    directions, hidden = len(reverse), weights[1].shape[0]
    each = len(weights) // directions
    tokens = input if is_tokens(input) else None
    _, backward = backends.kernels_of(backend, out.device, out.dtype, hidden)
    needs_ih, needs_bias = any(needs_grad[2::each]), each == 3 and any(needs_grad[4::each])
    in_kernel = _adds_bias(backend)
    grad_x, grad_weight_hh, grad_h0, *grad_bias = backward(
        _unit_stride(grad_out),
        _unit_stride(grad_h_n),
        out,
        _recurrent(weights, directions),
        _unit_stride(h0),
        tokens=tokens,
        num_tokens=None if tokens is None else weights[0].shape[1],
        batch_sizes=batch_sizes,
        nonlinearity=nonlinearity,
        reverse=tuple(reverse),
        need_weight_grad=any(needs_grad[3::each]),
        **({"need_bias_grad": needs_bias} if in_kernel else {}),
    )
    rows = grad_x if tokens is not None else _rows(grad_x)
    if needs_ih:  # (D*H, I); of the table with a row per token, it is the transpose
        grad_weight_ih = rows.t() if tokens is not None else rows.t() @ _rows(input)
    if needs_bias:
        bias_rows = grad_bias[0] if in_kernel else rows.sum(0)
    grads = [
        _grad_input(rows, weights, directions).view(input.shape) if needs_grad[0] else None,
        grad_h0 if needs_grad[1] else None,
    ]
    for direction in range(directions):
        units = slice(direction * hidden, (direction + 1) * hidden)
        grads.append(grad_weight_ih[units] if needs_ih else None)
        grads.append(grad_weight_hh[direction] if grad_weight_hh is not None else None)
        if each == 3:
            grads.append(bias_rows[units] if needs_bias else None)
    return [grad if needs else None for grad, needs in zip(grads, needs_grad, strict=True)]


def _adds_bias(backend: str) -> bool:
    """Whether the backend's kernels add the bias and sum its gradient, and take a table of any strides."""
    return backend == "triton"


def _projects(
    backend: str, input: Tensor, weights: Sequence[Tensor], directions: int, batch_sizes: Tensor | None
) -> bool:
    """Whether the backend's kernels make the product of input and W_ih."""
    if backend != "triton":
        return False
    steps = input.shape[0] if batch_sizes is None else len(batch_sizes)
    batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0]) if steps else 0
    return backends.projects_in_kernel(
        input.shape[-1], weights[1].shape[0], input.dtype, input.device, batch * directions, steps
    )


# Reading a row of the input weight itself as a column takes a sector of 32 bytes an element: from the first cache, a
# small one costs less than a launch that transposes it.
_MAX_TABLE_IN_PLACE = 2**16  # bytes


def _table(weights: Sequence[Tensor], directions: int, bias_in_kernel: bool) -> Tensor:
    """(V, D*H): row v is token v's input, W_ih[:, v], plus the biases if the kernel adds none."""
    weight_ih = weights[0]
    if bias_in_kernel and directions == 1 and weight_ih.numel() * weight_ih.element_size() <= _MAX_TABLE_IN_PLACE:
        return weight_ih.t()
    if bias_in_kernel:
        weights = [w for i, w in enumerate(weights) if i % 3 != 2]
    return token_table(weights, directions)


def token_table(weights: Sequence[Tensor], directions: int) -> Tensor:
    """(V, D*H): row v is token v's input, W_ih[:, v] + b_ih + b_hh of each direction."""
    hidden, vocab = weights[0].shape
    table = weights[0].new_empty(vocab, directions * hidden)
    for direction in range(directions):
        weight_ih, _, bias = of_direction(weights, direction, directions)
        columns = table[:, direction * hidden : (direction + 1) * hidden]
        if bias is None:
            columns.copy_(weight_ih.t())
        else:
            torch.add(weight_ih.t(), bias, out=columns)
    return table


def _project(input: Tensor, weights: Sequence[Tensor], directions: int, bias_in_kernel: bool) -> Tensor:
    """input (T, B, I) or (N, I), any strides -> input W_ih^T, (T, B, D*H) or (N, D*H), contiguous.

    Plus the biases if the kernel adds none. A tensor of its own and no view of one, as it becomes the output: what
    autograd takes for a view it does not let users change in place.
    """
    if bias_in_kernel:
        weights = [w for i, w in enumerate(weights) if i % 3 != 2]
    rows, hidden = _rows(input), weights[0].shape[0]
    shape = (*input.shape[:-1], directions * hidden)
    if directions == 1:
        return F.linear(rows, weights[0], weights[2] if len(weights) == 3 else None).resize_(shape)
    projected = rows.new_empty(shape)
    projected_rows = _rows(projected)
    for direction in range(directions):
        weight_ih, _, bias = of_direction(weights, direction, directions)
        columns = projected_rows[:, direction * hidden : (direction + 1) * hidden]
        if bias is None:
            torch.mm(rows, weight_ih.t(), out=columns)
        else:
            torch.addmm(bias, rows, weight_ih.t(), out=columns)
    return projected


def _grad_input(grad_rows: Tensor, weights: Sequence[Tensor], directions: int) -> Tensor:
    """grad_rows (R, D*H) -> gradient (R, I) of the rows of a dense input.

    On a CPU, where the two have one size, it takes the place of ``grad_rows``, some rows at a time: the largest tensor
    of a backward pass less, and no fresh pages to fetch.
    """
    hidden, features = weights[0].shape
    if directions == 1 and features == hidden and grad_rows.is_contiguous() and grad_rows.device.type == "cpu":
        for part in grad_rows.split(_ROWS_IN_PLACE):
            part.copy_(part @ weights[0])
        return grad_rows
    rows = grad_rows[:, :hidden] @ weights[0]
    if directions == 2:
        rows.addmm_(grad_rows[:, hidden:], weights[len(weights) // 2])
    return rows


def is_tokens(input: Tensor) -> bool:
    return input.dtype in TOKEN_TYPES


def _recurrent(weights: Sequence[Tensor], directions: int) -> list[Tensor]:
    return [weights[1 + direction * (len(weights) // directions)].contiguous() for direction in range(directions)]


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(x: Tensor) -> Tensor:
    """x (T, B, C) as (T*B, C), copied if its memory is in another order; packed (N, C) is that already."""
    return x.flatten(0, 1) if x.dim() == 3 else x


def check_tokens(tokens: Tensor, vocab: int) -> None:
    """Report ids outside 0..V-1: IndexError on a CPU; on a GPU, without waiting for it, embedding's own assertion."""
    if not addressable(tokens) or tokens.numel() == 0:
        return  # the values may not be there to look at
    if tokens.device.type == "cpu":
        lowest, highest = (int(bound) for bound in tokens.aminmax())
        if lowest < 0 or highest >= vocab:
            raise IndexError(
                f"index out of range in self: token id {lowest if lowest < 0 else highest} is not in 0..{vocab - 1}"
            )
    else:
        torch.empty(vocab, 1, device=tokens.device, dtype=torch.uint8).index_select(0, tokens.flatten())
