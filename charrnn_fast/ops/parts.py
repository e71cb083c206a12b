"""The steps of a sequence cut into parts of k, in the order in which a direction walks them."""

import itertools
from functools import cached_property

import torch
from torch import Tensor


class Parts:
    """The parts of padded steps (T, B, ...) or packed rows (N, ...). A direction that walks time backwards begins at
    each sequence's last step; its rows are those of a forward one over turned sequences, packed by the same sizes.
    """

    def __init__(self, like: Tensor, batch_sizes: Tensor | None, steps: int):
        """like: any tensor of these rows; batch_sizes: (T,) int64 on the CPU for packed ones; steps: k."""
        self.batch_sizes, self._steps, self._device = batch_sizes, steps, like.device
        self._sizes = None if batch_sizes is None else batch_sizes.tolist()
        self._total = like.shape[0] if self._sizes is None else len(self._sizes)
        self._batch = like.shape[1] if self._sizes is None else self._sizes[0]
        self._offsets = [0, *itertools.accumulate(self._sizes or ())]  # of each step's rows
        self.count = -(-self._total // steps)

    def active(self, part: int) -> int:
        """The sequences that a part begins with; none after the last."""
        if part >= self.count:
            return 0
        return self._batch if self._sizes is None else self._sizes[part * self._steps]

    def sizes(self, part: int) -> Tensor | None:
        """Its own batch sizes."""
        return None if self.batch_sizes is None else self.batch_sizes[slice(*self._ends(part))]

    def rows(self, of: Tensor, part: int, backwards: bool) -> Tensor:
        """(steps of the part, B, ...), or packed: a view of ``of`` where the walk is in its order."""
        begin, end = self._ends(part)
        if self._sizes is None:
            return of[self._total - end : self._total - begin].flip(0) if backwards else of[begin:end]
        packed = slice(self._offsets[begin], self._offsets[end])
        return of.index_select(0, self._turned[packed]) if backwards else of[packed]

    def put(self, into: Tensor, part: int, backwards: bool, rows: Tensor) -> None:
        """Write a part's rows forwards, where all are written once; add them to what is there backwards."""
        begin, end = self._ends(part)
        if not backwards:
            self.rows(into, part, False).copy_(rows)
        elif self._sizes is None:
            into[self._total - end : self._total - begin].add_(rows.flip(0))
        else:
            into.index_add_(0, self._turned[self._offsets[begin] : self._offsets[end]], rows)

    def states_between(self, output: Tensor, backwards: bool) -> Tensor:
        """Of a layer's output in one direction, (T, B, H) or (N, H), the states that all parts but the first begin
        with, (count - 1, B, H); whatever lies there for sequences that have ended.
        """
        steps, walked = self._steps, (self.count - 1) * self._steps
        if self._sizes is None:
            if backwards:
                return output[self._total - walked : self._total - steps + 1 : steps].flip(0)
            return output[steps - 1 : walked : steps]
        sequence = torch.arange(self._batch, dtype=torch.int64, device="cpu")
        places = [
            self._offsets[step - 1] + sequence.clamp(max=self._sizes[step] - 1)
            for step in range(steps, walked + 1, steps)
        ]
        index = torch.cat([sequence[:0], *places]).to(self._device)
        chosen = output.index_select(0, self._turned[index] if backwards else index)
        return chosen.view(self.count - 1, self._batch, output.shape[-1])

    def _ends(self, part: int) -> tuple[int, int]:
        return part * self._steps, min((part + 1) * self._steps, self._total)

    @cached_property
    def _turned(self) -> Tensor:
        """(N,): for each packed row of the turned sequences its place among the packed rows."""
        sizes = self.batch_sizes
        assert sizes is not None
        offsets = sizes.cumsum(0) - sizes
        step = torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(sizes)
        sequence = torch.arange(len(step), dtype=torch.int64, device="cpu") - offsets[step]
        sequences = torch.arange(self._batch, dtype=torch.int64, device="cpu")
        lengths = (sizes.unsqueeze(1) > sequences).sum(0)
        return (offsets[lengths[sequence] - 1 - step] + sequence).to(self._device)
