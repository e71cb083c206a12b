"""The decoder as one operation: warm up on the prompts, then append one token after the other.

    greedy:   x_{t+1} = argmax o_t
    sampled:  q ~ softmax(o_t / temperature)^alpha, x_{t+1} = the first id whose cumulated q exceeds u_t

The uniform numbers u come in as a tensor, so one seed gives one text on every backend.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from charrnn_fast.kernels import native
from charrnn_fast.reference import generate as reference

from . import backends
from .elman import elman

Layer = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def generate(
    prompt: Tensor,
    num_tokens: int,
    layers: Sequence[Layer],
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    nonlinearity: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Continue the prompts by num_tokens ids.

    Args:
        prompt: (B, P) int64, P >= 1, ids in 0..V-1.
        layers: for each of the L layers weight_ih, weight_hh (H, H) and the sum of its biases (H,). The first weight_ih
            is (H, V): its columns are what the V ids feed into the cell.
        head_weight: (V, H). head_bias: (V,) or None.
        state: (L, B, H), or None for zeros.
        uniforms: (B, num_tokens) in [0, 1); None decodes greedily and ignores the options of sampling.
        temperature: tau > 0. alpha: exponent > 0 of the probabilities. top_k: sample among the k largest logits and
            those equal to the k-th.
        backend: "auto", "native" or "torch".

    Returns: the new ids (B, num_tokens) int64, and the state (L, B, H) after the last id that was read, which is the
    one before the last returned (None if nothing was read and none was given).

    Raises: IndexError for an id outside 0..V-1; RuntimeError if the backend asked for cannot run.
    """
    weight_hh = layers[0][1]
    if _backend(backend, weight_hh, num_tokens) == "native":
        table = layers[0][0].t() + layers[0][2]  # (V, H)
        return native.generate(
            prompt,
            num_tokens,
            table,
            [layer[0] for layer in layers],
            [layer[1] for layer in layers],
            [layer[2] for layer in layers],
            head_weight,
            head_bias,
            state,
            uniforms=uniforms,
            temperature=temperature,
            alpha=alpha,
            top_k=top_k,
            nonlinearity=nonlinearity,
        )

    def step(tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        output, last = tokens.t(), []  # (T, B)
        for index, (weight_ih, weight_hh, bias) in enumerate(layers):
            h0 = None if state is None else state[index]
            output, h_n = elman(output, h0, weight_ih, weight_hh, bias, nonlinearity=nonlinearity, backend="torch")
            last.append(h_n)
        return F.linear(output.transpose(0, 1), head_weight, head_bias), torch.stack(last)

    return reference.generate(
        step, prompt, num_tokens, uniforms=uniforms, temperature=temperature, alpha=alpha, top_k=top_k, state=state
    )


def _backend(backend: str, weight_hh: Tensor, num_tokens: int) -> str:
    """Which of native and torch runs. The state of an empty continuation is the one that was given: nothing to run."""
    chosen = backends.choose(backend, weight_hh.device, weight_hh.dtype, weight_hh.shape[0])
    return "native" if chosen == "native" and num_tokens > 0 else "torch"
