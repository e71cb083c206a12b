"""What the launchers of the two decoding kernels take, and the states that both leave in memory. No Triton here."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Decoding(NamedTuple):
    """A call of generate.generate that was checked; B >= 1."""

    prompt: Tensor
    num_tokens: int
    table: Tensor
    weight_ih: Sequence[Tensor | None]
    weight_hh: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    head_weight: Tensor
    head_bias: Tensor | None
    state: Tensor | None
    uniforms: Tensor | None
    sharpness: int  # the bits of alpha / temperature
    top_k: int | None  # below V
    tanh: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, P, V, H and L."""
        return *self.prompt.shape, *self.table.shape, len(self.weight_hh)

    @property
    def acc_type(self) -> torch.dtype:
        """Of states, sums and logits."""
        return torch.float64 if self.table.dtype == torch.float64 else torch.float32

    def new_ids(self) -> Tensor:
        return torch.empty((len(self.prompt), self.num_tokens), dtype=torch.int64, device=self.table.device)

    def new_states(self, width: int) -> Tensor:
        """(B, 2, L, width): the first ones in half 0 and zeros."""
        B, _, _, H, L = self.sizes
        states = torch.zeros((B, 2, L, width), dtype=self.acc_type, device=self.table.device)
        if self.state is not None:
            states[:, 0, :, :H] = self.state.transpose(0, 1)
        return states

    def last_state(self, states: Tensor) -> Tensor:
        """(L, B, H) of such states, after a step for each id that is read."""
        _, P, _, H, _ = self.sizes
        last = states[:, (P + self.num_tokens - 1) % 2, :, :H]
        return last.transpose(0, 1).to(self.table.dtype, memory_format=torch.contiguous_format)
