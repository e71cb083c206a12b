"""A batch of token ids (B, T) with the ids that follow them: as the places of a corpus where its windows begin, or as
two tensors.

Samplers give the first kind. Nothing is gathered before somebody wants the ids, and a step whose kernel reads them
where they lie never does. Both kinds can be taken for the pair (X, Y) that they stand for.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from charrnn_fast.lm.distributed import Processes
from charrnn_fast.ops import language_model_step
from charrnn_fast.ops.language_model_step import Batch as Places
from charrnn_fast.ops.windows import windows

Pair = tuple[Tensor, Tensor]


class Batch(ABC):
    """A batch, read as the pair (X, Y), each (B, T) int64: ``X, Y = batch``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(B, T)."""

    @abstractmethod
    def windows(self) -> Pair:
        """X and Y (B, T) int64: the ids, and those that follow them."""

    @abstractmethod
    def places(self) -> Places:
        """Where the ids are, for a kernel that reads them there."""

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that differ from one batch of a shape to the next: what a recorded step holds buffers for."""

    @abstractmethod
    def on(self, inputs: Sequence[Tensor]) -> "Batch":
        """The same kind of batch on other such tensors."""

    @abstractmethod
    def kind(self) -> Hashable:
        """Equal for two batches that differ in nothing but their inputs' numbers."""

    def share(self, processes: Processes) -> "Batch":
        """This process's rows."""
        return self.on([processes.share(given) for given in self.inputs()])

    @property
    def count(self) -> int:
        """Characters to predict, B*T."""
        batch, steps = self.shape
        return batch * steps

    @property
    def ids_below(self) -> int | None:
        """A number that all ids are known to be below; None where nobody has looked."""
        return None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.windows())

    def __getitem__(self, index: int) -> Tensor:
        return self.windows()[index]

    def __len__(self) -> int:
        return 2


@dataclass(frozen=True)
class Ids(Batch):
    """X and Y as they are."""

    X: Tensor  # (B, T) int64
    Y: Tensor  # (B, T) int64

    @property
    def shape(self) -> tuple[int, int]:
        batch, steps = self.X.shape
        return batch, steps

    def windows(self) -> Pair:
        return self.X, self.Y

    def places(self) -> Places:
        return language_model_step.windows(self.X, self.Y)

    def inputs(self) -> tuple[Tensor, ...]:
        return self.X, self.Y

    def on(self, inputs: Sequence[Tensor]) -> "Ids":
        return Ids(*inputs)

    def kind(self) -> Hashable:
        return self.shape


@dataclass(frozen=True)
class Positions(Batch):
    """Windows of T characters and their successors, by where they begin."""

    corpus: Tensor  # (N,) ids of any integer type
    starts: Tensor  # (B,) int64 in 0..N-T-1, on the corpus's device
    num_steps: int  # T
    below: int | None = None  # see ids_below

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts), self.num_steps

    @property
    def ids_below(self) -> int | None:
        return self.below

    def windows(self) -> Pair:
        """X and Y, two views of one gather."""
        tokens, targets = windows(self.corpus, self.starts, self.num_steps)
        return tokens.t(), targets.t()

    def places(self) -> Places:
        return language_model_step.positions(self.corpus, self.starts, self.num_steps)

    def inputs(self) -> tuple[Tensor, ...]:
        return (self.starts,)

    def on(self, inputs: Sequence[Tensor]) -> "Positions":
        (starts,) = inputs
        return Positions(self.corpus, starts, self.num_steps, self.below)

    def kind(self) -> Hashable:
        return self.shape, self.corpus.data_ptr(), self.corpus.dtype, self.below


def as_batch(batch: Any) -> Batch:
    """A batch as one; a pair (X, Y) of tensors is one too."""
    return batch if isinstance(batch, Batch) else Ids(*batch)
