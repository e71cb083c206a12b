"""Linear head and cross-entropy as one differentiable operation that keeps no logits.

    o = h W^T + b,    loss = -log softmax(o)[target],    d loss / d o = softmax(o) - one_hot(target)

The native kernel walks the rows once: it computes a row's logits, its loss and, while they are at hand, its share of
the gradients of h, W and b. So the backward pass only has to scale them by the gradient of the loss. The Triton kernels
keep each row's log-sum-exp and make the logits again when that gradient is known: on a GPU that costs less than scaling
would (another pass over the gradient of h, and in fp16 what is below its range), and nobody waits to see if it is 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from charrnn_fast.kernels import native

from . import backends
from .autograd import HandedOutOnce, apply_of, must_recompute, read_by_compiler
from .context import (
    OPERATORS,
    REGISTERED,
    addressable,
    autocast,
    in_autocast,
    in_plain_memory,
    plain,
    watched,
)
from .precision import matmul_precision
from .registration import Operation, register
from .tokens import ids_are_known

REDUCTIONS = ("mean", "sum", "none")
_16_BIT = (torch.bfloat16, torch.float16)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), in nats: torch.nn.functional's contract.

    Args:
        input: (N, H), or (H,) with a scalar target.
        linear_weight: (V, H), or (V, d_1, ..., d_K, H) for a K-dimensional loss. linear_bias: its shape without H, or
            None.
        target: (N,) int64 class indices; or what torch's cross_entropy takes beside them: class probabilities, and
            (N, d_1, ..., d_K).
        weight: (V,), a factor for each class, or None.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,).
        ignore_index: rows with this target count neither in the loss nor in the gradients; None is -100.
        label_smoothing: the share, 0 to 1, of the uniform distribution in each target's.

    Kernels run for (N, H) rows with class indices, without weight and smoothing; all else is torch's operators.

    Returns: a scalar, or (N,) for "none", in the input's dtype.

    Under autocast, as there, products are in its type and the loss is float32.

    Raises: RuntimeError if ``CHARRNN_BACKEND`` names a backend that cannot run on this device in this type;
    ValueError for another reduction; IndexError for a target outside 0..V-1, on a CPU (a GPU fails a device
    assertion, as torch.nn.functional.cross_entropy does); RuntimeError for shapes that do not match, in its words.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    # What is no reduction and no index torch refuses in its turn, after shapes and types.
    known = reduction in REDUCTIONS and isinstance(ignore_index, int) and -(2**63) <= ignore_index < 2**63
    onlooker = watched()
    backend = "torch"
    if known and weight is None and label_smoothing == 0.0 and onlooker is not OPERATORS:
        backend = _backend(input, linear_weight, linear_bias, target, onlooker)
    if backend == "triton":
        return _by_triton(input, linear_weight, linear_bias, target, reduction, ignore_index, onlooker)
    if backend == "torch":
        return _by_tensor_operations(
            input, linear_weight, linear_bias, target, reduction, ignore_index, weight, label_smoothing
        )
    if torch.is_grad_enabled() and (
        input.requires_grad or linear_weight.requires_grad or (linear_bias is not None and linear_bias.requires_grad)
    ):
        return _apply_native(input, linear_weight, linear_bias, target, reduction, ignore_index, input.dtype)
    operands = (input, linear_weight, linear_bias, target)
    return native.linear_cross_entropy(*operands, ignore_index, reduction, need_grad=False)[0]


def _backend(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, onlooker: str | None) -> str:
    """The backend of this call: "torch" for shapes, types and kinds of tensors that the kernels do not take."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and isinstance(target, Tensor)):
        return "torch"  # which says so in its own words
    operands = (input, weight, bias, target)
    if not (in_plain_memory(operands) if onlooker is None else plain(*operands)):
        return "torch"
    shape, of_weight, device = input.shape, weight.shape, input.device
    if len(shape) != 2 or len(of_weight) != 2 or shape[1] != of_weight[1] or weight.numel() == 0 or shape[0] == 0:
        return "torch"
    if target.dtype != torch.int64 or target.shape != shape[:1] or device != weight.device or device != target.device:
        return "torch"
    if bias is not None and (bias.shape != of_weight[:1] or bias.device != device):
        return "torch"
    casts, dtypes = in_autocast(device.type), [input.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
    if casts:
        cast = torch.get_autocast_dtype(device.type)
        dtypes = [cast if dtype in (torch.float32, *_16_BIT) else dtype for dtype in dtypes]
    dtype = dtypes[0]
    if dtypes[1] != dtype or dtypes[2] != dtype or not dtype.is_floating_point:
        return "torch"
    name = backends.choose("linear_cross_entropy", device, dtype)
    if name == "native" and (casts or onlooker is not None):  # which need PyTorch's own operators
        return "torch"
    return name


def _by_tensor_operations(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    if isinstance(weight, Tensor) and weight.dim() > 2:  # (V, d_1, ..., d_K, H)
        rows = F.linear(input, weight.flatten(0, -2), None if bias is None else bias.flatten())
        logits = rows.unflatten(-1, weight.shape[:-1])
    else:
        logits = F.linear(input, weight, bias)
    return F.cross_entropy(
        logits,
        target,
        class_weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


@dataclass
class LinearCrossEntropy(Operation):
    """The Triton kernels as operators. Arguments as in `linear_cross_entropy`, checked, operands of one dtype."""

    OPERANDS, RESULTS, UPSTREAM, KEPT = ("input", "weight", "bias"), ("loss", "lse", "count"), 1, ("lse", "count")

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    reduction: str
    ignore_index: int
    loss_dtype: torch.dtype

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log-sum-exp of each row (N,), number of rows that count ()."""
        _check_target(self.target, self.weight.shape[0], self.ignore_index)
        return self.by_kernels()

    def by_kernels(self) -> tuple[Tensor, Tensor, Tensor]:
        from charrnn_fast.kernels.triton import linear_cross_entropy as kernels

        arguments = (self.input, self.weight, self.bias, self.target, self.ignore_index, self.reduction)
        precision = matmul_precision(self.input.device, self.input.dtype)
        return kernels.linear_cross_entropy_forward(*arguments, precision=precision, loss_dtype=self.loss_dtype)

    def shapes(self) -> tuple[Tensor, Tensor, Tensor]:
        input, accumulator = self.input, torch.promote_types(self.input.dtype, torch.float32)
        rows = (input.shape[0],)
        loss = input.new_empty(rows if self.reduction == "none" else (), dtype=self.loss_dtype)
        return loss, input.new_empty(rows, dtype=accumulator), input.new_empty((), dtype=accumulator)

    def flops(self) -> int:
        """2 N V H, the logits'."""
        return 2 * self.input.shape[0] * self.weight.shape[0] * self.weight.shape[1]

    def backward(
        self, grads: Sequence[Tensor | None], kept: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> list[Tensor | None]:
        from charrnn_fast.kernels.triton import linear_cross_entropy as kernels

        (grad_loss,), (lse, count), (needs_input, needs_weight, needs_bias) = grads, kept, needs_grad
        assert grad_loss is not None
        grad_input, grad_weight, grad_bias = kernels.linear_cross_entropy_backward(
            grad_loss,
            *(self.input, self.weight, self.bias, self.target, self.ignore_index, self.reduction, lse, count),
            precision=matmul_precision(self.input.device, self.input.dtype),
            need_hidden=needs_input,
            need_weight=needs_weight or needs_bias,
        )
        found = (grad_input if needs_input else None, grad_weight if needs_weight else None)
        return [*found, grad_bias if needs_bias else None]

    def backward_flops(self, needs_grad: Sequence[bool]) -> int:
        """2 N V H for each of the gradients of input and weight that is wanted."""
        return self.flops() * (bool(needs_grad[0]) + bool(needs_grad[1]))

    def by_tensor_operations(self, *operands: Any) -> tuple[Tensor]:
        input, weight, bias = operands
        loss = _by_tensor_operations(input, weight, bias, self.target, self.reduction, self.ignore_index)
        return (loss.to(self.loss_dtype),)

    def gradients_to_compilers(self, grad_loss: Tensor, needs_grad: Sequence[bool]) -> list[Tensor | None]:
        """As backward, where a compiler reads a Function's backward."""
        options = (self.reduction, self.ignore_index)
        found = loss_gradients(grad_loss, self.input, self.weight, self.bias, self.target, *options)
        return [g if needs else None for g, needs in zip(found, needs_grad, strict=True)]


_operator, _ = register("linear_cross_entropy", LinearCrossEntropy)


def loss_gradients(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those of input (N, H), weight (V, H) and bias (V,) by tensor operations: (softmax - one_hot) / count."""
    counts = target != ignore_index
    logits = F.linear(input, weight, bias)
    ids = target.where(counts, 0).unsqueeze(-1)
    grad = logits.softmax(-1).scatter_add(-1, ids, logits.new_full((1, 1), -1.0).expand(ids.shape))
    factor = grad_loss * counts / (counts.sum() if reduction == "mean" else 1)
    grad = grad * factor.to(grad.dtype).unsqueeze(-1)
    return grad @ weight, grad.t() @ input, None if bias is None else grad.sum(0)


def _by_triton(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    onlooker: str | None,
) -> Tensor:
    loss_dtype = input.dtype
    if in_autocast(input.device.type):
        input, weight, bias = autocast(input.device.type, [input, weight, bias])
        loss_dtype = torch.promote_types(input.dtype, torch.float32)
    arguments = (input, weight, bias, target, reduction, ignore_index, loss_dtype)
    if onlooker is REGISTERED:
        return _operator(*arguments)[0]
    _check_target(target, weight.shape[0], ignore_index)
    return _apply_triton(*arguments) if torch.is_grad_enabled() else LinearCrossEntropy(*arguments).by_kernels()[0]


def _check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for a target that is no class, in torch's words, on a CPU; on a GPU the kernels assert it."""
    if target.device.type == "cpu" and not ids_are_known(classes) and addressable(target):
        outside = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if len(outside):
            raise IndexError(f"Target {int(outside[0])} is out of bounds.")


# ---- under autograd: forward's arguments are the fields of LinearCrossEntropy ---------------------------------------


class _ByTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, lse, count = LinearCrossEntropy(*arguments).by_kernels()
        ctx.save_for_backward(*arguments[:4], lse, count)
        ctx.options = arguments[4:]
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        operation, needs_grad = LinearCrossEntropy(*saved[:4], *ctx.options), ctx.needs_input_grad[:3]
        if not must_recompute(*grads, *saved):
            gradients = operation.backward(grads, saved[4:], needs_grad)
        elif read_by_compiler():
            gradients = operation.gradients_to_compilers(grads[0], needs_grad)
        else:
            gradients = operation.recomputed(grads, needs_grad)
        return (*gradients, None, None, None, None)


class _ByNative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        input, weight, bias, target, reduction, ignore_index, _ = arguments
        ctx.save_for_backward(input, weight, bias, target)
        ctx.options = arguments[4:]
        operands, need_grad = (input, weight, bias, target), reduction != "none"
        loss, *gradients = native.linear_cross_entropy(*operands, ignore_index, reduction, need_grad=need_grad)
        ctx.gradients = HandedOutOnce(gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,), needs_grad = grads, ctx.needs_input_grad[:3]
        saved = ctx.saved_tensors  # once: checkpointing makes them anew for one reading
        input, weight, bias, target = saved
        reduction, ignore_index, _ = ctx.options
        arguments = (input, weight, bias, target, ignore_index, reduction)
        unusual = must_recompute(grad_loss, *saved)
        if unusual and read_by_compiler():
            gradients = LinearCrossEntropy(*saved, *ctx.options).gradients_to_compilers(grad_loss, needs_grad)
            return (*gradients, None, None, None, None)
        # The gradients made in forward are given away, so that nobody finds them changed, and a loss that is kept does
        # not keep them. A graph that is retained and walked again makes them anew, the same bits.
        gradients = ctx.gradients.take()
        factor = None if unusual or reduction == "none" else grad_loss.item()
        # One that is not finite leaves zeros where no row counts, which a product would not.
        if unusual or (factor is not None and not math.isfinite(factor)):
            gradients = LinearCrossEntropy(*saved, *ctx.options).recomputed(grads, needs_grad)
        elif factor is None:
            _, *gradients = native.linear_cross_entropy(*arguments, need_grad=True, grad_loss=grad_loss)
        else:
            if gradients is None:
                _, *gradients = native.linear_cross_entropy(*arguments, need_grad=True)
            if factor != 1.0:  # nearly never, and scaling is another pass over (N, H)
                gradients = [None if g is None else g.mul_(grad_loss) for g in gradients]
        wanted = [g if needs else None for g, needs in zip(gradients, needs_grad, strict=True)]
        return (*wanted, None, None, None, None)


_apply_native, _apply_triton = apply_of(_ByNative), apply_of(_ByTriton)
