"""Trainer: epochs over a sampler, with truncated backpropagation through time, clipping, a schedule, validation, exact
resume from any step, and a way out when a loss is not finite.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm.batches import Batch, as_batch
from charrnn_fast.lm.callbacks import Callback
from charrnn_fast.lm.capture import RecordedSteps, why_not, why_not_optimizer
from charrnn_fast.lm.data import Sampler
from charrnn_fast.lm.distributed import Processes, ProcessLost
from charrnn_fast.lm.evaluation import Stopped, epochs_since_best, validate
from charrnn_fast.lm.forms import of
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.optimizers import (
    check_optimizer,
    for_this_device,
    learning_rates,
    make_optimizer,
    set_learning_rates,
)
from charrnn_fast.lm.random_state import random_state, set_random_state
from charrnn_fast.lm.recordings import Recordings
from charrnn_fast.lm.records import WHAT_TO_TRY, EpochRecord, EpochSoFar, StepRecord, each_part, parts_of, perplexity
from charrnn_fast.lm.schedule import Schedule
from charrnn_fast.lm.step import Evaluation, TrainingStep, train_batches
from charrnn_fast.lm.training_options import check_options
from charrnn_fast.ops import backends

MAX_RESTORES = 8  # of one run, each halving the learning rate
MAX_SKIPPED = 100  # updates in a row at an epoch's beginning: more will not help


class Trainer:
    """Trains a language model in any of its forms; the reference one with its own clip and optimisers.

    Args:
        model: a CharRNN, a TorchCharRNN, or charrnn_fast.reference.language_model.RNNLM.
        optimizer: "sgd", "adam", "adamw", "rmsprop", or a torch.optim.Optimizer over parameters of the model, all or
            some of them: the others stay as they are. The reference model takes its own optimisers too, and of the
            names the first two. One over anything else is a ValueError.
        lr, momentum, weight_decay: for an optimizer given by name; momentum for "sgd" and "rmsprop".
        clip: largest norm of the gradients of all that the optimizer holds; None trains without clipping.
        epochs: how many epochs `fit` brings the model to.
        graph_batches: with a sampler that carries the state, the number of batches k (1..16) that the graph is kept
            across; one update is made for every k batches.
        accumulate: the number of batches whose gradients are added up for one update, each batch with a backward pass
            of its own. At most one of graph_batches and accumulate is above 1.
        schedule: how the learning rate changes, a Schedule.
        patience: stop after so many epochs without a better loss (of the validation, or without one of the training).
        precision: "fp32" for the parameters' own dtype, or "bf16" for forward and loss under autocast to it.
        on_nan: what a loss or gradient norm that is not finite does. "stop": TrainingError, with the parameters as they
            were before that step where values are looked at (on a CPU); "skip": no update is made with it; "restore":
            back to the last epoch or checkpoint, with half the learning rate, 8 times at most.
        capture: on a GPU a training step can be captured as one CUDA graph for each shape of batch, and replayed.
            "auto" does so where it can, and trains step by step elsewhere, and TorchCharRNN as PyTorch does; True makes
            it a RuntimeError that says why where it cannot; False does not. The curve is the same.
        processes: those that train this model together, each with a Trainer of the same arguments and a sampler of the
            same text and seed, whose batches they share by rows; None for this one alone. Callbacks are each process's
            own.

    Attributes: history, a list of EpochRecord; step, the updates made so far; stopped, why the run was ended before its
    last epoch, or None; capture_reason, why steps are not captured, and at_once_reason, why a step is made of separate
    operations, or None.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        optimizer: str | torch.optim.Optimizer = "sgd",
        lr: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        epochs: int = 100,
        graph_batches: int = 1,
        accumulate: int = 1,
        schedule: Schedule | None = None,
        patience: int | None = None,
        precision: str = "fp32",
        on_nan: str = "stop",
        capture: bool | str = "auto",
        processes: Processes | None = None,
    ):
        self.clip, self.epochs, self.graph_batches = clip, epochs, graph_batches
        self.accumulate, self.schedule, self.patience = accumulate, schedule or Schedule(), patience
        self.precision, self.on_nan, self.capture, self.processes = precision, on_nan, capture, processes
        check_options(self)
        self.model = model = of(model)
        model.require_trainable(self)
        made: Any = optimizer
        if isinstance(optimizer, str):
            capturable = self._why_not_model() is None
            made = make_optimizer(model, optimizer, lr, momentum, weight_decay, capturable=capturable)
        self.optimizer: torch.optim.Optimizer = made
        check_optimizer(model, self.optimizer)
        self.history: list[EpochRecord] = []
        self.step = 0
        self.stopped: str | None = None
        self._wish: str | None = None  # why this process wants to stop
        self.total_updates: int | None = None
        self._lrs = learning_rates(self.optimizer)
        self._lr = self._lrs[0]  # the next update's, on the host
        self._lr_scale, self._restores = 1.0, 0  # halved by each restore
        self._so_far: EpochSoFar | None = None
        self._plain: TrainingStep | None = None
        self._good: dict[str, Any] | None = None  # what "restore" goes back to
        self._callbacks: Sequence[Callback] = ()
        self._data: Sampler | None = None
        self._recordings = Recordings(model, required=capture is True)
        self._require_capture()

    @property
    def capture_reason(self) -> str | None:
        """Why training steps are not captured as a CUDA graph: one clause, or None where they are."""
        return self._recordings.reason or self._why_not_model() or why_not_optimizer(self.optimizer)

    @property
    def at_once_reason(self) -> str | None:
        """Why a training step is made of separate operations and not taken at once: one clause, or None."""
        return self._new_step(self.graph_batches).why_not_at_once

    def _why_not_model(self) -> str | None:
        if self.capture is False:
            return "it was turned off"
        if self.accumulate > 1:
            return f"gradients are added up over {self.accumulate} batches, and a captured step is one batch"
        if self.on_nan != "stop":
            return f"on_nan='{self.on_nan}' looks at every step's loss"
        reason = why_not(self.model, self.graph_batches, self.capture is True)
        if reason is not None or self.processes is None:
            return reason
        if self.capture == "auto":
            return "steps with collectives in them are captured only where that is asked for"
        return self.processes.why_not_captured()

    def _require_capture(self) -> None:
        if self.capture is True and (reason := self.capture_reason) is not None:
            raise RuntimeError(f"capture was asked for, but training steps cannot be captured: {reason}")

    @property
    def keeps_optimizer(self) -> bool:
        """Whether the optimizer has a state that a checkpoint can keep, as the reference's own have not."""
        return isinstance(self.optimizer, torch.optim.Optimizer)

    @property
    def between_epochs(self) -> bool:
        """Whether no epoch is in progress."""
        return self._so_far is None

    def _is_done(self) -> bool:
        return len(self.history) >= self.epochs

    @property
    def share_of_epoch(self) -> float:
        """How much of the epoch in progress is done, 0 to 1; 0 where its number of batches is not known."""
        batches = None if self._data is None else self._data.num_batches
        return 0.0 if self._so_far is None or not batches else min(1.0, self._so_far.batches / batches)

    @property
    def seconds_of_epoch(self) -> float:
        """Seconds of training in the epoch in progress."""
        return 0.0 if self._so_far is None else self._so_far.seconds

    def stop(self, reason: str) -> None:
        """End `fit` after the step that is under way; the run can be resumed from there. Of several processes all end
        after the same step, on a CPU the one after this, on a GPU within 16.
        """
        self._wish = reason
        if self.processes is None:
            self.stopped = reason

    def _agree(self, asked: bool | None = None) -> bool:
        """Whether to stop, the same in all processes. asked: whether one of them wants to, where that is known."""
        if self.processes is not None and self.stopped is None:
            if asked is None:
                asked = self.processes.any(self._wish is not None)
            if asked:
                self.stopped = next(reason for reason in self.processes.of_all(self._wish) if reason is not None)
        return self.stopped is not None

    def announce_checkpoint(self, path: Path) -> None:
        """Tell the callbacks, and "restore", that a checkpoint of this moment was written to `path`."""
        self._remember()
        for callback in self._callbacks:
            callback.on_checkpoint(self, path)

    def fit(
        self,
        data: Sampler,
        *,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> list[EpochRecord]:
        """Train until `epochs` epochs are in the history, and call on_epoch and the callbacks' on_epoch after each.

        The corpus is moved to the model's device, the model put in training mode. Returns the history; it ends early
        if `stop` was called or patience is at its end, and `stopped` says so: another `fit` then goes on with the next
        step. Raises TrainingError when a loss or the validation perplexity is not finite and on_nan does not help (that
        epoch is not recorded), and with capture=True when a step cannot be captured.
        """
        check_optimizer(self.model, self.optimizer)
        self._require_capture()
        data.to(self.model.device)
        data.look_at_ids()
        self.model.train()
        self.stopped = self._wish = None
        self._callbacks, self._data, self._lr = tuple(callbacks), data, learning_rates(self.optimizer)[0]
        if self.processes is not None:
            self.processes.meet(self.model, data.generator)
        batches = data.num_batches
        self.total_updates = None if batches is None else self.epochs * -(-batches // self._group(data))
        while not self._is_done() and self.stopped is None:
            try:
                record = self._epoch(len(self.history) + 1, data)
            except TrainingError as error:
                if isinstance(error, ProcessLost) or not self._restore():
                    raise
                continue
            if record is None:
                break
            self.history.append(record)
            self._remember()
            self._check_patience()
            if on_epoch is not None:
                on_epoch(record)
            for callback in self._callbacks:
                callback.on_epoch(self, record)
            self._agree()
        return self.history

    def _check_patience(self) -> None:
        if self.patience is not None and self.patience <= epochs_since_best(self.history) and not self._is_done():
            self.stop(f"no better loss for {self.patience} epochs")
            self._agree(True)  # all have the same losses

    def _epoch(self, epoch: int, data: Sampler) -> EpochRecord | None:
        """What is left of an epoch, and its validation; None if the run was stopped in it."""
        so_far, resumed = self._so_far, self._so_far is not None
        if so_far is None:
            so_far = self._so_far = EpochSoFar(data.generator.get_state())
        else:
            data.generator.set_state(so_far.generator.cpu())
        if self.on_nan == "restore" and self._good is None:
            self._remember()
        start, before = time.perf_counter(), so_far.seconds
        for step in self._steps(epoch, data, so_far, resumed):
            so_far.seconds = before + time.perf_counter() - start
            for callback in self._callbacks:
                callback.on_step(self, step)
            if self.stopped is not None:
                self.check_finite()
                return None
        self.check_finite()
        # Losses and norms come from the device here, all at once: its work is known to be done.
        mean = so_far.mean_loss()
        so_far.seconds = before + time.perf_counter() - start
        try:
            val = validate(
                self.model,
                data.validation(),
                carry_state=data.carry_state,
                stopped=self._agree,
                processes=self.processes,
                step=self._evaluation(data.carry_state),
            )
        except Stopped:
            return None
        if val is not None and not math.isfinite(val[0]):
            raise TrainingError(f"the validation perplexity is {val[0]} in epoch {epoch}: {WHAT_TO_TRY}")
        self._so_far = None
        val_ppl, batch_mean = val or (None, None)
        norm, clipped = so_far.norm_figures(self.clip)
        return EpochRecord(
            *(epoch, mean, perplexity(mean), val_ppl, batch_mean, so_far.tokens, so_far.seconds),
            *(self.step, self._lr, norm, clipped, so_far.skipped),
        )

    def _steps(self, epoch: int, data: Sampler, so_far: EpochSoFar, resumed: bool) -> Iterator[StepRecord]:
        """The epoch's updates from where it is, one by one, each seen to its end."""

        def counted() -> Iterator[Batch]:
            for batch in map(as_batch, itertools.islice(data.train(), so_far.batches, None)):
                self._set_lr()
                so_far.counts.append(batch.count)
                so_far.tokens += batch.count
                if plain.shared is not None:
                    batch = batch.share(plain.shared.processes)
                    plain.shared.wish.fill_(self._wish is not None)
                yield batch

        plain = self._plain_step(data, so_far.state if resumed else None)
        for loss in self._losses(counted(), data, plain):
            so_far.losses.append(loss)
            if plain.pending:
                continue
            self._after_update(so_far, plain)
            yield self._record(epoch, so_far)
        if so_far.batches and so_far.updates < -(-so_far.batches // self._group(data)):
            self._after_update(so_far, plain)  # of an incomplete group, at the epoch's end
            yield self._record(epoch, so_far)

    def _group(self, data: Sampler) -> int:
        return self.accumulate * (self.graph_batches if data.carry_state else 1)

    def _record(self, epoch: int, so_far: EpochSoFar) -> StepRecord:
        last = (so_far.losses[-1], so_far.norms[-1])
        return StepRecord(self.step, epoch, so_far.batches, self._lr, so_far.tokens, *last)

    def _after_update(self, so_far: EpochSoFar, plain: TrainingStep) -> None:
        assert plain.norm is not None
        so_far.updates += 1
        self.step += 1
        so_far.norms.append(plain.norm)
        so_far.state = plain.state
        self._look(so_far, plain)
        wishes = None if plain.shared is None else plain.shared.wishes
        if wishes is not None and (wishes.device.type == "cpu" or self.step % 16 == 0):
            self._agree(bool(wishes.item()))

    def _look(self, so_far: EpochSoFar, plain: TrainingStep) -> None:
        """Is the step finite? Asked after each one where that does not wait for a device, or where on_nan wants it."""
        if plain.guard and plain.refused > so_far.skipped:
            if self.on_nan != "skip":
                bad = so_far.first_not_finite()
                raise TrainingError(
                    so_far.what_happened(so_far.batches - 1 if bad is None else bad, self.step, len(self.history) + 1)
                )
            so_far.skipped = plain.refused
            for i in range(so_far.checked, so_far.batches):  # what was not learned from does not count
                if not math.isfinite(float(so_far.losses[i])):
                    so_far.tokens -= so_far.counts[i]
                    so_far.losses[i], so_far.counts[i] = torch.zeros_like(so_far.losses[i]), 0
            bad = not all(bool(part.isfinite().all()) for part in parts_of(plain.state))
            if bad if self.processes is None else self.processes.any(bad):
                plain.state = so_far.state = None
            if so_far.skipped == so_far.updates and so_far.skipped >= MAX_SKIPPED:
                raise TrainingError(f"the first {so_far.skipped} updates of the epoch are not finite: {WHAT_TO_TRY}")

    def check_finite(self) -> None:
        """Raise TrainingError if a loss of the epoch so far is not finite: to be asked before anything is saved. Waits
        for the device.
        """
        so_far = self._so_far
        if so_far is not None and (bad := so_far.first_not_finite()) is not None:
            raise TrainingError(so_far.what_happened(bad, self.step, len(self.history) + 1))

    def _plain_step(self, data: Sampler, state: Any) -> TrainingStep:
        """The step of this epoch, to start from a state."""
        graph_batches = self.graph_batches if data.carry_state else 1
        plain = self._plain
        now = (self.optimizer, self.clip, graph_batches)
        if plain is None or (plain.optimizer, plain.clip, plain.graph_batches) != now:
            if plain is not None and plain.optimizer is not self.optimizer:
                self._lrs, self._lr = learning_rates(self.optimizer), learning_rates(self.optimizer)[0]
            plain = self._plain = self._new_step(graph_batches)
        plain.state, plain.pending = state, 0
        plain.refused = 0 if self._so_far is None else self._so_far.skipped
        return plain

    def _new_step(self, graph_batches: int) -> TrainingStep:
        return TrainingStep(
            self.model,
            self.optimizer,
            self.clip,
            graph_batches,
            accumulate=self.accumulate,
            bf16=self.precision == "bf16",
            guard=self.on_nan != "stop" or (self.model.device.type == "cpu" and backends.requested() != "triton"),
            processes=self.processes,
        )

    def _losses(self, batches: Iterator[Batch], data: Sampler, plain: TrainingStep) -> Iterator[Tensor]:
        options: dict[str, Any] = {"carry_state": data.carry_state, "step": plain}
        if self.capture_reason is None:
            changing_lr = self.schedule.changes
            options["recorded"] = self._recordings.training(plain, data.carry_state, changing_lr=changing_lr)
        return train_batches(self.model, batches, self.optimizer, self.clip, **options)

    def _evaluation(self, carry_state: bool) -> Evaluation | RecordedSteps:
        """What computes the losses of a validation, recorded where that can be."""
        return Evaluation(self.model) if self.capture is False else self._recordings.evaluation(carry_state)

    def _set_lr(self) -> None:
        """The learning rates of the next update. One that never changes is left to whoever made the optimizer."""
        optimizer = self.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer) or not (self.schedule.changes or self._lr_scale != 1.0):
            return
        factor = self._lr_scale * self.schedule.factor(self.step, len(self.history), self.total_updates)
        self._lr = self._lrs[0] * factor
        set_learning_rates(optimizer, [lr * factor for lr in self._lrs])

    def _remember(self) -> None:
        """Keep a copy of this moment for on_nan="restore"."""
        if self.on_nan == "restore" and self._data is not None:
            generator = self._data.generator.get_state()
            state = {"model": self.model.state_dict(), "trainer": self.state_dict(), "generator": generator}
            self._good = copy.deepcopy(state)

    def _restore(self) -> bool:
        """Back to the last moment that was remembered, with half the learning rate; False if that is of no use."""
        if self._good is None or self._data is None or self._restores >= MAX_RESTORES:
            return False
        scale, restores = self._lr_scale / 2, self._restores + 1
        good = copy.deepcopy(self._good)
        self.model.load_state_dict(good["model"])
        self.load_state_dict(good["trainer"])
        self._data.generator.set_state(good["generator"])
        self._lr_scale, self._restores = scale, restores
        for callback in self._callbacks:
            callback.on_restore(self, self._lr_scale)
        return True

    def state_dict(self) -> dict[str, object]:
        """Optimiser, history and the epoch in progress, as plain values and tensors: with the model and the sampler's
        generator, all that a resumed run needs. Of several processes all are to ask, and get the whole run's.
        """
        so_far = None if self._so_far is None else self._so_far.state_dict()
        if so_far is not None and self.processes is not None:
            so_far["state"] = self.processes.whole(so_far["state"])
        return {
            "optimizer": self.optimizer.state_dict() if self.keeps_optimizer else None,
            "history": [asdict(record) for record in self.history],
            "step": self.step,
            "lrs": self._lrs,
            "lr_scale": self._lr_scale,
            "restores": self._restores,
            "epoch": so_far,
            "random": random_state(self.model, self.processes),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up where `state_dict` was written, on this device or another."""
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(for_this_device(state["optimizer"], self.optimizer))
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.step = int(state.get("step", 0)) or sum(record.step for record in self.history[-1:])
        self._lrs = [float(lr) for lr in state.get("lrs", learning_rates(self.optimizer))]
        self._lr_scale, self._restores = float(state.get("lr_scale", 1.0)), int(state.get("restores", 0))
        so_far, device = state.get("epoch"), self.model.device
        self._so_far = None if so_far is None else EpochSoFar.from_state_dict(so_far)
        if self._so_far is not None and self._so_far.state is not None:
            self._so_far.state = each_part(self._so_far.state, lambda part: part.to(device))
            self.model.require_state(self._so_far.state)
            if self.processes is not None:
                self._so_far.state = self.processes.own(self._so_far.state)
        set_random_state(state.get("random"), device, self.processes)
