"""A stack of Elman layers that keeps the states of every k-th step for backward and computes the others anew there.

The steps are cut into parts of k. Forward is the stack's ordinary one; of it are kept the input and, for each layer and
direction, the states that a part begins with. Backward goes from the last part to the first: it runs a part again,
recorded, through all layers, and hands the gradient of the states that it began with to the part before. A layer with
two directions needs all steps of the layer below, which are computed anew for it and are gone when it is done; each of
its directions is walked from its own end, as a forward one over turned rows.

Whatever runs the stack runs its parts, through elman_stack.py, so every backend, type and kind of input has this.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled_backward
from .autograd import apply_of, below_autograd_recording, must_recompute, recomputed, saved_tensors, unshared
from .compiling import unknown_size
from .context import OPERATORS, autocast, exported, in_plain_memory, plain, registered_operators_only, watched
from .elman_stack import OneLayer, alike, as_batch_first, elman_stack
from .parts import Parts
from .tokens import TOKEN_TYPES


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
        masks.append(_bits(F.dropout(ones, dropout, True)))
    if onlooker is None:
        return _apply(stack, batch_first, batch_sizes, masks, input, hx, *weights)
    output, h_n, _ = _checkpointed_op(input, hx, batch_sizes, weights, masks, *astuple(stack))
    return output.transpose(0, 1) if batch_first else output, h_n


def check_steps(steps: Any) -> int | None:
    """``steps`` if it is a number of steps or None; else a ValueError."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"checkpoint_steps: expected a positive number of steps or None, got {steps!r}")
    return steps


