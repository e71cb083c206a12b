"""The five recipes, with every constant of theirs, and how a model and a sampler are built from one.

Sources: D2L (Dive into Deep Learning), "RNN from scratch" and "Concise implementation" (scratch, concise), its older
chapter 8 (ch8); santa is a character model trained on pieces of one book with truncated backpropagation through time.
shakespeare is the task of char-rnn and nanoGPT: one million characters, the last tenth to validate on.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from charrnn_fast.errors import InputError
from charrnn_fast.lm import data
from charrnn_fast.lm.data import Sampler, Vocabulary
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.forms import FORMS, as_form, make_modules
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.schedule import Schedule
from charrnn_fast.lm.texts import LargeText
from charrnn_fast.lm.training import Trainer
from charrnn_fast.reference.language_model import RNNLM


@dataclass(frozen=True)
class Prompt:
    """A text to decode after training (or at every report): greedy, or sampled at a temperature."""

    text: str
    num_chars: int
    temperature: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run but its seed. `epochs` counts pieces where the sampler is "pieces"."""

    name: str
    book: str
    letters: bool  # prepare the text as letters_only does
    sampler: str  # windows, sequential, random, pieces
    batch_size: int
    num_steps: int
    hidden_size: int
    init: (
        str  # "normal": N(0, 1) * 0.01, biases zero; "uniform": PyTorch's default; "orthogonal": W_hh so, else uniform
    )
    second_bias: bool
    optimizer: str  # sgd, adam, adamw, rmsprop
    lr: float
    clip: float | None
    epochs: int
    prompts: tuple[Prompt, ...] = ()
    report_every: int = 1
    sample_at_reports: bool = False
    max_chars: int | None = None  # train on the first characters only
    num_layers: int = 1
    nonlinearity: str = "tanh"
    embedding: str | int = "onehot"
    graph_batches: int = 1
    dropout: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"  # constant, cosine, step
    warmup: int = 0  # updates
    lr_final: float = 0.0  # share of lr that a cosine ends at
    lr_every: int = 10  # epochs between two steps down
    lr_gamma: float = 0.5  # what each of them multiplies lr by
    accumulate: int = 1  # batches for one update
    precision: str = "fp32"  # fp32, bf16
    patience: int | None = None  # epochs without a better loss
    on_nan: str = "stop"  # stop, skip, restore
    split: tuple[float, ...] | None = None  # shares of the text, by place: training, validation, test

    @property
    def unit(self) -> str:
        """What one epoch of the sampler is called."""
        return "iteration" if self.sampler == "pieces" else "epoch"

    def reports(self, epoch: int) -> bool:
        """Whether a line is printed, and the state saved, after this epoch."""
        return epoch % self.report_every == 0 or epoch in (1, self.epochs)


SCRATCH = Recipe(
    name="scratch",
    book="timemachine",
    letters=True,
    sampler="windows",
    batch_size=1024,
    num_steps=32,
    hidden_size=32,
    init="normal",
    second_bias=False,
    optimizer="sgd",
    lr=1.0,
    clip=1.0,
    epochs=100,
    prompts=(Prompt("time traveller", 20), Prompt("it has", 20)),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        SCRATCH,
        replace(SCRATCH, name="concise", init="uniform", second_bias=True),
        replace(
            SCRATCH,
            name="ch8",
            sampler="sequential",
            max_chars=10_000,
            batch_size=32,
            num_steps=35,
            hidden_size=512,
            epochs=500,
            prompts=(Prompt("time traveller", 50), Prompt("traveller", 50)),
        ),
        Recipe(
            name="santa",
            book="santa",
            letters=False,
            sampler="pieces",
            batch_size=1,
            num_steps=64,
            hidden_size=256,
            init="uniform",
            second_bias=True,
            optimizer="adam",
            lr=1e-3,
            clip=None,
            epochs=2_000,
            prompts=(Prompt("Santa ", 50, temperature=0.1),),
            report_every=10,
            sample_at_reports=True,
        ),
        Recipe(
            name="shakespeare",
            book="shakespeare",
            letters=False,
            sampler="sequential",
            batch_size=32,
            num_steps=64,
            hidden_size=512,
            num_layers=2,
            init="uniform",
            second_bias=True,
            optimizer="adamw",
            lr=2e-3,
            clip=1.0,
            epochs=8,
            prompts=(Prompt("ROMEO:\n", 400, temperature=0.7),),
            dropout=0.2,
            schedule="cosine",
            warmup=100,
            split=(0.9, 0.1),
        ),
    )
}


