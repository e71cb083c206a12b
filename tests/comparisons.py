"""How results are compared, for the tests of all kernels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def same(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal, number by number."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_one_thread_and_by_two(function: Callable[[], Any]) -> list[Any]:
    """What function() returns with one thread, and with two."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(function())
    return results


def error(found: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """Largest error, relative to the largest entry, or to that of `scale`."""
    largest = (exact if scale is None else scale).abs().max().clamp(min=1e-30)
    return ((found.double() - exact).abs().max() / largest).item()
