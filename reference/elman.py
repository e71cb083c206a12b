"""The Elman recurrence, one cell and a stack of cells.

    h_t = phi(x_t W_xh + h_{t-1} W_hh + b_h)        phi = tanh or relu

Source: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990); notation of D2L, chapter "Recurrent
Neural Networks".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def elman(
    inputs: Tensor,  # (T, B, I)
    state: Tensor,  # (B, H), h_0
    W_xh: Tensor,  # (I, H)
    W_hh: Tensor,  # (H, H)
    b_h: Tensor,  # (H)
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Run one cell over all time steps.

    Returns the outputs (T, B, H), which are the states h_1 .. h_T, and the last of them (B, H). All tensors share one
    floating dtype; T may be zero. Raises KeyError for a nonlinearity other than "tanh" and "relu".
    """
    phi = ACTIVATIONS[nonlinearity]
    outputs = []
    for x in inputs:
        state = phi(x @ W_xh + state @ W_hh + b_h)
        outputs.append(state)
    if not outputs:
        return inputs.new_empty(0, *state.shape), state
    return torch.stack(outputs), state


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
