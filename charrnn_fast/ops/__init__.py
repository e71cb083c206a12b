"""The library's operations: arguments checked, backend chosen, differentiable."""

from .elman import elman

__all__ = ["elman"]
