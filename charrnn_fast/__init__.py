"""charrnn_fast: fused Elman RNN kernels for PyTorch and the character language model that runs on them.

    h_t = tanh(x_t W_xh + h_{t-1} W_hh + b_h),    o_t = h_t W_hq + b_q

FusedRNN, replace_rnn          torch.nn.RNN's arguments, parameters, shapes and errors; one kernel for all time steps
CharRNN, generate              a language model over token ids (B, T) int64; a prompt continued
Trainer, Callback, Schedule    epochs of a sampler (charrnn_fast.lm.data); who listens; how the learning rate changes
clip_grad_norm_, linear_cross_entropy      torch's functions of these names, in one or two passes over their data

T is time, B batch, I input features, H hidden units, V vocabulary, L layers, everywhere. Beside these names:
charrnn_fast.ops.elman is one layer as a function, charrnn_fast.ops.backends.explain says which backend runs and why
the others do not, charrnn_fast.reference is the specification from scratch, `charrnn-fast --help` the command line.
"""

from charrnn_fast.lm.callbacks import Callback
from charrnn_fast.lm.generation import generate
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.schedule import Schedule
from charrnn_fast.lm.training import Trainer
from charrnn_fast.ops.clip_grad_norm import clip_grad_norm_
from charrnn_fast.ops.linear_cross_entropy import linear_cross_entropy
from charrnn_fast.rnn import FusedRNN, replace_rnn

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "CharRNN",
    "FusedRNN",
    "Schedule",
    "Trainer",
    "clip_grad_norm_",
    "generate",
    "linear_cross_entropy",
    "replace_rnn",
]
