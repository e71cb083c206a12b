"""Backward passes by torch's and the registered operators alone, for torch's compiled autograd.

It reads the backward of an autograd.Function as a compiler reads code, so nothing there may take an address or look at
a number, and a pass through autograd within it finds no graph. Each Function of this library asks `read` where
its kernel may not run.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def read() -> bool:
    """Is this backward pass being read by a compiler?"""
    return torch.compiler.is_compiling()


def elman_gradients(
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
    """As Layer.backward in elman_layer.py: the gradients of (input, h0, *weights), None where they are not needed."""
    operator: Any = torch.ops.charrnn_fast.elman_layer_backward
    options = (list(weights), backend, nonlinearity, list(reverse), list(needs_grad))
    found = operator(grad_out, grad_h_n, out, input, h0, batch_sizes, *options)
    places = [sum(needs_grad[:i]) for i in range(len(needs_grad))]
    return [found[place] if needs else None for place, needs in zip(places, needs_grad, strict=True)]


def loss_gradients(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those of input (N, H), weight (V, H) and bias (V,) of linear_cross_entropy: (softmax - one_hot) / count."""
    counts = target != ignore_index
    logits = F.linear(input, weight, bias)
    ids = target.where(counts, 0).unsqueeze(-1)
    grad = logits.softmax(-1).scatter_add(-1, ids, logits.new_full((1, 1), -1.0).expand(ids.shape))
    factor = grad_loss * counts / (counts.sum() if reduction == "mean" else 1)
    grad = grad * factor.to(grad.dtype).unsqueeze(-1)
    return grad @ weight, grad.t() @ input, None if bias is None else grad.sum(0)


def language_model_gradients(
    nonlinearity: str,
    tokens: Tensor,
    targets: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    grad_loss: Tensor | None,
    grad_h_n: Tensor | None,
) -> list[Tensor | None]:
    """All gradients of language_model_loss, from h0 to head_bias in its arguments' order."""
    biases = [bias for bias in (bias_ih, bias_hh) if bias is not None]
    weights, state = [weight_ih, weight_hh, *biases], None if h0 is None else h0[None]
    forward: Any = torch.ops.charrnn_fast.elman_layer
    out, _ = forward(tokens, state, None, weights, "native", nonlinearity, [False])
    grad_out = grad_head = grad_head_bias = None
    if grad_loss is not None:
        head = (head_weight, head_bias, targets.flatten(), "mean", -100)
        grad_rows, grad_head, grad_head_bias = loss_gradients(grad_loss, out.flatten(0, 1), *head)
        grad_out = grad_rows.view(out.shape)
    upstream = (grad_out, None if grad_h_n is None else grad_h_n[None], out, tokens, state)
    needs = [False, h0 is not None, *(True for _ in weights)]
    _, grad_h0, grad_ih, grad_hh, *of_biases = elman_gradients(
        "native", *upstream, weights, None, nonlinearity, [False], needs
    )
    grad_bias_ih = None if bias_ih is None else of_biases[0]
    grad_bias_hh = None if bias_hh is None else of_biases[-1]
    grad_state = None if grad_h0 is None else grad_h0[0]
    return [grad_state, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_head, grad_head_bias]
