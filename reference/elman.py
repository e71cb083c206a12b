"""The Elman recurrence, one cell and a stack of cells.

    h_t = phi(x_t W_xh + h_{t-1} W_hh + b_h)        phi = tanh or relu

Source: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990); notation of D2L, chapter "Recurrent
Neural Networks".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def walk(
    inputs: Tensor,  # (T, B, ...), or packed (N, ...)
    state: Tensor,  # (B, H), h_0
    step: Callable[[Tensor, Tensor], Tensor],  # (x_t, h_{t-1}), of the rows that are active, -> h_t
    *,
    reverse: bool = False,
    batch_sizes: Tensor | None = None,  # (T), rows active at each step of packed input; they do not increase
) -> tuple[Tensor, Tensor]:
    """Go through time, forwards or, if `reverse`, backwards: the one loop of every form of this recurrence.

    Returns the states after all steps, in the order of the inputs, (T, B, H) or packed (N, H), and each row's state
    after its own last step of the walk (B, H). With packed input rows leave as their sequences end or, backwards, enter
    with their h_0. T may be zero.
    """
    steps = inputs.unbind(0) if batch_sizes is None else inputs.split(batch_sizes.tolist())
    if not steps:
        return inputs.new_empty(*inputs.shape[: inputs.dim() - 1], state.shape[-1], dtype=state.dtype), state.clone()
    first, outputs, finished = state, [], []
    if batch_sizes is not None and reverse:
        state = first[: len(steps[-1])]
    for x in reversed(steps) if reverse else steps:
        active, before = x.shape[0], state.shape[0]
        if active < before:
            finished.append(state[active:])
            state = state[:active]
        elif active > before:
            state = torch.cat([state, first[before:active].to(state.dtype)])
        state = step(x, state)
        outputs.append(state)
    outputs = outputs[::-1] if reverse else outputs
    last = torch.cat([state, *finished[::-1]]) if finished else state
    return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), last


def elman(
    inputs: Tensor,  # (T, B, I), or packed (N, I); or token ids (T, B) or (N,), which stand for one-hot rows
    state: Tensor,  # (B, H), h_0
    W_xh: Tensor,  # (I, H)
    W_hh: Tensor,  # (H, H)
    b_h: Tensor,  # (H)
    nonlinearity: str = "tanh",
    *,
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one cell over all time steps; `reverse` and `batch_sizes` as in `walk`.

    Returns the outputs, which are the states h_1 .. h_T, (T, B, H) or packed (N, H), and the last of them (B, H). All
    tensors share one floating dtype; T may be zero. Raises KeyError for a nonlinearity other than "tanh" and "relu".
    """
    phi = ACTIVATIONS[nonlinearity]

    def step(x: Tensor, h: Tensor) -> Tensor:
        return phi((x @ W_xh if x.is_floating_point() else W_xh[x]) + h @ W_hh + b_h)

    return walk(inputs, state, step, reverse=reverse, batch_sizes=batch_sizes)


def elman_stack(
    inputs: Tensor,  # (T, B, I)
    states: Tensor,  # (L, B, H)
    cells: Sequence[tuple[Tensor, Tensor, Tensor]],  # L times (W_xh, W_hh, b_h)
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Run stacked cells: layer l + 1 takes layer l's h_t as its x_t.

    Returns the last layer's outputs (T, B, H) and every layer's last state (L, B, H).
    """
    outputs, last = inputs, []
    for state, (W_xh, W_hh, b_h) in zip(states, cells, strict=True):
        outputs, state = elman(outputs, state, W_xh, W_hh, b_h, nonlinearity)
        last.append(state)
    return outputs, torch.stack(last)
