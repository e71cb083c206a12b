"""The character language model: one-hot characters, stacked Elman cells, a linear output layer.

h_t = phi(x_t W_xh + h_{t-1} W_hh + b_h)        x_t (B, V) one-hot, or a learned embedding of it
o_t = h_t W_hq + b_q
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .elman import elman_stack
from .linear_cross_entropy import cross_entropy, linear


@dataclass
class Cell:
    """One layer's parameters. A second bias b_hh, as PyTorch's cells have it, is added to b_h where it is given."""

    W_xh: Tensor  # (I, H)
    W_hh: Tensor  # (H, H)
    b_h: Tensor  # (H)
    b_hh: Tensor | None = None  # (H)

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.W_xh, self.W_hh, self.b_h, self.b_hh) if p is not None]

    def bias(self) -> Tensor:
        return self.b_h if self.b_hh is None else self.b_h + self.b_hh


@dataclass
class RNNLM:
    """A language model over token ids 0 .. V-1. Its parameters are plain tensors that require gradients."""

    cells: list[Cell]
    W_hq: Tensor  # (H, V)
    b_q: Tensor  # (V)
    W_embed: Tensor | None = None  # (V, I): learned embedding in place of one-hot inputs
    nonlinearity: str = "tanh"
    num_hiddens: int = field(init=False)
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_hiddens, self.vocab_size = self.W_hq.shape
        for p in self.parameters():
            p.requires_grad_()

    @classmethod
    def from_scratch(
        cls,
        vocab_size: int,
        num_hiddens: int,
        num_layers: int = 1,
        *,
        sigma: float = 0.01,
        embedding: int | None = None,
        nonlinearity: str = "tanh",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "RNNLM":
        """Weights N(0, 1) * sigma, biases zero, where the generator is (without one, on the CPU). `embedding` is the
        width of a learned embedding; None means one-hot.
        """
        device = "cpu" if generator is None else generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype, device=device) * sigma

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        W_embed = None if embedding is None else normal(vocab_size, embedding)
        widths = [embedding or vocab_size] + [num_hiddens] * (num_layers - 1)
        cells = [
            Cell(normal(width, num_hiddens), normal(num_hiddens, num_hiddens), zeros(num_hiddens)) for width in widths
        ]
        W_hq = normal(num_hiddens, vocab_size)
        return cls(cells, W_hq, zeros(vocab_size), W_embed, nonlinearity)

    def parameters(self) -> list[Tensor]:
        embed = [] if self.W_embed is None else [self.W_embed]
        return embed + [p for cell in self.cells for p in cell.parameters()] + [self.W_hq, self.b_q]

    def zero_state(self, batch_size: int) -> Tensor:
        return self.W_hq.new_zeros(len(self.cells), batch_size, self.num_hiddens)

    def encode(self, tokens: Tensor) -> Tensor:
        """Cell inputs x (T, B, I) of token ids (B, T): one-hot rows, or rows of the embedding."""
        if self.W_embed is not None:
            return self.W_embed[tokens.T]
        return torch.eye(self.vocab_size, dtype=self.W_hq.dtype, device=self.W_hq.device)[tokens.T]

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and the last states (L, B, H), from token ids (B, T) int64 and h_0 (L, B, H), zero if
        None.
        """
        if state is None:
            state = self.zero_state(len(tokens))
        cells = [(cell.W_xh, cell.W_hh, cell.bias()) for cell in self.cells]
        outputs, state = elman_stack(self.encode(tokens), state, cells, self.nonlinearity)  # (T, B, H)
        return linear(outputs, self.W_hq, self.b_q).transpose(0, 1), state

    __call__ = forward

    def loss(self, tokens: Tensor, targets: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss in nats over targets (B, T), and the last states (L, B, H). Perplexity is its exponential."""
        logits, state = self.forward(tokens, state)
        return cross_entropy(logits, targets), state
