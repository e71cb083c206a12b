"""How results are compared, for the tests of all kernels."""

from collections.abc import Iterable

import torch


def same(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal, number by number."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def error(found: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """Largest error, relative to the largest entry, or to that of `scale`."""
    largest = (exact if scale is None else scale).abs().max().clamp(min=1e-30)
    return ((found.double() - exact).abs().max() / largest).item()