def build_model(
    recipe: Recipe,
    vocab_size: int,
    seed: int,
    *,
    kind: str = "fused",
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """The recipe's model in one of its forms, "fused", "reference" or "torch": the same parameters for the same
    seed.
    """
    if kind not in FORMS:
        raise InputError(f"the model must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {kind}")
    if kind == "reference" and recipe.dropout > 0:
        raise InputError(f"the reference model has no dropout, and this run's is {recipe.dropout:g}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = ("nonlinearity", "embedding", "second_bias", "dropout")
        options: dict[str, Any] = {name: getattr(recipe, name) for name in names}
        model = make_modules(kind, vocab_size, recipe.hidden_size, recipe.num_layers, backend=backend, **options)
        if recipe.init == "orthogonal":
            for layer in range(recipe.num_layers):
                torch.nn.init.orthogonal_(getattr(model.rnn, f"weight_hh_l{layer}"))
    if recipe.init == "normal":
        scratch = RNNLM.from_scratch(
            vocab_size,
            recipe.hidden_size,
            recipe.num_layers,
            embedding=None if recipe.embedding == "onehot" else int(recipe.embedding),
            generator=torch.Generator().manual_seed(seed),
        )
        model.load_reference(scratch)
    return as_form(kind, model.to(device=device, dtype=dtype))


def build_sampler(recipe: Recipe, tokens: Tensor, seed: int) -> Sampler:
    """The recipe's sampler over token ids (N,) that lie on the training device. Raises InputError if the text is too
    short.

    With a split the sampler trains on the first part and validates on the second; `split_by_place` gives all three.
    """
    generator = torch.Generator().manual_seed(seed)
    train, val, _ = split_by_place(recipe, tokens)
    options: dict[str, Any] = {"num_steps": recipe.num_steps}
    kinds = {"windows": data.Windows, "sequential": data.Sequential, "random": data.RandomWindows}
    if recipe.sampler in kinds:
        options["batch_size"] = recipe.batch_size
    elif recipe.sampler != "pieces":
        raise InputError(f"the sampler must be one of pieces, {', '.join(kinds)}; got {recipe.sampler}")
    sampler: Sampler = {**kinds, "pieces": data.Pieces}[recipe.sampler](train, generator, **options)
    return sampler if val is None else sampler.hold_out(val)


def split_by_place(recipe: Recipe, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The training, validation and test parts of a text (N,), one after the other; None for a part without a share.

    Shares count from the beginning, as char-rnn and nanoGPT cut: part i ends at the character int(N * (sum of the
    shares up to i)). Raises InputError if a part comes out with less than two characters.
    """
    if recipe.split is None:
        return tokens, None, None
    ends = [int(len(tokens) * min(1.0, round(sum(recipe.split[: i + 1]), 9))) for i in range(len(recipe.split))]
    parts = [tokens[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    for name, share, part in zip(("training", "validation", "test"), recipe.split, parts, strict=False):
        if len(part) < 2:
            raise InputError(
                f"the text of {len(tokens):,} characters is too short for a {name} part of {share:g} of it: expected "
                f"at least 2 characters, got {len(part)}"
            )
    padded: list[Tensor | None] = [*parts, None, None]
    return parts[0], padded[1], padded[2]


def schedule_of(recipe: Recipe) -> Schedule:
    """The recipe's learning-rate schedule. Raises ValueError for values out of range."""
    return Schedule(recipe.schedule, recipe.warmup, recipe.lr_final, recipe.lr_every, recipe.lr_gamma)


def for_processes(recipe: Recipe, count: int) -> Recipe:
    """The recipe of a run by so many processes, each with the recipe's own batch: so many times the sequences. Raises
    InputError if the sampler has one sequence alone.
    """
    if count > 1 and recipe.sampler == "pieces":
        raise InputError(f"a batch of the sampler pieces is one sequence, which {count} processes cannot share")
    return replace(recipe, batch_size=recipe.batch_size * count)


def build_trainer(
    recipe: Recipe, model: LanguageModel, capture: bool | str = "auto", processes: Processes | None = None
) -> Trainer:
    """The recipe's trainer of a model. Raises what Trainer raises."""
    names = ("optimizer", "lr", "momentum", "weight_decay", "clip", "epochs", "graph_batches", "accumulate", "patience")
    options: dict[str, Any] = {name: getattr(recipe, name) for name in (*names, "precision", "on_nan")}
    return Trainer(model, schedule=schedule_of(recipe), capture=capture, processes=processes, **options)


def prepare_text(recipe: Recipe, text: str | LargeText) -> tuple[Vocabulary, Tensor]:
    """The vocabulary of a text (of the whole of it), and the token ids (N,) that the recipe trains on, of the smallest
    integer type; for a LargeText mapped from a file without a name. Raises InputError if the text is empty, or that
    file cannot be written.
    """
    if isinstance(text, str):
        vocab = Vocabulary.of(text, recipe.letters)
        return vocab, vocab.encode(text, vocab.dtype)[: recipe.max_chars]
    symbols: set[str] = set()
    for piece in text.chunks():
        symbols |= set(piece)
    vocab = Vocabulary.of("".join(sorted(symbols)), recipe.letters)
    return vocab, mapped(_ids(text, vocab, recipe.max_chars), vocab.dtype)


def _ids(text: LargeText, vocab: Vocabulary, max_chars: int | None) -> Iterator[Tensor]:
    """The token ids of a text, piece by piece, as they would be of the whole of it."""
    blank, count = False, 0  # whether the piece before ended in a space
    for piece in text.chunks():
        prepared = vocab.prepare(piece)
        if vocab.letters and blank:
            prepared = prepared.removeprefix(" ")
        if not prepared:
            continue
        blank = prepared.endswith(" ")
        prepared = prepared if max_chars is None else prepared[: max_chars - count]
        count += len(prepared)
        yield vocab.ids_of(prepared, vocab.dtype)
        if count == max_chars:
            return


def mapped(pieces: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Pieces of ids (n,) as one tensor (N,) whose memory is a file without a name in the folder for temporary files.
    Raises InputError if it cannot be written.
    """
    try:
        with tempfile.TemporaryFile() as file:
            count = 0
            for piece in pieces:
                file.write(piece.numpy().data)
                count += len(piece)
            file.flush()
            of_numpy = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
            return torch.from_numpy(np.memmap(file, of_numpy, "r+", shape=(count,)))
    except OSError as error:
        place = tempfile.gettempdir()
        raise InputError(f"cannot write the token ids to {place}: {error.strerror}; TMPDIR names another") from None
