"""FusedRNN, a drop-in for torch.nn.RNN, and replace_rnn, which swaps it into a whole model.

h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), f = tanh or relu, layer upon layer: torch.nn.RNN's formula,
parameters, shapes and errors. A layer with all its directions is one launch of a kernel that holds W_hh; what the
kernels cannot take (sizes, devices, malformed arguments) goes to torch's own path, whose errors are then torch's.
"""

from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from .ops import backends
from .ops.compiling import allow_in_graphs
from .ops.context import autocast, exported_to_onnx, plain, tensor_operations_only, traced, transforms_active
from .ops.elman import elman_layer, wrong_batch_sizes
from .ops.elman_layer import check_tokens
from .ops.elman_torch import TOKEN_TYPES, TorchRNN, one_hot_rows, torch_rnn


class FusedRNN(TorchRNN):
    """Elman RNN with torch.nn.RNN's constructor, parameters, state_dict, shapes and errors; an instance of it.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype:
            as in torch.nn.RNN.
        backend: "auto" (the environment's ``CHARRNN_BACKEND`` or else the first that runs), or a name from
            ``charrnn_fast.ops.backends``: one that cannot run is a RuntimeError at the call.

    Inputs and outputs of ``forward`` are those of torch.nn.RNN; ``forward_tokens`` takes token ids for one-hot rows.
    The output lies in memory as torch.nn.RNN's does, (T, B, D*H) whatever the input's strides, and may be changed in
    place; where backward still reads it, that is an error then, as it is with cuDNN. Dropout draws torch.nn.RNN's
    random numbers on a CPU.

    torch.jit.trace and torch.jit.script write down torch.nn.RNN's operators, both ONNX exporters ONNX's RNN, torch.fx
    one node, torch.compile and torch.export this library's operators (see ops/compiling.py).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        self.backend = backends.check_name(backend)
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **kwargs,  # which torch.nn.RNN refuses
        )

    @overload
    @torch._jit_internal._overload_method  # for torch.jit.script, as torch.nn.RNN does it
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pass

    @overload
    @torch._jit_internal._overload_method
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]:
        pass

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        """torch.nn.RNN's forward.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) unbatched, or a PackedSequence.
            hx: (L*D, B, H), unbatched (L*D, H), or None for zeros.

        Returns:
            output like input with D*H columns, and h_n like hx.
        """
        if torch.jit.is_scripting():
            # All that the script's compiler reads, so that a scripted module is torch.nn.RNN's operators.
            if isinstance(input, PackedSequence):
                data, batch_sizes, sorted_indices, unsorted_indices = input
                if hx is not None:
                    hx = self.permute_hidden(hx, sorted_indices)
                output, hidden = self._scripted(data, hx, batch_sizes)
                packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
                return packed, self.permute_hidden(hidden, unsorted_indices)
            else:
                batched, hx = self._batched(input, hx, False)
                output, hidden = self._scripted(batched, hx, None)
                if input.dim() == 2:
                    return output.squeeze(0 if self.batch_first else 1), hidden.squeeze(1)
                else:
                    return output, hidden
        else:
            return self._eager(input, hx)

    def _eager(self, input: Any, hx: Tensor | None) -> Any:
        if traced() or self._is_brief(input) or (isinstance(input, PackedSequence) and _is_torchs_packing(input)):
            return super().forward(input, hx)
        return self._run(input, hx, tokens=False)

    def _scripted(self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """torch.nn.RNN's operator on batched or packed input; read by torch.jit.script."""
        if hx is None:
            batch = int(batch_sizes[0]) if batch_sizes is not None else input.size(0 if self.batch_first else 1)
            layers = self.num_layers * (2 if self.bidirectional else 1)
            hx = torch.zeros(layers, batch, self.hidden_size, dtype=input.dtype, device=input.device)
        self.check_forward_args(input, hx, batch_sizes)
        # The type checker's ignore: torch has None among the weights where one was taken away, which no script has.
        return torch_rnn(
            input,
            hx,
            self._flat_weights,  # type: ignore[arg-type]
            batch_sizes,
            "tanh" if self.mode == "RNN_TANH" else "relu",
            self.bias,
            self.num_layers,
            float(self.dropout),
            self.training,
            self.bidirectional,
            self.batch_first,
        )

    def forward_tokens(self, tokens: Any, hx: Tensor | None = None) -> Any:
        """``forward(one_hot(tokens, input_size), hx)`` without the one-hot rows: layer 0 reads rows of a table.

        Args:
            tokens: int64 or int32 ids in 0..I-1: (T, B), (B, T) if ``batch_first``, (T,) unbatched, or a
                PackedSequence of them.
            hx: as in :meth:`forward`.

        Returns:
            output and h_n as :meth:`forward` gives them, in the parameters' dtype.

        Raises:
            IndexError: an id out of range, on a CPU; a GPU reports it as ``torch.nn.functional.embedding`` does.
            ValueError: not int64 or int32, another number of dimensions, or batch sizes that do not fit the packed ids.

        Hooks of the module run for ``forward``.
        """
        if isinstance(tokens, PackedSequence) and (wrong := _wrong_packing(tokens)) is not None:
            raise ValueError(wrong)
        if isinstance(tokens, fx.Proxy):  # a graph can name the module, not a method of it
            ids: Any = tokens
            weight: Any = self._flat_weights[0]
            return self(F.one_hot(ids.long(), self.input_size).to(weight.dtype), hx)
        if traced() or (isinstance(tokens, PackedSequence) and exported_to_onnx()):
            return super().forward(self._one_hot_input(tokens), hx)
        return self._run(tokens, hx, tokens=True)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """What nn.Module.__call__ runs. To torch.fx's tracers a call is one node, as torch.nn's own modules are."""
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if type(argument) is not Tensor and isinstance(argument, fx.Proxy):
                tracer: Any = argument.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super()._call_impl(*args, **kwargs)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend}")

    def _is_brief(self, input: Any) -> bool:
        """A few steps on a CPU, to be run by "auto": torch's own path costs less than entering the kernels' does."""
        if torch.compiler.is_compiling():  # first: whatever is asked of a size fixes it in the graph
            return False
        if type(input) is not Tensor or input.dim() not in (2, 3) or input.device.type != "cpu":
            return False
        steps = input.size(1 if self.batch_first and input.dim() == 3 else 0)
        return (
            steps < backends.LEAST_CPU_STEPS
            and backends.requested(self.backend) == "auto"
            and not tensor_operations_only()
        )

    def _run(self, input: Any, hx: Tensor | None, tokens: bool) -> Any:
        """The door: every form of input made (T, B, ...) or packed, checked as torch.nn.RNN does, and back again."""
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            elif sorted_indices is not None and torch.compiler.is_compiling():
                # The number of sequences is data in batch_sizes, and a shape here: without it the graph would break.
                layers, weight = self.num_layers * (2 if self.bidirectional else 1), self._flat_weights[0]
                hx = cast(Tensor, weight).new_zeros(layers, sorted_indices.size(0), self.hidden_size)
            self._check(data, hx, batch_sizes, tokens)
            output, hidden = self._stack(data, hx, batch_sizes, tokens)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(hidden, unsorted_indices)

        batched, hx = self._batched(input, hx, tokens)
        self._check(batched, hx, None, tokens)
        output, hidden = self._stack(batched.transpose(0, 1) if self.batch_first else batched, hx, None, tokens)
        if batched is input:
            return output, hidden
        return output.squeeze(0 if self.batch_first else 1), hidden.squeeze(1)

    def _batched(self, input: Tensor, hx: Tensor | None, tokens: bool) -> tuple[Tensor, Tensor | None]:
        """Dense input and hx with a dimension for the sequences, or torch.nn.RNN's refusal."""
        dims = input.dim() + int(tokens)
        if dims not in (2, 3):
            expected = "1D or 2D" if tokens else "2D or 3D"
            raise ValueError(f"RNN: Expected input to be {expected}, got {input.dim()}D tensor instead")
        if dims == 3:
            if hx is not None and hx.dim() != 3:
                raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
            return input, hx
        if hx is not None:
            if hx.dim() != 2:
                raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
            hx = hx.unsqueeze(1)
        return input.unsqueeze(0 if self.batch_first else 1), hx

    def _check(self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, tokens: bool) -> None:
        if not tokens:
            self.check_input(input, batch_sizes)
        elif input.dtype not in TOKEN_TYPES:
            raise ValueError(f"forward_tokens expects int64 or int32 token ids, got {input.dtype}")
        elif batch_sizes is not None and input.dim() != 1:
            raise RuntimeError(f"packed token ids must have 1 dimension, got {input.dim()}")
        if hx is None:
            return
        if batch_sizes is not None and torch.compiler.is_compiling():
            # How many sequences there are is data to the compiler: the operator checks it when the graph runs.
            expected = (self.num_layers * (2 if self.bidirectional else 1), hx.size(1), self.hidden_size)
        else:
            expected = self.get_expected_hidden_size(input, batch_sizes)
        self.check_hidden_size(hx, expected)

    def _stack(
        self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, tokens: bool
    ) -> tuple[Tensor, Tensor]:
        """input (T, B, I), ids (T, B) or packed; hx (L*D, B, H) or None -> output (T, B, D*H), (B, T, D*H) if
        ``batch_first``, or packed, and h_n.
        """
        weights: list[Any] = self._flat_weights  # None where a user has taken a parameter away
        if tokens and exported_to_onnx():
            input, tokens = self._one_hot(input, weights[0].dtype), False
        operands = autocast(input.device.type, [input, hx, *weights])
        backend = self._layerwise_backend(operands, tokens)
        if backend is not None:
            return self._layers(backend, operands[0], operands[1], operands[2:], batch_sizes)
        if hx is None:
            dtype = weights[0].dtype if tokens else input.dtype
            layers = self.num_layers * (2 if self.bidirectional else 1)
            batch = input.size(1) if batch_sizes is None else int(batch_sizes[0])
            hx = torch.zeros(layers, batch, self.hidden_size, dtype=dtype, device=input.device)
        if tokens and input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if tokens and input.device.type == "cpu":
            if _alike(operands, tokens) and plain(*operands):
                return self._torch_layers_of_tokens(input, hx, weights, batch_sizes)
            check_tokens(input, self.input_size)
        if tokens:  # cuDNN walks one-hot rows faster than a loop of launches walks a table
            input = self._one_hot(input, weights[0].dtype)
        return self._torch_layers(input, hx, weights, batch_sizes)

    def _layerwise_backend(self, operands: list[Any], tokens: bool) -> str | None:
        """The backend that takes layer after layer; None for torch's own RNN, which also refuses malformed calls."""
        if operands[0].size(0) == 0 or not _alike(operands, tokens):
            return None
        if exported_to_onnx():
            return "onnx" if operands[0].dim() == 3 else None
        if tensor_operations_only():
            return "torch" if transforms_active() else None  # torch's own RNN has no rule for vmap
        weight = operands[-1]
        name = backends.choose(self.backend, weight.device, weight.dtype, self.hidden_size)
        return name if name != "torch" and plain(*operands) else None

    def _layers(
        self, backend: str, input: Tensor, hx: Tensor | None, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Layer upon layer, each with all its directions at once."""
        output, state = self._layer(backend, input, hx, weights, batch_sizes, 0)
        states = [state]
        for layer in range(1, self.num_layers):  # dropout draws for (T, B, C), as torch.nn.RNN's does
            output, state = self._layer(backend, self._dropout(output), hx, weights, batch_sizes, layer)
            states.append(state)
        return output, state if self.num_layers == 1 else torch.cat(states)

    def _layer(
        self,
        backend: str,
        input: Tensor,
        hx: Tensor | None,
        weights: list[Tensor],
        batch_sizes: Tensor | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        directions = 2 if self.bidirectional else 1
        own: list[Tensor] = []
        for row in range(layer * directions, (layer + 1) * directions):
            if self.bias:
                weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * row : 4 * (row + 1)]
                own += [weight_ih, weight_hh, bias_ih + bias_hh]
            else:
                own += weights[2 * row : 2 * (row + 1)]
        h0 = None if hx is None else hx[layer * directions : (layer + 1) * directions]
        nonlinearity = "tanh" if self.mode == "RNN_TANH" else "relu"
        batch_first = self.batch_first and batch_sizes is None and layer == self.num_layers - 1
        return elman_layer(backend, input, h0, own, batch_sizes, nonlinearity, (False, True)[:directions], batch_first)

    def _dropout(self, output: Tensor) -> Tensor:
        return F.dropout(output, self.dropout, self.training) if self.dropout > 0 else output

    def _torch_layers(
        self, input: Tensor, hx: Tensor, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The layers whose weights these are, by torch's own path; input and output as in :meth:`_stack`."""
        batch_first = self.batch_first and batch_sizes is None
        return torch_rnn(
            input.transpose(0, 1) if batch_first else input,
            hx,
            weights,
            batch_sizes,
            "tanh" if self.mode == "RNN_TANH" else "relu",
            self.bias,
            hx.size(0) // (2 if self.bidirectional else 1),
            self.dropout,
            self.training,
            self.bidirectional,
            batch_first,
        )

    def _one_hot(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (T, B, I) or (N, I) of ids (T, B) or (N,); on a CPU in the order of memory that a user's rows have, by
        which torch chooses the operators that run.
        """
        batch_major = self.batch_first and tokens.dim() == 2 and tokens.device.type == "cpu"
        if batch_major:
            return one_hot_rows(tokens.t(), self.input_size, dtype).transpose(0, 1)
        return one_hot_rows(tokens, self.input_size, dtype)

    def _one_hot_input(self, tokens: Any) -> Any:
        """Ids in any form that :meth:`forward_tokens` takes, as one-hot rows in that form."""
        if isinstance(tokens, PackedSequence):
            return tokens._replace(data=self._one_hot_input(tokens.data))
        if tokens.dtype not in TOKEN_TYPES:
            raise ValueError(f"forward_tokens expects int64 or int32 token ids, got {tokens.dtype}")
        weight: Any = self._flat_weights[0]
        return one_hot_rows(tokens, self.input_size, weight.dtype)

    def _torch_layers_of_tokens(
        self, tokens: Tensor, hx: Tensor, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Layer 0 by tensor operations, which can read a table; the others by torch's own path."""
        output, state = self._layer("torch", tokens, hx, weights, batch_sizes, 0)
        if self.num_layers == 1:
            return output, state
        directions = 2 if self.bidirectional else 1
        others = weights[(4 if self.bias else 2) * directions :]
        output, states = self._torch_layers(self._dropout(output), hx[directions:], others, batch_sizes)
        return output, torch.cat([state, states])


def _alike(operands: list[Any], tokens: bool) -> bool:
    """Are input, hx (or None) and all weights there, of one type (ids aside) on one device? If not, torch runs them or
    refuses them in its own words.
    """
    input, hx, *weights = operands
    if any(weight is None for weight in weights):
        return False
    device, dtype = input.device, weights[-1].dtype
    numbers = weights if hx is None else [hx, *weights]
    return (tokens or input.dtype == dtype) and all(x.dtype == dtype and x.device == device for x in numbers)


def _is_torchs_packing(packed: PackedSequence) -> bool:
    """Is it torch's matter: batch sizes that cannot be, or an export to ONNX, whose RNN takes no packed rows?"""
    return exported_to_onnx() or _wrong_packing(packed) is not None


def _wrong_packing(packed: PackedSequence) -> str | None:
    """What is wrong with its batch sizes, where they can be looked at; torch runs such input or refuses it."""
    data, batch_sizes = packed.data, packed.batch_sizes
    if torch.compiler.is_compiling() or data.dim() == 0 or not plain(batch_sizes):
        return None
    return wrong_batch_sizes(batch_sizes, data.size(0))


def replace_rnn(module: nn.Module) -> nn.Module:
    """Swap every torch.nn.RNN inside ``module`` (or ``module`` itself) for a FusedRNN that shares its parameters.

    The new modules hold the same Parameter objects, training flag, hooks and parametrizations; a torch.nn.RNN that
    appears twice becomes one FusedRNN that appears twice. Subclasses of torch.nn.RNN are left as they are: their
    forward may be their own. Returns ``module``, or the FusedRNN in its place if it is a torch.nn.RNN.
    """
    replaced: dict[nn.Module, nn.Module] = {}

    def fused(child: nn.Module) -> nn.Module:
        if child not in replaced:
            replaced[child] = _fused_from(child)
        return replaced[child]

    if _is_torch_rnn(module):
        return fused(module)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and _is_torch_rnn(child):
                parent._modules[name] = fused(child)
    return module


def _is_torch_rnn(module: nn.Module) -> bool:
    kind = type(module)
    # torch.nn.utils.parametrize gives the module a class of its own, one step below torch.nn.RNN.
    return kind is TorchRNN or (nn.utils.parametrize.is_parametrized(module) and kind.__bases__ == (TorchRNN,))


def _fused_from(rnn: nn.Module) -> FusedRNN:
    kind = type(rnn)
    fused_kind: Any = FusedRNN
    if kind is not TorchRNN:  # the properties that compute the parametrized weights live on the class
        members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        fused_kind = type("ParametrizedFusedRNN", (FusedRNN,), members)
    fused: FusedRNN = fused_kind.__new__(fused_kind)
    state = dict(rnn.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs"):
        state[name] = state[name].copy()
    state.pop("_compiled_call_impl", None)
    fused.__dict__.update(state, backend="auto")
    return fused


allow_in_graphs(FusedRNN)
# A whole model that was saved with FusedRNN in it loads where one with torch.nn.RNN does: its state is that one's.
torch.serialization.add_safe_globals([FusedRNN])
