"""One training run: what listens to it, what it keeps, how it goes on, and how it ends."""

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial

import torch
from tqdm import tqdm

from charrnn_fast.cli.progress import Progress, notice
from charrnn_fast.cli.settings import Settings
from charrnn_fast.cli.signals import finishing
from charrnn_fast.errors import InputError, TrainingError
from charrnn_fast.lm import checkpoint, data, distributed
from charrnn_fast.lm.callbacks import Callback, JsonLog, Samples, TensorBoard
from charrnn_fast.lm.corpora import Corpus
from charrnn_fast.lm.evaluation import validate
from charrnn_fast.lm.generation import generate
from charrnn_fast.lm.keeping import Keeper
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.recipes import Prompt
from charrnn_fast.lm.records import EpochRecord
from charrnn_fast.lm.texts import LargeText
from charrnn_fast.lm.training import Trainer


class Run:
    """One training run as the terminal and its folder see it.

    Attributes: signal, the number of the signal that ended it, or None.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        settings: Settings,
        trainer: Trainer,
        sampler: data.Sampler,
        vocab: data.Vocabulary,
        corpus: Corpus | LargeText,
    ):
        self.options, self.settings, self.recipe = options, settings, settings.recipe
        self.out, self.trainer, self.sampler, self.vocab = options.out, trainer, sampler, vocab
        self.source, self.text_sha256 = corpus.source, corpus.sha256
        self.signal: int | None = None
        self._keeper: Keeper | None = None

    def resume(self) -> None:
        """Go on from the folder's last.ckpt, read by the first process. Raises InputError if it is another run's."""
        processes = self.trainer.processes
        written = checkpoint.load(self.out / checkpoint.LAST) if processes is None or processes.first else None
        written = written if processes is None else processes.from_first(written)
        assert written is not None
        kind, seed = self.settings.model, self.settings.seed
        if (written.kind, written.seed) != (kind, seed):
            raise InputError(
                f"{written.path} was written by --model {written.kind} --seed {written.seed}; "
                f"got --model {kind} --seed {seed}"
            )
        if (written.vocab.symbols, written.vocab.letters) != (self.vocab.symbols, self.vocab.letters):
            raise InputError(f"{written.path} has another vocabulary: it was trained on {written.source}, not on this")
        if written.text_sha256 is None:
            notice(f"{written.path} keeps no hash of its text: only the vocabulary was compared")
        elif written.text_sha256 != self.text_sha256:
            raise InputError(
                f"{written.path} was trained on another text, {written.source} with SHA-256 {written.text_sha256}; "
                f"got {self.source} with {self.text_sha256}"
            )
        checkpoint.resume(written, self.trainer, self.sampler, self.recipe)
        if written.epoch >= self.recipe.epochs and not distributed.restarts():
            raise InputError(
                f"{written.path} is at {self.recipe.unit} {written.epoch} already: raise --epochs to go on"
            )
        if not self.options.quiet:
            inside = "" if self.trainer.between_epochs else f", at step {self.trainer.step} in the next"
            print(f"resume  {written.path}: {written.epoch} {self.recipe.unit}s done{inside}")

    def fit(self) -> list[EpochRecord]:
        """Train to the end, or to a signal. Raises TrainingError with the last good checkpoint's name."""
        trainer = self.trainer
        progress = Progress(self.recipe, trainer, self.options.quiet, self._sample_at_reports)
        if self.out is not None:
            self._keeper = Keeper(
                self.out,
                trainer,
                self.sampler,
                self.vocab,
                self.recipe,
                identity={
                    "kind": self.settings.model,
                    "seed": self.settings.seed,
                    "source": self.source,
                    "text_sha256": self.text_sha256,
                },
                every=self.options.save_every,
                keep=self.options.keep,
                notice=notice,
            )
        listeners: list[Callback] = [progress, *self._listeners()]
        if self._keeper is not None:
            listeners.insert(0, self._keeper)  # before anything is printed, which may fail
        with closing(progress), finishing(trainer.stop) as received:
            try:
                history = trainer.fit(self.sampler, callbacks=listeners)
                self._stopped(received)
            except TrainingError as error:
                raise TrainingError(f"{error}{self._last_good()}") from None
        writes = self.out is not None and distributed.speaks()
        if writes and history and (self._keeper is None or self._keeper.failure is None):
            self._plot()
        return history

    def _stopped(self, received: Sequence[int]) -> None:
        """What is left to do when `fit` came back."""
        name = self.trainer.stopped  # by a signal's name, in whichever of the processes it was received
        if received or name in signal.Signals.__members__:
            self.signal = received[0] if received else signal.Signals[str(name)].value
            name = signal.Signals(self.signal).name
            saved = ""
            if self._keeper is not None and self._keeper.write():
                saved = f", saved in {self.out / checkpoint.LAST}: --resume goes on from there"
            notice(f"{name}: stopped after step {self.trainer.step}{saved}")
        elif name is not None:
            notice(f"stopped after {self.recipe.unit} {len(self.trainer.history)}: {name}")

    def _last_good(self) -> str:
        if self.out is None or not (self.out / checkpoint.LAST).exists():
            return "; no checkpoint was written before (--out, --save-every)"
        return f"; {self.out / checkpoint.LAST} keeps the last state that was saved"

    def require_saved(self) -> None:
        """InputError unless the folder, if there is one, holds the run's end; it is tried once more."""
        keeper = self._keeper
        if keeper is not None and keeper.failure is not None and not keeper.write():
            raise InputError(f"{keeper.failure}: the end of the run is not saved")

    def test(self, tokens: torch.Tensor | None) -> tuple[float, str] | None:
        """Perplexity on the test part, by best.ckpt where there is one, else by the model as it is; and which."""
        if tokens is None:
            return None
        model, which = self.trainer.model, "the model as it is"
        if self.out is not None and (self.out / checkpoint.BEST).exists():
            written = checkpoint.load(self.out / checkpoint.BEST)
            model, which = written.build(tokens.device), f"best.ckpt, {self.recipe.unit} {written.epoch}"
        measured = validate(model, self.sampler.walk(tokens), carry_state=self.sampler.carry_state)
        return None if measured is None else (measured[0], which)

    def _listeners(self) -> list[Callback]:
        listeners: list[Callback] = []
        if self.options.log is not None:
            listeners.append(JsonLog(self.options.log, notice=notice))
        if self.options.tensorboard is not None:
            listeners.append(TensorBoard(self.options.tensorboard))
        if self.options.sample_every is not None and not self.options.quiet:
            show = partial(tqdm.write, file=sys.stdout)  # beside the bar
            listeners.append(Samples(lambda epoch: f"sample {self._sample(epoch)}", show, self.options.sample_every))
        return listeners

    def _sample(self, epoch: int) -> str:
        """What the model makes of the recipe's prompts after an epoch."""
        seed = self.settings.seed + epoch
        return "  ".join(repr(decode(self.trainer.model, self.vocab, p, seed)) for p in self.recipe.prompts)

    def _sample_at_reports(self, epoch: int) -> str:
        """The same, to be printed behind the epoch's line where the recipe wants it there."""
        return f"  {self._sample(epoch)}" if self.recipe.sample_at_reports else ""

    def _plot(self) -> None:
        try:
            from charrnn_fast.cli.plot import describe, text_name
            from charrnn_fast.lm.plots import Curve, plot_curve

            recipe, count = self.recipe, sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
            title = describe(self.settings.model, asdict(recipe), count)
            curve = Curve(recipe.name, text_name(self.source), title, self.trainer.history, recipe.unit)
            plot_curve(curve, self.out / "curve.png")
        except ImportError:
            notice("no curve.png, because matplotlib is not installed (pip install matplotlib)")
        except OSError as error:
            notice(f"cannot write the picture {self.out / 'curve.png'}: {error.strerror or error}")


def decode(model: LanguageModel, vocab: data.Vocabulary, prompt: Prompt, seed: int) -> str:
    """A recipe's prompt continued. Characters that another text does not have are left out of the prompt."""
    known = "".join(c for c in vocab.prepare(prompt.text) if c in vocab.symbols) or vocab.symbols[0]
    greedy = not prompt.temperature or math.isinf(1 / prompt.temperature)
    return generate(
        model,
        vocab,
        known,
        prompt.num_chars,
        temperature=None if greedy else prompt.temperature,
        seed=None if greedy else seed,
    )
