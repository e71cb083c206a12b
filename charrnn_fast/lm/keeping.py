"""Keeping a run on the disk: the last state, the best one, earlier ones, the history; at epochs, steps or seconds.

A write that fails, because the disk is full or the folder is gone or read-only, is told once and training goes on; the
files already there are untouched. It is tried again at the next occasion.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from charrnn_fast.errors import InputError
from charrnn_fast.lm import checkpoint
from charrnn_fast.lm.callbacks import Callback
from charrnn_fast.lm.data import Sampler, Vocabulary
from charrnn_fast.lm.files import remove_parts, write_whole
from charrnn_fast.lm.recipes import Recipe
from charrnn_fast.lm.records import EpochRecord, StepRecord
from charrnn_fast.lm.training import Trainer

HISTORY = "history.json"


@dataclass(frozen=True)
class Every:
    """How often: so many steps, or so many seconds."""

    count: float
    seconds: bool = False


class Keeper(Callback):
    """Writes a run's folder as training goes on. Of several processes each has one, and the first's writes.

    Args:
        folder: where last.ckpt, best.ckpt, step-N.ckpt and history.json go. It must exist.
        trainer, sampler, vocab, recipe: what is kept.
        identity: kind, seed, source and text_sha256 of checkpoint.save.
        every: when to write last.ckpt beside the reports of the recipe's epochs; None for then alone.
        keep: how many earlier states to keep as step-N.ckpt beside last.ckpt and best.ckpt.
        notice: takes one line for each failure that is new.

    Attributes: failure, what kept the last write from being made, or None.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        sampler: Sampler,
        vocab: Vocabulary,
        recipe: Recipe,
        *,
        identity: dict[str, Any],
        every: Every | None = None,
        keep: int = 0,
        notice: Callable[[str], object] = lambda line: None,
    ):
        self.folder, self.trainer, self.sampler, self.vocab, self.recipe = folder, trainer, sampler, vocab, recipe
        self.identity, self.every, self.keep, self._notice = identity, every, keep, notice
        self.failure: str | None = None
        self._last = (trainer.step, time.monotonic())
        if self._writes():
            remove_parts(folder)

    def on_step(self, trainer: Trainer, step: StepRecord) -> None:
        if self.every is None:
            return
        steps, moment = self._last
        due = (time.monotonic() - moment if self.every.seconds else step.step - steps) >= self.every.count
        if self.every.seconds and trainer.processes is not None:
            due = trainer.processes.any(due and self._writes())
        if due:
            self.write()

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        if trainer.stopped is not None or self.recipe.reports(record.epoch):
            self.write()

    def write(self) -> bool:
        """Write everything that is due now; False if that failed. Raises TrainingError if the state is not finite."""
        trainer = self.trainer
        trainer.check_finite()
        self._last = (trainer.step, time.monotonic())
        failure = None
        try:
            self._write()
        except InputError as error:
            failure = str(error)
        if trainer.processes is not None:
            failure = trainer.processes.from_first(failure)
        if failure is not None:
            if self.failure is None or _reason(failure) != _reason(self.failure):
                self._notice(f"{failure}; training goes on")
            self.failure = failure
            return False
        if self.failure is not None:
            self._notice(f"{self.folder} can be written again: step {trainer.step} is saved")
        self.failure = None
        trainer.announce_checkpoint(self.folder / checkpoint.LAST)
        return True

    def _writes(self) -> bool:
        return self.trainer.processes is None or self.trainer.processes.first

    def _write(self) -> None:
        history = self.trainer.history
        save = checkpoint.as_bytes(self.trainer, self.sampler, self.vocab, self.recipe, **self.identity)
        if not self._writes():
            return
        names = [checkpoint.LAST]
        if self.trainer.between_epochs and history:
            losses = [record.loss for record in history]
            if min(losses[-self.recipe.report_every :]) <= min(losses):
                names.insert(0, checkpoint.BEST)  # first: killed in between, a resumed run comes by again
        if self.keep:
            names.insert(0, f"step-{self.trainer.step}.ckpt")
        for name in names:
            write_whole(self.folder / name, save, "the checkpoint")
        if self.keep:
            for path in kept(self.folder)[: -self.keep]:
                with suppress(OSError):
                    path.unlink()
        lines = json.dumps([asdict(record) for record in history], indent=1) + "\n"
        write_whole(self.folder / HISTORY, lines.encode(), "the history")


def _reason(failure: str) -> str:
    return failure.rpartition(": ")[2]


def kept(folder: Path) -> list[Path]:
    """The earlier states in a run's folder, oldest first."""
    numbered = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.ckpt")}
    return sorted((path for path, number in numbered.items() if number.isdecimal()), key=lambda p: int(numbered[p]))
