"""Launcher of the C decoder (generate.c has the algorithm)."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .memory import COMPUTE, array_of, buffer_of, computed, require_one_type


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
