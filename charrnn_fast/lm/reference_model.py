"""ReferenceCharRNN, the specification's model from scratch as a form of the language model."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from charrnn_fast.lm.at_once import Look, StepAtOnce
from charrnn_fast.lm.batches import Batch
from charrnn_fast.reference import generate as reference_generate
from charrnn_fast.reference.clip_grad_norm import clip_grad_norm
from charrnn_fast.reference.language_model import RNNLM
from charrnn_fast.reference.training import SGD, Adam

_PLAIN = "the reference model is trained operation by operation"


class ReferenceCharRNN(RNNLM):
    """charrnn_fast.reference.language_model.RNNLM, and what Trainer, checkpoints and `generate` ask of a model.

    Its arithmetic is the specification's all through: loss, clip, optimizers, decoder. It has no dropout, and its
    optimizers neither momentum nor a state that is kept.
    """

    form: ClassVar[str] = "reference"
    dropout: ClassVar[float] = 0.0
    own_optimizers: ClassVar[Mapping[str, Callable[..., Any]]] = {"sgd": SGD, "adam": Adam}

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.W_hq.device

    def buffers(self) -> Iterable[Tensor]:
        """None."""
        return ()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave no gradients behind."""
        for p in self.parameters():
            p.grad = None

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the parameters' gradients in place so that their norm together is at most max_norm; returns the norm
        before, a scalar tensor.
        """
        return clip_grad_norm(parameters, max_norm)

    def why_not_at_once(self, optimizer: Any, looks: bool) -> str | None:
        """One clause: it is there to be compared with."""
        return _PLAIN

    def step_at_once(self, optimizer: Any, clip: float | None, look: Look | None) -> StepAtOnce:
        """There is none."""
        raise RuntimeError(_PLAIN)

    def evaluated_at_once(self, batch: Batch, state: Any, into: Tensor | None) -> tuple[Tensor, Any] | None:
        """None: there is no other way than `loss`."""
        return None

    def sgd_step_(self, parameters: list[Tensor], max_norm: float | None, lr: float | Tensor) -> Tensor | None:
        """None: the clip is the clip, and the optimizer takes the step."""
        return None

    def generate_ids(
        self,
        prompt: Tensor,
        num_tokens: int,
        *,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        alpha: float = 1.0,
        top_k: int | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Continue prompts (B, P) int64 by num_tokens ids; see charrnn_fast.reference.generate."""
        sampling: dict[str, Any] = {"uniforms": uniforms, "temperature": temperature, "alpha": alpha, "top_k": top_k}
        return reference_generate.generate(self, prompt, num_tokens, state=state, **sampling)

    def train(self, mode: bool = True) -> "ReferenceCharRNN":
        """Returns self: it is the same in training and in use."""
        return self

    def evaluating(self) -> AbstractContextManager[None]:
        """Nothing to change."""
        return nullcontext()

    def config(self) -> dict[str, Any]:
        """CharRNN's arguments for a model of these sizes."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.num_hiddens,
            "num_layers": len(self.cells),
            "nonlinearity": self.nonlinearity,
            "embedding": "onehot" if self.W_embed is None else self.W_embed.shape[1],
            "second_bias": self.cells[0].b_hh is not None,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the parameters under CharRNN's names, weights transposed; a second bias that is none is zeros."""
        embed = {} if self.W_embed is None else {"embed.weight": self.W_embed}
        found: dict[str, Tensor] = {**embed}
        for layer, cell in enumerate(self.cells):
            bias_hh = torch.zeros_like(cell.b_h) if cell.b_hh is None else cell.b_hh
            found |= {f"rnn.weight_ih_l{layer}": cell.W_xh.T, f"rnn.weight_hh_l{layer}": cell.W_hh.T}
            found |= {f"rnn.bias_ih_l{layer}": cell.b_h, f"rnn.bias_hh_l{layer}": bias_hh}
        found |= {"head.weight": self.W_hq.T, "head.bias": self.b_q}
        return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in found.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the parameters of such a one. Raises RuntimeError for other names or sizes."""
        own = self.state_dict()
        if (wrong := sorted(set(own) ^ set(state_dict))) or any(own[n].shape != state_dict[n].shape for n in own):
            raise RuntimeError(f"parameters of other names or sizes: {wrong or 'size mismatch'}")
        for layer, cell in enumerate(self.cells):
            cell.W_xh.copy_(state_dict[f"rnn.weight_ih_l{layer}"].T)
            cell.W_hh.copy_(state_dict[f"rnn.weight_hh_l{layer}"].T)
            bias, bias_hh = (state_dict[f"rnn.{kind}_l{layer}"] for kind in ("bias_ih", "bias_hh"))
            if cell.b_hh is None:
                cell.b_h.copy_(bias + bias_hh)
            else:
                cell.b_h.copy_(bias)
                cell.b_hh.copy_(bias_hh)
        self.W_hq.copy_(state_dict["head.weight"].T)
        self.b_q.copy_(state_dict["head.bias"])
        if self.W_embed is not None:
            self.W_embed.copy_(state_dict["embed.weight"])

    def require_state(self, state: Any) -> None:
        """ValueError if this cannot be a state (L, B, H) of the model."""
        got, L, H = tuple(getattr(state, "shape", ())), len(self.cells), self.num_hiddens
        if len(got) != 3 or (got[0], got[2]) != (L, H):
            raise ValueError(f"a state ({L}, B, {H}) was expected, got {got}")

    def require_as_built(self, what: str) -> None:
        """It is as it was built."""

    def require_trainable(
        self, *, changing_lr: bool, accumulate: int, precision: str, on_nan: str, processes: int
    ) -> None:
        """ValueError for options of Trainer that the specification does not have."""
        if changing_lr or accumulate > 1 or precision != "fp32":
            raise ValueError("the reference model is trained in its own dtype, at one learning rate, batch by batch")
        if on_nan != "stop":
            raise ValueError(f"the reference model stops at a loss that is not finite, got on_nan={on_nan!r}")
        if processes > 1:
            raise ValueError(f"the reference model is trained by one process, got {processes}")

    def why_not_captured(self, asked: bool) -> str | None:
        """One clause: it is there to be compared with, and runs operation by operation."""
        return _PLAIN
