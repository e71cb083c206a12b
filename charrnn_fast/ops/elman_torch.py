"""The "torch" backend of elman: torch's own RNN for whole stacks, and one layer by tensor operations.

    h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh),   f = tanh or relu

The tensor operations run on any device, take token ids, walk one direction alone, and can be differentiated any number
of times and transformed by torch.func. On a CPU they are also PyTorch's fastest way for token ids. Forward+backward on
one core against torch.nn.RNN on one-hot rows, alternating, medians in ms: T=32 B=1024 V=28 H=32 15.7 and 19.3,
T=35 B=32 V=28 H=512 37.7 and 41.2, T=64 B=1 V=90 H=256 5.6 and 6.6, T=1000 B=1 V=28 H=128 47.7 and 65.6,
T=64 B=16 V=5000 H=128 9.9 and 51.5.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn

from charrnn_fast.reference.elman import ACTIVATIONS, walk

from .tokens import TOKEN_TYPES, one_hot_rows

# Torch's own class, bound here and nowhere else when the library is imported: torch.nn.RNN may be FusedRNN by the time
# of a call, as patching that name is the commonest way to try a drop-in.
TorchRNN = nn.RNN


def torch_rnn(
    input: Tensor,
    hx: Tensor,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """What torch.nn.RNN runs for a stack of layers: ATen on a CPU, cuDNN or MIOpen on a GPU. torch.jit.script takes it.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, or packed (N, I). hx: (L*D, B, H).
        weights: flat, as ``RNNBase._flat_weights``.

    Returns:
        output like input with D*H columns, and h_n (L*D, B, H).
    """
    # cuDNN has a backward only for what ran in training mode, so that says "a gradient may follow", not "drop out".
    dropout, training = (dropout if training else 0.0), training or torch.is_grad_enabled()
    if batch_sizes is None:
        if nonlinearity == "tanh":
            return _VF.rnn_tanh(
                input, hx, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first
            )
        return _VF.rnn_relu(input, hx, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first)
    if nonlinearity == "tanh":
        return _VF.rnn_tanh(input, batch_sizes, hx, weights, has_biases, num_layers, dropout, training, bidirectional)
    return _VF.rnn_relu(input, batch_sizes, hx, weights, has_biases, num_layers, dropout, training, bidirectional)


def layer_by_tensor_operations(
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """All D directions of one layer.

    Args:
        input: (T, B, I) or packed (N, I); or token ids (T, B) or (N,). h0: (D, B, H) or None.
        weights: for each direction W_ih (H, I), W_hh (H, H) and no bias, one, or b_ih and b_hh, each (H,).
        reverse: for each direction, does it walk time backwards.

    Returns:
        output (T, B, D*H) or (N, D*H), direction d in columns d*H:(d+1)*H, and h_n (D, B, H).
    """
    activation = ACTIVATIONS[nonlinearity]
    outputs, states = [], []
    for direction, backwards in enumerate(reverse):
        weight_ih, weight_hh, bias = of_direction(weights, direction, len(reverse))
        x = projected(input, weight_ih, bias)
        if h0 is not None:
            start = h0[direction]
        else:
            batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0]) if len(batch_sizes) else 0
            start = x.new_zeros(batch, weight_hh.shape[0])
        weight = weight_hh.t()

        def step(x: Tensor, state: Tensor, weight: Tensor = weight) -> Tensor:
            return activation(torch.addmm(x, state, weight))

        output, state = walk(x, start, step, reverse=backwards, batch_sizes=batch_sizes)
        outputs.append(output)
        states.append(state)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)), torch.stack(states)


def layer_by_torch(
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """All D directions of one layer by torch's own RNN where it can run them. Arguments and results as above."""
    tokens, each = input.dtype in TOKEN_TYPES, len(weights) // len(reverse)
    backwards = reverse[0]
    turned = len(reverse) == 1 and batch_sizes is None  # what walks backwards can be
    if (backwards and not turned) or (tokens and input.device.type == "cpu"):
        return layer_by_tensor_operations(input, h0, weights, batch_sizes, nonlinearity, reverse)
    if backwards:
        input = input.flip(0)
    if each == 3:  # it has two biases or none
        none = torch.zeros_like(weights[2])
        weights = [w for i in range(0, len(weights), 3) for w in (*weights[i : i + 3], none)]
        each = 4
    if tokens:
        input = one_hot_rows(input, weights[0].shape[1], weights[0].dtype)
    if h0 is None:
        batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        h0 = input.new_zeros(len(reverse), batch, weights[1].shape[0])
    options: tuple[Any, ...] = (nonlinearity, each == 4, 1, 0.0, True, len(reverse) == 2)
    output, h_n = torch_rnn(input, h0, list(weights), batch_sizes, *options)
    return output.flip(0) if backwards else output, h_n


def projected(input: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """The input of one direction's recurrence, (T, B, H) or packed (N, H), of features or token ids."""
    if input.dtype not in TOKEN_TYPES:
        return F.linear(input, weight_ih, bias)
    # A gather from a contiguous table is far cheaper than one from the transposed weight.
    table = weight_ih.t().contiguous()
    return F.embedding(input, table if bias is None else table + bias)


def of_direction(weights: Sequence[Tensor], direction: int, directions: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(W_ih, W_hh, the sum of the biases or None) of one direction out of the flat weights of a layer."""
    each = len(weights) // directions
    own = weights[direction * each : (direction + 1) * each]
    return own[0], own[1], None if each == 2 else own[2] if each == 3 else own[2] + own[3]
