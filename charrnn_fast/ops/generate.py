"""The decoder as one operation: warm up on the prompts, then append one token after the other.

    greedy:   x_{t+1} = argmax o_t
    sampled:  q ~ softmax(o_t / temperature)^alpha, x_{t+1} = the first id whose cumulated q exceeds u_t

The uniform numbers u come in as a tensor, so one seed gives one text on every backend.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from charrnn_fast.kernels import native
from charrnn_fast.reference import generate as reference

from . import backends
from .context import addressable
from .elman import elman
from .tokens import TOKEN_TYPES, check_tokens

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
        temperature: tau > 0. alpha: exponent >= 0 of the probabilities. top_k: sample among the k largest logits and
            those equal to the k-th.
        backend: "auto", "triton", "native" or "torch". On a GPU the kernel decodes all of it in one launch.

    Returns: the new ids (B, num_tokens) int64, and the state (L, B, H) after the last id that was read, which is the
    one before the last returned (None if nothing was read and none was given).

    Raises: IndexError for an id outside 0..V-1 (on a GPU an assertion on the device, as from torch's embedding);
    RuntimeError if the backend asked for cannot run; ValueError for shapes, types, devices and options that do not fit.
    """
    _check(prompt, num_tokens, layers, head_weight, head_bias, state, uniforms, temperature, alpha, top_k)
    alpha, temperature = min(alpha / temperature, reference.MAX_SHARPNESS), 1.0
    top_k = None if top_k is None else min(top_k, head_weight.shape[0])
    operands = (prompt, uniforms, state, head_weight, head_bias, *itertools.chain.from_iterable(layers))
    chosen = _backend(backend, prompt.shape[0], layers, head_weight, num_tokens) if addressable(*operands) else "torch"
    if chosen != "torch":
        table = layers[0][0].t() + layers[0][2]  # (V, H)
        check_tokens(prompt, table.shape[0])
        return _kernel(chosen)(
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


def _check(
    prompt: Tensor,
    num_tokens: int,
    layers: Sequence[Layer],
    head_weight: Tensor,
    head_bias: Tensor | None,
    state: Tensor | None,
    uniforms: Tensor | None,
    temperature: float,
    alpha: float,
    top_k: int | None,
) -> None:
    """ValueError for what does not fit together, whichever backend would run."""
    if prompt.dim() != 2 or prompt.dtype not in TOKEN_TYPES:
        raise ValueError(f"prompt: expected (B, P) token ids of int64, got {tuple(prompt.shape)} of {prompt.dtype}")
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    if num_tokens and prompt.shape[1] < 1:
        raise ValueError("prompt: expected at least one id, got none")
    if not (temperature > 0 and alpha >= 0 and (top_k is None or top_k >= 1)):
        raise ValueError(
            "expected temperature > 0, alpha >= 0 and top_k >= 1, got "
            f"temperature {temperature}, alpha {alpha}, top_k {top_k}"
        )
    (vocab, hidden), batch, dtype = head_weight.shape, prompt.shape[0], head_weight.dtype
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("head_bias", head_bias, (vocab,)),
        ("state", state, (len(layers), batch, hidden)),
        ("uniforms", uniforms, (batch, num_tokens)),
    ]
    for index, (weight_ih, weight_hh, bias) in enumerate(layers):
        expected += [
            (f"weight_ih of layer {index}", weight_ih, (hidden, hidden if index else vocab)),
            (f"weight_hh of layer {index}", weight_hh, (hidden, hidden)),
            (f"bias of layer {index}", bias, (hidden,)),
        ]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floats {shape}, got {tuple(tensor.shape)} of {tensor.dtype}")
        if tensor.device != prompt.device:
            raise ValueError(f"{name}: expected a tensor on {prompt.device}, where the prompt is, got {tensor.device}")
        if tensor.dtype != dtype and tensor is not uniforms:
            raise ValueError(f"{name}: expected {dtype}, as the head's weight has, got {tensor.dtype}")


def _kernel(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if backend == "native":
        return native.generate
    from charrnn_fast.kernels.triton.generate import generate as kernel

    return kernel


def _backend(backend: str, batch: int, layers: Sequence[Layer], head_weight: Tensor, num_tokens: int) -> str:
    """Which of triton, native and torch runs. The state of an empty continuation is the one that was given."""
    (vocab, hidden), device, dtype = head_weight.shape, head_weight.device, head_weight.dtype
    sizes = {"hidden_size": hidden, "batch_size": batch, "num_classes": vocab, "num_layers": len(layers)}
    chosen = backends.choose("generate", device, dtype, **sizes, backend=backend)
    return chosen if num_tokens > 0 else "torch"
