"""What the tests of the language model share: a text, tiny models, runs of a recipe, and how runs are compared."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch

from charrnn_fast.lm import checkpoint, corpora, data
from charrnn_fast.lm.callbacks import Callback
from charrnn_fast.lm.forms import make
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.recipes import Recipe, build_model, build_sampler, build_trainer
from charrnn_fast.lm.records import EpochRecord
from charrnn_fast.lm.step import train_batches
from charrnn_fast.lm.training import Trainer
from charrnn_fast.reference import training as reference

# English that is on every machine, which the recipes' own books are not; all 27 symbols of it and <unk> make V = 28.
ENGLISH = corpora.fallback(corpora.BOOKS["timemachine"], "offline").text[:40_000]
VOCAB = data.Vocabulary.of(f"{ENGLISH} {ascii_lowercase}", letters=True)
TEXT = VOCAB.encode(ENGLISH)[:20_000]

V, H = 7, 5  # of a tiny model


def tiny(form="fused", seed=0, **options) -> LanguageModel:
    """A model of V symbols and H units in fp64, the same in each form."""
    torch.manual_seed(seed)
    return make(form, V, H, **{"dtype": torch.float64, **options})


def start(
    recipe, text=TEXT, *, capture="auto", seed=0, kind="fused", device="cpu", dtype=torch.float32, **changes
) -> tuple[Trainer, data.Sampler]:
    """The trainer and the sampler of a recipe, with these changes to it; the same parameters in each form."""
    recipe = replace(recipe, **changes)
    model = build_model(recipe, len(VOCAB), seed, kind=kind, device=device, dtype=dtype)
    return build_trainer(recipe, model, capture), build_sampler(recipe, text, seed)


def fit(recipe, text=TEXT, **options) -> Trainer:
    """The same, trained to its last epoch."""
    trainer, sampler = start(recipe, text, **options)
    trainer.fit(sampler)
    return trainer


def by_form(recipe, text, steps, *, reordered=0, **options) -> tuple[list[float], int, Trainer, data.Sampler]:
    """So many training steps, and on to the end of an epoch, by the loop of the model's form, which is the
    specification's own for the reference -> their losses, the epochs, and what was trained.

    `reordered` turns the rows of each batch around by so many, which is another order of the same sums.
    """
    trainer, sampler = start(recipe, text, **options)
    run = reference.train_batches if trainer.model.form == "reference" else train_batches
    losses, epochs = [], 0
    while len(losses) < steps:
        batches = sampler.train()
        if reordered:
            batches = [(X.roll(reordered, 0), Y.roll(reordered, 0)) for X, Y in batches]
        carried = {"carry_state": sampler.carry_state}
        losses += map(float, run(trainer.model, batches, trainer.optimizer, trainer.clip, **carried))
        epochs += 1
    return losses, epochs, trainer, sampler


def by_hand(loss_of, optimizer, batches, clip=None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loop that everybody writes -> each batch's loss, and the norm of all that the optimizer holds."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for X, Y in batches:
        loss = loss_of(X, Y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(held, math.inf if clip is None else clip)
        optimizer.step()
        yield loss.detach(), norm


class Listener(Callback):
    """The learning rates, losses and gradient norms of all updates, and what `each` says of the trainer after each."""

    def __init__(self, each: Callable[[Trainer], Any] = lambda trainer: None):
        self.lrs, self.losses, self.norms, self.said = [], [], [], []
        self.each = each

    def on_step(self, trainer, step):
        self.lrs.append(step.lr)
        self.losses.append(step.loss)
        self.norms.append(step.grad_norm)
        self.said.append(self.each(trainer))


class Calling:
    """Stands for the recorder of CUDA graphs, and records the call itself: it runs the kernels that a CPU has. As a
    graph's, its replays put their scalars in the place of the last ones.
    """

    def __init__(self, *trained: Any):
        self.trained = trained  # the model and its optimizer
        self.runs = self.recorded = self.replays = 0

    def run(self, work):
        self.runs += 1
        return work()

    def record(self, work):
        self.recorded += 1
        places = []

        def replay():
            self.replays += 1
            found = work()
            places.extend(map(torch.empty_like, found[len(places) :]))
            return tuple(place.copy_(scalar) for place, scalar in zip(places, found, strict=True))

        return replay


def figures(trainer: Trainer) -> list[EpochRecord]:
    """A history without its times."""
    return [replace(record, seconds=0.0) for record in trainer.history]


def same_parameters(one: Any, other: Any) -> None:
    """To the bit."""
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def same_run(one: Trainer, other: Trainer) -> None:
    """Figures, parameters and the optimizers' state to the bit."""
    assert figures(one) == figures(other) and one.step == other.step
    same_parameters(one.model, other.model)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def save(path: Path, trainer: Trainer, sampler: data.Sampler, recipe: Recipe) -> None:
    """A checkpoint of a run of VOCAB's text."""
    checkpoint.save(path, trainer, sampler, VOCAB, recipe, kind="fused", seed=0, source="a text")
