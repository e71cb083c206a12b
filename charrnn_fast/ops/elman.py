"""The Elman recurrence as one differentiable operation, a layer with D = 1 or 2 directions at a time.

    h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh),   f = tanh or relu      (torch.nn.RNN's formula and layout)

Nothing is kept for backward but the input, the outputs and the weights: f' follows from the outputs (1 - h^2, or
h > 0). elman_layer.py has the layer's two passes by a backend's kernels, elman_torch.py by tensor operations.
"""

import itertools
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends
from .autograd import apply_of, below_autograd_recording, read_by_compiler, recomputed, saved_tensors
from .compiling import unknown_size
from .context import OPERATORS, REGISTERED, autocast, in_plain_memory, plain, watched
from .elman_layer import Layer, layer_of
from .elman_torch import layer_by_tensor_operations, layer_by_torch
from .precision import tf32_for_rnns
from .registration import Operation, register
from .tokens import TOKEN_TYPES, check_tokens


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
        backend: one of ``backends.NAMES``.

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
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    state, ways = None if h0 is None else h0[None], (bool(reverse),)
    device, dtype, hidden_size = weight_ih.device, weight_ih.dtype, weight_hh.shape[0]
    name = backends.choose("elman", device, dtype, hidden_size=hidden_size, backend=backend)
    onlooker = watched()
    if name == "torch" or onlooker is OPERATORS or not plain(input, state, batch_sizes, *weights):
        if is_tokens(input) and input.device.type == "cpu":
            check_tokens(input, weight_ih.shape[1])
        output, h_n = layer_by_tensor_operations(input, state, weights, batch_sizes, nonlinearity, ways)
    elif num_sequences(input, batch_sizes) > backends.most_rows(backend, name, device, dtype, hidden_size):
        # Torch's own RNN is faster. Recorded it is an operator of ours, which can be differentiated twice.
        if onlooker is REGISTERED or torch.is_grad_enabled():
            output, h_n = registered_layer(input, state, batch_sizes, weights, "torch", nonlinearity, ways)
        else:
            output, h_n = layer_by_torch(input, state, weights, batch_sizes, nonlinearity, ways)
    elif onlooker is REGISTERED:
        output, h_n = registered_layer(input, state, batch_sizes, weights, name, nonlinearity, ways)
    else:
        layer = _layer_like(name, weight_hh, nonlinearity, ways)
        output, h_n = elman_layer(layer, input, state, weights, batch_sizes)
    return output, h_n[0]


def num_sequences(input: Tensor, batch_sizes: Tensor | None) -> int:
    """B of time-major or packed input; 0 without a step."""
    if batch_sizes is None:
        return input.shape[1] if input.shape[0] else 0
    return int(batch_sizes[0]) if len(batch_sizes) else 0


