"""Resets inside a sequence: the state is zero before some steps, as where an episode of reinforcement learning begins.

Between two resets the steps know nothing of what was before, so these episodes are sequences of their own: taken apart
they are packed sequences, for which every backend has a kernel. They are shorter than the whole and more of them run at
once, which costs two copies of rows and no step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """The S stretches of a batch between resets, longest first."""

    rows: Tensor  # (T*B,) int64, the place t * B + b of each packed row
    places: Tensor  # (T*B,) int64, the packed row of each place
    batch_sizes: Tensor  # (longest,) int64 on the CPU
    carried: Tensor  # (n,) int64, episodes that go on from the state that was given
    carried_from: Tensor  # (n,) int64, their sequences
    last: Tensor  # (B,) int64, the episode that a sequence ends with


def episodes(resets: Tensor) -> Episodes:
    """Of resets (T, B) bool, T and B at least 1, which are copied to the CPU; it waits for them."""
    steps, batch = resets.shape
    mask = resets.to("cpu").t()  # (B, T): an episode is a stretch of it
    starts = mask.clone()
    starts[:, 0] = True
    begins = starts.flatten().nonzero().squeeze(1)  # in (B, T)
    ends = torch.cat([begins[1:], torch.tensor([batch * steps], dtype=torch.int64, device="cpu")])
    lengths, order = (ends - begins).sort(descending=True, stable=True)
    sequence, first = begins[order] // steps, begins[order] % steps
    within = torch.arange(int(lengths[0]), dtype=torch.int64, device="cpu").unsqueeze(1)
    inside = within < lengths  # (longest, S)
    rows = ((first + within) * batch + sequence)[inside]
    places = torch.empty_like(rows)
    places[rows] = torch.arange(len(rows), dtype=torch.int64, device="cpu")
    carried = ((first == 0) & ~mask[sequence, first]).nonzero().squeeze(1)
    last = torch.empty(batch, dtype=torch.int64, device="cpu")
    at_the_end = (first + lengths == steps).nonzero().squeeze(1)
    last[sequence[at_the_end]] = at_the_end
    found = (rows, places, carried, sequence[carried], last)
    rows, places, carried, carried_from, last = (t.to(resets.device, non_blocking=True) for t in found)
    return Episodes(rows, places, inside.sum(1), carried, carried_from, last)
