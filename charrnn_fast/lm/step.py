"""One training step: forward, loss, backward, clip, update; and the loop over the batches of an epoch.

A step is taken at once where the model has a way to (at_once.py), else by its loss, autograd, a clip and the optimizer.

`train_batches` is the loop of charrnn_fast.reference.training, by the same arguments; the tests hold the curves of the
two together.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.lm.at_once import StepAtOnce
from charrnn_fast.lm.batches import Batch, Pair, as_batch
from charrnn_fast.lm.capture import RecordedSteps
from charrnn_fast.lm.distributed import Processes, SharedGradients
from charrnn_fast.lm.language_model import LanguageModel, State
from charrnn_fast.lm.optimizers import held_by
from charrnn_fast.lm.records import each_part
from charrnn_fast.ops.tokens import ids_known_below


class TrainingStep:
    """Forward, loss, backward, clip and update for one batch; without a look at a value, but with `guard`.

    Args:
        model, optimizer: what is trained, and what updates its parameters.
        clip: largest global gradient norm, None for none.
        graph_batches: the number of batches k that the graph is kept across; one update is made for every k of them,
            on the mean of their losses.
        accumulate: the number of batches whose gradients are added up, each batch with a backward pass of its own, for
            one update on the mean loss over their characters. At most one of the two is above 1.
        bf16: run forward and loss under autocast to bfloat16.
        guard: look at loss and norm before an update, and make none if one of them is not finite.
        processes: who else trains this model, each on its own rows of every batch; None for nobody. Gradients and
            losses are then those of all rows from the update on; until then a loss is this process's.

    Attributes:
        norm: the gradients' norm at the last update, before clipping: a scalar on the model's device that no later step
            changes; None before the first update.
        pending: batches that wait for an update. refused: updates that `guard` has not made.
        state: (L, B, H) or None, where `train_batches` keeps the state that the next batch starts from.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Any,
        clip: float | None,
        graph_batches: int = 1,
        *,
        accumulate: int = 1,
        bf16: bool = False,
        guard: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.optimizer, self.clip, self.graph_batches = model, optimizer, clip, graph_batches
        self.accumulate, self.bf16, self.guard = accumulate, bf16, guard
        self.parameters = held_by(optimizer)
        self.norm: Tensor | None = None
        self.state: State = None
        self.pending = self.refused = 0
        self.shared = None if processes is None else SharedGradients(processes, self.parameters)
        self._losses: list[Tensor] = []  # of the batches that wait for a backward pass
        self._detached: list[Tensor] = []  # of the batches that wait for an update
        self._counts: list[int] = []  # their characters
        self._at_once: StepAtOnce | None = None
        self._made: list[StepAtOnce] = []  # kept for good: what was recorded of one reads and writes its memory
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    @property
    def why_not_at_once(self) -> str | None:
        """None where a step is taken at once, else one clause that says why not."""
        if self.graph_batches > 1 or self.accumulate > 1:
            return f"an update is made for {max(self.graph_batches, self.accumulate)} batches"
        if self.bf16:
            return "forward and loss are under autocast"
        if self.shared is not None:
            return "gradients are shared with other processes"
        return self.model.why_not_at_once(self.optimizer, self.guard)

    def prepare(self) -> None:
        """Find out how steps are taken from now on: to be called before an epoch."""
        self._at_once = None
        if self.why_not_at_once is not None:
            return
        if not self._made or not self._made[-1].is_of(self.model):
            look = self._may_update if self.guard else None
            self._made.append(self.model.step_at_once(self.optimizer, self.clip, look))
        self._at_once = self._made[-1]

    def __call__(self, batch: Batch | Pair, state: State = None, into: Tensor | None = None) -> tuple[Tensor, State]:
        """A batch and the state (L, B, H), None for zeros -> the loss, detached, and the next state, detached if there
        was an update; if there is a tensor `into`, (L, B, H), which may be `state`, it is put there.
        """
        found = self.run(batch, state, into)
        if self.norm is not None and self._at_once is not None and self._at_once.reuses_norm:
            self.norm = self.norm.clone()
        return found

    def run(self, batch: Batch | Pair, state: State = None, into: Tensor | None = None) -> tuple[Tensor, State]:
        """The same, and the next step may overwrite norm."""
        batch = as_batch(batch)
        if self._at_once is not None and not self.pending and (found := self._at_once(batch, state, into)) is not None:
            self.norm = self._at_once.norm
            return found
        count = batch.count
        if has_rows := count > 0 or self.shared is None:
            loss, state = loss_of(self.model, batch, state, self.bf16)
        else:  # fewer rows than processes, and none for this one
            loss = torch.zeros((), dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        # Of several processes it becomes the loss of all rows, in place.
        detached = loss.detach() if self.shared is None else loss.detach().clone()
        self._detached.append(detached)
        self._counts.append(count)
        self.pending += 1
        if not has_rows:
            pass
        elif self.accumulate > 1:
            self._add_gradients(loss)
            state = each_part(state, Tensor.detach)
        else:
            self._losses.append(loss)
        if self.pending == max(self.graph_batches, self.accumulate):
            self.update()
            state = each_part(state, Tensor.detach)
        return detached, put(state, into)

    def update(self) -> None:
        """Bring the parameters up to date with the batches so far, if there are any. No gradients are left behind."""
        if not self.pending:
            return
        try:
            if self._losses:
                share = self._constant(1 / len(self._losses), self._losses[0])
                torch.autograd.backward(self._losses, [share] * len(self._losses))
            elif any(self._counts) and (scale := self._added_up() / sum(self._counts)) != 1:
                for p in self.parameters:
                    if p.grad is not None:
                        p.grad.mul_(scale)
            if self.shared is not None:
                self.shared(self._detached, self._counts)
            self._descend()
        finally:  # also when a recording fails, whose gradients are memory that was never written
            self._losses.clear()
            self._detached.clear()
            self._counts.clear()
            self.pending = 0
            self.model.zero_grad(set_to_none=True)

    def _add_gradients(self, loss: Tensor) -> None:
        """Backward of one of several batches: weighed as if all had the first one's number of characters."""
        loss.backward(self._constant(self._counts[-1] / self._added_up(), loss))

    def _constant(self, value: float, like: Tensor) -> Tensor:
        """A scalar of a loss's kind, the same tensor whenever it is wanted again: autograd would fill one each time."""
        kind = (value, like.dtype, like.device)
        if kind not in self._constants:
            self._constants[kind] = torch.full((), value, dtype=like.dtype, device=like.device)
        return self._constants[kind]

    def _added_up(self) -> int:
        """The characters of `accumulate` batches, were they all as the first that has any."""
        return self.accumulate * next(count for count in self._counts if count)

    def _descend(self) -> None:
        """Clip the gradients and take the optimizer's step along them; plain SGD's on a GPU in the same launch."""
        lr = _plain_sgd_lr(self.optimizer)
        if lr is not None and not self.guard:
            norm = self.model.sgd_step_(self.parameters, self.clip, lr)
            if norm is not None:
                self.norm = norm
                return
        # Without clipping the norm is measured all the same: no gradient is above infinity, and times 1 is exact.
        norm = self.model.clip_grad_norm_(self.parameters, math.inf if self.clip is None else self.clip)
        self.norm = norm.detach()
        if not self.guard or self._may_update(self._detached[-1], norm):
            self.optimizer.step()

    def _may_update(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether both are finite; counted where they are not."""
        finite = math.isfinite(float(norm)) and math.isfinite(float(loss))
        self.refused += not finite
        return finite


class Evaluation:
    """The loss of a batch under a model in evaluation mode, with the arguments and results of a training step.

    Attributes: norm, None.
    """

    def __init__(self, model: LanguageModel):
        self.model = model
        self.norm: Tensor | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch | Pair, state: State = None, into: Tensor | None = None) -> tuple[Tensor, State]:
        """A batch and the state -> its mean loss, a scalar, and the next state, put `into` a tensor if there is one."""
        batch = as_batch(batch)
        if (found := self.model.evaluated_at_once(batch, state, into)) is not None:
            return found
        loss, state = loss_of(self.model, batch, state)
        return loss, put(state, into)

    run = __call__


def loss_of(model: LanguageModel, batch: Batch, state: State, bf16: bool = False) -> tuple[Tensor, State]:
    """The model's loss of a batch and the next state; with bf16 under autocast to it. Ids that are known to be the
    model's are not looked at.
    """
    X, Y = batch.windows()
    below = batch.ids_below
    with torch.autocast(X.device.type, torch.bfloat16) if bf16 else nullcontext():
        if below is None or below > model.vocab_size:
            return model.loss(X, Y, state)
        with ids_known_below(model.vocab_size):
            return model.loss(X, Y, state)


def put(state: State, into: Tensor | None) -> State:
    """The state, in another tensor's memory if there is one."""
    if into is None or state is None or state is into:
        return state
    return into.copy_(state)


def _plain_sgd_lr(optimizer: Any) -> float | Tensor | None:
    """The learning rate of an SGD that only subtracts lr * gradient and that nobody watches; None for all others."""
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        return None
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    (group,) = optimizer.param_groups
    plain = not any(group[name] for name in ("momentum", "weight_decay", "maximize", "differentiable"))
    return group["lr"] if plain else None


def train_batches(
    model: LanguageModel,
    batches: Iterable[Batch | Pair],
    optimizer: Any,
    clip: float | None,
    *,
    carry_state: bool = False,
    graph_batches: int = 1,
    step: TrainingStep | None = None,
    recorded: RecordedSteps | None = None,
) -> Iterator[Tensor]:
    """Train on the batches in turn and yield the loss of each, detached and still on the device.

    carry_state=False starts every batch from the zero state; True takes the state that the batch before ended with,
    detached every `graph_batches` batches, for which one update is made on the mean of their losses. clip is the
    largest global gradient norm, None for none. `step` is a TrainingStep of these arguments, by default made here:
    the first batch starts from its state, and it keeps the one that the next would start from. `recorded` is the same
    step, recorded; by default each step is run anew.
    """
    if step is None:
        step = TrainingStep(model, optimizer, clip, graph_batches)
    step.prepare()
    run: Callable[[Batch | Pair, State], tuple[Tensor, State]] = step if recorded is None else recorded
    for batch in batches:
        loss, state = run(batch, step.state if carry_state else None)
        step.state = state if carry_state else None
        yield loss
    step.update()
