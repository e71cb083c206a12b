"""Launcher of the C kernel of head and cross-entropy (linear_cross_entropy.c has the algorithm)."""

from array import array

import torch
from torch import Tensor

from . import library
from .many_classes import MAX_FUSED_CLASSES, chunked_cross_entropy
from .memory import COMPUTE, array_of, buffer_of, computed, require_one_type, rows_of


def linear_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N) int64
    ignore_index: int = -100,
    reduction: str = "mean",
    need_grad: bool = True,
    *,
    grad_loss: Tensor | None = None,  # (N), factor of each row's gradient; None: 1
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Cross-entropy of hidden weight^T + bias, in nats. Returns (loss, grad_hidden, grad_weight, grad_bias).

    The loss is a scalar ("mean" over the rows that are not ignored, or "sum") or (N) ("none"). The gradients are those
    for an upstream gradient of 1, to be scaled by the real one; for "none", pass the upstream gradient as grad_loss.
    They are None without need_grad; grad_bias also without bias. For 16-bit tensors they are float32: rounded before
    they are scaled, small ones would be lost. No (N, V) tensor is kept. A target outside 0..V-1 is
    an IndexError.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if weight.shape[0] > MAX_FUSED_CLASSES:
        return chunked_cross_entropy(hidden, weight, bias, target, ignore_index, reduction, need_grad, grad_loss)
    dtype = hidden.dtype
    hidden, weight, bias, grad_loss = computed(hidden), computed(weight), computed(bias), computed(grad_loss)
    require_one_type(hidden, weight, bias, grad_loss)
    target = target.to(torch.int64).contiguous()
    (N, H), V = hidden.shape, weight.shape[0]
    loss = array("d", [0.0])
    rows = hidden.new_empty(N) if reduction == "none" else None
    grad_hidden, grad_weight = (hidden.new_empty(N, H), hidden.new_empty(V, H)) if need_grad else (None, None)
    grad_bias = hidden.new_empty(V) if need_grad and bias is not None else None
    threads = torch.get_num_threads() if N * H * V >= 1 << 17 else 1
    try:
        library.extension.linear_cross_entropy(
            *(library.isa_number(), COMPUTE[hidden.dtype], N, H, V, threads, ignore_index, int(reduction == "mean")),
            *(*rows_of(hidden), *rows_of(weight)),
            *(*buffer_of(bias), *buffer_of(target), *buffer_of(grad_loss), *array_of(loss), *buffer_of(rows)),
            *(*buffer_of(grad_hidden), *buffer_of(grad_weight), *buffer_of(grad_bias)),
        )
    except IndexError:
        bad = target[(target != ignore_index) & ((target < 0) | (target >= V))][0]
        raise IndexError(f"Target {int(bad)} is out of bounds.") from None
    value = hidden.new_tensor(loss[0]) if rows is None else rows
    return value.to(dtype), grad_hidden, grad_weight, grad_bias
