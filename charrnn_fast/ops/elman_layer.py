"""One Elman layer by a backend's kernels: forward, backward, and the order of memory that they work in.

The input is projected straight into the output's memory, which is (T, B, D*H) whatever the input's strides, and the
kernel walks it in place; token ids need no projection, their input is a row of the table W_ih^T (+ b_ih + b_hh). No
autograd here and no checks: elman.py has both.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.kernels import native

from . import backends
from .elman_torch import of_direction
from .precision import rnn_precision, tf32_for_rnns
from .tokens import TOKEN_TYPES, check_tokens

_ROWS_IN_PLACE = 1024  # rows of a gradient that are replaced at a time: enough for a matrix product at full speed


@dataclass(frozen=True)
class Kernels:
    """A backend's two passes of the recurrence for one device, type and width."""

    forward: Callable[..., Any]  # elman_forward of kernels/native/elman.py, which is that of kernels/triton/elman.py
    backward: Callable[..., Any]  # elman_backward
    adds_bias: bool = False  # they add the biases, sum their gradient and take a table of any strides
    projects: Callable[[int, int], int] | None = None
    # for features and rows (batch times directions): the most steps for which forward makes the product with W_ih
    most_rows: float = float("inf")  # batch times directions up to which "auto" prefers them to torch's own RNN


def kernels_of(backend: str, device: torch.device, dtype: torch.dtype, hidden_size: int) -> Kernels:
    """Those of a backend that has kernels, with torch's float32 precision switch applied."""
    if backend == "native":
        return Kernels(native.elman_forward, native.elman_backward)
    if backend != "triton":
        raise ValueError(f"backend '{backend}' has no kernels")
    from charrnn_fast.kernels.triton import elman as kernels

    precision = rnn_precision(device, dtype)

    @functools.lru_cache(4096)
    def projects(features: int, rows: int) -> int:
        return kernels.projected_steps(features, hidden_size, dtype, precision, device, rows)

    forward = functools.partial(kernels.elman_forward, precision=precision)
    backward = functools.partial(kernels.elman_backward, precision=precision)
    return Kernels(forward, backward, True, projects, kernels.most_rows(hidden_size, dtype, precision, device))


