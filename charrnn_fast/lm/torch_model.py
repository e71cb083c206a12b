"""TorchCharRNN, the character language model by PyTorch alone: what this library's is compared with."""

import torch

from charrnn_fast.lm.recurrent import RecurrentLM
from charrnn_fast.ops.elman_torch import TorchRNN


class TorchCharRNN(RecurrentLM, form="torch"):
    """CharRNN's model on torch.nn.RNN, with one-hot rows, and PyTorch's own loss and clip.

    Arguments, attributes and errors: CharRNN's, but for cell and backend. The same seed gives the same parameters, and
    state_dicts load both ways.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        embedding: str | int = "onehot",
        second_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = (vocab_size, hidden_size, num_layers, nonlinearity, embedding, second_bias, dropout)
        super().__init__(*sizes, TorchRNN, device, dtype)

    def why_not_captured(self, asked: bool) -> str | None:
        """As CharRNN's; where nobody asks for it, PyTorch alone is not captured."""
        return super().why_not_captured(asked) if asked else "PyTorch alone is trained as PyTorch does"
