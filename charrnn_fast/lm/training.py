"""Trainer: epochs over a sampler, with truncated backpropagation through time, clipping, validation and exact resume.

The loop of `train_batches` is the one of charrnn_fast.reference.training, which trains the reference model; the two
take the same arguments and follow the same curve.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm.capture import CudaGraphRecorder, RecordedSteps, Step, dependencies, why_not, why_not_optimizer
from charrnn_fast.lm.data import Batch, Sampler
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.ops.clip_grad_norm import clip_and_sgd_step_, steps_in_one_launch
from charrnn_fast.reference import training as reference
from charrnn_fast.reference.language_model import RNNLM

MAX_GRAPH_BATCHES = 16  # each one more keeps the activations of one more batch alive


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to. Losses are means over characters in nats; train_ppl and val_ppl are their exponentials.

    val_ppl_batch_mean is the mean of the per-batch perplexities, which D2L plots. tokens_per_s counts training only.
    """

    epoch: int
    train_loss: float
    train_ppl: float
    val_ppl: float | None
    val_ppl_batch_mean: float | None
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class TrainingStep:
    """Forward, loss, backward, clip and update for one batch, without a look at a value.

    Args:
        model, optimizer: what is trained, and what updates its parameters.
        clip: largest global gradient norm, None for none.
        graph_batches: the number of batches k that the graph is kept across; one update is made for every k of them,
            on the mean of their losses.
    """

    def __init__(
        self, model: CharRNN, optimizer: torch.optim.Optimizer, clip: float | None, graph_batches: int = 1
    ) -> None:
        self.model, self.optimizer, self.clip, self.graph_batches = model, optimizer, clip, graph_batches
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._losses: list[Tensor] = []  # of the batches that wait for an update

    def __call__(self, X: Tensor, Y: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """X, Y (B, T) int64 and the state (L, B, H), None for zeros -> the loss, detached, and the next state, detached
        if there was an update.
        """
        loss, state = self.model.loss(X, Y, state)
        self._losses.append(loss)
        if len(self._losses) == self.graph_batches:
            self.update()
            state = _cut_off(state)
        return loss.detach(), state

    def update(self) -> None:
        """Bring the parameters up to date with the losses so far, if there are any. No gradients are left behind."""
        if not self._losses:
            return
        loss = self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).mean()
        self._losses.clear()
        try:
            loss.backward()
            self._descend()
        finally:  # also when a recording fails, whose gradients are memory that was never written
            self.optimizer.zero_grad(set_to_none=True)
            self.model.zero_grad(set_to_none=True)  # of what the optimizer does not hold

    def _descend(self) -> None:
        """Clip the gradients and take the optimizer's step along them; plain SGD's on a GPU in the same launch."""
        lr = _plain_sgd_lr(self.optimizer)
        if lr is not None and self.model.cell == "fused" and steps_in_one_launch(self.parameters):
            clip_and_sgd_step_(self.parameters, self.clip, lr)
            return
        if self.clip is not None:
            self.model.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()


def _cut_off(state: Any) -> Any:
    """The state without its graph: a tensor, or a tuple of them as an LSTM has it."""
    return state.detach() if isinstance(state, Tensor) else tuple(_cut_off(part) for part in state)


def _plain_sgd_lr(optimizer: torch.optim.Optimizer) -> float | Tensor | None:
    """The learning rate of an SGD that only subtracts lr * gradient and that nobody watches; None for all others."""
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1 or any(hooks):
        return None
    (group,) = optimizer.param_groups
    plain = not any(group[name] for name in ("momentum", "weight_decay", "maximize", "differentiable"))
    return group["lr"] if plain else None


def train_batches(
    model: CharRNN,
    batches: Iterable[Batch],  # X (B, T) and Y (B, T), int64
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    *,
    carry_state: bool = False,
    graph_batches: int = 1,
    recorded: RecordedSteps | None = None,
) -> Iterator[Tensor]:
    """Train on the batches in turn and yield the loss of each, detached and still on the device.

    carry_state=False starts every batch from the zero state; True takes the state that the batch before ended with,
    detached every `graph_batches` batches, for which one update is made on the mean of their losses. clip is the
    largest global gradient norm, None for none. `recorded` is a TrainingStep of these arguments that is recorded; by
    default each step is run anew.
    """
    plain = TrainingStep(model, optimizer, clip, graph_batches)
    step: Step = plain if recorded is None else recorded
    state: Tensor | None = None
    for X, Y in batches:
        loss, state = step(X, Y, state if carry_state else None)
        yield loss
    plain.update()


