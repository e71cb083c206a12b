"""Floating-point operations of the registered operators, for torch.utils.flop_counter and what asks its registry.

They are those that torch's own operators would be counted with for the same result, two for each multiplication of a
matrix product: what a kernel computes once more in place of keeping it is not counted, nor what it leaves out.

Called eagerly under a FlopCounterMode, the library runs torch's operators, as under every mode of a user's: a mode may
do more than count, and no other knows what an operator of this library stands for. The formulas are for graphs that
already hold the operators: exported and compiled programs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import elman as _elman  # noqa: F401  (which registers its operators)
from . import elman_checkpointed as _elman_checkpointed  # noqa: F401
from . import linear_cross_entropy as _linear_cross_entropy  # noqa: F401


@register_flop_formula(torch.ops.charrnn_fast.elman_layer, get_raw=True)
def elman_layer_flops(
    input: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    backend: str,
    nonlinearity: str,
    reverse: Sequence[bool],
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """2 N H (I + H) for each direction, N the rows of all steps; token ids count as the one-hot rows that they are."""
    hidden, features = weights[0].shape
    return 2 * len(reverse) * _rows(input, batch_sizes) * hidden * (features + hidden)


@register_flop_formula(torch.ops.charrnn_fast.elman_layer_backward, get_raw=True)
def elman_layer_backward_flops(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    out: Tensor,
    input: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    backend: str,
    nonlinearity: str,
    reverse: Sequence[bool],
    needs_grad: Sequence[bool],
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """Of each product its gradients that are asked for; the state's own is needed at every step but the first."""
    hidden, features = weights[0].shape
    each, rows = len(weights) // len(reverse), _rows(input, batch_sizes)
    first = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    products = 0
    for direction in range(len(reverse)):
        needs_ih, needs_hh = needs_grad[2 + direction * each : 4 + direction * each]
        products += rows * hidden * features * (bool(needs_grad[0]) + bool(needs_ih))
        products += rows * hidden * hidden * bool(needs_hh)
        products += (rows - (0 if needs_grad[1] else first)) * hidden * hidden
    return 2 * products


@register_flop_formula(torch.ops.charrnn_fast.elman_checkpointed, get_raw=True)
def elman_checkpointed_flops(
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    *options: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """As elman_layer's, of all layers."""
    matrices = (w for w in weights if w.dim() == 2)
    return sum(2 * _rows(input, batch_sizes) * matrix.numel() for matrix in matrices)


@register_flop_formula(torch.ops.charrnn_fast.elman_checkpointed_backward, get_raw=True)
def elman_checkpointed_backward_flops(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    kept: Tensor,
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    backend: str,
    nonlinearity: str,
    num_layers: int,
    directions: int,
    dropout: float,
    steps: int,
    needs_grad: Sequence[bool],
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """As elman_layer_backward's, of all layers: what it computes once more is not counted."""
    needs_input, needs_hx, *needs_weights = needs_grad
    each = len(weights) // num_layers
    found = 0
    for i in range(num_layers):
        own = slice(i * each, (i + 1) * each)
        needs = [needs_input or i > 0, needs_hx, *needs_weights[own]]
        layer = (input, hx, batch_sizes, weights[own], backend, nonlinearity, [False] * directions, needs)
        found += elman_layer_backward_flops(grad_out, grad_h_n, kept, *layer)
    return found


@register_flop_formula(torch.ops.charrnn_fast.linear_cross_entropy, get_raw=True)
def linear_cross_entropy_flops(input: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """2 N V H, the logits'."""
    return 2 * input.shape[0] * weight.shape[0] * weight.shape[1]


@register_flop_formula(torch.ops.charrnn_fast.linear_cross_entropy_backward, get_raw=True)
def linear_cross_entropy_backward_flops(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    count: Tensor,
    reduction: str,
    ignore_index: int,
    needs_grad: Sequence[bool],
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    """2 N V H for each of the gradients of input and weight that is asked for."""
    return 2 * input.shape[0] * weight.shape[0] * weight.shape[1] * (bool(needs_grad[0]) + bool(needs_grad[1]))


def _rows(input: Tensor, batch_sizes: Tensor | None) -> int:
    return input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
