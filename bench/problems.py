"""The inputs of one timed configuration: the same numbers for every side, never zeros."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench.grid import Config


@dataclass
class Problem:
    """Inputs and parameters of a configuration on a device, in a dtype."""

    config: Config
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @cached_property
    def rnn(self) -> nn.RNN:
        torch.manual_seed(0)
        return nn.RNN(self.config.I, self.config.H, device=self.device, dtype=self.dtype)

    @cached_property
    def tokens(self) -> Tensor:
        """(T, B) int64."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.config.I, (self.config.T, self.config.B), generator=generator).to(self.device)

    @cached_property
    def input(self) -> Tensor | PackedSequence:
        """(T, B, I): one-hot rows of the tokens, or normal numbers; packed where the configuration is."""
        if self.config.tokens:
            return F.one_hot(self.tokens, self.config.I).to(self.dtype)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.config.T, self.config.B, self.config.I, generator=generator, dtype=self.dtype)
        x = x.to(self.device)
        return pack_padded_sequence(x, self.config.lengths) if self.config.packed else x

    @cached_property
    def grad_output(self) -> Tensor:
        """(T, B, H), or (N, H) where packed."""
        shape = (self.config.rows,) if self.config.packed else (self.config.T, self.config.B)
        return torch.randn(*shape, self.config.H, generator=torch.Generator().manual_seed(2), dtype=self.dtype).to(
            self.device
        )
