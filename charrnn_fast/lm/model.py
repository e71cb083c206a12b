"""CharRNN, the character language model by this library's kernels."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.lm import at_once
from charrnn_fast.lm.as_built import why_called
from charrnn_fast.lm.batches import Batch
from charrnn_fast.lm.recurrent import METHODS, RecurrentLM
from charrnn_fast.ops import backends
from charrnn_fast.ops import generate as decoder
from charrnn_fast.ops import language_model_loss as one_call
from charrnn_fast.ops.clip_grad_norm import clip_and_sgd_step_, clip_grad_norm_, steps_in_one_launch
from charrnn_fast.ops.context import addressable, in_autocast
from charrnn_fast.ops.elman import elman
from charrnn_fast.ops.embedding import embedding
from charrnn_fast.ops.linear_cross_entropy import linear_cross_entropy
from charrnn_fast.ops.tokens import TOKEN_TYPES
from charrnn_fast.rnn import FusedRNN


class CharRNN(RecurrentLM, form="fused"):
    """A language model over V token ids: logits o_t = h_t W_hq + b_q from the states h_t of stacked Elman cells.

    Args:
        vocab_size: V.
        hidden_size: H.
        num_layers: L.
        nonlinearity: "tanh" or "relu".
        embedding: "onehot", or the width of a learned embedding.
        second_bias: whether the cells have PyTorch's second bias (bias_hh). Without it, bias_hh stays zero and is not
            trained, which makes the cell the textbook's with its one b_h.
        cell: "fused", the only one: the same model by PyTorch alone is charrnn_fast.lm.torch_model.TorchCharRNN.
        dropout: the probability with which, in training, each number that a layer hands on to the next one or to the
            head is set to zero, and the others divided by 1 - dropout (W. Zaremba, I. Sutskever and O. Vinyals,
            "Recurrent neural network regularization", 2014). The recurrence itself is left alone, and so is decoding.
        backend: FusedRNN's backend; see charrnn_fast.ops.backends.

        device, dtype: of the parameters, torch's defaults if None.

    Raises: ValueError for another embedding, cell, backend, nonlinearity or dropout than these.

    Attributes: rnn (FusedRNN), head (nn.Linear), embed (nn.Embedding or None). They may be hooked, pruned,
    parametrized, wrapped or replaced: the model is then what calling them gives, and a little slower. rnn takes
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
        if cell != "fused":
            raise ValueError(
                f"cell must be 'fused', got {cell!r}: the same model by PyTorch alone is "
                "charrnn_fast.lm.torch_model.TorchCharRNN, with these arguments but cell and backend"
            )
        super().__init__(
            vocab_size,
            hidden_size,
            num_layers,
            nonlinearity=nonlinearity,
            embedding=embedding,
            second_bias=second_bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
            make_rnn=partial(FusedRNN, backend=backend),
        )

    def hidden(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rnn, embed = self.rnn, self.embed
        if not isinstance(rnn, FusedRNN) or why_called(self, ("rnn",)) is not None:
            return super().hidden(tokens, state)
        if embed is None:
            return rnn.forward_tokens(tokens, state)
        if why_called(self, ("embed",)) is not None:
            return super().hidden(tokens, state)
        if self._reads_a_table(tokens, state):
            own: Any = rnn._parameters
            weights = [own[f"{name}_l0"] for name in ("weight_hh", "bias_ih", "bias_hh")]
            h0 = None if state is None else state[0]
            options: dict[str, Any] = {"nonlinearity": self.nonlinearity, "backend": rnn.backend}
            outputs, h_n = elman(tokens.t(), h0, self._weight_of_ids(), *weights, **options)
            return outputs.transpose(0, 1), h_n.unsqueeze(0)
        return self._call_rnn(embedding(embed, tokens), state)

    def _weight_of_ids(self) -> Tensor:
        """(H, V): what each token feeds into the first cell, bias apart. A learned embedding's W_ih E^T is a product of
        V columns, where reading the embedding row by row would be one of B*T and its gradient a sum over as many.
        """
        weight_ih: Tensor = self._cell_parameter("weight_ih", 0)
        return weight_ih if self.embed is None else weight_ih @ self.embed.weight.t()

    def _reads_a_table(self, tokens: Tensor, state: Tensor | None) -> bool:
        """Whether one layer on a learned embedding, both as they were built, is the recurrence on `_weight_of_ids`."""
        embed, rnn = self.embed, self.rnn
        if embed is None or self.num_layers > 1:
            return False
        # Asked first: to a compiler a question about sizes is part of what it compiles.
        if not addressable(tokens, state, embed.weight, *rnn._parameters.values()):
            return False
        if tokens.dim() != 2 or not 0 < self.vocab_size <= tokens.numel():
            return False
        if embed.padding_idx is not None or embed.scale_grad_by_freq or embed.sparse:
            return False
        if tokens.dtype not in TOKEN_TYPES or (state is not None and state.shape != (1, len(tokens), self.hidden_size)):
            return False
        weight, device = embed.weight, embed.weight.device
        if weight.dtype not in (torch.float32, torch.float64) or in_autocast(device.type):
            return False
        backend = getattr(rnn, "backend", "auto")
        sizes = {"hidden_size": self.hidden_size, "batch_size": len(tokens)}
        return backends.choose("elman", device, weight.dtype, **sizes, backend=backend) != "torch"

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return clip_grad_norm_(parameters, max_norm)

    def why_not_at_once(self, optimizer: Any, looks: bool) -> str | None:
        return at_once.why_not(self, optimizer, looks)

    def step_at_once(self, optimizer: Any, clip: float | None, look: at_once.Look | None) -> at_once.StepAtOnce:
        return at_once.at_once(self, optimizer, clip, look)

    def evaluated_at_once(self, batch: Batch, state: Any, into: Tensor | None) -> tuple[Tensor, Any] | None:
        return at_once.evaluated_at_once(self, batch, state, into)

    def sgd_step_(self, parameters: list[Tensor], max_norm: float | None, lr: float | Tensor) -> Tensor | None:
        return clip_and_sgd_step_(parameters, max_norm, lr) if steps_in_one_launch(parameters) else None

    def is_the_forms_own(self) -> bool:
        """Whether what a training step asks of the model is what this file says, nowhere replaced."""
        return not self._is_watched() and all(map(self._is_own, METHODS))

    def _loss_of_rows(self, rows: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(rows, self.head.weight, targets, linear_bias=self.head.bias)

    def _loss_in_one_call(self, tokens: Tensor, targets: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        rnn, head = self._modules["rnn"], self._modules["head"]
        if not isinstance(rnn, FusedRNN) or self.num_layers > 1:
            return None
        if self.dropout > 0 and self.training:
            return None
        if not self._is_own("hidden") or head is None or why_called(self) is not None:
            return None
        if state is not None and state.shape[0] != 1:
            return None
        own, of_head = rnn._parameters, head._parameters
        bias_hh = own["bias_hh_l0"]
        if self.embed is not None:  # whose table is not made in vain
            if not torch.is_grad_enabled() or not self._reads_a_table(tokens, state):
                return None
            sizes = {"hidden_size": self.hidden_size, "batch_size": len(tokens), "num_classes": self.vocab_size}
            weight = self.embed.weight
            name = backends.choose("language_model_loss", weight.device, weight.dtype, **sizes, backend=rnn.backend)
            if name == "torch":
                return None
        weight_ih = own["weight_ih_l0"] if self.embed is None else self._weight_of_ids()
        of_cell = (weight_ih, own["weight_hh_l0"], own["bias_ih_l0"])
        weights: Any = (*of_cell, of_head["weight"], of_head["bias"])
        ids, h0 = (tokens.T, targets.T), None if state is None else state[0]
        if one_call.why_not(*ids, h0, (*weights, bias_hh), rnn.backend) is not None:
            return None
        options: dict[str, Any] = {"bias_hh": bias_hh, "nonlinearity": self.nonlinearity, "backend": rnn.backend}
        loss, h_n = one_call.language_model_loss(*ids, h0, *weights, **options)
        return loss, h_n.unsqueeze(0)

    def _continued(
        self, prompt: Tensor, num_tokens: int, state: Tensor | None, sampling: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        as_built = self._is_own("forward") and self._is_own("hidden") and why_called(self) is None
        if not isinstance(self.rnn, FusedRNN) or not as_built or self._is_watched():
            return super()._continued(prompt, num_tokens, state, sampling)
        layers = []
        for layer in range(self.num_layers):
            weight_ih: Tensor = self._cell_parameter("weight_ih", layer) if layer else self._weight_of_ids()
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
