"""The decoder: warm up on a prefix, then append one character after the other.

    greedy:   x_{t+1} = argmax o_t
    sampled:  p = softmax(o_t / tau), sharpened to q ~ p^alpha, x_{t+1} = the first id whose cumulated q exceeds u_t

The uniform numbers u come in as a tensor, so one seed gives one text whatever computes it.
"""

import torch
from torch import Tensor

# Beyond it the choice is the largest logit's in every float type; infinity, which a small temperature gives, is no
# number to multiply with.
MAX_SHARPNESS = 1e30


def next_token(
    logits: Tensor,  # (B, V)
    uniform: Tensor | None = None,  # (B), in [0, 1); None: greedy
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """Choose the next ids (B) int64. With top_k, only the k largest logits (and those equal to the k-th) take part."""
    if uniform is None:
        return logits.argmax(-1)
    scores = logits.double() * min(alpha / temperature, MAX_SHARPNESS)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]  # (B, 1)
        scores = scores.masked_fill(logits < kth, -torch.inf)
    q = torch.softmax(scores, -1)  # (B, V): p^alpha, normalised
    cumulated = q.cumsum(-1)
    # Scaling u by the total, a rounding away from 1, keeps the choice inside the last id of nonzero probability.
    return (cumulated <= uniform.double().unsqueeze(-1) * cumulated[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    net,
    prompt: Tensor,  # (B, P) int64, P >= 1
    num_tokens: int,
    *,
    uniforms: Tensor | None = None,  # (B, num_tokens) in [0, 1); None: greedy
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    state: Tensor | None = None,  # (L, B, H)
) -> tuple[Tensor, Tensor | None]:
    """Continue the prompts by num_tokens ids. `net(tokens (B, T), state)` returns logits (B, T, V) and the state.

    Returns the new ids (B, num_tokens) int64 and the state (L, B, H) after the last character that the network has
    read, which is the one before the last id returned: the state given if it has read none.
    """
    new, inputs = [], prompt
    for i in range(num_tokens):
        logits, state = net(inputs, state)
        uniform = None if uniforms is None else uniforms[:, i]
        inputs = next_token(logits[:, -1], uniform, temperature=temperature, alpha=alpha, top_k=top_k).unsqueeze(1)
        new.append(inputs)
    return (torch.cat(new, 1) if new else prompt[:, :0]), state
