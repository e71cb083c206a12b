"""CPU kernels in plain C, called with addresses and sizes: tensors in, tensors out, no autograd and no policy.

Data types: float32 and float64 are computed as they are; bfloat16 and float16 are converted at the door and computed in
float32. The instruction set (AVX-512, AVX2 with FMA, baseline) is chosen when the program runs; CHARRNN_ISA forces one.
Threads follow torch.get_num_threads() at every call; the results do not depend on it.
"""

import functools
import os
from array import array
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from .many_classes import MAX_FUSED_CLASSES, chunked_cross_entropy
from .memory import (
    COMPUTE,
    array_of,
    buffer_of,
    buffers_of,
    computed,
    pair_of,
    require_one_type,
    rows_of,
    sequence_of,
    states_of,
)

_missing: str | None = None
try:
    _native: Any = import_module(f"{__name__}._native")
except ModuleNotFoundError:
    _native, _missing = None, "the C extension is not built: install with GCC or Clang at hand"
except ImportError as error:
    _native, _missing = None, f"the C extension cannot be loaded: {error}"

ISAS = ("baseline", "avx2", "avx512")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_selected: int | None = None


def available() -> str | None:
    """None if the kernels can run here, else one clause saying why not."""
    return _missing


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline".

    Raises RuntimeError if CHARRNN_ISA names one that this machine or this build lacks.
    """
    return ISAS[_isa()]


def set_isa(name: str | None) -> None:
    """Use this instruction set from now on; None: $CHARRNN_ISA, or else the best that the machine has.

    Raises RuntimeError if this machine or this build lacks it.
    """
    global _selected
    _selected = _index_of(name)


def _index_of(name: str | None) -> int:
    if _native is None:
        raise RuntimeError(f"the native backend cannot run: {_missing}")
    names = _native.isas()
    name = name or os.environ.get("CHARRNN_ISA") or names[-1]
    if name not in names:
        raise RuntimeError(f"CHARRNN_ISA: this machine has {', '.join(names)}, got {name!r}")
    return ISAS.index(name)


def _isa() -> int:
    global _selected
    if _selected is None:
        _selected = _index_of(None)
    return _selected


def peak_scratch() -> int:
    """The most bytes of working memory, beyond all tensors, that the kernels held at once since the last such call."""
    return 0 if _native is None else _native.peak_scratch()


def elman_limits(hidden_size: int, dtype: torch.dtype) -> str | None:
    """None if elman_forward and elman_backward can run this size and type, else one clause saying why not."""
    if _missing:
        return _missing
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not among float32, float64, bfloat16, float16"
    if hidden_size < 1:
        return f"hidden size {hidden_size} is below 1"
    return None


class _Walk:
    """The sizes of one call and the tensors that its argument record points into, kept alive until it returns."""

    def __init__(self, lead: Tensor, weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        if lead.device.type != "cpu":
            raise ValueError(f"expected tensors on the CPU, got {lead.device}")
        self.weight = [computed(w) for w in weight_hh]
        self.h0 = computed(h0)
        self.H, self.D = self.weight[0].shape[0], len(self.weight)
        self.dtype = self.weight[0].dtype
        self.tokens = None if tokens is None else tokens.to(torch.int64)
        steps = lead if tokens is None else tokens
        self.shape = torch.Size((*(steps.shape if tokens is not None else steps.shape[:-1]), self.D * self.H))
        if batch_sizes is None:
            self.T, self.B = self.shape[:2]
            self.batch_sizes = self.offsets = None
        else:
            self.T = batch_sizes.shape[0]
            self.batch_sizes = batch_sizes.to(torch.int64).contiguous()
            self.offsets = self.batch_sizes.cumsum(0) - self.batch_sizes
            self.B = int(self.batch_sizes[0]) if self.T else 0
        self.relu = int(nonlinearity == "relu")
        self.reverse = pair_of([int(r) for r in reverse])

    @property
    def empty(self) -> bool:
        return self.T == 0 or self.B == 0

    def states(self, batch: int) -> Tensor:
        return torch.empty((self.D, batch, self.H), dtype=self.dtype, device="cpu")

    def record(self, out: Tensor, num_tokens: int, threads: int, columns: int) -> tuple[int, ...]:
        """The fields of elman_shape in kernels.h."""
        tokens = self.tokens
        strides = (0, 0) if tokens is None else (tokens.stride(0) if tokens.dim() == 2 else 0, tokens.stride(-1))
        return (
            *(self.T, self.B, self.H, self.D, num_tokens, threads, columns, self.relu, *self.reverse),
            *(*buffer_of(self.batch_sizes), *buffer_of(self.offsets), *buffer_of(tokens), *strides),
            *buffers_of(self.weight),
            *pair_of([w.stride(0) for w in self.weight]),
            *states_of(self.h0),
            *sequence_of(out),
        )


def _plan(B: int, H: int, D: int, T: int) -> tuple[int, int]:
    """Threads, and whether columns (1) or rows (0) are split over them.

    Measured on 2 cores with AVX-512. Rows, where a thread gets enough of them to hide the reading of W (4 from level 2,
    1 when W fits level 1); else columns, where a step's share outweighs the barrier (0.2 us, more on a busy machine).
    """
    threads = torch.get_num_threads()
    step = B * H * H * D
    if threads == 1 or step * T < 1 << 19:
        return 1, 0
    rows = B * D // threads
    if rows >= (1 if H <= 64 else 4):
        return threads, 0
    if step < 1 << 15:
        return 1, 0
    return min(threads, D * -(-H // 32)), 1


def elman_forward(
    x: Tensor,  # (T, B, D*H) or packed (N, D*H): projected input; with tokens the table (V, D*H)
    weight_hh: Sequence[Tensor],  # D tensors (H, H)
    h0: Tensor | None = None,  # (D, B, H)
    *,
    tokens: Tensor | None = None,  # (T, B) or packed (N), int64 or int32
    batch_sizes: Tensor | None = None,  # (T) int64, rows active at each step; None: all B
    nonlinearity: str = "tanh",
    reverse: Sequence[bool] = (False,),  # D: does direction d walk time backwards
    out: Tensor | None = None,  # like the result; may be x itself
) -> tuple[Tensor, Tensor]:
    """h_t = f(x_t + h_{t-1} W^T) over all steps. Returns out (T, B, D*H) or (N, D*H), and h_n (D, B, H).

    Row v of the table is W_ih[:, v] + b_ih + b_hh. h_n is the state after each sequence's own last step. Float tensors
    have one dtype among float32, float64, bfloat16, float16; a token outside the table is an IndexError.
    """
    walk = _Walk(x, weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse)
    source = computed(x)
    require_one_type(source, walk.h0, *walk.weight)
    if out is not None and (out.shape != walk.shape or (walk.H > 1 and out.stride(-1) != 1)):
        raise ValueError(
            f"out: expected {tuple(walk.shape)} with last stride 1, got {tuple(out.shape)} with strides {out.stride()}"
        )
    if out is not None and out.dtype == walk.dtype:
        result = out
    elif tokens is None:
        result = torch.empty_like(source)
    else:
        result = torch.empty(walk.shape, dtype=walk.dtype, device="cpu")
    if walk.empty:
        h_n = h0.clone() if h0 is not None else torch.zeros((walk.D, walk.B, walk.H), dtype=x.dtype, device="cpu")
        return (result if out is None else out).to(x.dtype), h_n
    h_n = walk.states(walk.B)
    threads, columns = _plan(walk.B, walk.H, walk.D, walk.T)
    table_rows = 0 if tokens is None else source.shape[0]
    shape = walk.record(result, table_rows, threads, columns)
    _native.elman_forward(_isa(), COMPUTE[walk.dtype], *shape, *sequence_of(source), *buffer_of(h_n))
    if out is not None and out is not result:
        result = out.copy_(result)
    return result.to(x.dtype), h_n.to(x.dtype)


def elman_backward(
    grad_out: Tensor | None,  # like out
    grad_h_n: Tensor | None,  # (D, B, H)
    out: Tensor,  # (T, B, D*H) or (N, D*H): what forward returned
    weight_hh: Sequence[Tensor],  # D tensors (H, H)
    h0: Tensor | None = None,  # (D, B, H)
    *,
    tokens: Tensor | None = None,  # (T, B) or packed (N), int64 or int32
    num_tokens: int | None = None,  # V, the rows of the table
    batch_sizes: Tensor | None = None,  # (T) int64, rows active at each step; None: all B
    nonlinearity: str = "tanh",
    reverse: Sequence[bool] = (False,),
    need_weight_grad: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor]:
    """g_t = (grad_out_t + g_{t+1} W) f'(h_t), f' = 1 - h^2 or [h > 0]. Returns (grad_x, grad_weight_hh, grad_h0).

    grad_x is g, like out; with tokens the table's gradient (V, D*H), the sum of g over the positions of each token.
    grad_weight_hh: D tensors (H, H), or None. grad_h0 (D, B, H) always.
    """
    walk = _Walk(out, weight_hh, h0, tokens, batch_sizes, nonlinearity, reverse)
    states = computed(out)
    grad_out, grad_h_n = computed(grad_out), computed(grad_h_n)
    require_one_type(states, grad_out, grad_h_n, walk.h0, *walk.weight)
    batch = walk.B if h0 is None else h0.shape[1]
    grad_h0 = walk.states(batch)
    new: Any = functools.partial(torch.empty, dtype=walk.dtype, device="cpu")
    table = None if tokens is None else new((num_tokens, walk.D * walk.H))
    weights = tuple(new((walk.H, walk.H)) for _ in weight_hh) if need_weight_grad else None
    threads, columns = _plan(walk.B, walk.H, walk.D, walk.T)
    fused = int(_fused(walk.B, walk.H, num_tokens or 0))
    result = torch.empty_like(states) if table is None else table
    grad_x = result if table is None else None if fused else torch.empty_like(states)
    if walk.empty:
        for tensor in (table, grad_h0, *(weights or ())):
            if tensor is not None:
                tensor.zero_()
        if grad_h_n is not None:
            grad_h0.copy_(grad_h_n)
    else:
        _native.elman_backward(
            *(_isa(), COMPUTE[walk.dtype], *walk.record(states, num_tokens or 0, threads, 0 if fused else columns)),
            *(fused, *sequence_of(grad_out), *states_of(grad_h_n), *sequence_of(grad_x), *buffer_of(table)),
            *buffers_of(weights or (None, None)),
            *buffer_of(grad_h0),
        )
    dtype = out.dtype
    return result.to(dtype), None if weights is None else tuple(w.to(dtype) for w in weights), grad_h0.to(dtype)


def _fused(B: int, H: int, V: int) -> bool:
    """Whether weight and table gradients are summed while the recurrence runs, in a partial sum for each few rows.

    Depends on the shape alone: the order of the sums must not change with the thread count.
    """
    return B >= 64 and H <= 64 and V <= 256


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
        _native.linear_cross_entropy(
            *(_isa(), COMPUTE[hidden.dtype], N, H, V, threads, ignore_index, int(reduction == "mean")),
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
    if _missing:
        return _missing
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
        _native.language_model(
            *(_isa(), COMPUTE[table.dtype], T, B, H, V, threads, int(nonlinearity == "relu"), ignore_index),
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
    _native.generate(
        *(_isa(), COMPUTE[table.dtype], B, P, num_chars, H, V, L, _generate_threads(B, H), relu),
        *(*buffer_of(prompt), *buffers[0], *(field for layers in lists for field in array_of(layers))),
        *(field for buffer in buffers[-2:] for field in buffer),
        *(*buffer_of(uniforms), *array_of(sharpness), top_k or 0, *buffer_of(result), *buffer_of(ids)),
    )
    return ids, result.to(head_weight.dtype)


def _generate_threads(B: int, H: int) -> int:
    """One thread where a step is so short that meeting at the barrier would cost more than half of it."""
    return torch.get_num_threads() if B * H * H >= 1 << 16 else 1


def clip_limits(grads: Sequence[Tensor], found: "tensors.Survey | None" = None) -> str | None:
    """None if clip_grad_norm_ can run on these tensors, else one clause saying why not. found: their survey."""
    if _missing:
        return _missing
    if not grads:
        return None
    found = found or tensors.survey(list(grads))
    if found is None or not (found.one_device and grads[0].is_cpu):
        return "not all gradients are dense tensors on the CPU"
    if not found.floats:
        return "not all gradients are of float32, float64, bfloat16 or float16"
    return None if found.side_by_side else "the elements of a gradient do not lie side by side"


def clips_in_place(found: "tensors.Survey") -> bool:
    """Whether clip_grad_norm_ reads and writes the tensors as they are: of one type, float32 or float64."""
    return found.kinds in (1 << tensors.KINDS.index(torch.float32), 1 << tensors.KINDS.index(torch.float64))


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float, found: "tensors.Survey | None" = None) -> Tensor:
    """Scale all tensors in place by min(1, max_norm / (norm + 1e-6)); returns the L2 norm of all together, a scalar.

    The tensors must satisfy clip_limits. Of several types, or 16-bit, they are copied to the wider one, float32 at
    least, and back. The norm has the type that all of theirs promote to. found: their survey.
    """
    if not grads:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    found = found or tensors.survey(list(grads))
    if (why := clip_limits(grads, found)) is not None or found is None:
        raise ValueError(f"clip_grad_norm_: {why}")
    dtype = grads[0].dtype
    if not clips_in_place(found):
        dtype = functools.reduce(torch.promote_types, found.dtypes)
        wide = [g.to(torch.promote_types(dtype, torch.float32), copy=True) for g in grads]
        norm = clip_grad_norm_(wide, max_norm)
        for g, w in zip(grads, wide, strict=True):
            g.copy_(w)
        return norm.to(dtype)
    address, size = found.table.buffer_info()[0], 8 * found.count
    limit, result = array("d", [max_norm]), array("d", [0.0])
    _native.clip(
        *(_isa(), COMPUTE[dtype], found.count, torch.get_num_threads()),
        *(address, size, address + size, size, *array_of(limit), *array_of(result)),
    )
    return torch.tensor(result[0], dtype=dtype, device="cpu")
