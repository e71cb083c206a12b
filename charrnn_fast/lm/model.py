"""The character language model: token ids -> Elman layers -> linear head, and its decoder."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charrnn_fast.errors import InputError
from charrnn_fast.lm.as_built import PARTS, why_called, why_changed
from charrnn_fast.lm.data import Vocabulary
from charrnn_fast.ops import generate as decoder
from charrnn_fast.ops import language_model_loss as one_call
from charrnn_fast.ops.clip_grad_norm import clip_grad_norm_
from charrnn_fast.ops.context import plain
from charrnn_fast.ops.elman_torch import TorchRNN
from charrnn_fast.ops.embedding import embedding
from charrnn_fast.ops.linear_cross_entropy import linear_cross_entropy
from charrnn_fast.ops.tokens import TOKEN_TYPES, check_tokens, one_hot_rows
from charrnn_fast.reference import generate as reference_generate
from charrnn_fast.reference.language_model import RNNLM, Cell
from charrnn_fast.rnn import FusedRNN


class CharRNN(nn.Module):
    """A language model over V token ids: logits o_t = h_t W_hq + b_q from the states h_t of stacked Elman cells.

    Args:
        vocab_size: V.
        hidden_size: H.
        num_layers: L.
        nonlinearity: "tanh" or "relu".
        embedding: "onehot", or the width of a learned embedding.
        second_bias: whether the cells have PyTorch's second bias (bias_hh). Without it, bias_hh stays zero and is not
            trained, which makes the cell the textbook's with its one b_h.
        cell: "fused" for FusedRNN, or "torch" for PyTorch alone to compare with: torch.nn.RNN on one-hot inputs, and
            PyTorch's own loss and clip.
        dropout: the probability with which, in training, each number that a layer hands on to the next one or to the
            head is set to zero, and the others divided by 1 - dropout (W. Zaremba, I. Sutskever and O. Vinyals,
            "Recurrent neural network regularization", 2014). The recurrence itself is left alone, and so is decoding.
        backend: FusedRNN's backend; see charrnn_fast.ops.backends.

        device, dtype: of the parameters, torch's defaults if None.

    Raises: ValueError for another embedding, cell, backend, nonlinearity or dropout than these.

    Attributes: rnn (FusedRNN or torch.nn.RNN), head (nn.Linear), embed (nn.Embedding or None). They may be hooked,
    pruned, parametrized, wrapped or replaced: the model is then what calling them gives, and a little slower. rnn takes
    (B, T, I), or time first where it is an nn.RNNBase that says so, and a state, and returns outputs and a state.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        embedding: str | int = "onehot",
        second_bias: bool = True,
        cell: str = "fused",
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability of at least 0 and below 1, got {dropout}")
        if not (embedding == "onehot" or (isinstance(embedding, int) and embedding > 0)):
            raise ValueError(f"embedding must be 'onehot' or a width of at least 1, got {embedding!r}")
        if cell not in ("fused", "torch"):
            raise ValueError(f"cell must be 'fused' or 'torch', got {cell!r}")
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.nonlinearity, self.embedding, self.second_bias, self.cell = nonlinearity, embedding, second_bias, cell
        self.dropout = float(dropout)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = embedding if isinstance(embedding, int) else vocab_size
        self.embed = nn.Embedding(vocab_size, width, **factory) if isinstance(embedding, int) else None
        shape: dict[str, Any] = {"input_size": width, "hidden_size": hidden_size, "num_layers": num_layers}
        shape.update(nonlinearity=nonlinearity, batch_first=True, dropout=self.dropout if num_layers > 1 else 0.0)
        self.rnn: nn.RNNBase
        if cell == "fused":
            self.rnn = FusedRNN(**shape, backend=backend, **factory)
        else:
            self.rnn = TorchRNN(**shape, **factory)
        self.head = nn.Linear(hidden_size, vocab_size, **factory)
        if not second_bias:
            for layer in range(num_layers):
                nn.init.zeros_(self._cell_parameter("bias_hh", layer)).requires_grad_(False)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that determine the parameters, as plain values; what a checkpoint keeps."""
        names = ("vocab_size", "hidden_size", "num_layers", "nonlinearity", "embedding", "second_bias")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self._a_weight().device

    def zero_state(self, batch_size: int) -> Tensor:
        """The state (L, B, H) that a text starts from."""
        return self._a_weight().new_zeros(self.num_layers, batch_size, self.hidden_size)

    def hidden(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last layer's states (B, T, H) and the final states (L, B, H), from token ids (B, T) and h_0 (L, B, H) or
        None.
        """
        if self.embed is not None:
            as_built = why_called(self, ("embed",)) is None
            return self._call_rnn(embedding(self.embed, tokens) if as_built else self.embed(tokens), state)
        rnn = self.rnn
        if isinstance(rnn, FusedRNN) and why_called(self, ("rnn",)) is None:
            return rnn.forward_tokens(tokens, state)
        if tokens.dtype not in TOKEN_TYPES:
            raise ValueError(f"tokens: expected int64 or int32 ids, got {tokens.dtype}")
        check_tokens(tokens, self.vocab_size)
        return self._call_rnn(one_hot_rows(tokens, self.vocab_size, self._a_weight().dtype), state)

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
        rows, targets = outputs.flatten(0, 1), targets.flatten()
        if self.cell == "torch":
            return F.cross_entropy(self.head(rows), targets), state
        return linear_cross_entropy(rows, self.head.weight, targets, linear_bias=self.head.bias), state

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the parameters' gradients in place so that their norm together is at most max_norm, by this library's
        clip; with cell="torch" by PyTorch's. Returns the norm before, a scalar tensor.
        """
        clip = nn.utils.clip_grad_norm_ if self.cell == "torch" else clip_grad_norm_
        return clip(parameters, max_norm)

    def _loss_in_one_call(self, tokens: Tensor, targets: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """`loss` by the kernel that computes it together with all gradients, or None where that does not apply."""
        rnn, head = self._modules["rnn"], self._modules["head"]
        if not isinstance(rnn, FusedRNN) or self.embed is not None or self.num_layers > 1:
            return None
        if self.dropout > 0 and self.training:
            return None
        if not self._is_own("hidden") or head is None or why_called(self) is not None:
            return None
        if state is not None and state.shape[0] != 1:
            return None
        own, of_head = rnn._parameters, head._parameters
        bias_hh = own["bias_hh_l0"]
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
        weights: Any = (*[own[name] for name in names], of_head["weight"], of_head["bias"])
        ids, h0 = (tokens.T, targets.T), None if state is None else state[0]
        if one_call.why_not(*ids, h0, (*weights, bias_hh), rnn.backend) is not None:
            return None
        loss, h_n = one_call.language_model_loss(*ids, h0, *weights, bias_hh=bias_hh, nonlinearity=self.nonlinearity)
        return loss, h_n.unsqueeze(0)

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
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Continue prompts (B, P) int64 by num_tokens ids: ids (B, num_tokens), and the state (L, B, H) before the
        last.

        Greedy if uniforms is None, else sampled by these numbers (B, num_tokens) in [0, 1); see
        charrnn_fast.ops.generate.
        """
        sampling: dict[str, Any] = {"uniforms": uniforms, "temperature": temperature, "alpha": alpha, "top_k": top_k}
        as_built = self._is_own("forward") and self._is_own("hidden") and why_called(self) is None
        if not isinstance(self.rnn, FusedRNN) or not as_built or self._is_watched():
            with evaluating(self):
                return reference_generate.generate(self, prompt, num_tokens, state=state, **sampling)
        layers = []
        for layer in range(self.num_layers):
            weight_ih: Tensor = self._cell_parameter("weight_ih", layer)
            if layer == 0 and self.embed is not None:
                weight_ih = weight_ih @ self.embed.weight.T  # (H, V): what each token feeds into the cell
            bias = self._cell_parameter("bias_ih", layer) + self._cell_parameter("bias_hh", layer)
            layers.append((weight_ih, self._cell_parameter("weight_hh", layer), bias))
        return decoder.generate(
            prompt,
            num_tokens,
            layers,
            self.head.weight,
            self.head.bias,
            state,
            nonlinearity=self.nonlinearity,
            backend=self.rnn.backend,
            **sampling,
        )

    def to_reference(self) -> RNNLM:
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
        return RNNLM(cells, copy(self.head.weight.T), copy(self.head.bias), W_embed, self.nonlinearity)

    @torch.no_grad()
    def load_reference(self, net: RNNLM) -> "CharRNN":
        """Take over the parameters of a reference model of the same sizes; returns self. Raises ValueError if its own
        modules are not those that it was built with.
        """
        self.require_as_built("parameters are taken over by")
        for layer, cell in enumerate(net.cells):
            self._cell_parameter("weight_ih", layer).copy_(cell.W_xh.T)
            self._cell_parameter("weight_hh", layer).copy_(cell.W_hh.T)
            self._cell_parameter("bias_ih", layer).copy_(cell.b_h)
            if cell.b_hh is not None:
                self._cell_parameter("bias_hh", layer).copy_(cell.b_hh)
        self.head.weight.copy_(net.W_hq.T)
        self.head.bias.copy_(net.b_q)
        if self.embed is not None and net.W_embed is not None:
            self.embed.weight.copy_(net.W_embed)
        return self

    def require_state(self, state: Any) -> None:
        """ValueError if this cannot be a state (L, B, H) of the model, whose rnn may be one with other states."""
        got, L, H = tuple(getattr(state, "shape", ())), self.num_layers, self.hidden_size
        if isinstance(self.rnn, nn.RNNBase) and (len(got) != 3 or (got[0], got[2]) != (L, H)):
            raise ValueError(f"a state ({L}, B, {H}) was expected, got {got}")

    def require_as_built(self, what: str) -> None:
        """ValueError if the modules are not those that `config` describes: "<what> a model as it was built"."""
        for name in PARTS:
            if (why := why_changed(self, name)) is not None:
                raise ValueError(f"{what} a model as it was built, but {name} {why}")

    def _drop(self, outputs: Tensor) -> Tensor:
        """Dropout between the last layer and the head."""
        return F.dropout(outputs, self.dropout, self.training) if self.dropout > 0 else outputs

    def _is_own(self, method: str) -> bool:
        """Whether a method is the one of this class, not a subclass's or an instance's."""
        return getattr(type(self), method) is getattr(CharRNN, method) and method not in self.__dict__

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


