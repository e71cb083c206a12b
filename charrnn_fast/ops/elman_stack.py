"""A torch.nn.RNN's layers, one upon the other: each by a backend's kernels, or all of them by torch's own RNN."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .context import OPERATORS, addressable, autocast, exported_to_onnx, in_plain_memory, plain, transforms_active
from .elman import elman_layer, num_sequences, registered_layer
from .elman_layer import Layer, choose_layer
from .elman_onnx import layer_in_onnx
from .elman_torch import layer_by_tensor_operations, torch_rnn
from .tokens import TOKEN_TYPES, check_tokens, one_hot_rows

_ACTIVATIONS = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}


def elman_stack(
    rnn: Any, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, tokens: bool, onlooker: str | None
) -> tuple[Tensor, Tensor]:
    """Outputs of the last layer and last states of all.

    Args:
        rnn: a torch.nn.RNN with ``backend``, whose options and ``_flat_weights`` are read: for each layer and direction
            W_ih, W_hh and, if there are biases, b_ih and b_hh; None where a user has taken a parameter away.
        input: (T, B, I), (B, T, I) if ``rnn.batch_first``, or packed (N, I); with ``tokens`` ids, without
            the last dimension.
        hx: (L*D, B, H) or None for zeros.
        batch_sizes: (T,) int64 on the CPU for packed input.
        onlooker: what context.watched says.

    Returns:
        output (T, B, D*H), (B, T, D*H) or packed (N, D*H), and h_n (L*D, B, H).
    """
    weights = rnn._flat_weights
    if rnn.batch_first and batch_sizes is None:
        input = input.transpose(0, 1)
    if onlooker is None and not torch._C._is_any_autocast_enabled():
        layer = kernels_of(rnn, input, hx, weights, batch_sizes, tokens)
        if layer is not None:
            if rnn.num_layers == 1:
                return elman_layer(layer, input, hx, weights, batch_sizes, rnn.batch_first and batch_sizes is None)
            return _layers(rnn, layer, input, hx, weights, batch_sizes)
    return _watched_stack(rnn, input, hx, weights, batch_sizes, tokens, onlooker)


def by_torchs_operator(rnn: Any, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
    """What torch.nn.RNN's forward ends in, without its way there; input (T, B, I) or, as the module says, (B, T, I)."""
    if hx is None:
        layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
        hx = input.new_zeros(layers, input.size(0 if rnn.batch_first else 1), rnn.hidden_size)
    options = (rnn.bias, rnn.num_layers, rnn.dropout, rnn.training, rnn.bidirectional, rnn.batch_first)
    return torch_rnn(input, hx, rnn._flat_weights, None, _ACTIVATIONS[rnn.mode], *options)


class OneLayer:
    """What elman_stack reads of a module, for a layer alone; weights: of each direction W_ih, W_hh, no bias or both."""

    num_layers, batch_first, dropout, training = 1, False, 0.0, False

    def __init__(
        self,
        backend: str,
        nonlinearity: str,
        weights: Sequence[Any],
        directions: int = 1,
        checkpoint_steps: int | None = None,
    ):
        self._flat_weights, self.backend, self.checkpoint_steps = list(weights), backend, checkpoint_steps
        self.bidirectional, self.bias = directions == 2, len(weights) > 2 * directions
        self.hidden_size, self.input_size = weights[0].shape
        self.mode = f"RNN_{nonlinearity.upper()}"

    @classmethod
    def of(cls, rnn: Any, layer: int, direction: int) -> "OneLayer":
        """A layer of a module in one of its directions, as a forward one."""
        each = 4 if rnn.bias else 2
        place = layer * (2 if rnn.bidirectional else 1) + direction
        weights = rnn._flat_weights[place * each : (place + 1) * each]
        return cls(rnn.backend, _ACTIVATIONS[rnn.mode], weights, 1, rnn.checkpoint_steps)


