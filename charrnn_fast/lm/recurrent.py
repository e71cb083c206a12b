"""A language model of torch modules: token ids -> embedding or one-hot rows -> Elman layers -> linear head.

What CharRNN and TorchCharRNN have in common: their parts, their sizes, and the way from and to the reference's.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charrnn_fast.lm.as_built import PARTS, why_called, why_changed
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.reference_model import ReferenceCharRNN, by_name
from charrnn_fast.ops.context import plain
from charrnn_fast.ops.elman_torch import TorchRNN
from charrnn_fast.ops.tokens import TOKEN_TYPES, check_tokens, one_hot_rows
from charrnn_fast.reference.language_model import RNNLM, Cell

Self = TypeVar("Self", bound="RecurrentLM")
METHODS = ("forward", "hidden", "loss", "clip_grad_norm_", "sgd_step_")  # of a training step: one at once calls none


class RecurrentLM(nn.Module, LanguageModel):
    """The parts rnn, head and embed, called one after the other; a subclass says which modules they are.

    Arguments, errors and attributes: see CharRNN. A form is a subclass that names itself, ``class F(RecurrentLM,
    form="f")``; subclasses of such a one keep its name.
    """

    _written: ClassVar[dict[str, Any]]  # the form's own methods, as they are where it is defined

    def __init_subclass__(cls, form: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if form is not None:
            cls.form, cls._written = form, {name: getattr(cls, name) for name in METHODS}

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        embedding: str | int = "onehot",
        second_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        make_rnn: Callable[..., nn.RNNBase] = TorchRNN,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability of at least 0 and below 1, got {dropout}")
        if not (embedding == "onehot" or (isinstance(embedding, int) and embedding > 0)):
            raise ValueError(f"embedding must be 'onehot' or a width of at least 1, got {embedding!r}")
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.nonlinearity, self.embedding, self.second_bias = nonlinearity, embedding, second_bias
        self.dropout = float(dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = embedding if isinstance(embedding, int) else vocab_size
        self.embed = nn.Embedding(vocab_size, width, **factory) if isinstance(embedding, int) else None
        shape: dict[str, Any] = {"input_size": width, "hidden_size": hidden_size, "num_layers": num_layers}
        shape.update(nonlinearity=nonlinearity, batch_first=True, dropout=self.dropout if num_layers > 1 else 0.0)
        self.rnn = make_rnn(**shape, **factory)
        self.head = nn.Linear(hidden_size, vocab_size, **factory)
        if not second_bias:
            for layer in range(num_layers):
                nn.init.zeros_(self._cell_parameter("bias_hh", layer)).requires_grad_(False)

    def config(self) -> dict[str, Any]:
        names = ("vocab_size", "hidden_size", "num_layers", "nonlinearity", "embedding", "second_bias")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        return self._a_weight().device

    def zero_state(self, batch_size: int) -> Tensor:
        return self._a_weight().new_zeros(self.num_layers, batch_size, self.hidden_size)

    def hidden(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last layer's states (B, T, H) and the final states (L, B, H), from token ids (B, T) and h_0 (L, B, H) or
        None.
        """
        return self._call_rnn(self._one_hot(tokens) if self.embed is None else self.embed(tokens), state)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and the final states (L, B, H), from token ids (B, T) int64 and h_0 (L, B, H), zero if
        None.
        """
        outputs, state = self.hidden(tokens, state)
        return self.head(self._drop(outputs)), state

    def loss(self, tokens: Tensor, targets: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss in nats over targets (B, T) int64, and the final states (L, B, H).

        Raises ValueError if targets are not shaped as tokens (B, T) are: paired by place, they would be others'.
        """
        if targets.shape != tokens.shape:
            raise ValueError(f"targets must be {tuple(tokens.shape)} as tokens are, got {tuple(targets.shape)}")
        if not self._is_own("forward") or self._is_watched():
            logits, state = self(tokens, state)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), state
        in_one_call = self._loss_in_one_call(tokens, targets, state)
        if in_one_call is not None:
            return in_one_call
        outputs, state = self.hidden(tokens, state)
        outputs = self._drop(outputs)
        if why_called(self, ("head",)) is not None or not self._head_is_usual():
            return F.cross_entropy(self.head(outputs).flatten(0, 1), targets.flatten()), state
        # Loss rows in the outputs' own memory order, whichever of (B, T) and (T, B) it is: no copy of (B*T, H).
        if not outputs.is_contiguous():
            outputs, targets = outputs.transpose(0, 1), targets.T
        return self._loss_of_rows(outputs.flatten(0, 1), targets.flatten()), state

    def _loss_in_one_call(self, tokens: Tensor, targets: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """`loss` by a kernel that computes it together with all gradients, or None where that does not apply."""
        return None

    def _loss_of_rows(self, rows: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the head on rows (N, H), whose targets are (N,)."""
        return F.cross_entropy(self.head(rows), targets)

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def why_not_at_once(self, optimizer: Any, looks: bool) -> str | None:
        return "PyTorch alone is trained as PyTorch does"

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode for a while; each module is then left in the mode that it was in."""
        modes = {module: module.training for module in self.modules()}
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def to_reference(self) -> ReferenceCharRNN:
        """The same model from scratch, in tensor operations only: a copy of the parameters under their textbook
        names. Raises ValueError if hooks, parametrizations or other modules make it another model than it was built as.
        """
        if self.dropout > 0:
            raise ValueError(f"the reference form has no dropout, and this model's is {self.dropout}")
        if (why := why_called(self)) is not None:
            raise ValueError(f"the reference form is made of a model as it was built, but {why}")

        def copy(p: Tensor) -> Tensor:
            return p.detach().clone().contiguous()

        cells = [
            Cell(
                copy(self._cell_parameter("weight_ih", layer).T),
                copy(self._cell_parameter("weight_hh", layer).T),
                copy(self._cell_parameter("bias_ih", layer)),
                copy(self._cell_parameter("bias_hh", layer)) if self.second_bias else None,
            )
            for layer in range(self.num_layers)
        ]
        W_embed = None if self.embed is None else copy(self.embed.weight)
        return ReferenceCharRNN(cells, copy(self.head.weight.T), copy(self.head.bias), W_embed, self.nonlinearity)

    @torch.no_grad()
    def load_reference(self: Self, net: RNNLM) -> Self:
        """Take over the parameters of a reference model of the same sizes, zeros for a second bias that it does not
        have; returns self. Raises ValueError if its own modules are not those that it was built with.
        """
        self.require_as_built("parameters are taken over by")
        for name, p in by_name(net).items():
            if self.embed is not None or name != "embed.weight":
                own = self.get_parameter(name)
                own.copy_(torch.zeros_like(own) if p is None else p)
        return self

    def require_state(self, state: Any) -> None:
        if isinstance(self.rnn, nn.RNNBase):  # another has states of its own
            super().require_state(state)

    def require_as_built(self, what: str) -> None:
        for name in PARTS:
            if (why := why_changed(self, name)) is not None:
                raise ValueError(f"{what} a model as it was built, but {name} {why}")

    def why_not_captured(self, asked: bool) -> str | None:
        if (why := why_called(self)) is not None:
            return f"a replay would not call its modules, and {why}"
        for name, p in self.named_parameters():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return f"a replay would not call the hook of {name}"
        return None

    def _drop(self, outputs: Tensor) -> Tensor:
        """Dropout between the last layer and the head."""
        return F.dropout(outputs, self.dropout, self.training) if self.dropout > 0 else outputs

    def _one_hot(self, tokens: Tensor) -> Tensor:
        """The rows (B, T, V) that ids (B, T) stand for."""
        if tokens.dtype not in TOKEN_TYPES:
            raise ValueError(f"tokens: expected int64 or int32 ids, got {tokens.dtype}")
        check_tokens(tokens, self.vocab_size)
        return one_hot_rows(tokens, self.vocab_size, self._a_weight().dtype)

    def _is_own(self, method: str) -> bool:
        """Whether a method is the one that this form was written with, nowhere replaced."""
        return getattr(type(self), method) is self._written[method] and method not in self.__dict__

    def _is_watched(self) -> bool:
        """Whether hooks make a call of the model more than its forward, as those of fully_shard do."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def _head_is_usual(self) -> bool:
        """Whether torch's operators take the head on rows (N, H) as they take it on (B, T, H)."""
        weight, bias = self.head.weight, self.head.bias
        return plain(weight, bias) and weight.dtype == bias.dtype

    def _a_weight(self) -> Tensor:
        """A floating-point tensor of the model, whose dtype and device are those of its inputs and states."""
        for module in (self.rnn, self):
            for p in (*module.parameters(), *module.buffers()):
                if p.is_floating_point():
                    return p
        raise ValueError("the model has no floating-point parameter")

    def _call_rnn(self, input: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """rnn on rows (B, T, I), called as a module."""
        if isinstance(self.rnn, nn.RNNBase) and not self.rnn.batch_first:
            outputs, state = self.rnn(input.transpose(0, 1), state)
            return outputs.transpose(0, 1), state
        return self.rnn(input, state)

    def _cell_parameter(self, kind: str, layer: int) -> nn.Parameter:
        return getattr(self.rnn, f"{kind}_l{layer}")
