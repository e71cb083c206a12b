"""The four recipes, with every constant of theirs, and how a model and a sampler are built from one.

Sources: D2L (Dive into Deep Learning), "RNN from scratch" and "Concise implementation" (scratch, concise), its older
chapter 8 (ch8); santa is a character model trained on pieces of one book with truncated backpropagation through time.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from charrnn_fast.errors import InputError
from charrnn_fast.lm import data
from charrnn_fast.lm.data import Sampler, Vocabulary
from charrnn_fast.lm.model import CharRNN
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
    init: str  # "normal": N(0, 1) * 0.01, biases zero; "uniform": PyTorch's default
    second_bias: bool
    optimizer: str  # sgd, adam
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

    @property
    def unit(self) -> str:
        """What one epoch of the sampler is called."""
        return "iteration" if self.sampler == "pieces" else "epoch"


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
) -> CharRNN | RNNLM:
    """The recipe's model in one of its forms, "fused", "reference" or "torch": the same parameters for the same
    seed.
    """
    if kind not in ("fused", "reference", "torch"):
        raise InputError(f"the model must be fused, reference or torch, got {kind}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharRNN(
            vocab_size,
            recipe.hidden_size,
            recipe.num_layers,
            nonlinearity=recipe.nonlinearity,
            embedding=recipe.embedding,
            second_bias=recipe.second_bias,
            cell="torch" if kind == "torch" else "fused",
            backend=backend if kind == "fused" else "auto",
        )
    if recipe.init == "normal":
        scratch = RNNLM.from_scratch(
            vocab_size,
            recipe.hidden_size,
            recipe.num_layers,
            embedding=None if recipe.embedding == "onehot" else int(recipe.embedding),
            generator=torch.Generator().manual_seed(seed),
        )
        model.load_reference(scratch)
    model = model.to(device=device, dtype=dtype)
    return model.to_reference() if kind == "reference" else model


def build_sampler(recipe: Recipe, tokens: Tensor, seed: int) -> Sampler:
    """The recipe's sampler over token ids (N,) that lie on the training device. Raises InputError if the text is too
    short.
    """
    generator = torch.Generator().manual_seed(seed)
    if recipe.sampler == "pieces":
        return data.Pieces(tokens, generator, num_steps=recipe.num_steps)
    kinds = {"windows": data.Windows, "sequential": data.Sequential, "random": data.RandomWindows}
    if recipe.sampler not in kinds:
        raise InputError(f"the sampler must be one of pieces, {', '.join(kinds)}; got {recipe.sampler}")
    return kinds[recipe.sampler](tokens, generator, batch_size=recipe.batch_size, num_steps=recipe.num_steps)


def prepare_text(recipe: Recipe, text: str) -> tuple[Vocabulary, Tensor]:
    """The vocabulary of a text (of the whole of it), and the token ids (N,) int64 that the recipe trains on."""
    vocab = Vocabulary.of(text, recipe.letters)
    return vocab, vocab.encode(text)[: recipe.max_chars]
