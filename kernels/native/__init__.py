"""CPU kernels in plain C, called with addresses and sizes: tensors in, tensors out, no autograd and no policy.

Data types: float32 and float64 are computed as they are; bfloat16 and float16 are converted at the door and computed in
float32. The instruction set (AVX-512, AVX2 with FMA, baseline) is chosen when the program runs; CHARRNN_ISA forces one.
Threads follow torch.get_num_threads() at every call; the results do not depend on it.
"""

from .clip_grad_norm import clip_grad_norm_, clip_limits, clips_in_place
from .elman import elman_backward, elman_forward, elman_limits
from .generate import generate
from .language_model import language_model_limits, language_model_loss
from .library import ISAS, available, isa, peak_scratch, set_isa
from .linear_cross_entropy import linear_cross_entropy

__all__ = [
    "ISAS",
    "available",
    "clip_grad_norm_",
    "clip_limits",
    "clips_in_place",
    "elman_backward",
    "elman_forward",
    "elman_limits",
    "generate",
    "isa",
    "language_model_limits",
    "language_model_loss",
    "linear_cross_entropy",
    "peak_scratch",
    "set_isa",
]
