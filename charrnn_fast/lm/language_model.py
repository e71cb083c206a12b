"""What a language model is to all that trains, measures, saves and decodes one, in whichever of its forms it comes.

    fused      CharRNN (model.py): this library's kernels
    torch      TorchCharRNN (torch_model.py): PyTorch alone, to compare with
    reference  ReferenceCharRNN (reference_model.py): charrnn_fast.reference's model from scratch

The form answers for itself what it can do; nobody asks which it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from charrnn_fast.lm.at_once import Look, StepAtOnce
from charrnn_fast.lm.batches import Batch
from charrnn_fast.reference import generate as reference_generate

if TYPE_CHECKING:
    from charrnn_fast.lm.training import Trainer

State: TypeAlias = Any  # (L, B, H), or what a model whose rnn was replaced carries: an LSTM a tuple; None for zeros


class LanguageModel(ABC):
    """Logits o_t = h_t W_hq + b_q over V token ids, from the states h_t of L stacked cells of H units.

    A form names this class behind the one that has its parameters. What it leaves out is that of a model which is
    trained and decoded operation by operation, with any options of Trainer.

    Attributes: form, one of forms.FORMS; vocab_size, V; dropout, the probability in training; own_optimizers, makers of
    optimizers by name (parameters, lr) that the form is trained with, empty where torch's are.
    """

    form: str
    vocab_size: int
    dropout: float = 0.0
    own_optimizers: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the parameters are."""

    @abstractmethod
    def parameters(self) -> Iterable[Tensor]:
        """All of them, always in the same order."""

    def buffers(self) -> Iterable[Tensor]:
        """Tensors that are no parameters and that a state_dict or a process of several takes along."""
        return ()

    @abstractmethod
    def zero_state(self, batch_size: int) -> Tensor:
        """The state (L, B, H) that a text starts from."""

    @abstractmethod
    def __call__(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) and the final state, from token ids (B, T) int64."""

    @abstractmethod
    def loss(self, tokens: Tensor, targets: Tensor, state: State = None) -> tuple[Tensor, State]:
        """The mean loss in nats over targets (B, T) int64, a scalar, and the final state."""

    @abstractmethod
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave no gradients behind."""

    @abstractmethod
    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the parameters' gradients in place so that their norm together is at most max_norm, by the form's own
        clip; returns the norm before, a scalar.
        """

    @abstractmethod
    def why_not_at_once(self, optimizer: Any, looks: bool) -> str | None:
        """None where a whole training step is taken at once, else one clause that says why not. looks: see
        `step_at_once`.
        """

    def step_at_once(self, optimizer: Any, clip: float | None, look: Look | None) -> StepAtOnce:
        """A whole training step, where `why_not_at_once` has nothing against it. clip: the largest global norm of the
        gradients of all that the optimizer holds, None for none. look: asked with loss and norm before an update.
        """
        raise RuntimeError(self.why_not_at_once(optimizer, look is not None))

    def evaluated_at_once(self, batch: Batch, state: State, into: Tensor | None) -> tuple[Tensor, State] | None:
        """The loss of a batch and the next state, put `into` a tensor if there is one, without gradients and in fewer
        launches than `loss`; None where the form has no such way.
        """
        return None

    def sgd_step_(self, parameters: list[Tensor], max_norm: float | None, lr: float | Tensor) -> Tensor | None:
        """Clip and a step of plain SGD at once, with gradients left as they were; returns the norm before, a scalar, or
        None where this form has no such step for these parameters: nothing has happened then.
        """
        return None

    @torch.no_grad()
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
        """Continue prompts (B, P) int64 by num_tokens ids: ids (B, num_tokens), and the state (L, B, H) before the
        last.

        Greedy if uniforms is None, else sampled by these numbers (B, num_tokens) in [0, 1); see
        charrnn_fast.ops.generate.
        """
        sampling: dict[str, Any] = {"uniforms": uniforms, "temperature": temperature, "alpha": alpha, "top_k": top_k}
        return self._continued(prompt, num_tokens, state, sampling)

    def _continued(
        self, prompt: Tensor, num_tokens: int, state: State, sampling: dict[str, Any]
    ) -> tuple[Tensor, State]:
        """`generate_ids` by calls of the model, a step at a time; sampling: its keyword arguments but the state."""
        with self.evaluating():
            return reference_generate.generate(self, prompt, num_tokens, state=state, **sampling)

    @abstractmethod
    def train(self, mode: bool = True) -> Any:
        """In training mode dropout draws numbers."""

    def evaluating(self) -> AbstractContextManager[None]:
        """In evaluation mode for a while, and then as before."""
        return nullcontext()

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """CharRNN's arguments that determine the parameters, as plain values; what a checkpoint keeps."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """The parameters under CharRNN's names, whatever the form's own are; `load_state_dict` takes them back."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Take parameters over in place. Raises RuntimeError for other names or sizes."""

    def require_state(self, state: Any) -> None:
        """ValueError if this cannot be a state of the model."""
        got, (L, _, H) = tuple(getattr(state, "shape", ())), self.zero_state(1).shape
        if len(got) != 3 or (got[0], got[2]) != (L, H):
            raise ValueError(f"a state ({L}, B, {H}) was expected, got {got}")

    def require_as_built(self, what: str) -> None:
        """ValueError if the model is another than `config` describes: "<what> a model as it was built, but ..."."""
        return None

    def require_trainable(self, trainer: "Trainer") -> None:
        """ValueError if this form is not trained with a trainer's options, or by so many processes."""
        return None

    @abstractmethod
    def why_not_captured(self, asked: bool) -> str | None:
        """None if the model's part of a training step can be captured as a CUDA graph, else one clause. asked: is it
        asked for, rather than welcome?
        """