@dataclass(frozen=True)
class Stack:
    """L layers with D directions, and how they run. Weights are flat: for each layer and direction W_ih, W_hh and no
    bias or both. masks: None kept, or for each layer but the last the bits of what dropout leaves of its output.
    """

    backend: str
    nonlinearity: str
    num_layers: int
    directions: int
    dropout: float  # 0 where none is drawn
    steps: int  # k

    def run(
        self,
        input: Tensor,
        hx: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        masks: Sequence[Tensor],
        num_layers: int | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output of the first ``num_layers`` layers, (T, B, D*H) or packed (N, D*H), and their last states. By what
        runs them without checkpoints, recorded where gradients are enabled. watch: called with each layer's output.
        """
        directions, each = self.directions, len(weights) // self.num_layers
        output, states = input, []
        for i in range(num_layers or self.num_layers):
            output = self.dropped(output, masks, i - 1)
            h0 = None if hx is None else hx[i * directions : (i + 1) * directions]
            output, state = self.layer(output, h0, weights[i * each : (i + 1) * each], batch_sizes, directions)
            states.append(state)
            if watch is not None:
                watch(output)
        return output, torch.cat(states)

    def layer(
        self, input: Tensor, h0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None, directions: int
    ) -> tuple[Tensor, Tensor]:
        """One layer with ``directions``, which need not be the stack's."""
        layer = OneLayer(self.backend, self.nonlinearity, weights, directions)
        return elman_stack(layer, input, h0, batch_sizes, input.dtype in TOKEN_TYPES, watched())

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        masks: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, h_n (L*D, B, H), and the states kept, (L*D, ceil(T/k), B, H) in the order of each walk; they have one
        dimension, as a compiler would make a program of its own for each of theirs that happens to be 1.
        """
        parts, between = Parts(input, batch_sizes, self.steps), []

        def watch(output: Tensor) -> None:
            for direction, own in enumerate(output.chunk(self.directions, -1)):
                between.append(parts.states_between(own, direction == 1))

        with torch.no_grad():
            output, h_n = self.run(input, hx, weights, batch_sizes, masks, watch=watch)
        kept = h_n.new_empty(len(h_n), parts.count, *h_n.shape[1:])
        for own, states in zip(kept, between, strict=True):
            own[1:] = states
        kept[:, 0] = 0 if hx is None else hx
        return output, h_n, kept.view(-1)

    def dropped(self, output: Tensor, masks: Sequence[Tensor], layer: int) -> Tensor:
        """The layer's output, or a gradient of what dropout made of it, times what dropout drew: 0 or 1 / (1 - p)."""
        if layer < 0 or not masks:
            return output
        places = torch.arange(8, dtype=torch.uint8, device=output.device)
        bits = ((masks[layer].unsqueeze(-1) >> places) & 1).flatten(-2)[..., : output.shape[-1]]
        return output * bits.to(output.dtype).div_(1 - self.dropout if self.dropout < 1 else 1)


def _bits(noise: Tensor) -> Tensor:
    """(..., C) -> (..., ceil(C/8)) uint8, a bit for each number, 1 where it is not 0."""
    bits = F.pad((noise != 0).to(torch.uint8), (0, -noise.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=noise.device)).sum(-1, dtype=torch.uint8)


class _Backward:
    """One backward pass; arguments as Stack.forward has them, with the states that it kept."""

    def __init__(
        self,
        stack: Stack,
        input: Tensor,
        hx: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        masks: Sequence[Tensor],
        kept: Tensor,
        needs_grad: Sequence[bool],
    ):
        self.stack, self.input, self.hx, self.masks = stack, input, hx, masks
        self.needs_input, self.needs_hx, *needs_weights = needs_grad
        self.parts = Parts(input, batch_sizes, stack.steps)
        cells = stack.num_layers * stack.directions
        self.kept = kept.view(cells, self.parts.count, self.parts.active(0), -1)
        self.weights = [w.detach().requires_grad_(needs) for w, needs in zip(weights, needs_weights, strict=True)]
        self.of_weights: list[Tensor | None] = [None] * len(weights)
        self.of_states: list[Tensor | None] = [None] * cells

    def run(self, grad_out: Tensor | None, grad_h_n: Tensor | None) -> list[Tensor | None]:
        """Gradients of (input, hx, *weights), None where none is needed."""
        stack, layers = self.stack, range(self.stack.num_layers)
        grad_input: Tensor | None = None
        if stack.directions == 1:
            grad_input = torch.empty_like(self.input) if self.needs_input else None
            self._through(layers, 0, self.input, grad_out, grad_h_n, grad_input)
        else:
            for i in reversed(layers):
                below = self.input if i == 0 else self._dropped_output(i)
                grad_input = torch.empty_like(below) if i > 0 or self.needs_input else None
                columns = (None, None) if grad_out is None else grad_out.chunk(2, -1)
                for direction in range(2):
                    self._through(range(i, i + 1), direction, below, columns[direction], grad_h_n, grad_input)
                if i > 0:
                    assert grad_input is not None
                    grad_out = stack.dropped(grad_input, self.masks, i - 1)
        grad_hx = torch.cat([g for g in self.of_states if g is not None]) if self.needs_hx else None
        return [grad_input, grad_hx, *self.of_weights]

    def _dropped_output(self, layer: int) -> Tensor:
        """The input of a layer above the first, by all layers below it once more."""
        stack = self.stack
        with torch.no_grad():
            weights, sizes = self.weights, self.parts.batch_sizes
            output, _ = stack.run(self.input, self.hx, weights, sizes, self.masks, num_layers=layer)
            return stack.dropped(output, self.masks, layer - 1)

    def _through(
        self,
        layers: range,  # upon each other, if this is the only direction
        direction: int,
        x: Tensor,  # their input
        grad_out: Tensor | None,  # of this direction's output
        grad_h_n: Tensor | None,  # of the whole stack's
        grad_x: Tensor | None,  # where the gradient of x goes: written by direction 0, added to by direction 1
    ) -> None:
        stack, parts, backwards = self.stack, self.parts, direction == 1
        each = len(self.weights) // (stack.num_layers * stack.directions)
        cells = [i * stack.directions + direction for i in layers]
        own = slice(cells[0], cells[-1] + 1)
        places = [p for cell in cells for p in range(cell * each, (cell + 1) * each) if self.weights[p].requires_grad]
        grad_state: Tensor | None = None
        for part in reversed(range(parts.count)):
            needs_state = part > 0 or self.needs_hx
            state = self.kept[own, part, : parts.active(part)].detach().requires_grad_(needs_state)
            rows = first = parts.rows(x, part, backwards).detach().requires_grad_(grad_x is not None)
            with torch.enable_grad():
                last = []
                for j, cell in enumerate(cells):
                    if j > 0:
                        rows = stack.dropped(rows, [parts.rows(m, part, False) for m in self.masks], cell - 1)
                    weights = self.weights[cell * each : (cell + 1) * each]
                    rows, h_n = stack.layer(rows, state[j : j + 1], weights, parts.sizes(part), 1)
                    last.append(h_n)
                results = [rows, torch.cat(last)]
            upstream = [
                None if grad_out is None else parts.rows(grad_out, part, backwards),
                self._grad_of_last(part, None if grad_h_n is None else grad_h_n[own], grad_state),
            ]
            given = [(y, g) for y, g in zip(results, upstream, strict=True) if g is not None]
            leaves = [leaf for leaf in (first, state, *(self.weights[p] for p in places)) if leaf.requires_grad]
            found = iter(torch.autograd.grad([y for y, _ in given], leaves, [g for _, g in given]))
            if grad_x is not None:
                parts.put(grad_x, part, backwards, next(found))
            grad_state = next(found) if needs_state else None
            for place in places:
                before, more = self.of_weights[place], next(found)
                self.of_weights[place] = more if before is None else before + more
        if self.needs_hx:
            assert grad_state is not None
            for j, cell in enumerate(cells):
                self.of_states[cell] = grad_state[j : j + 1]

    def _grad_of_last(self, part: int, of_h_n: Tensor | None, of_next: Tensor | None) -> Tensor | None:
        """Of the states that a part ends with: those of sequences that go on are the next part's, the others h_n's."""
        active, going_on = self.parts.active(part), self.parts.active(part + 1)
        if going_on == 0:
            return None if of_h_n is None else of_h_n[:, :active]
        if going_on == active:
            return of_next
        assert of_next is not None
        ended = active - going_on
        rest = (
            of_next.new_zeros(len(of_next), ended, of_next.shape[2]) if of_h_n is None else of_h_n[:, going_on:active]
        )
        return torch.cat([of_next, rest], 1)


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
            backward = _Backward(ctx.stack, input, hx, weights, batch_sizes, masks, kept, needs_grad)
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
        backward = _Backward(stack, input, hx, weights, batch_sizes, masks, kept, needs_grad)
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
