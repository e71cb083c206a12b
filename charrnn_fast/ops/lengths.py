"""Padded sequences whose lengths stay on the device: no copy to the host, which would wait for the device.

Packed input needs its batch sizes on the host, before anything can be launched. Here every sequence is walked to the
last step of the longest instead, and what lies beyond its own end is left out: input there is zero, as is the output,
and a sequence's last state is read at its own last step. A direction that walks time backwards begins at each
sequence's last step: it is a forward one over sequences turned within their lengths, by one index that turns them back
as well.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .elman_checkpointed import checkpointed_stack
from .elman_stack import OneLayer, elman_stack


def stack_with_lengths(
    rnn: Any, input: Tensor, lengths: Tensor, hx: Tensor | None, onlooker: str | None
) -> tuple[Tensor, Tensor]:
    """Output (T, B, D*H), zero beyond each length, and the states at each sequence's last step (L*D, B, H).

    Args:
        rnn, hx, onlooker: as for elman_stack. input: (T, B, I), in any order of memory.
        lengths: (B,) int64 on its device, in 0..T; after no step the state is hx's, or zero.
    """
    steps, batch = input.shape[:2]
    sequence = torch.arange(batch, dtype=torch.int64, device=input.device)
    step = torch.arange(steps, dtype=torch.int64, device=input.device).unsqueeze(1)
    inside = step < lengths  # (T, B)
    beyond, empty = ~inside.unsqueeze(-1), (lengths == 0).unsqueeze(-1)
    last = torch.where(lengths == 0, lengths, lengths - 1) * batch + sequence  # (B,), rows of (T*B, H)
    directions, run = 2 if rnn.bidirectional else 1, elman_stack if rnn.checkpoint_steps is None else checkpointed_stack
    if directions == 2:
        turned = (torch.where(inside, lengths - 1 - step, step) * batch + sequence).flatten()
    output, states = input, []
    for i in range(rnn.num_layers):
        if i > 0 and rnn.dropout > 0:
            output = F.dropout(output, rnn.dropout, rnn.training)
        output = output.masked_fill(beyond, 0) if i == 0 else output
        ways = []
        for direction in range(directions):
            h0 = None if hx is None else hx[i * directions + direction].unsqueeze(0)
            rows = output if direction == 0 else _ordered(output, turned)
            rows, _ = run(OneLayer.of(rnn, i, direction), rows, h0, None, False, onlooker)
            state = rows.flatten(0, 1).index_select(0, last)
            states.append(torch.where(empty, state.new_zeros(()) if h0 is None else h0[0].to(state.dtype), state))
            ways.append(rows if direction == 0 else _ordered(rows, turned))
        output = (ways[0] if directions == 1 else torch.cat(ways, -1)).masked_fill(beyond, 0)
    return output, torch.stack(states)


def _ordered(x: Tensor, index: Tensor) -> Tensor:
    """(T, B, C) with the rows of (T*B, C) in the order of ``index``."""
    return x.flatten(0, 1).index_select(0, index).view(x.shape)
