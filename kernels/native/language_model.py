"""Launcher of the C kernel of a whole one-layer model (language_model.c has the algorithm)."""

from array import array

import torch
from torch import Tensor

from . import library
from .memory import COMPUTE, array_of, buffer_of, computed, require_one_type, rows_of


def language_model_limits(batch: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> str | None:
    """None where language_model_loss runs and beats the separate kernels, else one clause saying why not.

    Measured on 2 cores with AVX-512 (bench/NOTES.md), a training step on one and on two threads: 1.7 times as fast at
    H=32, 1.2 to 1.5 at H=128, 1.0 to 1.3 at H=256. A block of rows is one thread's work: with few rows of many units
    the separate kernels, which can split a step's columns, are faster. The thread count is no part of the rule: the
    results must not depend on it.
    """
    if library.missing:
        return library.missing
    if dtype not in COMPUTE:
        return f"dtype {dtype} is neither float32 nor float64"
    if hidden_size > 512:
        return f"hidden size {hidden_size} is above 512"
    if vocab > 512:
        return f"vocabulary {vocab} is above 512"
    if hidden_size > 256 and batch < 12:
        return f"batch {batch} is below 12 at a hidden size above 256"
    return None


def language_model_loss(
    tokens: Tensor,  # (T, B) int64, any strides, T and B at least 1
    targets: Tensor,  # (T, B) int64, any strides
    table: Tensor,  # (V, H), row v = W_ih[:, v] + b_ih + b_hh
    weight_hh: Tensor,  # (H, H)
    head_weight: Tensor,  # (V, H)
    head_bias: Tensor | None = None,  # (V)
    h0: Tensor | None = None,  # (B, H)
    *,
    nonlinearity: str = "tanh",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """One layer, head, cross-entropy and all gradients in one pass that keeps nothing of size (T, B, H).

    Returns (loss, h_n, grad_table, grad_weight_hh, grad_head_weight, grad_head_bias, grad_h0): the mean loss in nats
    over the targets other than ignore_index, a scalar; the last state (B, H); the loss's gradients, shaped like what
    they belong to (grad_head_bias None without a bias, grad_h0 (B, H) also without h0). Float tensors have one dtype,
    float32 or float64. A token or target outside 0..V-1 is an IndexError.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    table, weight_hh, head_weight, h0 = computed(table), computed(weight_hh), computed(head_weight), computed(h0)
    head_bias = None if head_bias is None else head_bias.contiguous()
    require_one_type(table, weight_hh, head_weight, head_bias, h0)
    # Ids that share memory are copied: C takes as many as there are, so that nothing makes it loop for nothing.
    tokens, targets = (ids.contiguous() if 0 in ids.stride() else ids for ids in (tokens, targets))
    (T, B), (V, H) = tokens.shape, table.shape
    loss = array("d", [0.0])
    h_n, grad_h0 = table.new_empty(B, H), table.new_empty(B, H)
    grad_table, grad_weight, grad_head = table.new_empty(V, H), table.new_empty(H, H), table.new_empty(V, H)
    grad_bias = None if head_bias is None else table.new_empty(V)
    threads = torch.get_num_threads() if T * B * H * (H + V) >= 1 << 17 else 1
    try:
        library.extension.language_model(
            *(library.isa_number(), COMPUTE[table.dtype], T, B, H, V, threads),
            *(int(nonlinearity == "relu"), ignore_index),
            *(*buffer_of(tokens), *tokens.stride(), *buffer_of(targets), *targets.stride()),
            *(*rows_of(table), *rows_of(weight_hh), *rows_of(head_weight), *buffer_of(head_bias)),
            *((0, 0, 0) if h0 is None else rows_of(h0)),
            *(*array_of(loss), *buffer_of(h_n), *buffer_of(grad_table), *buffer_of(grad_weight)),
            *(*buffer_of(grad_head), *buffer_of(grad_bias), *buffer_of(grad_h0)),
        )
    except IndexError:
        raise IndexError(_bad_id(tokens, targets, V, ignore_index)) from None
    return table.new_tensor(loss[0]), h_n, grad_table, grad_weight, grad_head, grad_bias, grad_h0


def _bad_id(tokens: Tensor, targets: Tensor, V: int, ignore_index: int) -> str:
    """What is wrong, in the words of the separate operations."""
    bad = tokens[(tokens < 0) | (tokens >= V)]
    if bad.numel():
        return f"index out of range in self: token id {int(bad[0])} is not in 0..{V - 1}"
    bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
    return f"Target {int(bad[0])} is out of bounds."
