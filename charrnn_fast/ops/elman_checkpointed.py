"""A stack of Elman layers that keeps the states of every k-th step for backward and computes the others anew there.

elman_recomputed.py has the two passes; here are what autograd records and what compilers see, one operator for all
layers.
"""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled_backward
from .autograd import apply_of, below_autograd_recording, must_recompute, recomputed, saved_tensors, unshared
from .compiling import unknown_size
from .context import OPERATORS, autocast, exported, in_plain_memory, plain, registered_operators_only, watched
from .elman_recomputed import Backward, Stack, bits_of
from .elman_stack import alike, as_batch_first, elman_stack


def checkpointed_stack(
    rnn: Any, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, tokens: bool, onlooker: str | None
) -> tuple[Tensor, Tensor]:
    """As elman_stack; ``rnn.checkpoint_steps`` is k. What records no gradient, or can record no function of its own
    (transforms of torch.func, exporters, modes of a user's), runs as if it were None.
    """
    steps, given = check_steps(rnn.checkpoint_steps), [input, hx, *rnn._flat_weights]
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if steps is None or not recorded or onlooker is OPERATORS or exported() or input.numel() == 0:
        return elman_stack(rnn, input, hx, batch_sizes, tokens, onlooker)
    cast = autocast(input.device.type, given)
    if not alike(cast, tokens) or not plain(*cast, batch_sizes):
        return elman_stack(rnn, input, hx, batch_sizes, tokens, onlooker)
    input, hx, *weights = cast
    batch_first = rnn.batch_first and batch_sizes is None
    if batch_first:
        input = input.transpose(0, 1)
    dropout = float(rnn.dropout) if rnn.training and rnn.num_layers > 1 else 0.0
    directions, nonlinearity = 2 if rnn.bidirectional else 1, "tanh" if rnn.mode == "RNN_TANH" else "relu"
    stack = Stack(rnn.backend, nonlinearity, rnn.num_layers, directions, dropout, steps)
    masks = []
    for _ in range(rnn.num_layers - 1 if dropout > 0 else 0):
        # What dropout would draw for the layer's output, in its order: torch.nn.RNN's random numbers.
        shape = input.shape[: 2 if batch_sizes is None else 1]
        ones = weights[0].new_ones((*shape, directions * rnn.hidden_size))
        masks.append(bits_of(F.dropout(ones, dropout, True)))
    if onlooker is None:
        return _apply(stack, batch_first, batch_sizes, masks, input, hx, *weights)
    output, h_n, _ = _checkpointed_op(input, hx, batch_sizes, weights, masks, *astuple(stack))
    return output.transpose(0, 1) if batch_first else output, h_n


def check_steps(steps: Any) -> int | None:
    """``steps`` if it is a number of steps or None; else a ValueError."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"checkpoint_steps: expected a positive number of steps or None, got {steps!r}")
    return steps


class _Checkpointed(torch.autograd.Function):
    """Differentiated again, the whole stack is recomputed by what autograd can differentiate, with all its states."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        batch_first: bool,
        batch_sizes: Tensor | None,
        masks: list[Tensor],
        input: Tensor,
        hx: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        output, h_n, kept = stack.forward(input, hx, weights, batch_sizes, masks)
        ctx.stack, ctx.batch_first, ctx.num_masks = stack, batch_first, len(masks)
        ctx.save_for_backward(kept, batch_sizes, input, hx, *masks, *weights)
        ctx.set_materialize_grads(False)
        return as_batch_first(output) if batch_first else output, h_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_h_n = grads
        needs_grad = ctx.needs_input_grad[4:]
        if grad_out is None and grad_h_n is None:
            return (None,) * (4 + len(needs_grad))
        kept, batch_sizes, input, hx, *rest = saved = saved_tensors(ctx)
        masks, weights = rest[: ctx.num_masks], rest[ctx.num_masks :]
        if ctx.batch_first and grad_out is not None:
            grad_out = grad_out.transpose(0, 1)
        operands = (input, hx, batch_sizes, weights, masks)
        if compiled_backward.read():
            found = _by_operator(ctx.stack, grad_out, grad_h_n, kept, operands, needs_grad)
        elif torch.is_grad_enabled() or watched() is not None or not in_plain_memory((grad_out, grad_h_n, *saved)):
            found = _recomputed(ctx.stack, grad_out, grad_h_n, operands, needs_grad)
        else:
            backward = Backward(ctx.stack, input, hx, weights, batch_sizes, masks, kept, needs_grad)
            found = backward.run(grad_out, grad_h_n)
        return (None, None, None, None, *found)


_apply = apply_of(_Checkpointed)
_Operands = tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor], Sequence[Tensor]]


