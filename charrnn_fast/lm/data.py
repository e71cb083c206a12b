"""From a text to batches of token ids: the vocabulary and the four samplers of the recipes.

A corpus is one int64 tensor on the training device. A batch (X, Y) is a gather from it, or a view of it: X (B, T) are
characters, Y (B, T) the characters that follow them. All random choices come from one CPU torch.Generator, so they do
not depend on the device; what crosses to it is an epoch's choices, once, and nothing waits for it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from charrnn_fast.errors import InputError

UNKNOWN = "<unk>"
Batch = tuple[Tensor, Tensor]


def letters_only(text: str) -> str:
    """Every run of characters outside A-Z a-z becomes one space; lower case. As D2L prepares The Time Machine."""
    return re.sub("[^A-Za-z]+", " ", text).lower()


class Vocabulary:
    """Characters and their ids, in sorted order.

    `letters=True` is the preparation of the Time Machine recipes: texts pass through `letters_only`, and the symbol
    "<unk>" has an id of its own that unknown characters map to. `letters=False` takes characters as they are, and an
    unknown one is an InputError that names it.
    """

    def __init__(self, symbols: list[str], letters: bool):
        self.symbols = symbols
        self.letters = letters
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}

    @classmethod
    def of(cls, text: str, letters: bool) -> "Vocabulary":
        """The vocabulary of a text. Raises InputError if nothing is left of it after its preparation."""
        prepared = letters_only(text) if letters else text
        if not prepared.strip():
            raise InputError("the text is empty: expected at least one character that is not blank")
        return cls(sorted(set(prepared) | ({UNKNOWN} if letters else set())), letters)

    def __len__(self) -> int:
        return len(self.symbols)

    def prepare(self, text: str) -> str:
        """The text as it is tokenised."""
        return letters_only(text) if self.letters else text

    def encode(self, text: str) -> Tensor:
        """Token ids (number of characters,) int64 of a text."""
        prepared = self.prepare(text)
        if self.letters:
            unknown = self._ids[UNKNOWN]
            return torch.tensor([self._ids.get(c, unknown) for c in prepared], dtype=torch.int64, device="cpu")
        try:
            return torch.tensor([self._ids[c] for c in prepared], dtype=torch.int64, device="cpu")
        except KeyError:
            strange = sorted(set(prepared) - self._ids.keys())
            shown = " ".join(repr(c) for c in strange[:8])
            more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
            raise InputError(
                f"characters outside the model's vocabulary of {len(self)}: {shown}{more}; "
                "use characters of the text that the model was trained on"
            ) from None

    def decode(self, ids: Tensor) -> str:
        """The text of token ids (N,). Raises InputError for an id outside 0..V-1."""
        numbers = ids.tolist()
        for i in numbers:
            if not 0 <= i < len(self):
                raise InputError(f"token id {i} is outside 0..{len(self) - 1}")
        return "".join(self.symbols[i] for i in numbers)


def _need(tokens: Tensor, count: int, what: str) -> None:
    if len(tokens) < count:
        raise InputError(f"the text is too short for {what}: expected at least {count} characters, got {len(tokens)}")


def _random_below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator, dtype=torch.int64, device="cpu"))


class Sampler(ABC):
    """What Trainer draws batches from. `carry_state`: whether a batch continues where the one before ended."""

    carry_state = False
    has_validation = False

    def __init__(self, tokens: Tensor, generator: torch.Generator):
        self.tokens = tokens
        self.generator = generator

    @abstractmethod
    def train(self) -> Iterator[Batch]:
        """One epoch of training batches."""

    def validation(self) -> Iterator[Batch]:
        """The validation batches, in order; none for a sampler without validation."""
        return iter(())

    def to(self, device: torch.device | str) -> "Sampler":
        """Move the corpus to a device; returns self."""
        self.tokens = self.tokens.to(device)
        return self

    def _windows(self, starts: Tensor, batch_size: int, num_steps: int) -> Iterator[Batch]:
        """Batches of the windows that begin at `starts` (N,), a CPU tensor, in this order; the last may be smaller."""
        device = self.tokens.device
        if device.type == "cuda":
            starts = starts.pin_memory()  # without it the copy would wait
        starts = starts.to(device, non_blocking=True)
        steps = torch.arange(num_steps + 1, dtype=torch.int64, device=device)
        for some in starts.split(batch_size):
            window = self.tokens[some[:, None] + steps]  # (B, T + 1)
            yield window[:, :-1], window[:, 1:]


class Windows(Sampler):
    """All stride-1 windows of T + 1 characters: the first `num_train` train, shuffled; the next `num_val` validate, in
    order.

    A text with fewer windows than num_train + num_val is split in the same proportion; `shortened` says so.
    """

    has_validation = True

    def __init__(
        self,
        tokens: Tensor,
        generator: torch.Generator,
        *,
        batch_size: int,
        num_steps: int,
        num_train: int = 10_000,
        num_val: int = 5_000,
    ):
        super().__init__(tokens, generator)
        _need(
            tokens, num_steps + 2, f"a training and a validation window of {num_steps} characters and their successors"
        )
        available = len(tokens) - num_steps
        self.shortened = available < num_train + num_val
        if self.shortened:
            num_val = max(1, available * num_val // (num_train + num_val))
            num_train = available - num_val
        self.batch_size, self.num_steps = batch_size, num_steps
        self.num_train, self.num_val = num_train, num_val

    def train(self) -> Iterator[Batch]:
        order = torch.randperm(self.num_train, generator=self.generator, dtype=torch.int64, device="cpu")
        yield from self._windows(order, self.batch_size, self.num_steps)

    def validation(self) -> Iterator[Batch]:
        order = torch.arange(self.num_train, self.num_train + self.num_val, dtype=torch.int64, device="cpu")
        yield from self._windows(order, self.batch_size, self.num_steps)


class Sequential(Sampler):
    """B parallel streams, after a random offset in 0..T-1, walked T characters at a time; a rest shorter than T is
    dropped.
    """

    carry_state = True

    def __init__(self, tokens: Tensor, generator: torch.Generator, *, batch_size: int, num_steps: int):
        super().__init__(tokens, generator)
        _need(
            tokens,
            batch_size * num_steps + num_steps,
            f"{batch_size} streams of {num_steps} characters after an offset",
        )
        self.batch_size, self.num_steps = batch_size, num_steps

    def train(self) -> Iterator[Batch]:
        offset = _random_below(self.num_steps, self.generator)
        width = (len(self.tokens) - offset - 1) // self.batch_size
        X, Y = (self.tokens[begin:][: self.batch_size * width].view(-1, width) for begin in (offset, offset + 1))
        for step in range(0, width - self.num_steps + 1, self.num_steps):
            yield X[:, step : step + self.num_steps], Y[:, step : step + self.num_steps]


class RandomWindows(Sampler):
    """All non-overlapping windows of T characters after a random offset, in random order; the last batch may be
    smaller.
    """

    def __init__(self, tokens: Tensor, generator: torch.Generator, *, batch_size: int, num_steps: int):
        super().__init__(tokens, generator)
        _need(tokens, 2 * num_steps, f"a window of {num_steps} characters after an offset")
        self.batch_size, self.num_steps = batch_size, num_steps

    def train(self) -> Iterator[Batch]:
        offset = _random_below(self.num_steps, self.generator)
        count = (len(self.tokens) - offset - 1) // self.num_steps
        order = torch.randperm(count, generator=self.generator, dtype=torch.int64, device="cpu")
        yield from self._windows(offset + order * self.num_steps, self.batch_size, self.num_steps)


class Pieces(Sampler):
    """One random contiguous piece of the text an epoch, walked in chunks of T characters, batch 1; the last chunk is
    shorter.
    """

    carry_state = True

    def __init__(self, tokens: Tensor, generator: torch.Generator, *, piece: int = 5_000, num_steps: int = 64):
        super().__init__(tokens, generator)
        _need(tokens, 2, "a character and its successor")
        self.piece, self.num_steps = min(piece, len(tokens)), num_steps

    def train(self) -> Iterator[Batch]:
        start = _random_below(len(self.tokens) - self.piece + 1, self.generator)
        piece = self.tokens[start : start + self.piece].unsqueeze(0)  # (1, piece)
        for begin in range(0, self.piece - 1, self.num_steps):
            end = min(begin + self.num_steps, self.piece - 1)
            yield piece[:, begin:end], piece[:, begin + 1 : end + 1]


def consecutive(tokens: Tensor, num_steps: int) -> Iterator[Batch]:
    """A whole text in order, batch 1, T characters at a time: what `evaluate` walks with a carried state."""
    _need(tokens, 2, "a character and its successor")
    for begin in range(0, len(tokens) - 1, num_steps):
        end = min(begin + num_steps, len(tokens) - 1)
        yield tokens[None, begin:end], tokens[None, begin + 1 : end + 1]
