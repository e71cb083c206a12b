"""From a text to batches of token ids: the vocabulary and the four samplers of the recipes.

A corpus is one tensor of integers on the training device, of the smallest type that holds the vocabulary where it is
large. A batch is the B places in it where windows of T characters begin (batches.Positions), and stands for the pair
X (B, T) int64, the characters, and Y (B, T) int64, those that follow them. All random choices come from one CPU
torch.Generator, so they do not depend on the device; what crosses to it is an epoch's choices, and nothing waits for
it.
"""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from charrnn_fast.errors import InputError
from charrnn_fast.lm.batches import Batch, Positions

UNKNOWN = "<unk>"
_BLOCK = 1024  # batches whose places cross to the device at a time


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
        self._ids_by_code: np.ndarray | None = None
        self._no_id = -1

    @classmethod
    def of(cls, text: str, letters: bool) -> "Vocabulary":
        """The vocabulary of a text. Raises InputError if nothing is left of it after its preparation."""
        symbols = set(letters_only(text) if letters else text)
        if not any(symbol.strip() for symbol in symbols):
            raise InputError("the text is empty: expected at least one character that is not blank")
        return cls(sorted(symbols | ({UNKNOWN} if letters else set())), letters)

    def __len__(self) -> int:
        return len(self.symbols)

    def prepare(self, text: str) -> str:
        """The text as it is tokenised."""
        return letters_only(text) if self.letters else text

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds every id."""
        return torch.uint8 if len(self) <= 256 else torch.int16 if len(self) <= 2**15 else torch.int32

    def encode(self, text: str, dtype: torch.dtype = torch.int64) -> Tensor:
        """Token ids (number of characters,) of a text. Raises InputError for a character without an id."""
        return self.ids_of(self.prepare(text), dtype)

    def ids_of(self, prepared: str, dtype: torch.dtype = torch.int64) -> Tensor:
        """`encode` of a text that is prepared already."""
        codes = np.frombuffer(prepared.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._table()[np.minimum(codes, self._table().size - 1)]
        if not self.letters and (ids == self._no_id).any():
            strange = sorted(set(prepared) - self._ids.keys())
            shown = " ".join(repr(c) for c in strange[:8])
            more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
            raise InputError(
                f"characters outside the model's vocabulary of {len(self)}: {shown}{more}; "
                "use characters of the text that the model was trained on, or --unknown map"
            )
        return torch.from_numpy(ids).to(dtype)

    def map_unknown(self, text: str) -> tuple[str, list[str]]:
        """The text with each character that has no id replaced by one that has: its letter without accents, that in the
        other case, a space; left out where none of these has one. And the characters that were replaced, each once.
        """
        if self.letters:
            return text, []
        mapped: dict[str, str] = {}
        for c in sorted(set(text) - self._ids.keys()):
            base = unicodedata.normalize("NFKD", c)[:1]
            mapped[c] = next((s for s in (base, base.swapcase(), c.swapcase(), " ") if s in self._ids), "")
        return "".join(mapped.get(c, c) for c in text), list(mapped)

    def _table(self) -> np.ndarray:
        """By code point: the id, or `_no_id`, which the last entry is; made when it is first needed."""
        if self._ids_by_code is None:
            codes = {ord(symbol): i for symbol, i in self._ids.items() if len(symbol) == 1}
            self._no_id = self._ids[UNKNOWN] if self.letters else -1
            self._ids_by_code = np.full(max(codes, default=0) + 2, self._no_id, dtype=np.int32)
            self._ids_by_code[list(codes)] = list(codes.values())
        return self._ids_by_code

    def decode(self, ids: Tensor) -> str:
        """The text of token ids (N,). Raises InputError for an id outside 0..V-1."""
        numbers = ids.tolist()
        for i in numbers:
            if not 0 <= i < len(self):
                raise InputError(f"token id {i} is outside 0..{len(self) - 1}")
        return "".join(self.symbols[i] for i in numbers)


def _need(tokens: Tensor, count: int, what: str, way_out: str = "") -> None:
    if len(tokens) < count:
        raise InputError(
            f"the text is too short for {what}: expected at least {count} characters, got {len(tokens)}{way_out}"
        )


def _random_below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator, dtype=torch.int64, device="cpu"))


class Sampler(ABC):
    """What Trainer draws batches from.

    Attributes: tokens (N,), integers of any type; generator, the only source of its choices; carry_state, whether a
    batch continues where the one before ended; held_out (M,) or None, a text to validate on.
    """

    carry_state = False
    batch_size = 1
    num_steps = 64

    def __init__(self, tokens: Tensor, generator: torch.Generator):
        self.tokens = tokens
        self.generator = generator
        self.held_out: Tensor | None = None
        self._seen: list[tuple[Tensor, int, int | None]] = []  # texts whose ids were looked at, and as of which change

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch; where random offsets make one more or less, with offset 0. None if it is not known."""
        return None

    def hold_out(self, tokens: Tensor) -> "Sampler":
        """Validate on this text (M,) from now on; returns self. Raises InputError if it is too short for a batch."""
        _need(tokens, 2, "a character to validate on and its successor")
        self.held_out = tokens
        return self

    @abstractmethod
    def train(self) -> Iterator[Batch]:
        """One epoch of training batches."""

    def validation(self) -> Iterator[Batch]:
        """The validation batches, in order; none for a sampler without validation."""
        return iter(()) if self.held_out is None else self.walk(self.held_out)

    def walk(self, tokens: Tensor) -> Iterator[Batch]:
        """A text (M,) once and in order, as `train` would batch it but without a choice: B parallel streams to carry
        the state along, or windows one after the other. Characters that fill no stream or window are left out, as many
        as B or T at most.
        """
        if self.carry_state:
            batch = max(1, min(self.batch_size, (len(tokens) - 1) // self.num_steps))
            yield from self._streams(tokens, batch, 0, rest=True)
        else:
            steps = min(self.num_steps, len(tokens) - 1)
            starts = torch.arange(0, len(tokens) - steps, steps, dtype=torch.int64, device="cpu")
            yield from self._windows(starts, self.batch_size, steps, tokens)

    def to(self, device: torch.device | str) -> "Sampler":
        """Move the corpus, and what is held out, to a device; returns self."""
        self.tokens = self.tokens.to(device)
        self.held_out = None if self.held_out is None else self.held_out.to(device)
        return self

    def look_at_ids(self) -> None:
        """Find the largest id of the corpus and of what is held out, so that no step has to look: batches say so then.
        Each text is looked at once, on a GPU with a wait for it.
        """
        texts = [text for text in (self.tokens, self.held_out) if text is not None and len(text)]
        self._seen = [seen for text in texts for seen in self._seen if seen[0] is text and seen[1] == text._version]
        for text in texts:
            if self._ids_below(text) is None:
                lowest, highest = (int(bound) for bound in text.aminmax())
                self._seen.append((text, text._version, highest + 1 if lowest >= 0 else None))

    def _ids_below(self, tokens: Tensor) -> int | None:
        """A number that the ids of a text are known to be below."""
        return next((below for text, change, below in self._seen if text is tokens and change == text._version), None)

    def _windows(
        self, starts: Tensor, batch_size: int, num_steps: int, tokens: Tensor | None = None
    ) -> Iterator[Batch]:
        """Batches of the windows that begin at `starts` (N,), a CPU tensor, in this order; the last may be smaller."""
        tokens = self.tokens if tokens is None else tokens
        below = self._ids_below(tokens)
        for some in _moved(starts, tokens.device).split(batch_size):
            yield Positions(tokens, some, num_steps, below)

    def _streams(self, tokens: Tensor, batch_size: int, offset: int, rest: bool = False) -> Iterator[Batch]:
        """B parallel streams of the text after `offset`, walked T characters at a time; with `rest` to their last
        one.
        """
        width = (len(tokens) - offset - 1) // batch_size
        begins = offset + width * torch.arange(batch_size, dtype=torch.int64, device="cpu")
        return _walked(tokens, begins, width, self.num_steps, rest, self._ids_below(tokens))


def _moved(starts: Tensor, device: torch.device) -> Tensor:
    """Places from the CPU on a device, without waiting for it."""
    if device.type == "cuda":
        starts = starts.pin_memory()  # without it the copy would wait
    return starts.to(device, non_blocking=True)


def _walked(
    tokens: Tensor, begins: Tensor, width: int, num_steps: int, rest: bool, below: int | None = None
) -> Iterator[Batch]:
    """Streams (B,) of `width` characters each, by where they begin, T characters at a time; with `rest` to the end."""
    whole, left = divmod(width, num_steps)
    for block in range(0, whole, _BLOCK):
        steps = torch.arange(block, min(block + _BLOCK, whole), dtype=torch.int64, device="cpu") * num_steps
        for starts in _moved(begins + steps[:, None], tokens.device).unbind():  # (B,)
            yield Positions(tokens, starts, num_steps, below)
    if rest and left:
        yield Positions(tokens, _moved(begins + whole * num_steps, tokens.device), left, below)


class Windows(Sampler):
    """All stride-1 windows of T + 1 characters: the first `num_train` train, shuffled; the next `num_val` validate, in
    order.

    A text with fewer windows than num_train + num_val is split in the same proportion; `shortened` says so.
    """

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

    @property
    def num_batches(self) -> int:
        return -(-self.num_train // self.batch_size)

    def hold_out(self, tokens: Tensor) -> "Windows":
        super().hold_out(tokens)
        self.num_train, self.shortened = len(self.tokens) - self.num_steps, False  # all of its own text is for training
        return self

    def validation(self) -> Iterator[Batch]:
        if self.held_out is not None:
            yield from super().validation()
            return
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
            "; a smaller batch size or number of steps needs fewer",
        )
        self.batch_size, self.num_steps = batch_size, num_steps

    def train(self) -> Iterator[Batch]:
        offset = _random_below(self.num_steps, self.generator)
        yield from self._streams(self.tokens, self.batch_size, offset)

    @property
    def num_batches(self) -> int:
        return (len(self.tokens) - 1) // self.batch_size // self.num_steps


class RandomWindows(Sampler):
    """All non-overlapping windows of T characters after a random offset, in random order; the last batch may be
    smaller.
    """

    def __init__(self, tokens: Tensor, generator: torch.Generator, *, batch_size: int, num_steps: int):
        super().__init__(tokens, generator)
        way_out = "; a smaller number of steps needs fewer"
        _need(tokens, 2 * num_steps, f"a window of {num_steps} characters after an offset", way_out)
        self.batch_size, self.num_steps = batch_size, num_steps

    def train(self) -> Iterator[Batch]:
        offset = _random_below(self.num_steps, self.generator)
        count = (len(self.tokens) - offset - 1) // self.num_steps
        order = torch.randperm(count, generator=self.generator, dtype=torch.int64, device="cpu")
        yield from self._windows(offset + order * self.num_steps, self.batch_size, self.num_steps)

    @property
    def num_batches(self) -> int:
        return -(-((len(self.tokens) - 1) // self.num_steps) // self.batch_size)


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
        begins = torch.tensor([start], dtype=torch.int64, device="cpu")
        below = self._ids_below(self.tokens)
        yield from _walked(self.tokens, begins, self.piece - 1, self.num_steps, rest=True, below=below)

    @property
    def num_batches(self) -> int:
        return -(-(self.piece - 1) // self.num_steps)


def consecutive(tokens: Tensor, num_steps: int, ids_below: int | None = None) -> Iterator[Batch]:
    """A whole text in order, batch 1, T characters at a time: what `evaluate` walks with a carried state. ids_below: a
    number that its ids are known to be below.
    """
    _need(tokens, 2, "a character and its successor")
    begins = torch.zeros(1, dtype=torch.int64, device="cpu")
    yield from _walked(tokens, begins, len(tokens) - 1, num_steps, rest=True, below=ids_below)
