"""The configurations that are timed, and the arithmetic and memory traffic that each one cannot do without."""

from dataclasses import dataclass, replace
from typing import Any

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

    def bytes(self, backward: bool, itemsize: int = 4) -> float:
        """Traffic with every tensor read or written once: inputs, outputs, weights, and backward their gradients."""
        ids, dense = (8 * self.rows, 0) if self.tokens else (0, self.rows * self.I)
        weights = self.H * self.H + self.I * self.H
        # Backward reads the gradient of the outputs and the outputs, and a dense input once more beside its gradient.
        numbers = dense + self.rows * self.H + weights
        if backward:
            numbers += 2 * dense + 2 * self.rows * self.H + weights
        return float(ids * (2 if backward else 1) + itemsize * numbers)

    def lm_flops(self) -> float:
        """A training step of the language model: forward and backward of the recurrence and of the head."""
        return self.flops(True) + 3 * 2 * self.rows * self.H * self.I

    def lm_bytes(self) -> float:
        """A training step's tensors that have to be in memory: ids, targets, and each parameter and its gradient."""
        parameters = self.H * self.H + 2 * self.I * self.H
        return float(2 * 8 * self.rows + 4 * 3 * parameters)

    def generation_flops(self) -> float:
        """T characters decoded one after the other: recurrence and head of each."""
        return float(2 * self.B * self.T * (self.H * self.H + self.H * self.I))


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
BEYOND = {
    "resets": Config("policy", 64, 128, 32, 128),
    "checkpoint_steps": next(config for config in GRID if config.name == "long"),
    "lengths": next(config for config in GRID if config.name == "packed"),
}
NUM_CHARS = 1000  # that a decoder has to append
GENERATION = [
    Config(f"H={hidden} B={batch}", batch, NUM_CHARS, 28, hidden, tokens=True)
    for hidden in (32, 256, 512)
    for batch in (1, 64)
]

# On a GPU: input as wide as the state, which leaves the projection the same share of the work at every H.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU_GRID = [
    (Config(f"H={H} B={B} T={T}", B, T, H, H), dtype)
    for T in (100, 1024)
    for dtype in DTYPES
    for H in (128, 256, 384, 512, 768, 1024, 2048)
    for B in (1, 8, 16, 64, 128)
]

# Cost as one size grows and the others stay; the largest two points are beyond fixed costs.
SWEEP_BASE = Config("sweep", 32, 64, 28, 128, tokens=True)
SWEEPS = {"T": (16, 64, 256, 1024), "B": (4, 16, 64, 256), "H": (32, 64, 128, 256, 512)}
WORK_EXPONENT = {"T": 1, "B": 1, "H": 2}  # of the arithmetic, in each of them


def sweep(axis: str, sizes: tuple[int, ...] | None = None) -> list[Config]:
    """The configurations of one sweep, "T", "B" or "H"."""
    changes: list[dict[str, Any]] = [{"name": f"{axis}={n}", axis: n} for n in sizes or SWEEPS[axis]]
    return [replace(SWEEP_BASE, **change) for change in changes]


@dataclass(frozen=True)
class Gradients:
    """A list of gradients to clip, by their shapes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numbers(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def _model_shapes(V: int, H: int) -> tuple[tuple[int, ...], ...]:
    """Of a one-layer language model's parameters: the cell's two weights and two biases, the head's weight and bias."""
    return ((H, V), (H, H), (H,), (H,), (V, H), (V,))


CLIP = [
    Gradients("d2l's", _model_shapes(28, 32)),
    Gradients("ch8's", _model_shapes(28, 512)),
    Gradients("2,000 tensors", tuple((1 + 37 * i % 997,) for i in range(2000))),
]
