"""What a language model is to all that trains, measures, saves and decodes one, in whichever of its forms it comes.

    fused      CharRNN (model.py): this library's kernels
    torch      TorchCharRNN (torch_model.py): PyTorch alone, to compare with
    reference  ReferenceCharRNN (reference_model.py): charrnn_fast.reference's model from scratch

The form answers for itself what it can do; nobody asks which it is.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from charrnn_fast.lm.at_once import Look, StepAtOnce
from charrnn_fast.lm.batches import Batch

State: TypeAlias = Any  # (L, B, H), or what a model whose rnn was replaced carries: an LSTM a tuple; None for zeros


class LanguageModel(Protocol):
    """Logits o_t = h_t W_hq + b_q over V token ids, from the states h_t of L stacked cells of H units.

    Attributes: form, one of forms.FORMS; vocab_size, V; dropout, the probability in training; own_optimizers, makers of
    optimizers by name (parameters, lr) that the form is trained with, empty where torch's are.
    """

    @property
    def form(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def own_optimizers(self) -> Mapping[str, Callable[..., Any]]: ...
    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """All of them, always in the same order."""
        ...

    def buffers(self) -> Iterable[Tensor]:
        """Tensors that are no parameters and that a state_dict or a process of several takes along."""
        ...

    def zero_state(self, batch_size: int) -> Tensor:
        """The state (L, B, H) that a text starts from."""
        ...

    def __call__(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) and the final state, from token ids (B, T) int64."""
        ...

    def loss(self, tokens: Tensor, targets: Tensor, state: State = None) -> tuple[Tensor, State]:
        """The mean loss in nats over targets (B, T) int64, a scalar, and the final state."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave no gradients behind."""
        ...

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the parameters' gradients in place so that their norm together is at most max_norm; returns the norm
        before, a scalar.
        """
        ...

    def why_not_at_once(self, optimizer: Any, looks: bool) -> str | None:
        """None where a whole training step is taken at once, else one clause. looks: see `step_at_once`."""
        ...

    def step_at_once(self, optimizer: Any, clip: float | None, look: Look | None) -> StepAtOnce:
        """A whole training step, where `why_not_at_once` has nothing against it. clip: the largest global norm of the
        gradients of all that the optimizer holds, None for none. look: asked with loss and norm before an update.
        """
        ...

    def evaluated_at_once(self, batch: Batch, state: State, into: Tensor | None) -> tuple[Tensor, State] | None:
        """The loss of a batch and the next state, put `into` a tensor if there is one, without gradients and in fewer
        launches than `loss`; None where the form has no such way.
        """
        ...

    def sgd_step_(self, parameters: list[Tensor], max_norm: float | None, lr: float | Tensor) -> Tensor | None:
        """Clip and a step of plain SGD at once, with gradients left as they were; returns the norm before, a scalar, or
        None where this form has no such step for these parameters: nothing has happened then.
        """
        ...

    def generate_ids(
        self,
        prompt: Tensor,
        num_tokens: int,
        *,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        alpha: float = 1.0,
        top_k: int | None = None,
        state: State = None,
    ) -> tuple[Tensor, State]:
        """Continue prompts (B, P) int64 by num_tokens ids: ids (B, num_tokens), and the state before the last."""
        ...

    def train(self, mode: bool = True) -> Any:
        """In training mode dropout draws numbers."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """In evaluation mode for a while, and then as before."""
        ...

    def config(self) -> dict[str, Any]:
        """CharRNN's arguments that determine the parameters, as plain values."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """The parameters under CharRNN's names, whatever the form's own are; `load_state_dict` takes them back."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Take parameters over in place. Raises RuntimeError for other names or sizes."""
        ...

    def require_state(self, state: Any) -> None:
        """ValueError if this cannot be a state of the model."""
        ...

    def require_as_built(self, what: str) -> None:
        """ValueError if the model is another than `config` describes: "<what> a model as it was built, but ..."."""
        ...

    def require_trainable(
        self, *, changing_lr: bool, accumulate: int, precision: str, on_nan: str, processes: int
    ) -> None:
        """ValueError if this form is not trained with these options of Trainer, or by so many processes."""
        ...

    def why_not_captured(self, asked: bool) -> str | None:
        """None if the model's part of a training step can be captured as a CUDA graph, else one clause. asked: is it
        asked for, rather than welcome?
        """
        ...
