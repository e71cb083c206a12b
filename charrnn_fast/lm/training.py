"""Trainer: epochs over a sampler, with truncated backpropagation through time, clipping, validation and exact resume.

The loop of `train_batches` is the one of charrnn_fast.reference.training, which trains the reference model; the two
take the same arguments and follow the same curve.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm.data import Batch, Sampler
from charrnn_fast.lm.model import CharRNN
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


def train_batches(
    model: CharRNN,
    batches: Iterable[Batch],  # X (B, T) and Y (B, T), int64
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    *,
    carry_state: bool = False,
    graph_batches: int = 1,
) -> Iterator[Tensor]:
    """Train on the batches in turn and yield the loss of each, detached and still on the device.

    carry_state=False starts every batch from the zero state; True takes the state that the batch before ended with,
    detached every `graph_batches` batches, for which one update is made on the mean of their losses. clip is the
    largest global gradient norm, None for none.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: Tensor | None = None
    losses: list[Tensor] = []

    def update() -> None:
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        loss.backward()
        if clip is not None:
            model.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.clear()

    for X, Y in batches:
        loss, state = model.loss(X, Y, state if carry_state else None)
        losses.append(loss)
        if len(losses) == graph_batches:
            update()
            state = state.detach()
        yield loss.detach()
    if losses:
        update()


def validate(
    model: CharRNN | RNNLM, batches: Iterable[Batch], *, carry_state: bool = False
) -> tuple[float, float] | None:
    """exp(mean loss over characters) and the mean of the per-batch perplexities; None if there are no batches."""
    measured = list(reference.evaluate_batches(model, batches, carry_state=carry_state))
    if not measured:
        return None
    losses = torch.stack([loss for loss, _ in measured]).double().cpu()
    counts = torch.tensor([count for _, count in measured], dtype=torch.float64)
    return perplexity(float((losses * counts).sum() / counts.sum())), float(losses.exp().mean())


class Trainer:
    """Trains a CharRNN, or the reference model with its own loop, clip and optimisers.

    Args:
        model: a CharRNN, or charrnn_fast.reference.language_model.RNNLM.
        optimizer: "sgd", "adam", or a torch.optim.Optimizer over the model's parameters (for a CharRNN).
        lr: learning rate, for an optimizer given by name.
        clip: largest global gradient norm; None trains without clipping.
        epochs: how many epochs `fit` brings the model to.
        graph_batches: with a sampler that carries the state, the number of batches k (1..16) that the graph is kept
            across; one update is made for every k batches.

    Attributes: history, a list of EpochRecord.
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
    ):
        if not 1 <= graph_batches <= MAX_GRAPH_BATCHES:
            raise ValueError(f"graph_batches must be 1 to {MAX_GRAPH_BATCHES}, got {graph_batches}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be above 0, or None for no clipping, got {clip}")
        self.model, self.clip, self.epochs, self.graph_batches = model, clip, epochs, graph_batches
        self.optimizer = self._make_optimizer(optimizer, lr) if isinstance(optimizer, str) else optimizer
        self.history: list[EpochRecord] = []

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
        return kinds[name]([p for p in self.model.parameters() if p.requires_grad], lr)

    def fit(self, data: Sampler, *, on_epoch: Callable[[EpochRecord], None] | None = None) -> list[EpochRecord]:
        """Train until `epochs` epochs are in the history, and call on_epoch after each.

        Returns the history. Raises TrainingError when an epoch's loss or validation perplexity is not finite; that
        epoch is not recorded.
        """
        for epoch in range(len(self.history) + 1, self.epochs + 1):
            record = self._epoch(epoch, data)
            self.history.append(record)
            if on_epoch is not None:
                on_epoch(record)
        return self.history

    def _epoch(self, epoch: int, data: Sampler) -> EpochRecord:
        # The reference's loop has the signature of ours with its own optimisers: no common base to name here.
        run: Callable = reference.train_batches if isinstance(self.model, RNNLM) else train_batches
        counts: list[int] = []

        def counted() -> Iterator[Batch]:
            for X, Y in data.train():
                counts.append(Y.numel())
                yield X, Y

        losses: list[Tensor] = []
        start = time.perf_counter()
        for loss in run(
            self.model,
            counted(),
            self.optimizer,
            self.clip,
            carry_state=data.carry_state,
            graph_batches=self.graph_batches if data.carry_state else 1,
        ):
            losses.append(loss)
        weights = torch.tensor(counts, dtype=torch.float64)
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

    def state_dict(self) -> dict[str, object]:
        """Optimiser and history, as plain values and tensors: with the model and the sampler's generator, all that a
        resumed run needs.
        """
        if isinstance(self.model, RNNLM):
            return {"optimizer": None, "history": [asdict(record) for record in self.history]}
        return {"optimizer": self.optimizer.state_dict(), "history": [asdict(record) for record in self.history]}

    def load_state_dict(self, state: dict) -> None:
        """Take up where `state_dict` was written."""
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.history = [EpochRecord(**record) for record in state["history"]]
