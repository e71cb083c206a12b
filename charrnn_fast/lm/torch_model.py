"""TorchCharRNN, the character language model by PyTorch alone: what this library's is compared with."""

from charrnn_fast.lm.recurrent import RecurrentLM


class TorchCharRNN(RecurrentLM, form="torch"):
    """CharRNN's model on torch.nn.RNN, with one-hot rows, and PyTorch's own loss and clip.

    Arguments, attributes and errors: CharRNN's, but for cell and backend. The same seed gives the same parameters, and
    state_dicts load both ways.
    """

    def why_not_captured(self, asked: bool) -> str | None:
        """As CharRNN's; where nobody asks for it, PyTorch alone is not captured."""
        return super().why_not_captured(asked) if asked else "PyTorch alone is trained as PyTorch does"
