"""The inputs of one timed configuration: the same numbers for every side, never zeros."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from charrnn_fast.bench.grid import Config, Gradients

RESET_EVERY = 50  # steps of an episode


def data_of(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


@dataclass
class Problem:
    """Inputs and parameters of a configuration on a device, in a dtype. `seed` varies the inputs alone."""

    config: Config
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a torch.device is immutable
    dtype: torch.dtype = torch.float32
    seed: int = 1

    @cached_property
    def rnn(self) -> nn.RNN:
        torch.manual_seed(0)
        return nn.RNN(self.config.I, self.config.H, device=self.device, dtype=self.dtype)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_xh (I, H), W_hh (H, H) and b_h (H,) of h_t = tanh(x_t W_xh + h_{t-1} W_hh + b_h), the same numbers."""
        weight_ih, weight_hh, bias_ih, bias_hh = (p.detach() for p in self.rnn.parameters())
        return weight_ih.T.contiguous(), weight_hh.T.contiguous(), bias_ih + bias_hh

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """X and Y (B, T) int64: each character's successor is the next one."""
        X = self.tokens.T.contiguous()
        return X, X.roll(-1, 1)

    @cached_property
    def tokens(self) -> Tensor:
        """(T, B) int64."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.config.I, (self.config.T, self.config.B), generator=generator).to(self.device)

    @cached_property
    def input(self) -> Tensor | PackedSequence:
        """(T, B, I): one-hot rows of the tokens, or normal numbers; packed where the configuration is."""
        if self.config.tokens:
            return F.one_hot(self.tokens, self.config.I).to(self.dtype)
        x = self._normal(self.config.T, self.config.B, self.config.I)
        return pack_padded_sequence(x, self.config.lengths) if self.config.packed else x

    @property
    def given(self) -> Tensor:
        """The tokens (T, B) or the dense input (T, B, I), for a side that looks tokens up in a table."""
        return self.tokens if self.config.tokens else data_of(self.input).detach()

    @cached_property
    def padded(self) -> Tensor:
        """(T, B, I): normal numbers, up to the longest sequence."""
        return self._normal(self.config.T, self.config.B, self.config.I)

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) int64 on the device, the shortest first."""
        return self.config.lengths.flip(0).to(self.device)

    @cached_property
    def resets(self) -> Tensor:
        """(T, B) bool: an episode begins at a step in RESET_EVERY."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(self.config.T, self.config.B, generator=generator)
        return (drawn < 1 / RESET_EVERY).to(self.device)

    @cached_property
    def grad_output(self) -> Tensor:
        """(T, B, H), or (N, H) where packed."""
        shape = (self.config.rows,) if self.config.packed else (self.config.T, self.config.B)
        return self._normal(*shape, self.config.H, stream=1)

    @cached_property
    def grad_padded(self) -> Tensor:
        """(T, B, H)."""
        return self._normal(self.config.T, self.config.B, self.config.H, stream=1)

    @cached_property
    def grad_h_n(self) -> Tensor:
        """(1, B, H)."""
        return self._normal(1, self.config.B, self.config.H, stream=1)

    def _normal(self, *shape: int, stream: int = 0) -> Tensor:
        # Drawn on the device: a large grid's numbers would take the host longer than timing them.
        generator = torch.Generator(self.device).manual_seed(2 * self.seed + stream)
        return torch.randn(*shape, generator=generator, dtype=self.dtype, device=self.device)


@dataclass
class ClipProblem:
    """Parameters with gradients to clip, a list of its own for every caller."""

    config: Gradients
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a torch.device is immutable
    dtype: torch.dtype = torch.float32
    seed: int = 1

    def parameters(self) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(self.seed)
        parameters = []
        for shape in self.config.shapes:
            parameter = nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))
            parameter.grad = torch.randn(shape, generator=generator, dtype=self.dtype).to(self.device)
            parameters.append(parameter)
        return parameters

    @staticmethod
    def bounds():
        """Bounds for call after call, each a little lower, so that every call has something to scale."""
        return (0.99999**k for k in itertools.count())