def kernels_of(
    rnn: Any, input: Tensor, hx: Tensor | None, weights: Sequence[Any], batch_sizes: Tensor | None, tokens: bool
) -> Layer | None:
    """The layers' kernels; None where a backend has none or cannot be given these tensors."""
    last = weights[-1]
    if last is None or input.shape[0] == 0:
        return None
    dtype, device = last.dtype, last.device
    if (input.dtype != dtype and not tokens) or input.device != device:
        return None
    if hx is not None and (hx.dtype != dtype or hx.device != device):
        return None
    for weight in weights:
        if weight is None or weight.dtype != dtype or weight.device != device:
            return None
    reverse = (False, True) if rnn.bidirectional else (False,)
    layer = choose_layer(rnn.backend, device, dtype, rnn.hidden_size, _ACTIVATIONS[rnn.mode], reverse)
    if layer is None or not in_plain_memory((input, hx, *weights)):
        return None
    if layer.most_rows < float("inf") and backends.requested(rnn.backend) == "auto":
        return layer if num_sequences(input, batch_sizes) * layer.directions <= layer.most_rows else None
    return layer


def _layers(
    rnn: Any,
    layer: Layer,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Layer upon layer, each with all its directions at once; input (T, B, I), ids (T, B) or packed."""
    directions, num_layers, batch_first = layer.directions, rnn.num_layers, rnn.batch_first and batch_sizes is None
    each = directions * (4 if rnn.bias else 2)
    output, states = input, []
    for i in range(num_layers):
        if i > 0:
            output = _dropout(rnn, output)  # which draws for (T, B, C), as torch.nn.RNN's does
        h0 = None if hx is None else hx[i * directions : (i + 1) * directions]
        own = weights[i * each : (i + 1) * each]
        output, state = elman_layer(layer, output, h0, own, batch_sizes, batch_first and i == num_layers - 1)
        states.append(state)
    return output, torch.cat(states)


def _dropout(rnn: Any, output: Tensor) -> Tensor:
    return F.dropout(output, rnn.dropout, rnn.training) if rnn.dropout > 0 else output


# ---- under compilers, modes, transforms and autocast; and torch's own RNN --------------------------------------------


def _watched_stack(
    rnn: Any,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Any],
    batch_sizes: Tensor | None,
    tokens: bool,
    onlooker: str | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`_layers` wherever that does not apply."""
    if tokens and exported_to_onnx():
        input, tokens = _one_hot(rnn, input, weights[0].dtype), False
    cast_input, cast_hx, *cast = operands = autocast(input.device.type, [input, hx, *weights])
    backend = _layerwise_backend(rnn, operands, batch_sizes, tokens, onlooker)
    if backend is not None:
        return _watched_layers(rnn, backend, cast_input, cast_hx, cast, batch_sizes, onlooker)
    if hx is None:
        dtype = weights[0].dtype if tokens else input.dtype
        layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
        batch = num_sequences(input, batch_sizes)
        hx = torch.zeros(layers, batch, rnn.hidden_size, dtype=dtype, device=input.device)
    if tokens and input.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if tokens and input.device.type == "cpu":
        if alike(operands, tokens) and plain(*operands):
            return _torch_layers_of_tokens(rnn, input, hx, weights, batch_sizes)
        check_tokens(input, rnn.input_size)
    if tokens:  # cuDNN walks one-hot rows faster than a loop of launches walks a table
        input = _one_hot(rnn, input, weights[0].dtype)
    return _torch_layers(rnn, input, hx, weights, batch_sizes)


def _layerwise_backend(
    rnn: Any, operands: list[Any], batch_sizes: Tensor | None, tokens: bool, onlooker: str | None
) -> str | None:
    """The backend that takes layer after layer; None for torch's own RNN, which also refuses malformed calls."""
    if operands[0].size(0) == 0 or not alike(operands, tokens):
        return None
    if exported_to_onnx():
        return "onnx" if operands[0].dim() == 3 else None
    if onlooker is OPERATORS:
        return "torch" if transforms_active() else None  # torch's own RNN has no rule for vmap
    weight = operands[-1]
    device, dtype, hidden_size = weight.device, weight.dtype, rnn.hidden_size
    name = backends.choose("elman", device, dtype, hidden_size=hidden_size, backend=rnn.backend)
    most = backends.most_rows(rnn.backend, name, device, dtype, hidden_size)
    if most < float("inf") and num_sequences(operands[0], batch_sizes) * (2 if rnn.bidirectional else 1) > most:
        name = "torch"
    if name == "torch":  # one operator a layer to a compiler, which would unroll torch's own RNN, a step at a time
        return name if torch.compiler.is_compiling() else None
    return name if plain(*operands) else None


def alike(operands: list[Any], tokens: bool) -> bool:
    """Are input, hx (or None) and all weights there, of one type (ids aside) on one device? If not, torch runs them or
    refuses them in its own words.
    """
    input, hx, *weights = operands
    if any(weight is None for weight in weights):
        return False
    device, dtype = input.device, weights[-1].dtype
    numbers = weights if hx is None else [hx, *weights]
    return (tokens or input.dtype == dtype) and all(x.dtype == dtype and x.device == device for x in numbers)


def _watched_layers(
    rnn: Any,
    backend: str,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    onlooker: str | None,
) -> tuple[Tensor, Tensor]:
    reverse = (False, True) if rnn.bidirectional else (False,)
    directions, each = len(reverse), len(reverse) * (4 if rnn.bias else 2)
    batch_first = rnn.batch_first and batch_sizes is None
    output, states = input, []
    for i in range(rnn.num_layers):
        if i > 0:
            output = _dropout(rnn, output)
        h0 = None if hx is None else hx[i * directions : (i + 1) * directions]
        own, turned = weights[i * each : (i + 1) * each], batch_first and i == rnn.num_layers - 1
        if backend not in ("torch", "onnx") and onlooker is None:
            layer = choose_layer(backend, own[1].device, own[1].dtype, rnn.hidden_size, _ACTIVATIONS[rnn.mode], reverse)
            assert layer is not None
            output, state = elman_layer(layer, output, h0, own, batch_sizes, turned)
        else:
            output, state = _watched_layer(rnn, backend, output, h0, own, batch_sizes, reverse)
            output = as_batch_first(output) if turned else output
        states.append(state)
    return output, states[0] if rnn.num_layers == 1 else torch.cat(states)


def _watched_layer(
    rnn: Any,
    backend: str,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """One layer by ONNX's operator, by this library's registered one, or by tensor operations."""
    nonlinearity = _ACTIVATIONS[rnn.mode]
    if backend == "onnx":
        return layer_in_onnx(input, h0, weights, nonlinearity, len(reverse))
    if backend != "torch" or torch.compiler.is_compiling():
        return registered_layer(input, h0, batch_sizes, weights, backend, nonlinearity, reverse)
    if input.dtype in TOKEN_TYPES and input.device.type == "cpu":
        check_tokens(input, weights[0].shape[1])
    return layer_by_tensor_operations(input, h0, weights, batch_sizes, nonlinearity, reverse)


def as_batch_first(output: Tensor) -> Tensor:
    """(T, B, C) as (B, T, C), the memory as it is; to autograd no view, where nobody watches."""
    return output.transpose_(0, 1) if addressable(output) else output.transpose(0, 1)


def _torch_layers(
    rnn: Any, input: Tensor, hx: Tensor, weights: Sequence[Any], batch_sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The layers whose weights these are, by torch's own path; input (T, B, C) or packed."""
    batch_first = rnn.batch_first and batch_sizes is None
    return torch_rnn(
        input.transpose(0, 1) if batch_first else input,
        hx,
        list(weights),
        batch_sizes,
        _ACTIVATIONS[rnn.mode],
        rnn.bias,
        hx.size(0) // (2 if rnn.bidirectional else 1),
        rnn.dropout,
        rnn.training,
        rnn.bidirectional,
        batch_first,
    )


def _one_hot(rnn: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (T, B, I) or (N, I) of ids (T, B) or (N,); on a CPU in the order of memory that a user's rows have, by which
    torch chooses the operators that run.
    """
    if rnn.batch_first and tokens.dim() == 2 and tokens.device.type == "cpu":
        return one_hot_rows(tokens.t(), rnn.input_size, dtype).transpose(0, 1)
    return one_hot_rows(tokens, rnn.input_size, dtype)


def _torch_layers_of_tokens(
    rnn: Any, tokens: Tensor, hx: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Layer 0 by tensor operations, which can read a table; the others by torch's own path."""
    reverse = (False, True) if rnn.bidirectional else (False,)
    directions, each = len(reverse), len(reverse) * (4 if rnn.bias else 2)
    output, state = _watched_layer(rnn, "torch", tokens, hx[:directions], weights[:each], batch_sizes, reverse)
    if rnn.num_layers == 1:
        return as_batch_first(output) if rnn.batch_first and batch_sizes is None else output, state
    output, states = _torch_layers(rnn, _dropout(rnn, output), hx[directions:], weights[each:], batch_sizes)
    return output, torch.cat([state, states])
