"""Forward, loss and gradients of a one-layer character model as one differentiable operation.

    h_t = f(W_ih[:, token_t] + b + h_{t-1} W_hh^T),   loss = mean over (t, b) of -log softmax(h_t W_q^T + b_q)[target_t]

The kernels take a few rows at a time through all steps and back, so the states never leave the cache and nothing of
size (T, B, V) is kept. On a CPU loss and all gradients come from one call, and the backward pass has but to scale them.
On a GPU forward is two launches and leaves a sum of every gradient by program; backward adds and scales these in one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.kernels import native
from charrnn_fast.kernels.triton.language_model_types import Weights, windows

from . import backends
from .autograd import HandedOutOnce, apply_of, must_recompute, read_by_compiler, recomputed
from .context import addressable
from .elman import elman, gradients_by_operator, registered_layer
from .elman_layer import token_table
from .linear_cross_entropy import linear_cross_entropy, loss_gradients
from .tokens import check_tokens


def why_not(
    tokens: Tensor, targets: Tensor, h0: Tensor | None, weights: Sequence[Tensor | None], backend: str = "auto"
) -> str | None:
    """None where `language_model_loss` runs and is faster than `elman` and `linear_cross_entropy`, else one clause.

    Args:
        tokens, targets, h0, backend: as in `language_model_loss`.
        weights: its weight_ih, weight_hh, bias_ih, bias_hh (or no second bias), head_weight, head_bias.
    """
    if not addressable(tokens, targets, h0, *weights):
        return "a transform, a mode, a compiler or a tensor that is not plain memory needs PyTorch's own operators"
    weight_ih = weights[0]
    kind = None if weight_ih is None else weight_ih.device.type
    if weight_ih is None or kind not in ("cpu", "cuda") or torch.is_autocast_enabled(kind):
        return "it runs on a CPU or a GPU without autocast"
    if tokens.dim() != 2 or tokens.shape != targets.shape or not tokens.numel():
        return "it takes (T, B) tokens and as many targets"
    if tokens.dtype != torch.int64 or targets.dtype != torch.int64:
        return "it takes int64 tokens and targets"
    if not torch.is_grad_enabled():
        return "no gradients are wanted"
    dtype, wanted = weight_ih.dtype, False
    for weight in weights:
        if weight is not None:
            wanted |= weight.requires_grad
            if weight.dtype != dtype:
                return "it takes tensors of one dtype"
    if not wanted:
        return "no gradients are wanted"
    if h0 is not None and (h0.requires_grad or h0.dtype != dtype or h0.shape != (tokens.shape[1], weight_ih.shape[0])):
        return "the state is not a constant (B, H) of the weights' dtype"
    hidden, vocab = weight_ih.shape
    sizes = {"hidden_size": hidden, "batch_size": tokens.shape[1], "num_classes": vocab}
    name, device = "language_model_loss", weight_ih.device
    chosen = backends.choose(name, device, dtype, **sizes, backend=backend)
    if chosen == "torch":
        found = backends.explain(dtype=dtype, device=device, operation=name, **sizes, backend=backend)
        return found.why_not["native" if device.type == "cpu" else "triton"]
    if chosen == "triton" and not all(x is None or x.is_contiguous() for x in (h0, *weights)):
        return "a weight or the state is not contiguous"
    return None


def language_model_loss(
    tokens: Tensor,
    targets: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    *,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mean loss in nats and the last state of a one-layer model, by one kernel.

    Meant for calls for which `why_not` has no objection; all floating-point tensors on one device in one dtype, float32
    or, on a CPU, float64.

    Args:
        tokens, targets: (T, B) int64 ids in 0..V-1, any strides; targets of -100 do not count.
        h0: (B, H), or None for zeros.
        weight_ih: (H, V). weight_hh: (H, H). bias_ih, bias_hh: (H,) or None; the first if there is but one.
        head_weight: (V, H). head_bias: (V,) or None.
        nonlinearity: "tanh" or "relu".
        backend: the model's.

    Returns: loss, a scalar, and h_n (B, H). Where h_n is differentiated, or the loss twice, the backward pass computes
    everything again by `elman` and `linear_cross_entropy`.

    Raises: IndexError for a token or target outside 0..V-1, ValueError for another nonlinearity. On a GPU such a token
    fails a device assertion, unless ids are known to be in range, and such a target makes the loss NaN.
    """
    apply = _apply
    if weight_ih.is_cuda or backends.requested(backend) == "triton":
        apply = _apply_by_triton
        check_tokens(tokens, weight_ih.shape[1])
    return apply(tokens, targets, nonlinearity, h0, weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias)