@contextmanager
def evaluating(model: CharRNN | RNNLM) -> Iterator[None]:
    """The model in evaluation mode for a while; each module is then left in the mode that it was in."""
    modes = {} if isinstance(model, RNNLM) else {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def generate(
    model: CharRNN | RNNLM,
    vocab: Vocabulary,
    prompt: str,
    num_chars: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    alpha: float = 1.0,
    seed: int | None = None,
) -> str:
    """Continue a prompt by num_chars characters; returns the prompt and its continuation.

    temperature=None decodes greedily. Otherwise characters are drawn from q ~ p^alpha with p = softmax(o /
    temperature), among the top_k most probable if given; lower temperatures and larger alphas are more deterministic.
    The uniform numbers come from a torch.Generator with `seed` (fresh entropy if None), so a seed gives one text on
    every backend.

    Raises InputError for an empty prompt, characters outside the vocabulary, and options out of range.
    """
    ids, sampling = _sampling(model, vocab, prompt, num_chars, temperature, top_k, alpha, seed)
    new, _ = _continue(model, ids, num_chars, None, sampling)
    return vocab.prepare(prompt) + vocab.decode(new[0])


def stream(
    model: CharRNN | RNNLM,
    vocab: Vocabulary,
    prompt: str,
    num_chars: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    alpha: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """`generate`, character by character as they come: first the prompt, then num_chars characters. Together they are
    what `generate` returns. Arguments and errors as there.
    """
    ids, sampling = _sampling(model, vocab, prompt, num_chars, temperature, top_k, alpha, seed)
    uniforms, state = sampling.pop("uniforms"), None
    yield vocab.prepare(prompt)
    for i in range(num_chars):
        drawn = None if uniforms is None else uniforms[:, i : i + 1]
        ids, state = _continue(model, ids, 1, state, {"uniforms": drawn, **sampling})
        yield vocab.decode(ids[0])


def _sampling(
    model: CharRNN | RNNLM,
    vocab: Vocabulary,
    prompt: str,
    num_chars: int,
    temperature: float | None,
    top_k: int | None,
    alpha: float,
    seed: int | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The prompt's ids (1, P) on the model's device, and generate_ids' options. Raises InputError as `generate`."""
    if not vocab.prepare(prompt):
        raise InputError("the prompt is empty: expected at least one character")
    if num_chars < 0:
        raise InputError(f"the number of characters must be at least 0, got {num_chars}")
    if temperature is not None and not temperature > 0:
        raise InputError(f"the temperature must be above 0, got {temperature}; leave it out to decode greedily")
    if not alpha > 0:
        raise InputError(f"alpha must be above 0, got {alpha}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if temperature is None and (top_k is not None or alpha != 1.0 or seed is not None):
        raise InputError("top_k, alpha and seed apply to sampling: pass a temperature with them")
    device = model.device if isinstance(model, CharRNN) else model.W_hq.device
    ids = vocab.encode(prompt).to(device).unsqueeze(0)  # (1, P)
    uniforms = None
    if temperature is not None:
        generator = torch.Generator(device="cpu")
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        uniforms = torch.rand(1, num_chars, generator=generator, dtype=torch.float64, device="cpu").to(device)
    sampling: dict[str, Any] = {"uniforms": uniforms, "temperature": temperature or 1.0, "alpha": alpha}
    sampling["top_k"] = None if top_k is None else min(top_k, len(vocab))
    return ids, sampling


def _continue(
    model: CharRNN | RNNLM, ids: Tensor, num_tokens: int, state: Any, sampling: dict[str, Any]
) -> tuple[Tensor, Any]:
    if isinstance(model, CharRNN):
        return model.generate_ids(ids, num_tokens, state=state, **sampling)
    return reference_generate.generate(model, ids, num_tokens, state=state, **sampling)