class _Updater:
    """An optimizer of torch with the manners of the reference's: it leaves no gradients behind."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self._optimizer = optimizer

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def validate(
    model: CharRNN | RNNLM, batches: Iterable[Batch], *, carry_state: bool = False
) -> tuple[float, float] | None:
    """exp(mean loss over characters) and the mean of the per-batch perplexities; None if there are no batches."""
    measured = list(reference.evaluate_batches(model, batches, carry_state=carry_state))
    if not measured:
        return None
    losses = torch.stack([loss for loss, _ in measured]).double().cpu()
    counts = torch.tensor([count for _, count in measured], dtype=torch.float64, device="cpu")
    return perplexity(float((losses * counts).sum() / counts.sum())), float(losses.exp().mean())


class Trainer:
    """Trains a CharRNN, or the reference model with its own loop, clip and optimisers.

    Args:
        model: a CharRNN, or charrnn_fast.reference.language_model.RNNLM.
        optimizer: "sgd", "adam", or a torch.optim.Optimizer over parameters of the model, all or some of them: the
            others stay as they are. The reference model takes its own optimisers too. One over anything else is a
            ValueError.
        lr: learning rate, for an optimizer given by name.
        clip: largest norm of the gradients of all that the optimizer holds; None trains without clipping.
        epochs: how many epochs `fit` brings the model to.
        graph_batches: with a sampler that carries the state, the number of batches k (1..16) that the graph is kept
            across; one update is made for every k batches.
        capture: on a GPU a training step can be captured as one CUDA graph for each shape of batch, and replayed.
            "auto" does so where it can, and trains step by step elsewhere, and a model with cell="torch" as PyTorch
            does; True makes it a RuntimeError that says why where it cannot; False does not. The curve is the same.

    Attributes: history, a list of EpochRecord; capture_reason, why steps are not captured, or None.
    """

    def __init__(
        self,
        model: CharRNN | RNNLM,
        *,
        optimizer: str | torch.optim.Optimizer = "sgd",
        lr: float = 1.0,
        clip: float | None = 1.0,
        epochs: int = 100,
        graph_batches: int = 1,
        capture: bool | str = "auto",
    ):
        if not 1 <= graph_batches <= MAX_GRAPH_BATCHES:
            raise ValueError(f"graph_batches must be 1 to {MAX_GRAPH_BATCHES}, got {graph_batches}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be above 0, or None for no clipping, got {clip}")
        if capture not in ("auto", True, False):
            raise ValueError(f"capture must be 'auto', True or False, got {capture!r}")
        self.model, self.clip, self.epochs, self.graph_batches = model, clip, epochs, graph_batches
        self.capture = capture
        self.optimizer = self._make_optimizer(optimizer, lr) if isinstance(optimizer, str) else optimizer
        self._check_optimizer()
        self.history: list[EpochRecord] = []
        self._recorded: RecordedSteps | None = None
        self._recorded_for: tuple = ()  # whether the state is carried, the optimizer and the clip
        self._require_capture()

    @property
    def capture_reason(self) -> str | None:
        """Why training steps are not captured as a CUDA graph: one clause, or None where they are."""
        failure = None if self._recorded is None else self._recorded.reason
        return failure or self._why_not_model() or why_not_optimizer(self.optimizer)

    def _why_not_model(self) -> str | None:
        if self.capture is False:
            return "it was turned off"
        if self.capture == "auto" and isinstance(self.model, CharRNN) and self.model.cell == "torch":
            return "PyTorch alone is trained as PyTorch does"
        return why_not(self.model, self.graph_batches)

    def _require_capture(self) -> None:
        if self.capture is True and (reason := self.capture_reason) is not None:
            raise RuntimeError(f"capture was asked for, but training steps cannot be captured: {reason}")

    def _make_optimizer(self, name: str, lr: float):
        is_reference = isinstance(self.model, RNNLM)
        kinds = {
            "sgd": reference.SGD if is_reference else torch.optim.SGD,
            "adam": reference.Adam if is_reference else torch.optim.Adam,
        }
        if name not in kinds:
            raise ValueError(f"optimizer must be 'sgd', 'adam' or a torch.optim.Optimizer, got {name!r}")
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("the model has no parameter that requires a gradient: nothing would be trained")
        options: dict[str, Any] = {}
        if name == "adam" and not is_reference and parameters[0].device.type == "cuda":
            # One launch instead of some fifteen, with the step count on the device; captured or not, the same numbers.
            options = {"fused": True, "capturable": self._why_not_model() is None}
        return kinds[name](parameters, lr, **options)

    def _check_optimizer(self) -> None:
        """Raise unless the optimizer is one for this model: of a kind that its loop knows, over its parameters."""
        optimizer = self.optimizer
        is_reference = isinstance(self.model, RNNLM)
        if isinstance(optimizer, torch.optim.Optimizer):
            held = [p for group in optimizer.param_groups for p in group["params"]]
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("LBFGS evaluates the loss several times a step, which this trainer does not")
        elif is_reference and isinstance(optimizer, reference.SGD | reference.Adam):
            held = list(optimizer.params)
        else:
            kinds = "a torch.optim.Optimizer" + (" or a reference optimizer" if is_reference else "")
            raise TypeError(f"optimizer must be 'sgd', 'adam' or {kinds} for this model, got {type(optimizer)}")
        own = {id(p) for p in self.model.parameters()}
        foreign = sum(id(p) not in own for p in held)
        if foreign or not held:
            raise ValueError(
                f"the optimizer holds {len(held)} parameters, of which {foreign} are not the model's: make it of "
                "model.parameters(), after the last change to the model's modules"
            )

    def fit(self, data: Sampler, *, on_epoch: Callable[[EpochRecord], None] | None = None) -> list[EpochRecord]:
        """Train until `epochs` epochs are in the history, and call on_epoch after each.

        The corpus is moved to the model's device. Returns the history. Raises TrainingError when an epoch's loss or
        validation perplexity is not finite (that epoch is not recorded), and with capture=True when a step cannot be
        captured.
        """
        self._check_optimizer()
        self._require_capture()
        data.to(next(iter(self.model.parameters())).device)
        for epoch in range(len(self.history) + 1, self.epochs + 1):
            record = self._epoch(epoch, data)
            self.history.append(record)
            if on_epoch is not None:
                on_epoch(record)
        return self.history

    def _epoch(self, epoch: int, data: Sampler) -> EpochRecord:
        counts: list[int] = []

        def counted() -> Iterator[Batch]:
            for X, Y in data.train():
                counts.append(Y.numel())
                yield X, Y

        start = time.perf_counter()
        losses = list(self._train(counted(), data.carry_state))
        weights = torch.tensor(counts, dtype=torch.float64, device="cpu")
        # The only transfer from the device in an epoch, and the point where its work is known to be done.
        mean = float((torch.stack(losses).double().cpu() * weights).sum() / weights.sum())
        seconds = time.perf_counter() - start
        val = validate(self.model, data.validation())
        for kind, loss in (("training loss", mean), ("validation perplexity", 0.0 if val is None else val[0])):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the {kind} is {loss} in epoch {epoch}: expected a finite number; lower the learning rate or clip "
                    "the gradients"
                )
        val_ppl, batch_mean = val or (None, None)
        return EpochRecord(epoch, mean, perplexity(mean), val_ppl, batch_mean, sum(counts), seconds)

    def _train(self, batches: Iterator[Batch], carry_state: bool) -> Iterator[Tensor]:
        options: dict[str, Any] = {
            "carry_state": carry_state,
            "graph_batches": self.graph_batches if carry_state else 1,
        }
        if isinstance(self.model, RNNLM):
            updater: Any = self.optimizer
            if isinstance(updater, torch.optim.Optimizer):
                updater = _Updater(updater)
            return reference.train_batches(self.model, batches, updater, self.clip, **options)
        options["recorded"] = self._recorded_steps(carry_state)
        return train_batches(self.model, batches, self.optimizer, self.clip, **options)

    def _recorded_steps(self, carry_state: bool) -> RecordedSteps | None:
        """What records the steps of an epoch, and has recorded those of earlier ones; None if nothing does."""
        model = self.model
        if self.capture_reason is not None or not isinstance(model, CharRNN):
            return None
        optimizer = self.optimizer
        if self._recorded is None or self._recorded_for != (carry_state, optimizer, self.clip):
            self._recorded_for = (carry_state, optimizer, self.clip)
            self._recorded = RecordedSteps(
                TrainingStep(model, optimizer, self.clip),
                CudaGraphRecorder(model.device),
                lambda: dependencies(model, optimizer),
                model.zero_state if carry_state else None,
                required=self.capture is True,
            )
        self._recorded.refresh()
        return self._recorded

    def state_dict(self) -> dict[str, object]:
        """Optimiser and history, as plain values and tensors: with the model and the sampler's generator, all that a
        resumed run needs.
        """
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            return {"optimizer": None, "history": [asdict(record) for record in self.history]}
        return {"optimizer": self.optimizer.state_dict(), "history": [asdict(record) for record in self.history]}

    def load_state_dict(self, state: dict) -> None:
        """Take up where `state_dict` was written, on this device or another."""
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(_for_this_device(state["optimizer"], self.optimizer))
        self.history = [EpochRecord(**record) for record in state["history"]]


def _for_this_device(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimiser's state_dict with the options of `optimizer` for how to compute a step, which are its device's own.

    Where they put the step counts on the device, torch moves them there; elsewhere they belong on the host.
    """
    own = optimizer.param_groups
    if len(own) != len(state["param_groups"]):
        return state  # torch refuses it
    names = [name for name in ("foreach", "fused", "capturable") if name in optimizer.defaults]
    groups = [
        written | {name: group[name] for name in names}
        for written, group in zip(state["param_groups"], own, strict=True)
    ]
    values = {
        i: {name: value.cpu() if name == "step" and isinstance(value, Tensor) else value for name, value in of.items()}
        for i, of in state["state"].items()
    }
    return state | {"param_groups": groups, "state": values}