class _ByNative(torch.autograd.Function):
    """The native kernel under autograd; no setup_context, for which PyTorch inspects the signature at every call.

    floats: h0, weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, targets: Tensor, nonlinearity: str, *floats: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens, targets, *floats)
        ctx.set_materialize_grads(False)
        ctx.nonlinearity = nonlinearity
        loss, h_n, gradients = gradients_in_one_call(nonlinearity, tokens, targets, *floats)
        ctx.gradients = HandedOutOnce(gradients)
        return loss, h_n

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, grad_h_n = grad_outputs
        saved = ctx.saved_tensors
        unusual = grad_h_n is not None or must_recompute(grad_loss, *saved)
        if unusual and read_by_compiler():
            return _wanted(ctx, _gradients_to_compilers(ctx.nonlinearity, saved, *grad_outputs))
        # Given away, so that autograd can keep them as they are in place of copies; a graph that is retained and walked
        # again makes them anew, the same bits.
        gradients = ctx.gradients.take()
        factor = None if unusual or grad_loss is None else grad_loss.item()
        if unusual or (factor is not None and not math.isfinite(factor)):  # see linear_cross_entropy.py
            gradients = _recomputed(ctx, saved, grad_loss, grad_h_n)
        elif factor is None:
            gradients = [None] * (len(saved) - 2)
        else:
            if gradients is None:
                gradients = gradients_in_one_call(ctx.nonlinearity, *saved)[2]
            if factor != 1.0:  # nearly never
                gradients = [None if g is None else g.mul_(grad_loss) for g in gradients]
        return _wanted(ctx, gradients)


class _ByTriton(torch.autograd.Function):
    """The Triton kernels under autograd: backward launches once, and waits for nothing. Arguments as above."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, targets: Tensor, nonlinearity: str, *floats: Any) -> tuple[Tensor, Tensor]:
        from charrnn_fast.kernels.triton import language_model as kernels

        h0, *weights = floats
        ctx.save_for_backward(tokens, targets, *floats)
        ctx.set_materialize_grads(False)
        ctx.nonlinearity = nonlinearity
        batch = windows(tokens.t(), targets.t())
        loss, h_n, ctx.sums = kernels.language_model_forward(_weights(*weights), batch, h0, nonlinearity=nonlinearity)
        return loss, h_n

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, grad_h_n = grad_outputs
        saved = ctx.saved_tensors
        gradients: Sequence[Tensor | None]
        if grad_h_n is not None or must_recompute(grad_loss, *saved):
            if read_by_compiler():
                gradients = _gradients_to_compilers(ctx.nonlinearity, saved, *grad_outputs)
            else:
                gradients = _recomputed(ctx, saved, grad_loss, grad_h_n)
        elif grad_loss is None:
            gradients = [None] * (len(saved) - 2)
        else:
            from charrnn_fast.kernels.triton import language_model as kernels

            found = kernels.language_model_backward(grad_loss, _weights(*saved[3:]), ctx.sums)
            of_cell = (None, found.weight_ih, found.weight_hh, found.bias_ih, found.bias_hh)
            gradients = (*of_cell, found.head_weight, found.head_bias)
        return _wanted(ctx, gradients)


def _wanted(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What backward returns."""
    found: list[Tensor | None] = [None, None, None]
    for gradient, needs in zip(gradients, ctx.needs_input_grad[3:], strict=True):
        found.append(gradient if needs else None)
    return tuple(found)


_apply, _apply_by_triton = apply_of(_ByNative), apply_of(_ByTriton)


def _weights(
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
) -> Weights:
    """In the order of the Triton launchers."""
    return Weights(weight_ih, weight_hh, head_weight, bias_ih, bias_hh, head_bias)


def gradients_in_one_call(
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
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """Loss, last state, and the loss's gradients of all arguments from h0 on."""
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    table = token_table(weights, 1)
    loss, h_n, grad_table, grad_weight_hh, grad_head_weight, grad_head_bias, grad_h0 = native.language_model_loss(
        tokens, targets, table, weight_hh, head_weight, head_bias, h0, nonlinearity=nonlinearity
    )
    grad_bias = None if bias_ih is None else grad_table.sum(0)
    second = None if bias_hh is None or grad_bias is None else grad_bias.clone()  # the two are changed apart
    of_cell = (grad_h0, grad_table.t(), grad_weight_hh, grad_bias, second)
    return loss, h_n, (*of_cell, grad_head_weight, grad_head_bias)


def _recomputed(
    ctx: Any, saved: Sequence[Any], grad_loss: Tensor | None, grad_h_n: Tensor | None
) -> list[Tensor | None]:
    """The gradients by the separate operations, differentiable where a graph is wanted."""
    tokens, targets, *operands = saved

    def run(h0: Tensor | None, *weights: Any) -> tuple[Tensor, Tensor]:
        *cell, head_weight, head_bias = weights
        backend = "native" if cell[0].device.type == "cpu" else "auto"
        states, h_n = elman(tokens, h0, *cell, nonlinearity=ctx.nonlinearity, backend=backend)
        rows = states.transpose(0, 1).flatten(0, 1)
        return linear_cross_entropy(rows, head_weight, targets.t().flatten(), linear_bias=head_bias), h_n

    return recomputed(run, operands, ctx.needs_input_grad[3:], (grad_loss, grad_h_n))


def _gradients_to_compilers(
    nonlinearity: str, saved: Sequence[Any], grad_loss: Tensor | None, grad_h_n: Tensor | None
) -> list[Tensor | None]:
    """All gradients, from h0 to head_bias, where a compiler reads a Function's backward."""
    tokens, targets, h0, weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias = saved
    biases = [bias for bias in (bias_ih, bias_hh) if bias is not None]
    weights, state = [weight_ih, weight_hh, *biases], None if h0 is None else h0[None]
    backend = "native" if weight_ih.device.type == "cpu" else "triton"
    out, _ = registered_layer(tokens, state, None, weights, backend, nonlinearity, [False])
    grad_out = grad_head = grad_head_bias = None
    if grad_loss is not None:
        head = (head_weight, head_bias, targets.flatten(), "mean", -100)
        grad_rows, grad_head, grad_head_bias = loss_gradients(grad_loss, out.flatten(0, 1), *head)
        grad_out = grad_rows.view(out.shape)
    upstream = (grad_out, None if grad_h_n is None else grad_h_n[None])
    needs = [False, h0 is not None, *(True for _ in weights)]
    arguments = (tokens, state, None, weights, backend, nonlinearity, [False])
    _, grad_h0, grad_ih, grad_hh, *of_biases = gradients_by_operator(upstream, (out,), arguments, needs)
    grad_bias_ih = None if bias_ih is None else of_biases[0]
    grad_bias_hh = None if bias_hh is None else of_biases[-1]
    grad_state = None if grad_h0 is None else grad_h0[0]
    return [grad_state, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_head, grad_head_bias]
