"""A stack of Elman layers that keeps the states of every k-th step for backward and computes the others anew there.

elman_recomputed.py has the two passes; here are what autograd records and what compilers see, one operator for all
layers.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import apply_of, below_autograd_recording, read_by_compiler, saved_tensors
from .context import OPERATORS, autocast, exported, in_plain_memory, plain, watched
from .elman import ElmanLayer, batch_of, num_rows
from .elman_recomputed import Backward, Stack, bits_of
from .elman_stack import alike, as_batch_first, elman_stack
from .registration import Operation, register


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
    output, h_n, _ = _operator(input, hx, batch_sizes, weights, masks, *astuple(stack))
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
        if torch.is_grad_enabled() or watched() is not None or not in_plain_memory((grad_out, grad_h_n, *saved)):
            arguments = (input, hx, batch_sizes, list(weights), list(masks), *astuple(ctx.stack))
            if read_by_compiler():
                found = _gradients_by_operator((grad_out, grad_h_n), (kept,), arguments, needs_grad)
            else:
                found = ElmanCheckpointed(*arguments).recomputed((grad_out, grad_h_n), needs_grad)
        else:
            backward = Backward(ctx.stack, input, hx, weights, batch_sizes, masks, kept, needs_grad)
            found = backward.run(grad_out, grad_h_n)
        return (None, None, None, None, *found)


_apply = apply_of(_Checkpointed)


# ---- under torch.compile and in tracing modes: the same two functions as registered operators -----------------------


@dataclass
class ElmanCheckpointed(Operation):
    """All layers. Arguments as Stack.forward has them, and the stack's own."""

    OPERANDS, RESULTS, UPSTREAM, KEPT = ("input", "hx", "weights"), ("output", "h_n", "kept"), 2, ("kept",)

    input: Tensor
    hx: Tensor | None
    batch_sizes: Tensor | None
    weights: list[Tensor]
    masks: list[Tensor]
    backend: str
    nonlinearity: str
    num_layers: int
    directions: int
    dropout: float
    steps: int

    @property
    def stack(self) -> Stack:
        options = (self.num_layers, self.directions, self.dropout, self.steps)
        return Stack(self.backend, self.nonlinearity, *options)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.stack.forward(self.input, self.hx, self.weights, self.batch_sizes, self.masks)

    def shapes(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, cells, padded = self.weights[0].shape[0], self.num_layers * self.directions, self.batch_sizes is None
        batch = batch_of(self.input, self.hx, self.batch_sizes)
        total = self.input.shape[0] if self.batch_sizes is None else self.batch_sizes.shape[0]
        out = self.weights[0].new_empty(*self.input.shape[: 2 if padded else 1], self.directions * hidden)
        kept = out.new_empty(cells * ((total + self.steps - 1) // self.steps) * batch * hidden)
        return out, out.new_empty(cells, batch, hidden), kept

    def flops(self) -> int:
        """As elman_layer's, of all layers."""
        matrices = (w for w in self.weights if w.dim() == 2)
        return sum(2 * num_rows(self.input, self.batch_sizes) * matrix.numel() for matrix in matrices)

    def backward(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        operands = (self.input, self.hx, self.weights, self.batch_sizes, self.masks)
        with below_autograd_recording():  # although an operator's body runs below autograd
            backward = Backward(self.stack, *operands, kept[0], needs_grad)
            with torch.no_grad():
                return backward.run(*grads)

    def backward_flops(self, needs_grad: Sequence[bool]) -> int:
        """As elman_layer_backward's, of all layers: what it computes once more is not counted."""
        needs_input, needs_hx, *needs_weights = needs_grad
        each, found = len(self.weights) // self.num_layers, 0
        for i in range(self.num_layers):
            own = slice(i * each, (i + 1) * each)
            options = (self.backend, self.nonlinearity, [False] * self.directions)
            layer = ElmanLayer(self.input, self.hx, self.batch_sizes, self.weights[own], *options)
            found += layer.backward_flops([needs_input or i > 0, needs_hx, *needs_weights[own]])
        return found

    def by_tensor_operations(self, *operands: Any) -> tuple[Tensor, Tensor]:
        input, hx, *weights = operands
        return self.stack.run(input, hx, weights, self.batch_sizes, self.masks)


_operator, _gradients_by_operator = register("elman_checkpointed", ElmanCheckpointed)
