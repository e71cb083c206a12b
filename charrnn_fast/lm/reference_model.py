"""ReferenceCharRNN, the specification's model from scratch as a form of the language model."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.reference.clip_grad_norm import clip_grad_norm
from charrnn_fast.reference.language_model import RNNLM
from charrnn_fast.reference.training import SGD, Adam

if TYPE_CHECKING:
    from charrnn_fast.lm.training import Trainer

_PLAIN = "the reference model is trained operation by operation"


def by_name(net: RNNLM) -> dict[str, Tensor | None]:
    """The parameters of a reference model under CharRNN's names, as views: weights are transposed. None for a second
    bias that the cells do not have.
    """
    found: dict[str, Tensor | None] = {} if net.W_embed is None else {"embed.weight": net.W_embed}
    for layer, cell in enumerate(net.cells):
        found |= {f"rnn.weight_ih_l{layer}": cell.W_xh.T, f"rnn.weight_hh_l{layer}": cell.W_hh.T}
        found |= {f"rnn.bias_ih_l{layer}": cell.b_h, f"rnn.bias_hh_l{layer}": cell.b_hh}
    return found | {"head.weight": net.W_hq.T, "head.bias": net.b_q}


class ReferenceCharRNN(RNNLM, LanguageModel):
    """charrnn_fast.reference.language_model.RNNLM, and what Trainer, checkpoints and `generate` ask of a model.

    Its arithmetic is the specification's all through: loss, clip, optimizers, decoder. It has no dropout, and its
    optimizers neither momentum nor a state that is kept. It is the same in training and in use.
    """

    form = "reference"
    own_optimizers: ClassVar[Mapping[str, Callable[..., Any]]] = {"sgd": SGD, "adam": Adam}

    @property
    def device(self) -> torch.device:
        return self.W_hq.device

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters():
            p.grad = None

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return clip_grad_norm(parameters, max_norm)

    def why_not_at_once(self, optimizer: Any, looks: bool) -> str | None:
        return _PLAIN

    def why_not_captured(self, asked: bool) -> str | None:
        return _PLAIN

    def train(self, mode: bool = True) -> "ReferenceCharRNN":
        return self

    def config(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.num_hiddens,
            "num_layers": len(self.cells),
            "nonlinearity": self.nonlinearity,
            "embedding": "onehot" if self.W_embed is None else self.W_embed.shape[1],
            "second_bias": self.cells[0].b_hh is not None,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the parameters; a second bias that is none is zeros."""
        zeros = self.W_hq.new_zeros(self.num_hiddens)
        found = {name: zeros if p is None else p.detach() for name, p in by_name(self).items()}
        return {name: p.clone(memory_format=torch.contiguous_format) for name, p in found.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        own = self.state_dict()
        if (wrong := sorted(set(own) ^ set(state_dict))) or any(own[n].shape != state_dict[n].shape for n in own):
            raise RuntimeError(f"parameters of other names or sizes: {wrong or 'size mismatch'}")
        for name, p in by_name(self).items():
            if p is not None:
                p.copy_(state_dict[name])
        for layer, cell in enumerate(self.cells):
            if cell.b_hh is None:
                cell.b_h += state_dict[f"rnn.bias_hh_l{layer}"]

    def require_trainable(self, trainer: "Trainer") -> None:
        if trainer.schedule.changes or trainer.accumulate > 1 or trainer.precision != "fp32":
            raise ValueError("the reference model is trained in its own dtype, at one learning rate, batch by batch")
        if trainer.on_nan != "stop":
            raise ValueError(f"the reference model stops at a loss that is not finite, got on_nan={trainer.on_nan!r}")
        if trainer.processes is not None and trainer.processes.count > 1:
            raise ValueError(f"the reference model is trained by one process, got {trainer.processes.count}")
