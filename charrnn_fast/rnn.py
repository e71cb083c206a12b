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
from .ops.context import OPERATORS, exported_to_onnx, plain, traced, watched
from .ops.elman import wrong_batch_sizes
from .ops.elman_checkpointed import check_steps, checkpointed_stack
from .ops.elman_stack import by_torchs_operator, elman_stack
from .ops.elman_torch import TorchRNN, torch_rnn
from .ops.lengths import stack_with_lengths
from .ops.resets import episodes
from .ops.tokens import TOKEN_TYPES, one_hot_rows


class FusedRNN(TorchRNN):
    """Elman RNN with torch.nn.RNN's constructor, parameters, state_dict, shapes and errors; an instance of it.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype:
            as in torch.nn.RNN.
        checkpoint_steps: for long sequences, k: for backward the states of every k-th step are kept and those between
            are computed once more there, k steps at a time. None keeps all. See below.
        backend: "auto" (the environment's ``CHARRNN_BACKEND`` or else the first that runs), or a name from
            ``charrnn_fast.ops.backends``: one that cannot run is a RuntimeError at the call.

    Inputs and outputs of ``forward`` are those of torch.nn.RNN; ``forward_tokens`` takes token ids for one-hot rows.
    The output lies in memory as torch.nn.RNN's does, (T, B, D*H) whatever the input's strides, and may be changed in
    place; where backward still reads it, that is an error then, as it is with cuDNN. Dropout draws torch.nn.RNN's
    random numbers on a CPU.

    With ``checkpoint_steps`` a training step holds from forward to backward the input, which is the caller's (under
    autocast the copy in its type), T/k states of each layer and direction, and with dropout a bit for each number that
    it may drop. The output is the caller's: who goes on with h_n, or with few steps, and lets it go holds O(T/k). While
    they run, forward has all steps of a layer in memory, and of the one below it; backward k steps of all layers, or
    with two directions all steps of a layer and k of one. It costs one forward more, and for L layers with two
    directions L(L-1)/2 layers' more. Outputs are the same numbers, gradients the same but for rounding. It is not in
    the state_dict and may be set at any time. It does nothing where no gradient is recorded, inside torch.func's
    transforms and in exported programs; the graph of second derivatives (create_graph) keeps all states.

    torch.jit.trace and torch.jit.script write down torch.nn.RNN's operators, both ONNX exporters ONNX's RNN, torch.fx
    one node, torch.compile and torch.export this library's operators (see ops/compiling.py).
    """

    checkpoint_steps: int | None = None  # of modules that were saved before there was such an argument

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
        checkpoint_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.backend = backends.check_name(backend)
        self.checkpoint_steps = check_steps(checkpoint_steps)
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
            return self._run(input, hx, False)

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
        return self._run(tokens, hx, True)

    def forward_with_resets(self, input: Tensor, resets: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`forward` with a state that is zero before each step where ``resets`` says so, as recurrent policies of
        reinforcement learning need it where an episode begins.

        Args:
            input: (T, B, I), or (B, T, I) if ``batch_first``.
            resets: bool, (T, B) or (B, T): is the state, ``hx`` too, zero before this step? In a bidirectional layer
                nothing goes past a reset in either direction. The mask is read on the CPU, which waits for a GPU.
            hx: as in :meth:`forward`.

        Returns:
            output and h_n as :meth:`forward` gives them.

        Raises:
            ValueError: ``resets`` is no bool tensor of the input's steps and sequences on its device, or the input is
            unbatched or packed; what :meth:`forward` raises.

        Hooks of the module run for ``forward``.
        """
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise ValueError("forward_with_resets expects a batched 3-D tensor as input")
        if resets.dtype != torch.bool or resets.shape != input.shape[:2] or resets.device != input.device:
            raise ValueError(
                f"resets: expected bool {tuple(input.shape[:2])} on {input.device}, "
                f"got {resets.dtype} {tuple(resets.shape)} on {resets.device}"
            )
        self._check(input, hx, None, False)
        steps_first = input.transpose(0, 1) if self.batch_first else input
        steps, batch = steps_first.shape[:2]
        if steps == 0 or batch == 0:
            return self._run(input, hx, False)
        found = episodes(resets.t() if self.batch_first else resets)
        rows = steps_first.reshape(steps * batch, -1).index_select(0, found.rows)
        start = None
        if hx is not None:
            start = hx.new_zeros(hx.shape[0], int(found.batch_sizes[0]), hx.shape[2])
            start = start.index_copy(1, found.carried, hx.index_select(1, found.carried_from))
        packed, hidden = self._run(PackedSequence(rows, found.batch_sizes), start, False)
        output = packed.data.index_select(0, found.places).view(steps, batch, -1)
        return output.transpose(0, 1) if self.batch_first else output, hidden.index_select(1, found.last)

    def forward_with_lengths(self, input: Tensor, lengths: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`forward` of padded sequences whose lengths stay on the input's device, with the results of
        pack_padded_sequence(enforce_sorted=False), :meth:`forward` and pad_packed_sequence, which copies them to the
        host and waits. What the input holds beyond a length is not read.

        All T steps of all sequences are walked, in one launch a layer and direction, so the work is that of padded
        input; the copies of rows that packing and padding make of each step take longer than that on a CPU. relu states
        that grow without bound beyond a length may overflow there, which makes W_hh's gradient NaN. With
        ``checkpoint_steps`` each layer keeps the output of the one below.

        Args:
            input: (T, B, I), or (B, T, I) if ``batch_first``.
            lengths: (B,) int64 in 0..T on the input's device, in any order. After no step h_n is hx.
            hx: as in :meth:`forward`.

        Returns:
            output like :meth:`forward`'s, zero beyond each length, and h_n (L*D, B, H), the states after each
            sequence's own last step (of a direction that walks time backwards, after its first).

        Raises:
            ValueError: ``lengths`` is no int64 tensor of the input's sequences on its device, or has a length outside
            0..T (on a CPU; a GPU reports it as ``torch.nn.functional.embedding`` does an id), or the input is
            unbatched or packed; what :meth:`forward` raises.

        Hooks of the module run for ``forward``.
        """
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise ValueError("forward_with_lengths expects a batched 3-D tensor as input")
        time_major = input.transpose(0, 1) if self.batch_first else input
        steps, batch = time_major.shape[:2]
        if lengths.dtype != torch.int64 or lengths.shape != (batch,) or lengths.device != input.device:
            raise ValueError(
                f"lengths: expected int64 ({batch},) on {input.device}, "
                f"got {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
            )
        onlooker = watched()
        if onlooker is None and input.device.type == "cpu" and plain(lengths) and batch > 0:
            least, most = (int(length) for length in lengths.aminmax())
            if least < 0 or most > steps:
                raise ValueError(f"lengths: expected 0 to {steps}, got {least if least < 0 else most}")
        self._check(input, hx, None, False)
        if steps == 0 or batch == 0:
            return self._run(input, hx, False)
        self._update_flat_weights()
        output, hidden = stack_with_lengths(self, time_major, lengths, hx, onlooker)
        return output.transpose(0, 1) if self.batch_first else output, hidden

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """What nn.Module.__call__ runs. To torch.fx's tracers a call is one node, as torch.nn's own modules are."""
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if type(argument) is not Tensor and isinstance(argument, fx.Proxy):
                tracer: Any = argument.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super()._call_impl(*args, **kwargs)

    def extra_repr(self) -> str:
        kept = "" if self.checkpoint_steps is None else f", checkpoint_steps={self.checkpoint_steps}"
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend}") + kept

    def _run(self, input: Any, hx: Tensor | None, tokens: bool) -> Any:
        """The door: every form of input made (T, B, ...) or packed, checked as torch.nn.RNN does, and back again."""
        onlooker = watched()
        stack = elman_stack if self.checkpoint_steps is None else checkpointed_stack
        packed = isinstance(input, PackedSequence)
        if onlooker is OPERATORS and traced():
            return super().forward(self._one_hot_input(input) if tokens else input, hx)
        if packed and (exported_to_onnx() or (not tokens and _wrong_packing(input) is not None)):
            return super().forward(self._one_hot_input(input) if tokens else input, hx)
        if onlooker is None:
            parameters = self._parameters
            for name, weight in zip(self._flat_weights_names, self._flat_weights, strict=True):
                if parameters.get(name) is not weight:  # replaced, taken away, or computed by a parametrization
                    self._update_flat_weights()
                    break
        else:
            self._update_flat_weights()

        if packed:
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            elif sorted_indices is not None and torch.compiler.is_compiling():
                # The number of sequences is data in batch_sizes, and a shape here: without it the graph would break.
                layers, weight = self.num_layers * (2 if self.bidirectional else 1), self._flat_weights[0]
                hx = cast(Tensor, weight).new_zeros(layers, sorted_indices.size(0), self.hidden_size)
            self._check(data, hx, batch_sizes, tokens)
            output, hidden = stack(self, data, hx, batch_sizes, tokens, onlooker)
            rows = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return rows, self.permute_hidden(hidden, unsorted_indices)
        unbatched = input.dim() != (2 if tokens else 3) or (hx is not None and hx.dim() != 3)
        if unbatched:
            input, hx = self._batched(input, hx, tokens)
        steps, batch = input.size(0), input.size(1)
        if self.batch_first:
            steps, batch = batch, steps
        first: Any = self._flat_weights[0]
        if tokens:
            usual = input.dtype in TOKEN_TYPES
        else:
            usual = first is not None and input.size(2) == self.input_size and input.dtype == first.dtype
        layers = self.num_layers * (2 if self.bidirectional else 1)
        if not usual or (hx is not None and hx.shape != (layers, batch, self.hidden_size)):
            self._check(input, hx, None, tokens)
        # A compiler is not asked about sizes: whatever is asked of one fixes it in the graph.
        if onlooker is None and not tokens and steps < backends.LEAST_CPU_STEPS and self._runs_on_torch(input):
            output, hidden = by_torchs_operator(self, input, hx)
        else:
            output, hidden = stack(self, input, hx, None, tokens, onlooker)
        if unbatched:
            return output.squeeze(0 if self.batch_first else 1), hidden.squeeze(1)
        return output, hidden

    def _runs_on_torch(self, input: Tensor) -> bool:
        """Whether few steps are "auto"'s: on a CPU torch's own path costs less than entering the kernels' does."""
        return type(input) is Tensor and input.device.type == "cpu" and backends.requested(self.backend) == "auto"

    def _batched(self, input: Tensor, hx: Tensor | None, tokens: bool) -> tuple[Tensor, Tensor | None]:
        """Dense input and hx with a dimension for the sequences, or torch.nn.RNN's refusal; the script's too."""
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

    def _one_hot_input(self, tokens: Any) -> Any:
        """Ids in any form that :meth:`forward_tokens` takes, as one-hot rows in that form."""
        if isinstance(tokens, PackedSequence):
            return tokens._replace(data=self._one_hot_input(tokens.data))
        if tokens.dtype not in TOKEN_TYPES:
            raise ValueError(f"forward_tokens expects int64 or int32 token ids, got {tokens.dtype}")
        weight: Any = self._flat_weights[0]
        return one_hot_rows(tokens, self.input_size, weight.dtype)


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
    fused.__dict__.update(state, backend="auto", checkpoint_steps=None)
    return fused


allow_in_graphs(FusedRNN)
# A whole model that was saved with FusedRNN in it loads where one with torch.nn.RNN does: its state is that one's.
torch.serialization.add_safe_globals([FusedRNN])
