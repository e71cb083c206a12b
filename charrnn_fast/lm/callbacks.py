"""Listening to a Trainer: Callback, and the log and the samples that are made with it.

class Mine(Callback):
    def on_epoch(self, trainer, record):
        print(record.epoch, record.val_ppl)

Trainer(model).fit(data, callbacks=[Mine()])
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charrnn_fast.errors import InputError
from charrnn_fast.lm.records import EpochRecord, StepRecord

if TYPE_CHECKING:
    from charrnn_fast.lm.training import Trainer


class Callback:
    """What is called as training goes on. Each method does nothing; a subclass has those that it wants.

    `trainer.stop(reason)`, called in any of them, ends the run after the step.
    """

    def on_step(self, trainer: "Trainer", step: StepRecord) -> None:
        """After each update. Reading step.loss or step.grad_norm waits for the device."""

    def on_epoch(self, trainer: "Trainer", record: EpochRecord) -> None:
        """After each epoch, with its validation; the record is the last of trainer.history."""

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        """After a checkpoint was written to `path`."""

    def on_restore(self, trainer: "Trainer", lr_scale: float) -> None:
        """After on_nan="restore" went back; the learning rate is multiplied by lr_scale from now on."""


class JsonLog(Callback):
    """One JSON object a line, appended to a file: {"event": "step" | "epoch" | "checkpoint", ...}.

    Args:
        path: the file, made if it is not there.
        every: steps between two lines of event "step", which wait for the device; 0 for none.

    Raises InputError if the file cannot be opened. A line that cannot be written later, for a full disk say, is passed
    to `notice` and training goes on.
    """

    def __init__(self, path: str | Path, every: int = 10, notice: Callable[[str], object] | None = None):
        self.path, self.every, self._notice = Path(path), every, notice
        try:
            self._file: Any = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (as long as the run)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write the log {path}: {getattr(error, 'strerror', None) or error}") from None

    def on_step(self, trainer: "Trainer", step: StepRecord) -> None:
        if self.every and step.step % self.every == 0:
            figures = {"step": step.step, "epoch": step.epoch, "lr": step.lr, "loss": step.loss}
            self._write("step", figures | {"grad_norm": step.grad_norm, "tokens": step.tokens})

    def on_epoch(self, trainer: "Trainer", record: EpochRecord) -> None:
        self._write("epoch", asdict(record) | {"tokens_per_s": record.tokens_per_s})

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        self._write("checkpoint", {"path": str(path), "step": trainer.step, "epoch": len(trainer.history)})

    def _write(self, event: str, figures: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"event": event, **figures}) + "\n")
            self._file.flush()
        except OSError as error:
            self._file = None
            if self._notice is not None:
                self._notice(f"the log {self.path} ends here: {error.strerror or error}")


class TensorBoard(Callback):
    """Scalars for TensorBoard. Needs the package tensorboard: InputError without it.

    Args:
        folder: where its event files go. every: steps between two points of loss, gradient norm and learning rate.
    """

    def __init__(self, folder: str | Path, every: int = 10):
        self.every = every
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder))

    def on_step(self, trainer: "Trainer", step: StepRecord) -> None:
        if step.step % self.every == 0:
            self._write(step.step, {"step/loss": step.loss, "step/grad_norm": step.grad_norm, "step/lr": step.lr})

    def on_epoch(self, trainer: "Trainer", record: EpochRecord) -> None:
        figures = {"train_loss": record.train_loss, "train_ppl": record.train_ppl, "val_ppl": record.val_ppl}
        figures |= {"grad_norm": record.grad_norm, "clipped": record.clipped, "tokens_per_s": record.tokens_per_s}
        self._write(record.epoch, {f"epoch/{name}": value for name, value in figures.items()})
        self._writer.flush()

    def _write(self, at: int, figures: dict[str, float | None]) -> None:
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, at)


class Samples(Callback):
    """A text of the model every so many epochs.

    Args:
        make: epoch -> text. show: what takes the text. every: epochs between two texts.
    """

    def __init__(self, make: Callable[[int], str], show: Callable[[str], object], every: int = 1):
        self.make, self.show, self.every = make, show, every

    def on_epoch(self, trainer: "Trainer", record: EpochRecord) -> None:
        if record.epoch % self.every == 0:
            self.show(self.make(record.epoch))
