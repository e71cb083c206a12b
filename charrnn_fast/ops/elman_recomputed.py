"""The two passes of a stack of Elman layers that keeps its states of every k-th step alone.

The steps are cut into parts of k. Forward is the stack's ordinary one; of it are kept the input and, for each layer and
direction, the states that a part begins with. Backward goes from the last part to the first: it runs a part again
through all layers, then back through them, and hands the gradient of the states that it began with to the part before.
A layer with two directions needs all steps of the layer below, which are computed anew for it and are gone when it is
done; each of its directions is walked from its own end, as a forward one over turned rows.

What runs the stack runs its parts, so every backend, type and kind of input has this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import in_plain_memory, watched
from .elman_layer import Layer
from .elman_stack import OneLayer, elman_stack, kernels_of
from .parts import Parts
from .tokens import TOKEN_TYPES


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


def bits_of(noise: Tensor) -> Tensor:
    """(..., C) -> (..., ceil(C/8)) uint8, a bit for each number, 1 where it is not 0."""
    bits = F.pad((noise != 0).to(torch.uint8), (0, -noise.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=noise.device)).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class _Part:
    """k steps of layers upon each other, in the order of their walk."""

    cells: Sequence[int]  # the layers, by their place among all layers' directions
    rows: Tensor  # (k, B, I) or packed (n, I), or ids
    states: Tensor  # (cells, B, H), that it begins with
    batch_sizes: Tensor | None
    masks: Sequence[Tensor]  # of dropout, all layers'


class Backward:
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
        parts, backwards = self.parts, direction == 1
        cells = [i * self.stack.directions + direction for i in layers]
        own = slice(cells[0], cells[-1] + 1)
        of_h_n = None if grad_h_n is None else grad_h_n[own]
        grad_state: Tensor | None = None
        for number in reversed(range(parts.count)):
            part = _Part(
                cells,
                parts.rows(x, number, backwards),
                self.kept[own, number, : parts.active(number)],
                parts.sizes(number),
                [parts.rows(mask, number, False) for mask in self.masks],
            )
            upstream = None if grad_out is None else parts.rows(grad_out, number, backwards)
            of_last = self._grad_of_last(number, of_h_n, grad_state)
            kernels = self._kernels(part, upstream, of_last)
            if kernels is None:
                grad_rows, grad_state = self._recorded(part, upstream, of_last, grad_x is not None)
            else:
                grad_rows, grad_state = self._by_kernels(kernels, part, upstream, of_last, grad_x is not None)
            if grad_x is not None:
                assert grad_rows is not None
                parts.put(grad_x, number, backwards, grad_rows)
        if self.needs_hx:
            assert grad_state is not None
            for j, cell in enumerate(cells):
                self.of_states[cell] = grad_state[j : j + 1]

    def _kernels(self, part: "_Part", *grads: Tensor | None) -> Layer | None:
        """Those of one of the cells, which all have them or none."""
        layer = OneLayer(self.stack.backend, self.stack.nonlinearity, self._weights(part.cells[0]))
        tokens = part.rows.dtype in TOKEN_TYPES
        kernels = kernels_of(layer, part.rows, part.states, layer._flat_weights, part.batch_sizes, tokens)
        return kernels if kernels is not None and in_plain_memory(grads) else None

    def _by_kernels(
        self, kernels: Layer, part: "_Part", grad_out: Tensor | None, of_last: Tensor | None, needs_rows: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of a part's rows and of the states that it began with; those of weights are added up."""
        stack, sizes, inputs, outputs = self.stack, part.batch_sizes, [], []
        states = part.states.unsqueeze(1)
        rows = part.rows
        for j, cell in enumerate(part.cells):
            if j > 0:
                rows = stack.dropped(rows, part.masks, cell - 1)
            inputs.append(rows)
            rows, _ = kernels.forward(rows, states[j], self._weights(cell), sizes)
            outputs.append(rows)
        grad_rows, of_states = grad_out, []
        for j, cell in reversed(list(enumerate(part.cells))):
            weights = self._weights(cell)
            needs = [j > 0 or needs_rows, True, *(w.requires_grad for w in weights)]
            of_h_n = None if of_last is None else of_last[j : j + 1]
            grad_rows, of_state, *of_weights = kernels.backward(
                grad_rows, of_h_n, outputs[j], inputs[j], states[j], weights, sizes, needs
            )
            if j > 0:
                assert grad_rows is not None
                grad_rows = stack.dropped(grad_rows, part.masks, cell - 1)
            assert of_state is not None
            of_states.append(of_state)
            self._add(cell, of_weights)
        return grad_rows, torch.cat(of_states[::-1])

    def _recorded(
        self, part: "_Part", grad_out: Tensor | None, of_last: Tensor | None, needs_rows: bool
    ) -> tuple[Tensor | None, Tensor]:
        """As above by torch's own operators, which autograd differentiates."""
        stack = self.stack
        first = rows = part.rows.detach().requires_grad_(needs_rows)
        states, last = part.states.detach().requires_grad_(), []
        with torch.enable_grad():
            for j, cell in enumerate(part.cells):
                if j > 0:
                    rows = stack.dropped(rows, part.masks, cell - 1)
                rows, h_n = stack.layer(rows, states[j : j + 1], self._weights(cell), part.batch_sizes, 1)
                last.append(h_n)
            results = [rows, torch.cat(last)]
        given = [(y, g) for y, g in zip(results, (grad_out, of_last), strict=True) if g is not None]
        weights = [w for cell in part.cells for w in self._weights(cell)]
        leaves = [leaf for leaf in (states, first, *weights) if leaf.requires_grad]
        of_states, *found = torch.autograd.grad([y for y, _ in given], leaves, [g for _, g in given])
        grad_rows = found.pop(0) if needs_rows else None
        of_weights = iter(found)
        for cell in part.cells:
            self._add(cell, [next(of_weights) if w.requires_grad else None for w in self._weights(cell)])
        return grad_rows, of_states

    def _weights(self, cell: int) -> list[Tensor]:
        each = len(self.weights) // len(self.of_states)
        return self.weights[cell * each : (cell + 1) * each]

    def _add(self, cell: int, grads: Sequence[Tensor | None]) -> None:
        """To the gradients of a cell's weights."""
        for place, more in enumerate(grads, cell * len(grads)):
            before = self.of_weights[place]
            self.of_weights[place] = more if before is None or more is None else before + more

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
