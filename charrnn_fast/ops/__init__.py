"""The library's operations: arguments checked, backend chosen, differentiable."""

from . import flops
from .elman import elman

__all__ = ["elman", "flops"]
