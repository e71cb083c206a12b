"""charrnn_fast: fused Elman RNN kernels for PyTorch and the character language model that runs on them."""

from charrnn_fast.lm.model import CharRNN, generate
from charrnn_fast.lm.training import Trainer
from charrnn_fast.ops.clip_grad_norm import clip_grad_norm_
from charrnn_fast.ops.linear_cross_entropy import linear_cross_entropy
from charrnn_fast.rnn import FusedRNN, replace_rnn

__version__ = "0.1.0"
__all__ = [
    "CharRNN",
    "FusedRNN",
    "Trainer",
    "clip_grad_norm_",
    "generate",
    "linear_cross_entropy",
    "replace_rnn",
]
