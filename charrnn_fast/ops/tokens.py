"""Token ids in place of one-hot rows: which tensors are ids, whether they are in range, and the rows they stand for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .context import addressable, transforms_active

TOKEN_TYPES = (torch.int64, torch.int32)


class _Known(threading.local):
    ids_below = 0  # within ids_known_below: all ids of this thread's calls are


_KNOWN = _Known()


@contextmanager
def ids_known_below(count: int) -> Iterator[None]:
    """Within it this thread's ids are known to be in 0..count-1, as those of a corpus that somebody has looked at are,
    and `check_tokens` takes them for such: the look costs more launches than what it guards.
    """
    before, _KNOWN.ids_below = _KNOWN.ids_below, count
    try:
        yield
    finally:
        _KNOWN.ids_below = before


def ids_are_known(vocab: int) -> bool:
    """Are all ids of this thread's calls known to be in 0..V-1?"""
    return 0 < _KNOWN.ids_below <= vocab


def check_tokens(tokens: Tensor, vocab: int) -> None:
    """Report ids outside 0..V-1: IndexError on a CPU; on a GPU, without waiting for it, embedding's own assertion."""
    if ids_are_known(vocab) or not addressable(tokens) or tokens.numel() == 0:
        return  # the values may not be there to look at
    if tokens.device.type == "cpu":
        lowest, highest = (int(bound) for bound in tokens.aminmax())
        if lowest < 0 or highest >= vocab:
            raise IndexError(
                f"index out of range in self: token id {lowest if lowest < 0 else highest} is not in 0..{vocab - 1}"
            )
    else:
        torch.empty(vocab, 1, device=tokens.device, dtype=torch.uint8).index_select(0, tokens.flatten())


def one_hot_rows(ids: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(..., classes) rows of zeros with a one in the place of each id (...), int64 or int32; ids are taken as checked.

    torch.nn.functional.one_hot looks at the ids, which a tracer's have not to show, and makes integers first.
    """
    rows = torch.zeros(*ids.shape, classes, dtype=dtype, device=ids.device)
    places = ids.long().unsqueeze(-1)
    return rows.scatter(-1, places, 1) if transforms_active() else rows.scatter_(-1, places, 1)