class Layer:
    """How all D directions of one layer run by the kernels of ``backend``, resolved once and passed down as it is.

    Weights are flat: for each direction W_ih (H, I), W_hh (H, H) and no bias, one, or b_ih and b_hh, each (H,).

    Attributes:
        backend: "triton" or "native". nonlinearity: "tanh" or "relu".
        reverse: for each direction, does it walk time backwards.
    """

    __slots__ = ("_kernels", "backend", "directions", "hidden_size", "most_rows", "nonlinearity", "reverse")

    def __init__(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        hidden_size: int,
        nonlinearity: str,
        reverse: tuple[bool, ...],
    ):
        self.backend, self.hidden_size, self.nonlinearity, self.reverse = backend, hidden_size, nonlinearity, reverse
        self.directions = len(reverse)
        self._kernels = kernels_of(backend, device, dtype, hidden_size)
        self.most_rows = self._kernels.most_rows

    def forward(
        self, input: Tensor, h0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output (T, B, D*H) or packed (N, D*H), contiguous and no view of anything, and h_n (D, B, H).

        input: (T, B, I) or packed (N, I), or ids (T, B) or (N,), any strides. h0: (D, B, H) or None. batch_sizes: (T,)
        int64 on the CPU, or None. An id outside 0..I-1 is an IndexError on a CPU, on a GPU an assertion.
        """
        directions, kernels = self.directions, self._kernels
        each = len(weights) // directions
        in_kernel: dict[str, Sequence[Tensor]] = {}
        if kernels.adds_bias and each > 2:
            in_kernel["bias_ih"] = weights[2::each]
            if each == 4:
                in_kernel["bias_hh"] = weights[3::each]
        tokens: Tensor | None = None
        if input.dtype in TOKEN_TYPES:
            tokens, x = input, self._table(weights)
            if kernels.adds_bias:  # the native ones look at the ids themselves, in a fraction of the time
                check_tokens(tokens, x.shape[0])
            out = torch.empty((*tokens.shape, x.shape[1]), dtype=x.dtype, device=x.device)
        elif kernels.projects is not None and self._projects(input, batch_sizes):
            x = input if input.stride(-1) == 1 else input.contiguous()
            shape = (*input.shape[:-1], directions * self.hidden_size)
            out = torch.empty(shape, dtype=input.dtype, device=input.device)
            in_kernel["weight_ih"] = weights[::each]
        else:
            out = x = self._project(input, weights)
        try:
            return kernels.forward(
                x,
                weights[1::each],
                h0 if h0 is None or h0.stride(-1) == 1 else h0.contiguous(),
                tokens=tokens,
                batch_sizes=batch_sizes,
                nonlinearity=self.nonlinearity,
                reverse=self.reverse,
                out=out,
                **in_kernel,
            )
        except IndexError:
            check_tokens(input, x.shape[0])  # names the id
            raise

    def backward(
        self,
        grad_out: Tensor | None,
        grad_h_n: Tensor | None,
        out: Tensor,
        input: Tensor,
        h0: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        needs_grad: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of (input, h0, *weights), None where ``needs_grad`` does not ask. No two share an element.

        out: forward's output, as time-major as it was; grad_out: like it, any strides; grad_h_n: (D, B, H).
        """
        directions, hidden, kernels = self.directions, self.hidden_size, self._kernels
        each = len(weights) // directions
        tokens = input if input.dtype in TOKEN_TYPES else None
        if directions == 1:  # nearly always; any() would look at slices
            needs_ih, needs_hh = needs_grad[2], needs_grad[3]
            needs_bias = each > 2 and (needs_grad[4] or needs_grad[-1])
        else:
            needs_ih, needs_hh = any(needs_grad[2::each]), any(needs_grad[3::each])
            needs_bias = each > 2 and (any(needs_grad[4::each]) or any(needs_grad[1 + each :: each]))
        options = {"need_bias_grad": needs_bias} if kernels.adds_bias else {}
        grad_x, grad_weight_hh, grad_h0, *grad_bias = kernels.backward(
            grad_out if grad_out is None or grad_out.stride(-1) == 1 else grad_out.contiguous(),
            grad_h_n if grad_h_n is None or grad_h_n.stride(-1) == 1 else grad_h_n.contiguous(),
            out,
            weights[1::each],
            h0 if h0 is None or h0.stride(-1) == 1 else h0.contiguous(),
            tokens=tokens,
            num_tokens=None if tokens is None else weights[0].shape[1],
            batch_sizes=batch_sizes,
            nonlinearity=self.nonlinearity,
            reverse=self.reverse,
            need_weight_grad=needs_hh,
            **options,
        )
        rows = grad_x.flatten(0, 1) if tokens is None and grad_x.dim() == 3 else grad_x
        if needs_ih:  # (D*H, I); of the table with a row per token, it is the transpose
            if tokens is not None:
                grad_weight_ih = rows.t()
            else:
                grad_weight_ih = torch.mm(rows.t(), input.flatten(0, 1) if input.dim() == 3 else input)
        if needs_bias:
            bias_rows = grad_bias[0] if kernels.adds_bias else rows.sum(0)
        grads = [
            self._grad_input(rows, weights).view(input.shape) if needs_grad[0] else None,
            grad_h0 if needs_grad[1] else None,
        ]
        for direction in range(directions):
            units = slice(direction * hidden, (direction + 1) * hidden)
            needs = needs_grad[2 + direction * each : 2 + (direction + 1) * each]
            whole = directions == 1
            grads.append((grad_weight_ih if whole else grad_weight_ih[units]) if needs[0] else None)
            grads.append(grad_weight_hh[direction] if needs[1] else None)
            given = False
            for needed in needs[2:]:  # the second bias's is a copy: two parameters' gradients are changed apart
                own = (bias_rows if whole else bias_rows[units]) if needed else None
                grads.append(own.clone() if given and own is not None else own)
                given |= needed
        return grads

    def _projects(self, input: Tensor, batch_sizes: Tensor | None) -> bool:
        """Whether the kernel makes the product of input and W_ih itself."""
        if batch_sizes is None:
            steps, batch = input.shape[0], input.shape[1]
        else:
            steps = len(batch_sizes)
            batch = int(batch_sizes[0]) if steps else 0
        projects = self._kernels.projects
        return projects is not None and steps <= projects(input.shape[-1], batch * self.directions)

    def _table(self, weights: Sequence[Tensor]) -> Tensor:
        """(V, D*H): row v is token v's input, W_ih[:, v], plus the biases if the kernel adds none."""
        if not self._kernels.adds_bias:
            return token_table(weights, self.directions)
        weight_ih = weights[0]
        if self.directions == 1 and weight_ih.numel() * weight_ih.element_size() <= _MAX_TABLE_IN_PLACE:
            return weight_ih.t()
        each = len(weights) // self.directions
        bare = [w for i, w in enumerate(weights) if i % each < 2]
        return token_table(bare, self.directions)

    def _project(self, input: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """input (T, B, I) or (N, I), any strides -> input W_ih^T, (T, B, D*H) or (N, D*H), contiguous.

        Plus the biases if the kernel adds none. A tensor of its own and no view of one, as it becomes the output: what
        autograd takes for a view it does not let users change in place.
        """
        rows = input.flatten(0, 1) if input.dim() == 3 else input
        directions, hidden, adds_bias = self.directions, self.hidden_size, not self._kernels.adds_bias
        if directions == 1:
            weight_t = weights[0].t()
            if adds_bias and len(weights) > 2:
                bias = weights[2] if len(weights) == 3 else weights[2] + weights[3]
                projected = torch.addmm(bias, rows, weight_t)
            else:
                projected = torch.mm(rows, weight_t)
            return projected if input.dim() == 2 else projected.resize_(*input.shape[:-1], hidden)
        projected = rows.new_empty((*input.shape[:-1], directions * hidden))
        projected_rows = projected.flatten(0, 1) if input.dim() == 3 else projected
        for direction in range(directions):
            weight_ih, _, total = of_direction(weights, direction, directions)
            columns = projected_rows[:, direction * hidden : (direction + 1) * hidden]
            if total is None or not adds_bias:
                torch.mm(rows, weight_ih.t(), out=columns)
            else:
                torch.addmm(total, rows, weight_ih.t(), out=columns)
        return projected

    def _grad_input(self, grad_rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """grad_rows (R, D*H) -> gradient (R, I) of the rows of a dense input.

        On a CPU, where the two have one size, it takes the place of ``grad_rows``, some rows at a time: the largest
        tensor of a backward pass less, and no fresh pages to fetch.
        """
        hidden, features = weights[0].shape
        if self.directions == 1:
            if features == hidden and grad_rows.device.type == "cpu" and grad_rows.is_contiguous():
                for part in grad_rows.split(_ROWS_IN_PLACE):
                    part.copy_(part @ weights[0])
                return grad_rows
            return torch.mm(grad_rows, weights[0])
        rows = torch.mm(grad_rows[:, :hidden], weights[0])
        return rows.addmm_(grad_rows[:, hidden:], weights[len(weights) // 2])


# Reading a row of the input weight itself as a column takes a sector of 32 bytes an element: from the first cache, a
# small one costs less than a launch that transposes it.
_MAX_TABLE_IN_PLACE = 2**16  # bytes


@functools.cache
def layer_of(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    nonlinearity: str,
    reverse: tuple[bool, ...],
    tf32: bool,
) -> Layer:
    """The one Layer of these options. backend: one that has kernels and can run them; tf32: as tf32_for_rnns says."""
    return Layer(backend, device, dtype, hidden_size, nonlinearity, reverse)


def choose_layer(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    nonlinearity: str,
    reverse: tuple[bool, ...],
) -> Layer | None:
    """The layer by the backend that runs it here, as backends.choose says; None for torch's own operators."""
    name = backends.requested(backend)
    tf32 = device.type == "cuda" and tf32_for_rnns(device)
    return _choose_layer(name, device, dtype, hidden_size, nonlinearity, reverse, tf32)


@functools.cache
def _choose_layer(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    nonlinearity: str,
    reverse: tuple[bool, ...],
    tf32: bool,
) -> Layer | None:
    chosen = backends.choose("elman", device, dtype, hidden_size=hidden_size, backend=name)
    return None if chosen == "torch" else layer_of(chosen, device, dtype, hidden_size, nonlinearity, reverse, tf32)


def forget() -> None:
    """Choose anew: see backends.forget."""
    _choose_layer.cache_clear()
    layer_of.cache_clear()


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
