"""A training step of a CharRNN as few operations: from the batch to the updated parameters, without autograd.

What a step is, is the same everywhere: forward and loss, backward, clip, update. step.TrainingStep makes it of a
model's loss, autograd, a clip and an optimizer. Here are the ways to take it at once, with the same arguments and
results, and why they do not apply; the model answers which of them does.

    ThreeLaunches  on a GPU: gradients, their sums, clip and update, gather and all (ops/language_model_step.py)
    OneCall        on a CPU: loss and all gradients by one call of C, the clip, the optimizer (ops/one_call_step.py)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from charrnn_fast.lm.as_built import why_called
from charrnn_fast.lm.batches import Batch
from charrnn_fast.ops import backends, language_model_step
from charrnn_fast.ops.language_model_step import LanguageModelStep, Weights
from charrnn_fast.ops.one_call_step import OneCallStep
from charrnn_fast.rnn import FusedRNN

if TYPE_CHECKING:
    from charrnn_fast.lm.model import CharRNN

Look = Callable[[Tensor, Tensor], bool]  # loss and norm, scalars -> whether to update


class StepAtOnce(Protocol):
    """A whole step.

    Attributes: norm, the gradients' norm before clipping at the last step, a scalar; reuses_norm, whether the next one
    overwrites it.
    """

    norm: Tensor | None
    reuses_norm: bool

    def is_of(self, model: Any) -> bool:
        """Whether it still updates this model: the tensors that it was made with are the model's."""

    def __call__(self, batch: Batch, state: Tensor | None, into: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The loss, a scalar, and the next state (L, B, H), put `into` a tensor if there is one; None, and nothing has
        happened, for a batch or state that it does not take.
        """


class OneCall:
    """OneCallStep on the batches of a Trainer."""

    reuses_norm = False

    def __init__(self, model: "CharRNN", optimizer: torch.optim.Optimizer, clip: float | None, look: Look | None):
        options = {"nonlinearity": model.nonlinearity, "backend": _asked(model)}
        self._step = OneCallStep(_weights_of(model), optimizer, clip, look, **options)
        self.norm: Tensor | None = None

    def is_of(self, model: Any) -> bool:
        return all(a is b for a, b in zip(_weights_of(model), self._step.weights, strict=True))

    def __call__(self, batch: Batch, state: Tensor | None, into: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        if state is not None and (state.dim() != 3 or len(state) != 1):
            return None
        X, Y = batch.windows()
        tokens, targets, h0 = X.t(), Y.t(), None if state is None else state[0]
        if self._step.why_not(tokens, targets, h0) is not None:
            return None
        loss, h_n = self._step(tokens, targets, h0)
        self.norm, state = self._step.norm, h_n.unsqueeze(0)
        return loss, state if into is None else into.copy_(state)


class ThreeLaunches:
    """LanguageModelStep on the batches of a Trainer, whose ids are known to be the model's."""

    reuses_norm = True

    def __init__(self, model: "CharRNN", optimizer: torch.optim.Optimizer, clip: float | None):
        self._weights, self._classes = _placed_weights_of(model), model.vocab_size
        self._step = LanguageModelStep(self._weights, optimizer, clip, nonlinearity=model.nonlinearity)
        self.norm: Tensor | None = self._step.norm

    def is_of(self, model: Any) -> bool:
        return all(a is b for a, b in zip(_placed_weights_of(model), self._weights, strict=True))

    def __call__(self, batch: Batch, state: Tensor | None, into: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        found = _taken(self._weights, self._classes, batch, state)
        if found is None:
            return None
        loss, h_n = self._step(*found, h_n=None if into is None else into[0])
        return loss, h_n.unsqueeze(0) if into is None else into


def evaluated_at_once(
    model: "CharRNN", batch: Batch, state: Tensor | None, into: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The loss, a scalar, and the next state (L, B, H) in two launches; None where that does not apply."""
    if _why_not_forward(model) is not None or _backend_of(model) != "triton":
        return None
    weights = _placed_weights_of(model)
    found = _taken(weights, model.vocab_size, batch, state)
    if found is None or language_model_step.why_not(weights, backend=_asked(model)) is not None:
        return None
    h_n = None if into is None else into[0]
    loss, h_n = language_model_step.evaluate(weights, *found, nonlinearity=model.nonlinearity, h_n=h_n)
    return loss, h_n.unsqueeze(0) if into is None else into


def _taken(
    weights: Weights, classes: int, batch: Batch, state: Tensor | None
) -> tuple[language_model_step.Batch, Tensor | None] | None:
    """A batch and a state as the three launches take them; None where they do not: an id that is none of the model's is
    an error in the other way alone.
    """
    if batch.ids_below is None or batch.ids_below > classes or (state is not None and state.shape[:1] != (1,)):
        return None
    places, h0 = batch.places(), None if state is None else state[0]
    return None if language_model_step.why_not_batch(weights, places, h0) is not None else (places, h0)


def _weights_of(model: "CharRNN") -> tuple[Any, ...]:
    """weight_ih, weight_hh, bias_ih, bias_hh, head weight and bias of a one-layer model as it was built."""
    cell = [getattr(model.rnn, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return (*cell, model.head.weight, model.head.bias)


def _placed_weights_of(model: "CharRNN") -> Weights:
    """The same by their names."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "head_weight", "head_bias")
    return Weights(**dict(zip(names, _weights_of(model), strict=True)))


def _asked(model: "CharRNN") -> str:
    return getattr(model.rnn, "backend", "auto")


def _backend_of(model: "CharRNN") -> str:
    """What runs the model's recurrence."""
    weight = model.head.weight
    return backends.choose("elman", weight.device, weight.dtype, hidden_size=model.hidden_size, backend=_asked(model))


def why_not(model: "CharRNN", optimizer: Any, looks: bool) -> str | None:
    """None where a step of the model with this optimizer is taken at once, else one clause that says why not. looks:
    are loss and norm looked at before an update?
    """
    if (why := _why_not_forward(model)) is not None:
        return why
    if (why := model.why_not_captured(True)) is not None:
        return why.replace("a replay", "it")
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"{type(optimizer).__name__} is no optimizer of torch"
    backend = _backend_of(model)
    if backend == "native":
        return None
    if backend != "triton":
        return "it is there for the native kernels on a CPU and the Triton kernels on a GPU"
    if looks:
        return "loss and norm are looked at before an update"
    return language_model_step.why_not(_placed_weights_of(model), optimizer, backend=_asked(model))


def _why_not_forward(model: "CharRNN") -> str | None:
    """None where loss and state are those of one layer and a head as they were built, else one clause."""
    if model.num_layers > 1:
        return f"the model has {model.num_layers} layers"
    if model.embed is not None:
        return "the model has a learned embedding"
    if model.dropout > 0 and model.training:
        return "dropout draws numbers"
    if not model.is_the_forms_own():
        return "a method of the model is not CharRNN's"
    if (why := why_called(model)) is not None:
        return f"it would not call its modules, and {why}"
    return None if isinstance(model.rnn, FusedRNN) else f"rnn is a {type(model.rnn).__name__}"


def at_once(model: "CharRNN", optimizer: Any, clip: float | None, look: Look | None) -> StepAtOnce:
    """The step, for a model and an optimizer of which `why_not` has nothing to say."""
    if _backend_of(model) == "triton":
        return ThreeLaunches(model, optimizer, clip)
    return OneCall(model, optimizer, clip, look)