def _recomputed(
    stack: Stack, grad_out: Tensor | None, grad_h_n: Tensor | None, operands: _Operands, needs_grad: Sequence[bool]
) -> list[Tensor | None]:
    input, hx, batch_sizes, weights, masks = operands

    def run(input: Tensor, hx: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return stack.run(input, hx, weights, batch_sizes, masks)

    return recomputed(run, (input, hx, *weights), needs_grad, (grad_out, grad_h_n))


# ---- under torch.compile and in tracing modes: the same two functions as registered operators -----------------------


@torch.library.custom_op("charrnn_fast::elman_checkpointed", mutates_args=())
def _checkpointed_op(
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    masks: list[Tensor],
    backend: str,
    nonlinearity: str,
    num_layers: int,
    directions: int,
    dropout: float,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    stack = Stack(backend, nonlinearity, num_layers, directions, dropout, steps)
    return stack.forward(input, hx, weights, batch_sizes, masks)


@_checkpointed_op.register_fake
def _(
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    masks: list[Tensor],
    backend: str,
    nonlinearity: str,
    num_layers: int,
    directions: int,
    dropout: float,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, cells = weights[0].shape[0], num_layers * directions
    batch: int | torch.SymInt
    if hx is not None:
        batch = hx.shape[1]
    elif batch_sizes is None:
        batch = input.shape[1]
    else:
        batch = unknown_size()
    total = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    out = weights[0].new_empty(*input.shape[: 2 if batch_sizes is None else 1], directions * hidden)
    kept = out.new_empty(cells * ((total + steps - 1) // steps) * batch * hidden)
    return out, out.new_empty(cells, batch, hidden), kept


@torch.library.custom_op("charrnn_fast::elman_checkpointed_backward", mutates_args=())
def _checkpointed_backward_op(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    kept: Tensor,
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    masks: list[Tensor],
    backend: str,
    nonlinearity: str,
    num_layers: int,
    directions: int,
    dropout: float,
    steps: int,
    needs_grad: list[bool],
) -> list[Tensor]:
    stack = Stack(backend, nonlinearity, num_layers, directions, dropout, steps)
    with below_autograd_recording():  # although an operator's body runs below autograd
        backward = Backward(stack, input, hx, weights, batch_sizes, masks, kept, needs_grad)
        with torch.no_grad():
            return unshared(backward.run(grad_out, grad_h_n))


@_checkpointed_backward_op.register_fake
def _(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    kept: Tensor,
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    masks: list[Tensor],
    backend: str,
    nonlinearity: str,
    num_layers: int,
    directions: int,
    dropout: float,
    steps: int,
    needs_grad: list[bool],
) -> list[Tensor]:
    wanted = [x for x, needs in zip((input, hx, *weights), needs_grad, strict=True) if needs and x is not None]
    return [x.new_empty(x.shape) for x in wanted]


def _by_operator(
    stack: Stack,
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    kept: Tensor,
    operands: _Operands,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    input, hx, batch_sizes, weights, masks = operands
    tensors = (grad_out, grad_h_n, kept, input, hx, batch_sizes, list(weights), list(masks))
    found = _checkpointed_backward_op(*tensors, *astuple(stack), list(needs_grad))
    places = [sum(needs_grad[:i]) for i in range(len(needs_grad))]
    return [found[place] if needs else None for place, needs in zip(places, needs_grad, strict=True)]


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, hx, batch_sizes, weights, masks, *options = inputs
    ctx.stack, ctx.num_masks = Stack(*options), len(masks)
    ctx.save_for_backward(output[2], batch_sizes, input, hx, *masks, *weights)
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    kept, batch_sizes, input, hx, *rest = saved = saved_tensors(ctx)
    masks, weights = rest[: ctx.num_masks], rest[ctx.num_masks :]
    needs_input, needs_hx, _, needs_weights, *_ = ctx.needs_input_grad
    needs_grad = [needs_input, needs_hx, *needs_weights]
    operands = (input, hx, batch_sizes, weights, masks)
    if grad_out is None and grad_h_n is None:
        grads: list[Tensor | None] = [None] * len(needs_grad)
    elif registered_operators_only() or not must_recompute(grad_out, grad_h_n, *saved):
        grads = _by_operator(ctx.stack, grad_out, grad_h_n, kept, operands, needs_grad)
    else:
        grads = _recomputed(ctx.stack, grad_out, grad_h_n, operands, needs_grad)
    of_input, of_hx, *of_weights = grads
    return of_input, of_hx, None, of_weights, [None] * len(masks), *(None,) * 6


_checkpointed_op.register_autograd(_op_backward, setup_context=_setup_op_context)
