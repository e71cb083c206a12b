"""The configurations that are timed, and the arithmetic and memory traffic that each one cannot do without."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """One Elman layer on one input. Token input (V symbols) or dense input (I features); `packed`: lengths 1..T."""

    name: str
    B: int
    T: int
    I: int  # noqa: E741 - the field's name for the number of input features; V where tokens is set
    H: int
    tokens: bool = False
    packed: bool = False

    @property
    def lengths(self) -> Tensor:
        """Lengths (B,) int64 in decreasing order: T for padded input, spread evenly over 1..T for packed."""
        if not self.packed:
            return torch.full((self.B,), self.T)
        return torch.linspace(self.T, 1, self.B).round().long()

    @property
    def rows(self) -> int:
        """The time steps of all sequences together."""
        return int(self.lengths.sum())

    def flops(self, backward: bool) -> float:
        """Multiplications and additions of the recurrence and of a dense projection; token input is a table look-up."""
        recurrence = 2 * self.rows * self.H * self.H
        projection = 0 if self.tokens else 2 * self.rows * self.I * self.H
        # Backward: the gradients of state and weight, and of input and weight, each as much again.
        return float((recurrence + projection) * (3 if backward else 1))

    def bytes(self, backward: bool) -> float:
        """fp32 traffic with every tensor read or written once: inputs, outputs, and backward their gradients."""
        width = 2 if self.tokens else self.I
        forward = self.rows * (width + self.H)
        return 4.0 * (forward + (self.rows * (2 * self.H + (0 if self.tokens else 2 * self.I)) if backward else 0))


GRID = [
    Config("d2l", 1024, 32, 28, 32, tokens=True),
    Config("ch8", 32, 35, 28, 512, tokens=True),
    Config("santa", 1, 64, 90, 256, tokens=True),
    Config("mid", 256, 50, 128, 128),
    Config("wide", 64, 64, 256, 256),
    Config("large", 16, 128, 1024, 1024),
    Config("stream", 1, 1000, 28, 128, tokens=True),
    Config("long", 8, 4096, 64, 256),
    Config("packed", 64, 200, 128, 256, packed=True),
]
LM_STEPS = [config for config in GRID if config.name in ("d2l", "ch8", "santa")]
GENERATION = [(hidden, batch) for hidden in (32, 256, 512) for batch in (1, 64)]