def elman_layer(
    layer: Layer,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """All D directions of one layer by a backend's kernels; arguments are checked and in plain memory, nobody watches.

    Args:
        input, h0, weights, batch_sizes: as in :meth:`Layer.forward`.
        batch_first: is the output turned to (B, T, D*H)? The input is (T, B, I) in any case.

    Returns:
        output (T, B, D*H) or (N, D*H), direction d in columns d*H:(d+1)*H, and h_n (D, B, H). The output's memory is in
        the order (T, B, D*H), turned or not, and where autograd records this call it is no view to it, as
        torch.nn.RNN's.
    """
    if torch.is_grad_enabled():
        return _apply(layer, batch_first, batch_sizes, input, h0, *weights)
    out, h_n = layer.forward(input, h0, weights, batch_sizes)
    return out.transpose_(0, 1) if batch_first else out, h_n


def registered_layer(
    input: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    backend: str,
    nonlinearity: str,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """As :func:`elman_layer`, as one registered operator, for compilers and modes. backend: one that has kernels."""
    return _operator(input, h0, batch_sizes, list(weights), backend, nonlinearity, list(reverse))


class _ElmanLayer(torch.autograd.Function):
    """The kernels under autograd; differentiated again, the layer is recomputed by tensor operations.

    torch.func never comes here, so there is no setup_context, with which PyTorch inspects the signature at every call
    (some 50 us).
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        batch_first: bool,
        batch_sizes: Tensor | None,
        input: Tensor,
        h0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, h_n = layer.forward(input, h0, weights, batch_sizes)
        if batch_first:  # before it is saved: afterwards it would be a change of what backward reads
            out.transpose_(0, 1)
        ctx.layer, ctx.batch_first = layer, batch_first
        ctx.save_for_backward(out, batch_sizes, input, h0, *weights)
        ctx.set_materialize_grads(False)
        return out, h_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_h_n = grads
        needs_grad = ctx.needs_input_grad[3:]
        if grad_out is None and grad_h_n is None:
            return (None,) * (3 + len(needs_grad))
        saved = saved_tensors(ctx)
        out, batch_sizes, input, h0, *weights = saved
        layer = ctx.layer
        if ctx.batch_first:
            out, grad_out = out.transpose(0, 1), None if grad_out is None else grad_out.transpose(0, 1)
        if torch.is_grad_enabled() or watched() is not None or not in_plain_memory((grad_out, grad_h_n, *saved)):
            arguments = (input, h0, batch_sizes, weights, layer.backend, layer.nonlinearity, list(layer.reverse))
            if read_by_compiler():
                found = gradients_by_operator((grad_out, grad_h_n), (out,), arguments, needs_grad)
            else:
                found = ElmanLayer(*arguments).recomputed((grad_out, grad_h_n), needs_grad)
        else:
            found = layer.backward(grad_out, grad_h_n, out, input, h0, weights, batch_sizes, needs_grad)
        return (None, None, None, *found)


_apply = apply_of(_ElmanLayer)


# ---- under torch.compile, torch.export and tracing modes: the same two functions as registered operators ---------


@dataclass
class ElmanLayer(Operation):
    """A layer by a backend's kernels, or by torch's own RNN. Arguments as in :func:`registered_layer`, results too."""

    OPERANDS, RESULTS, UPSTREAM, KEPT = ("input", "h0", "weights"), ("out", "h_n"), 2, ("out",)

    input: Tensor
    h0: Tensor | None
    batch_sizes: Tensor | None
    weights: list[Tensor]
    backend: str
    nonlinearity: str
    reverse: list[bool]

    def forward(self) -> tuple[Tensor, Tensor]:
        h0, sizes, weights, reverse = self.h0, self.batch_sizes, self.weights, self.reverse
        # Callers have checked this, except where a compiler could not know the number of packed sequences.
        if h0 is not None and sizes is not None and len(sizes) and h0.shape[1] != sizes[0]:
            expected = (len(reverse), int(sizes[0]), weights[1].shape[0])
            raise RuntimeError(f"Expected hidden size {expected}, got {list(h0.shape)}")
        if self.backend == "torch":
            return layer_by_torch(self.input, h0, weights, sizes, self.nonlinearity, reverse)
        layer = _layer_like(self.backend, weights[1], self.nonlinearity, reverse)
        return layer.forward(self.input, h0, weights, sizes)

    def shapes(self) -> tuple[Tensor, Tensor]:
        directions, hidden, input = len(self.reverse), self.weights[1].shape[0], self.input
        batch = batch_of(input, self.h0, self.batch_sizes)
        out = self.weights[0].new_empty(*input.shape[: input.dim() - (not is_tokens(input))], directions * hidden)
        return out, out.new_empty(directions, batch, hidden)

    def flops(self) -> int:
        """2 N H (I + H) for each direction, N the rows of all steps; ids count as the one-hot rows that they are."""
        hidden, features = self.weights[0].shape
        return 2 * len(self.reverse) * num_rows(self.input, self.batch_sizes) * hidden * (features + hidden)

    def backward(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        if self.backend != "torch":
            layer = _layer_like(self.backend, self.weights[1], self.nonlinearity, self.reverse)
            operands = (self.input, self.h0, self.weights, self.batch_sizes)
            return layer.backward(grads[0], grads[1], kept[0], *operands, needs_grad)

        def run(input: Tensor, h0: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor]:
            return layer_by_torch(input, h0, weights, self.batch_sizes, self.nonlinearity, self.reverse)

        # Torch's own RNN runs again, recorded, although an operator's body runs below autograd.
        pairs = zip(self.operands(), needs_grad, strict=True)
        leaves = [None if x is None else x.detach().requires_grad_(needs) for x, needs in pairs]
        with below_autograd_recording(), torch.no_grad():
            return recomputed(run, leaves, needs_grad, grads)

    def backward_flops(self, needs_grad: Sequence[bool]) -> int:
        """Of each product its gradients that are wanted; the state's own is needed at every step but the first."""
        hidden, features = self.weights[0].shape
        each, rows = len(self.weights) // len(self.reverse), num_rows(self.input, self.batch_sizes)
        first = num_sequences(self.input, self.batch_sizes)
        products = 0
        for direction in range(len(self.reverse)):
            needs_ih, needs_hh = needs_grad[2 + direction * each : 4 + direction * each]
            products += rows * hidden * features * (bool(needs_grad[0]) + bool(needs_ih))
            products += rows * hidden * hidden * bool(needs_hh)
            products += (rows - (0 if needs_grad[1] else first)) * hidden * hidden
        return 2 * products

    def by_tensor_operations(self, *operands: Any) -> tuple[Tensor, Tensor]:
        input, h0, *weights = operands
        return layer_by_tensor_operations(input, h0, weights, self.batch_sizes, self.nonlinearity, self.reverse)


_operator, gradients_by_operator = register("elman_layer", ElmanLayer)


def _layer_like(backend: str, weight_hh: Tensor, nonlinearity: str, reverse: Sequence[bool]) -> Layer:
    device = weight_hh.device
    options = (nonlinearity, tuple(reverse), tf32_for_rnns(device))
    return layer_of(backend, device, weight_hh.dtype, weight_hh.shape[0], *options)


def batch_of(input: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> Any:
    """B for a registered operator's shapes, where batch sizes are data."""
    if h0 is not None:
        return h0.shape[1]
    return input.shape[1] if batch_sizes is None else unknown_size()


def num_rows(input: Tensor, batch_sizes: Tensor | None) -> int:
    """Of all steps."""
    return input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]


def is_tokens(input: Tensor) -> bool:
    return input.dtype in TOKEN_TYPES


# ---- checks -------------------------------------------------------------------------------------------------------


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
    tokens = is_tokens(input)
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
    if (wrong := wrong_batch_sizes(batch_sizes, total)) is not None:
        raise ValueError(wrong)
    return int(batch_sizes[0]) if len(batch_sizes) else 0


def wrong_batch_sizes(batch_sizes: Tensor, total: int) -> str | None:
    """None if (T,) batch_sizes can be those of ``total`` packed rows, else what is wrong with them."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        return (
            "batch_sizes must be (T,) int64 on the CPU, "
            f"got {tuple(batch_sizes.shape)} {batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if any(size < 1 for size in sizes) or any(after > before for before, after in itertools.pairwise(sizes)):
        return f"batch_sizes must be positive and must not increase, got {reprlib.repr(sizes)}"
    if sum(sizes) != total:
        return f"batch_sizes must sum to the {total} rows of input, got {sum(sizes)}"
    return None
