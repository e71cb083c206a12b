"""CPU kernels in plain C, called with addresses and sizes: tensors in, tensors out, no autograd and no policy.

Data types: float32 and float64 are computed as they are; bfloat16 and float16 are converted at the door and computed in
float32. The instruction set (AVX-512, AVX2 with FMA, baseline) is chosen when the program runs; CHARRNN_ISA forces one.
Threads follow torch.get_num_threads() at every call; the results do not depend on it.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .clip_grad_norm import clip_grad_norm_, clip_limits, clips_in_place
from .elman import elman_backward, elman_forward, elman_limits
from .library import ISAS, available, isa, peak_scratch, set_isa
from .many_classes import MAX_FUSED_CLASSES, chunked_cross_entropy
from .memory import COMPUTE, array_of, buffer_of, computed, require_one_type, rows_of

__all__ = [
    "ISAS",
    "available",
    "clip_grad_norm_",
    "clip_limits",
    "clips_in_place",
    "elman_backward",
    "elman_forward",
    "elman_limits",
    "generate",
    "isa",
    "language_model_limits",
    "language_model_loss",
    "linear_cross_entropy",
    "peak_scratch",
    "set_isa",
]


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


def generate(
    prompt: Tensor,  # (B, P) int64, P >= 1
    num_chars: int,
    table: Tensor,  # (V, H), row v = W_ih[:, v] + b_ih + b_hh of layer 0
    weight_ih: Sequence[Tensor | None],  # L tensors (H, H); the first is not read
    weight_hh: Sequence[Tensor],  # L tensors (H, H)
    bias: Sequence[Tensor | None],  # L tensors (H), b_ih + b_hh; the first is not read
    head_weight: Tensor,  # (V, H)
    head_bias: Tensor | None = None,  # (V)
    state: Tensor | None = None,  # (L, B, H)
    *,
    uniforms: Tensor | None = None,  # (B, num_chars) in [0, 1); None: greedy
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Continue the prompts by num_chars ids. Returns the ids (B, num_chars) int64 and the state (L, B, H).

    Greedy: argmax of the logits o. Sampled: the first id whose cumulated q exceeds u, where q is proportional to
    softmax(o / temperature)^alpha over the top_k largest logits (and those equal to the k-th). The state is the one
    after the last id that was read, the one before the last returned. A prompt id outside the table is an IndexError.
    """
    B, P = prompt.shape
    (V, H), L = table.shape, len(weight_hh)
    if P < 1:
        raise ValueError("prompt: expected at least one id, got none")
    if uniforms is not None and (temperature <= 0 or alpha < 0 or (top_k is not None and top_k < 1)):
        raise ValueError(
            "expected temperature > 0, alpha >= 0 and top_k >= 1, got "
            f"temperature {temperature}, alpha {alpha}, top_k {top_k}"
        )
    table = computed(table).contiguous()
    others = (*weight_ih[1:], *weight_hh, *bias[1:], head_weight, head_bias)
    kept = [table, *(None if t is None else computed(t).contiguous() for t in others)]
    require_one_type(*kept)
    result = table.new_zeros(L, B, H)
    if state is not None:
        result.copy_(state)
    ids = torch.empty((B, num_chars), dtype=torch.int64, device="cpu")
    if B == 0 or num_chars == 0:
        return ids, result.to(head_weight.dtype)
    buffers = [buffer_of(t) for t in kept]
    per_layer = ([(0, 0), *buffers[1:L]], buffers[L : 2 * L], [(0, 0), *buffers[2 * L : -2]])
    lists = [array("q", [*(at for at, _ in layers), *(size for _, size in layers)]) for layers in per_layer]
    prompt = prompt.to(torch.int64).contiguous()
    uniforms = None if uniforms is None else uniforms.to(torch.float64).contiguous()
    sharpness = array("d", [alpha / temperature])
    relu = int(nonlinearity == "relu")
    library.extension.generate(
        *(library.isa_number(), COMPUTE[table.dtype], B, P, num_chars, H, V, L, _generate_threads(B, H), relu),
        *(*buffer_of(prompt), *buffers[0], *(field for layers in lists for field in array_of(layers))),
        *(field for buffer in buffers[-2:] for field in buffer),
        *(*buffer_of(uniforms), *array_of(sharpness), top_k or 0, *buffer_of(result), *buffer_of(ids)),
    )
    return ids, result.to(head_weight.dtype)


def _generate_threads(B: int, H: int) -> int:
    """One thread where a step is so short that meeting at the barrier would cost more than half of it."""
    return torch.get_num_threads() if B * H * H >= 1 << 16 else 1
