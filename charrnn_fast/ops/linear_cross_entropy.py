"""Linear head and cross-entropy as one differentiable operation that keeps no logits.

    o = h W^T + b,    loss = -log softmax(o)[target],    d loss / d o = softmax(o) - one_hot(target)

The native kernel walks the rows once: it computes a row's logits, its loss and, while they are at hand, its share of
the gradients of h, W and b. So the backward pass only has to scale them by the gradient of the loss.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from charrnn_fast.kernels import native

from . import backends
from .elman_torch import tensor_operations_only

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), in nats: torch.nn.functional's contract.

    Args:
        input: (N, H), or (H,) with a scalar target.
        linear_weight: (V, H). linear_bias: (V,) or None.
        target: (N,) int64 class indices; anything else that torch's cross_entropy takes goes to torch.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,).
        ignore_index: rows with this target count neither in the loss nor in the gradients.

    Returns: a scalar, or (N,) for "none", in the input's dtype.

    Raises: ValueError for another reduction; IndexError for a target outside 0..V-1; RuntimeError for shapes that do
    not match, as torch.nn.functional.cross_entropy words it.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    operands = [t for t in (input, linear_weight, linear_bias) if t is not None]
    if _native_cannot(operands, target) is not None:
        return _by_tensor_operations(input, linear_weight, linear_bias, target, reduction, ignore_index)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in operands)):
        return native.linear_cross_entropy(
            input, linear_weight, linear_bias, target, ignore_index, reduction, need_grad=False
        )[0]
    return _LinearCrossEntropy.apply(input, linear_weight, linear_bias, target, reduction, ignore_index)


def _native_cannot(operands: list[Tensor], target: Tensor) -> str | None:
    """None if the native kernel takes this call, else one clause saying why not."""
    if backends.requested("auto") not in ("auto", "native"):
        return "another backend was asked for"
    if tensor_operations_only() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return "a transform, compilation or autocast needs PyTorch's own operators"
    input, weight = operands[:2]
    shapes = input.dim() == 2 and weight.dim() == 2 and input.shape[1] == weight.shape[1]
    if not (shapes and target.dtype == torch.int64 and target.shape == input.shape[:1] and len(target) > 0):
        return "it takes (N, H) rows with (N,) class indices"
    if len(operands) == 3 and operands[2].shape != weight.shape[:1]:
        return "the bias is not (V,)"
    if any(t.device.type != "cpu" for t in (*operands, target)) or any(t.dtype != input.dtype for t in operands):
        return "it runs on CPU tensors of one dtype"
    return native.elman_limits(input.shape[1], input.dtype)


def _by_tensor_operations(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, ignore_index: int
) -> Tensor:
    return F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction, ignore_index=ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    """The native kernel. Inputs and target are as in `linear_cross_entropy`, checked."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        reduction: str,
        ignore_index: int,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias, target)
        ctx.reduction, ctx.ignore_index = reduction, ignore_index
        loss, *ctx.gradients = native.linear_cross_entropy(
            input, weight, bias, target, ignore_index, reduction, need_grad=reduction != "none"
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grad_outputs
        input, weight, bias, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            gradients = _differentiable_backward(ctx, grad_loss)
        elif ctx.reduction == "none":
            _, *gradients = native.linear_cross_entropy(
                input, weight, bias, target, ctx.ignore_index, "none", need_grad=True, grad_loss=grad_loss
            )
        elif grad_loss.item() == 1.0:  # nearly always, and scaling would be another pass over (N, H)
            gradients = ctx.gradients
        else:
            gradients = [None if g is None else g * grad_loss for g in ctx.gradients]
        wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)]
        return (*wanted, None, None, None)


def _differentiable_backward(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients of input, weight and bias as differentiable functions of everything."""
    input, weight, bias, target = ctx.saved_tensors
    loss = _by_tensor_operations(input, weight, bias, target, ctx.reduction, ctx.ignore_index)
    wanted = [i for i, t in enumerate((input, weight, bias)) if t is not None and t.requires_grad]
    sources = [(input, weight, bias)[i] for i in wanted]
    found = torch.autograd.grad(loss, sources, grad_loss, create_graph=True)
    gradients: list[Tensor | None] = [None, None, None]
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients
