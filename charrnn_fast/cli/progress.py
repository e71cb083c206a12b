"""What a run prints: its lines, one an epoch, and on a terminal a bar with the figures of the moment."""

import math
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from charrnn_fast.lm import distributed
from charrnn_fast.lm.callbacks import Callback
from charrnn_fast.lm.recipes import Recipe
from charrnn_fast.lm.records import EpochRecord, StepRecord, perplexity
from charrnn_fast.lm.training import Trainer

REFRESH_SECONDS = 0.5  # between two looks at the figures, which wait for the device


class Progress(Callback):
    """Prints one line for each epoch that the recipe reports, and on a terminal keeps a bar.

    Args:
        recipe, trainer: of the run. quiet: print nothing. sample: epoch -> what to print behind the line.
    """

    def __init__(self, recipe: Recipe, trainer: Trainer, quiet: bool, sample: Callable[[int], str]):
        self.recipe, self.quiet, self.sample = recipe, quiet, sample
        self.capture_reason = trainer.capture_reason  # as the header says
        self._begun, self._begun_at, self._shown = time.monotonic(), trainer.step, 0.0
        self._bar = tqdm(
            total=trainer.epochs,
            initial=len(trainer.history),
            leave=False,
            disable=quiet or not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar:20}| {desc}",
        )

    def close(self) -> None:
        self._bar.close()

    def on_step(self, trainer: Trainer, step: StepRecord) -> None:
        if self._bar.disable or time.monotonic() - self._shown < REFRESH_SECONDS:
            return
        self._shown = time.monotonic()
        self._bar.n = min(trainer.epochs, step.epoch - 1 + trainer.share_of_epoch)
        self._bar.set_description_str(self.line(trainer, step))

    def line(self, trainer: Trainer, step: StepRecord) -> str:
        """The figures of a moment: loss, perplexity, bits per character, tokens/s, gradient norm, time left."""
        loss, norm = step.loss, step.grad_norm
        elapsed, made = time.monotonic() - self._begun, step.step - self._begun_at
        text = f"{self.recipe.unit} {step.epoch}/{trainer.epochs}  {figures(loss)}"
        text += f"  {step.tokens / max(trainer.seconds_of_epoch, 1e-9):,.0f} tokens/s"
        if norm is not None:
            text += f"  norm {norm:.2f}"
        if trainer.total_updates is not None and made:
            text += f"  {clock((trainer.total_updates - step.step) * elapsed / made)} left"
        return text

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        if not (self.recipe.reports(record.epoch) or trainer.stopped is not None):
            return
        line = self._epoch_line(trainer, record)
        with self._bar.external_write_mode():
            if self.capture_reason != trainer.capture_reason:
                self.capture_reason = trainer.capture_reason
                notice(f"steps are not captured: {self.capture_reason}")
            if not self.quiet:
                print(line, flush=True)

    def on_restore(self, trainer: Trainer, lr_scale: float) -> None:
        with self._bar.external_write_mode():
            notice(f"a loss was not finite: back to step {trainer.step}, with the learning rate times {lr_scale:g}")

    def _epoch_line(self, trainer: Trainer, record: EpochRecord) -> str:
        recent = trainer.history[-self.recipe.report_every :]
        speed = sum(r.tokens for r in recent) / sum(r.seconds for r in recent)
        width = len(str(trainer.epochs))
        line = f"{self.recipe.unit} {record.epoch:{width}d}/{trainer.epochs}  "
        if self.recipe.unit == "iteration":
            mean = sum(r.train_loss for r in recent) / len(recent)
            line += f"loss {record.train_loss:.3f}  mean of last {len(recent)} {mean:.3f}"
        else:
            line += f"train perplexity {record.train_ppl:.3f}"
        if record.val_ppl is not None:
            line += f"  validation {record.val_ppl:.3f} (batch mean {record.val_ppl_batch_mean:.3f})"
        line += f"  {record.loss / math.log(2):.3f} bits/char  {speed:,.0f} tokens/s"
        if record.grad_norm is not None:
            line += f"  norm {record.grad_norm:.2f}"
            line += f", {record.clipped:.0%} clipped" if self.recipe.clip is not None else ""
        if record.skipped:
            line += f", {record.skipped} skipped"
        left = (trainer.epochs - record.epoch) * sum(r.seconds for r in recent) / len(recent)
        line += f"  {clock(left)} left" if record.epoch < trainer.epochs else ""
        return line + self.sample(record.epoch)


def figures(loss: float) -> str:
    """A loss in nats a character in the three ways that people read it."""
    return f"loss {loss:.4f}  perplexity {perplexity(loss):.3f}  {loss / math.log(2):.3f} bits/char"


def clock(seconds: float) -> str:
    """A time as h:mm:ss, or m:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def notice(line: str) -> None:
    """A line that is neither a result nor an error; of several processes the first one's."""
    if distributed.speaks():
        print(f"charrnn-fast: {line}", file=sys.stderr, flush=True)
