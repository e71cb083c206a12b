"""The Elman recurrence as one differentiable operation, a layer with D = 1 or 2 directions at a time.

    h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh),   f = tanh or relu      (torch.nn.RNN's formula and layout)

The input is projected straight into the output's memory and the kernel walks it in place, so nothing is kept but the
input, the outputs and the weights: f' follows from the outputs (1 - h^2, or h > 0). Token ids need no projection:
their input is a row of the table W_ih^T + b_ih + b_hh.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .elman_torch import TOKEN_TYPES, in_autocast, layer_by_tensor_operations, of_direction, tensor_operations_only


def elman(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One Elman layer in one direction: h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh).

    Args:
        input: (T, B, I) floating point, or (T, B) int64 or int32 token ids in 0..I-1, which stand for one-hot rows;
            with ``batch_sizes`` packed: (N, I) or (N,). Any strides.
        h0: (B, H), or None for zeros.
        weight_ih: (H, I). weight_hh: (H, H). bias_ih, bias_hh: (H,) or None.
        nonlinearity: "tanh" or "relu".
        reverse: walk time backwards; the outputs stay in the input's order.
        batch_sizes: (T,) int64 on the CPU, the rows active at each step, as in ``PackedSequence.batch_sizes``.
        backend: "auto" or a name from ``backends.BACKENDS``.

    Returns:
        output (T, B, H), packed (N, H), and h_n (B, H), each sequence's state after its own last step
        (``reverse``: after its first). Under autocast in its type, as torch.nn.RNN's.

    Raises:
        ValueError: a shape, type or option is not one of the above. IndexError: a token id outside 0..I-1, on a CPU;
        a GPU reports it as ``torch.nn.functional.embedding`` does. RuntimeError: ``backend`` cannot run this.
    """
    input, h0, weight_ih, weight_hh, bias_ih, bias_hh = autocast(
        weight_ih.device.type, [input, h0, weight_ih, weight_hh, bias_ih, bias_hh]
    )
    _check_arguments(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity, batch_sizes)
    name = backends.choose(backend, weight_ih.device, weight_ih.dtype, weight_hh.shape[0])
    weights = (weight_ih, weight_hh) if bias_ih is None else (weight_ih, weight_hh, bias_ih)
    if bias_hh is not None:
        weights = (*weights[:2], bias_hh if bias_ih is None else bias_ih + bias_hh)
    output, h_n = elman_layer(
        name, input, None if h0 is None else h0[None], weights, batch_sizes, nonlinearity, (bool(reverse),)
    )
    return output, h_n[0]


def autocast(device_type: str, operands: list[Any]) -> list[Any]:
    """As torch's autocast treats the operands of torch.nn.RNN: to the region's type, float64 excepted."""
    if not in_autocast(device_type):
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    return [x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype) for x in operands]


