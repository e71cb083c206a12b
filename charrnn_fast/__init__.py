"""charrnn_fast: fused Elman RNN kernels for PyTorch and the character language model that runs on them."""

from charrnn_fast.lm.model import CharRNN, generate
from charrnn_fast.lm.training import Trainer
from charrnn_fast.rnn import FusedRNN, replace_rnn

__version__ = "0.1.0"
__all__ = ["CharRNN", "FusedRNN", "Trainer", "generate", "replace_rnn"]
