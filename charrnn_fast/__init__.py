"""charrnn_fast: fused Elman RNN kernels for PyTorch and the character language model that runs on them."""

__version__ = "0.1.0"