def elman_layer(
    backend: str,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """All D directions of one layer, arguments already checked.

    Args:
        backend: a name that ``backends.choose`` returned.
        input: as in :func:`elman`. h0: (D, B, H) or None.
        weights: for each direction W_ih (H, I), W_hh (H, H) and, if there are biases, their sum b_ih + b_hh (H,).
        reverse: for each direction, does it walk time backwards.

    Returns:
        output (T, B, D*H) or (N, D*H), direction d in columns d*H:(d+1)*H, and h_n (D, B, H).
    """
    if backend == "torch" or tensor_operations_only():
        if _is_tokens(input) and input.device.type == "cpu":
            check_tokens(input, weights[0].shape[1])
        return layer_by_tensor_operations(input, h0, weights, batch_sizes, nonlinearity, reverse)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return _elman_layer_op(input, h0, batch_sizes, list(weights), backend, nonlinearity, list(reverse))
    if not torch.is_grad_enabled():
        return _layer_forward(backend, input, h0, weights, batch_sizes, nonlinearity, reverse)
    return _ElmanLayer.apply(backend, nonlinearity, reverse, batch_sizes, input, h0, *weights)


_ROWS_IN_PLACE = 1024  # rows of a gradient that are replaced at a time: enough for a matrix product at full speed

# ---- kernels ------------------------------------------------------------------------------------------------------


def _layer_forward(
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
    if _is_tokens(input):
        tokens, x = input, token_table(weights, directions)
        if backend != "native":  # which looks at the ids itself, in a fraction of the time
            check_tokens(tokens, x.shape[0])
        out = _in_order(x.new_empty(tokens.numel(), x.shape[1]), tokens)
    else:
        tokens, x = None, _project(input, weights, directions)
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
        )
    except IndexError:
        check_tokens(input, x.shape[0])  # names the id
        raise


def _layer_backward(
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
    tokens = input if _is_tokens(input) else None
    _, backward = backends.kernels_of(backend, out.device, out.dtype, hidden)
    grad_x, grad_weight_hh, grad_h0 = backward(
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
    )
    rows = grad_x if tokens is not None else _rows(grad_x, input)
    needs_ih, needs_bias = any(needs_grad[2::each]), each == 3 and any(needs_grad[4::each])
    if needs_ih:  # (D*H, I); of the table with a row per token, it is the transpose
        grad_weight_ih = rows.t() if tokens is not None else rows.t() @ _rows(input, input)
    if needs_bias:
        grad_bias = rows.sum(0)
    grads = [
        _grad_input(rows, input, weights, directions) if needs_grad[0] else None,
        grad_h0 if needs_grad[1] else None,
    ]
    for direction in range(directions):
        units = slice(direction * hidden, (direction + 1) * hidden)
        grads.append(grad_weight_ih[units] if needs_ih else None)
        grads.append(grad_weight_hh[direction] if grad_weight_hh is not None else None)
        if each == 3:
            grads.append(grad_bias[units] if needs_bias else None)
    return [grad if needs else None for grad, needs in zip(grads, needs_grad, strict=True)]


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


def _project(input: Tensor, weights: Sequence[Tensor], directions: int) -> Tensor:
    """input (T, B, I) or (N, I) -> input W_ih^T + b_ih + b_hh, (T, B, D*H) or (N, D*H), memory in the input's order."""
    rows = _rows(input, input)
    if directions == 1:
        return _in_order(F.linear(rows, weights[0], weights[2] if len(weights) == 3 else None), input)
    hidden = weights[0].shape[0]
    projected = rows.new_empty(rows.shape[0], directions * hidden)
    for direction in range(directions):
        weight_ih, _, bias = of_direction(weights, direction, directions)
        columns = projected[:, direction * hidden : (direction + 1) * hidden]
        if bias is None:
            torch.mm(rows, weight_ih.t(), out=columns)
        else:
            torch.addmm(bias, rows, weight_ih.t(), out=columns)
    return _in_order(projected, input)


def _grad_input(grad_rows: Tensor, input: Tensor, weights: Sequence[Tensor], directions: int) -> Tensor:
    """grad_rows (R, D*H), rows in ``_rows``'s order -> gradient of the dense input, in the input's shape.

    On a CPU, where the two have one size, it takes the place of ``grad_rows``, some rows at a time: the largest tensor
    of a backward pass less, and no fresh pages to fetch.
    """
    hidden, features = weights[0].shape
    if directions == 1 and features == hidden and grad_rows.is_contiguous() and grad_rows.device.type == "cpu":
        for part in grad_rows.split(_ROWS_IN_PLACE):
            part.copy_(part @ weights[0])
        return _in_order(grad_rows, input)
    rows = grad_rows[:, :hidden] @ weights[0]
    if directions == 2:
        rows.addmm_(grad_rows[:, hidden:], weights[len(weights) // 2])
    return _in_order(rows, input)


def _is_tokens(input: Tensor) -> bool:
    return input.dtype in TOKEN_TYPES


def _recurrent(weights: Sequence[Tensor], directions: int) -> list[Tensor]:
    return [weights[1 + direction * (len(weights) // directions)].contiguous() for direction in range(directions)]


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _is_batch_major(input: Tensor) -> bool:
    """Does the memory of the (T, B, ...) view ``input`` run (B, T, ...), so that only that order merges for free?"""
    steps, batch = input.shape[:2]
    stride_t, stride_b = input.stride()[:2]
    return stride_b == steps * stride_t and stride_t != batch * stride_b


def _is_packed(input: Tensor) -> bool:
    return input.dim() == (1 if _is_tokens(input) else 2)


def _rows(x: Tensor, input: Tensor) -> Tensor:
    """x (T, B, C) as (T*B, C) in the order of ``input``'s memory: free for both orders; other strides are copied."""
    if _is_packed(input):
        return x
    return (x.transpose(0, 1) if _is_batch_major(input) else x).reshape(-1, x.shape[-1])


def _in_order(rows: Tensor, input: Tensor) -> Tensor:
    """The way back from :func:`_rows`: rows (T*B, C) in the order of ``input``'s memory as (T, B, C)."""
    if _is_packed(input):
        return rows
    steps, batch = input.shape[:2]
    if _is_batch_major(input):
        return rows.view(batch, steps, rows.shape[1]).transpose(0, 1)
    return rows.view(steps, batch, rows.shape[1])


class _ElmanLayer(torch.autograd.Function):
    """The kernels under autograd; differentiated again, the layer is recomputed by tensor operations.

    torch.func never comes here, so there is no setup_context, with which PyTorch inspects the signature at every call
    (some 50 us).
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        nonlinearity: str,
        reverse: tuple[bool, ...],
        batch_sizes: Tensor | None,
        input: Tensor,
        h0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, h_n = _layer_forward(backend, input, h0, weights, batch_sizes, nonlinearity, reverse)
        ctx.backend, ctx.nonlinearity, ctx.reverse = backend, nonlinearity, reverse
        ctx.save_for_backward(out, batch_sizes, input, h0, *weights)
        ctx.set_materialize_grads(False)
        return out, h_n

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        out, batch_sizes, input, h0, *weights = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[4:]
        if grad_out is None and grad_h_n is None:
            return (None,) * (4 + len(needs_grad))
        arguments = (batch_sizes, ctx.nonlinearity, ctx.reverse)
        if torch.is_grad_enabled():
            grads = _differentiable_backward(grad_out, grad_h_n, input, h0, weights, *arguments, needs_grad)
        else:
            grads = _layer_backward(ctx.backend, grad_out, grad_h_n, out, input, h0, weights, *arguments, needs_grad)
        return (None, None, None, None, *grads)


def _differentiable_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: Sequence[bool],
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """As :func:`_layer_backward`, with a graph: the layer again by tensor operations, differentiated by autograd."""
    # Aliases, so that a tensor passed twice (one weight in both directions, say) gets each place's own gradient.
    input = input.view_as(input)
    h0 = None if h0 is None else h0.view_as(h0)
    weights = [weight.view_as(weight) for weight in weights]
    result = layer_by_tensor_operations(input, h0, weights, batch_sizes, nonlinearity, reverse)
    given = [(y, grad) for y, grad in zip(result, (grad_out, grad_h_n), strict=True) if grad is not None]
    wanted = [x for x, needs in zip((input, h0, *weights), needs_grad, strict=True) if needs and x is not None]
    found = torch.autograd.grad(
        [y for y, _ in given], wanted, [grad for _, grad in given], create_graph=True, allow_unused=True
    )
    grads = iter(found)
    return [next(grads) if needs else None for needs in needs_grad]


# ---- under torch.compile, torch.export and tracing modes: the same two functions as registered operators ---------


@torch.library.custom_op("charrnn_fast::elman_layer", mutates_args=())
def _elman_layer_op(
    input: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    backend: str,
    nonlinearity: str,
    reverse: list[bool],
) -> tuple[Tensor, Tensor]:
    return _layer_forward(backend, input, h0, weights, batch_sizes, nonlinearity, reverse)


@_elman_layer_op.register_fake
def _(
    input: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    backend: str,
    nonlinearity: str,
    reverse: list[bool],
) -> tuple[Tensor, Tensor]:
    directions, hidden = len(reverse), weights[1].shape[0]
    batch: int | torch.SymInt
    if h0 is not None:
        batch = h0.shape[1]
    elif batch_sizes is None:
        batch = input.shape[1]
    else:
        batch = torch.library.get_ctx().new_dynamic_size()
    count = input.shape[0] if _is_packed(input) else input.shape[0] * input.shape[1]
    out = _in_order(weights[0].new_empty(count, directions * hidden), input)
    return out, out.new_empty(directions, batch, hidden)


@torch.library.custom_op("charrnn_fast::elman_layer_backward", mutates_args=())
def _elman_layer_backward_op(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    out: Tensor,
    input: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    backend: str,
    nonlinearity: str,
    reverse: list[bool],
    needs_grad: list[bool],
) -> list[Tensor]:
    grads = _layer_backward(
        backend, grad_out, grad_h_n, out, input, h0, weights, batch_sizes, nonlinearity, reverse, needs_grad
    )
    # An operator's results may share no memory, as gradients that are slices of one tensor do.
    results: list[Tensor] = []
    memory: set[int] = set()
    for grad in grads:
        if grad is not None:
            shared = grad.untyped_storage().data_ptr() in memory
            results.append(grad.clone(memory_format=torch.contiguous_format) if shared else grad.contiguous())
            memory.add(results[-1].untyped_storage().data_ptr())
    return results


@_elman_layer_backward_op.register_fake
def _(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    out: Tensor,
    input: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    backend: str,
    nonlinearity: str,
    reverse: list[bool],
    needs_grad: list[bool],
) -> list[Tensor]:
    wanted = [x for x, needs in zip((input, h0, *weights), needs_grad, strict=True) if needs and x is not None]
    return [x.new_empty(x.shape) for x in wanted]


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, h0, batch_sizes, weights, ctx.backend, ctx.nonlinearity, ctx.reverse = inputs
    ctx.save_for_backward(output[0], input, h0, batch_sizes, *weights)


def _op_backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Any, ...]:
    out, input, h0, batch_sizes, *weights = ctx.saved_tensors
    needs_input, needs_h0, _, needs_weights, *_ = ctx.needs_input_grad
    needs_grad = [needs_input, needs_h0, *needs_weights]
    arguments = (batch_sizes, weights, ctx.backend, ctx.nonlinearity, ctx.reverse, needs_grad)
    grads = iter(_elman_layer_backward_op(grad_out, grad_h_n, out, input, h0, *arguments))
    of_input, of_h0, *of_weights = [next(grads) if needs else None for needs in needs_grad]
    return of_input, of_h0, None, of_weights, None, None, None


_elman_layer_op.register_autograd(_op_backward, setup_context=_setup_op_context)


# ---- checks -------------------------------------------------------------------------------------------------------


def check_tokens(tokens: Tensor, vocab: int) -> None:
    """Report ids outside 0..V-1: IndexError on a CPU; on a GPU, without waiting for it, embedding's own assertion."""
    if tokens.numel() == 0 or tensor_operations_only() or torch.compiler.is_compiling():
        return  # the values may not be there to look at
    if tokens.device.type == "cpu":
        lowest, highest = (int(bound) for bound in tokens.aminmax())
        if lowest < 0 or highest >= vocab:
            raise IndexError(
                f"index out of range in self: token id {lowest if lowest < 0 else highest} is not in 0..{vocab - 1}"
            )
    else:
        torch.empty(vocab, 1, device=tokens.device, dtype=torch.uint8).index_select(0, tokens.flatten())


def _check_arguments(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
    batch_sizes: Tensor | None,
) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    if weight_ih.dim() != 2:
        raise ValueError(f"weight_ih must be (H, I), got {tuple(weight_ih.shape)}")
    hidden, features = weight_ih.shape
    tokens = _is_tokens(input)
    if not tokens and input.dtype != weight_ih.dtype:
        raise ValueError(
            f"input must be {weight_ih.dtype} as weight_ih is, or int64 or int32 token ids, got {input.dtype}"
        )
    shape = ("T", "B") if batch_sizes is None else ("N",)
    expected = shape if tokens else (*shape, features)
    if input.dim() != len(expected) or (not tokens and input.shape[-1] != features):
        raise ValueError(f"input must be ({', '.join(map(str, expected))}), got {tuple(input.shape)}")
    batch = input.shape[1] if batch_sizes is None else _check_batch_sizes(batch_sizes, input.shape[0])
    shapes = {
        "weight_hh": (weight_hh, (hidden, hidden)),
        "bias_ih": (bias_ih, (hidden,)),
        "bias_hh": (bias_hh, (hidden,)),
        "h0": (h0, (batch, hidden)),
    }
    for name, (tensor, wanted) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")
        if tensor.dtype != weight_ih.dtype:
            raise ValueError(f"{name} must be {weight_ih.dtype} as weight_ih is, got {tensor.dtype}")
        if tensor.device != weight_ih.device:
            raise ValueError(f"{name} must be on {weight_ih.device} as weight_ih is, got {tensor.device}")
    if input.device != weight_ih.device:
        raise ValueError(f"input must be on {weight_ih.device} as weight_ih is, got {input.device}")


def _check_batch_sizes(batch_sizes: Tensor, total: int) -> int:
    """The number of sequences, after checking the counts."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise ValueError(
            "batch_sizes must be (T,) int64 on the CPU, "
            f"got {tuple(batch_sizes.shape)} {batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if any(size < 1 for size in sizes) or any(after > before for before, after in itertools.pairwise(sizes)):
        raise ValueError(f"batch_sizes must be positive and must not increase, got {sizes}")
    if sum(sizes) != total:
        raise ValueError(f"batch_sizes must sum to the {total} rows of input, got {sum(sizes)}")
    return sizes[0] if sizes else 0
