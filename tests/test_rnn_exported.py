"""FusedRNN and CharRNN written down by others: torch.jit.trace and script, torch.fx, ONNX by both exporters, and files
that are loaded with weights_only. Each runs on other sizes than it was made with, and gives what the module gives.
"""

import copy
import functools
import io

import pytest
import torch
from rnn_modules import assert_same
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from charrnn_fast import CharRNN, FusedRNN, replace_rnn

# PyTorch announces the end of torch.jit and of its first ONNX exporter in several ways.
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = [
    {},
    {"batch_first": True, "num_layers": 2, "bidirectional": True, "dropout": 0.5},
    {"nonlinearity": "relu", "bias": False, "bidirectional": True},
]
MODELS = [{}, {"num_layers": 2}, {"embedding": 4}, {"nonlinearity": "relu", "second_bias": False}]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Model(nn.Module):
    """A model with a FusedRNN in it; what is called is for each of the classes below to say."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = FusedRNN(5, 7, **options)


class Head(Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.head = nn.Linear(14 if options.get("bidirectional") else 7, 3)

    def forward(self, x):
        output, h_n = self.rnn(x)
        return self.head(output), h_n


class WithState(Model):
    def forward(self, x: torch.Tensor, hx: torch.Tensor):
        return self.rnn(x, hx)


class Packed(Model):
    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=self.rnn.batch_first, enforce_sorted=False)
        output, h_n = self.rnn(packed)
        return pad_packed_sequence(output, batch_first=self.rnn.batch_first)[0], h_n


class Ids(Model):
    def forward(self, ids):
        return self.rnn.forward_tokens(ids)


class PackedIds(Model):
    def forward(self, ids, batch_sizes):
        output, h_n = self.rnn.forward_tokens(PackedSequence(ids, batch_sizes))
        return output.data, h_n


def states(rnn, batch):
    return torch.randn(rnn.num_layers * (2 if rnn.bidirectional else 1), batch, 7)


def with_lengths(model, *sizes):
    """Input, and lengths of its sequences, the last of which is the longest."""
    x = torch.randn(*sizes, 5)
    batch, steps = sizes if model.rnn.batch_first else sizes[::-1]
    return x, torch.tensor([max(1, steps - 2 * row) for row in range(batch)]).flip(0)


def ids_of(*sizes, below=11):
    return (torch.randint(below, sizes),)


def check(made, model, given, *sizes, device="cpu", **tolerances):
    """What was made of a model gives what the model gives, for given(*size) of each size."""
    for size in sizes:
        arguments = [x.to(device) for x in given(*size)]
        torch.testing.assert_close(made(*arguments), model(*arguments), **tolerances)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


# ---- torch.jit ----------------------------------------------------------------------------------------------------


def check_trace(model, given, *sizes, device="cpu"):
    """Traced, with its checker, for the first size, and run for it and all others."""
    traced = torch.jit.trace(model, tuple(x.to(device) for x in given(*sizes[0])))
    check(traced, model, given, *sizes, device=device)
    return traced


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trace(backend, device, options):
    rnn = FusedRNN(5, 7, backend=backend, device=device, **options).eval()
    check_trace(rnn, lambda t, b: (torch.randn(t, b, 5),), (9, 3), (20, 6), (2, 1), device=device)
    check_trace(rnn, lambda b: (torch.randn(b, b, 5), states(rnn, b)), (3,), (6,), (1,), device=device)
    check_trace(rnn, lambda t: (torch.randn(t, 5),), (9,), (20,), device=device)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trace_and_script_of_packed_input(options):
    model = Packed(**options).eval()
    given = functools.partial(with_lengths, model)
    check_trace(model, given, (9, 3), (4, 6), (12, 2))
    check(torch.jit.script(model), model, given, (9, 3), (4, 6))


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_trace_of_the_language_model(backend, device, options):
    model = CharRNN(11, 8, backend=backend, device=device, **options).eval()
    traced = check_trace(model, ids_of, (3, 6), (5, 17), (1, 1), device=device)
    check(saved_and_loaded(traced), model, ids_of, (1, 1), device=device)


def test_trace_of_the_language_models_loss():
    model, (ids,) = CharRNN(11, 8), ids_of(3, 6)
    traced = torch.jit.trace_module(model, {"loss": (ids, ids)})
    check(traced.loss, model.loss, lambda *size: ids_of(*size) * 2, (5, 17))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trace_of_tokens(options):
    model = Ids(**options).eval()
    check_trace(model, functools.partial(ids_of, below=5), (9, 3), (20, 6))
    with pytest.raises(ValueError, match=r"expects int64 or int32 token ids, got torch\.float32"):
        torch.jit.trace(model, (torch.zeros(9, 3),))


def test_trace_of_packed_tokens():
    check_trace(
        PackedIds().eval(), lambda *sizes: (*ids_of(sum(sizes), below=5), torch.tensor(sizes)), (3, 2, 1), (4, 4, 1)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_script(options):
    model = Head(**options).eval()
    scripted = torch.jit.script(model)
    assert type(model.rnn) is FusedRNN  # PyTorch's hook for this would replace it in the user's model
    for module in (scripted, saved_and_loaded(scripted)):
        check(module, model, lambda *shape: (torch.randn(shape),), (9, 3, 5), (2, 4, 5), (9, 5))
    with pytest.raises(torch.jit.Error, match="Expected input to be 2D or 3D, got 1D tensor instead"):
        scripted(torch.zeros(5))
    with pytest.raises(torch.jit.Error, match=r"input\.size\(-1\) must be equal to input_size"):
        scripted(torch.zeros(9, 3, 4))


def test_script_with_a_state():
    model = WithState(num_layers=2)
    scripted, given = torch.jit.script(model), (torch.randn(9, 3, 5), torch.randn(2, 3, 7))
    assert_same(scripted, model, *given)
    with pytest.raises(torch.jit.Error, match="Expected hidden size"):
        scripted(given[0], given[1][:1])


# ---- torch.fx -----------------------------------------------------------------------------------------------------


def test_fx_takes_it_for_one_node(backend, device):
    model = nn.Sequential(nn.Linear(5, 5), FusedRNN(5, 7, backend=backend)).to(device)
    calls = []
    model[1].register_forward_pre_hook(lambda module, given: calls.append("before"))
    model[1].register_forward_hook(lambda module, given, result: (result[0] * 2, result[1]))
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert not calls
    x = torch.randn(9, 3, 5, device=device)
    torch.testing.assert_close(graph(x), model(x))
    assert calls == ["before"] * 2


def test_fx_with_a_state():
    class Twice(Model):
        def forward(self, x, hx):
            output, h_n = self.rnn(x, hx=hx)
            return output, h_n, self.rnn(x[:4])

    model = Twice()
    check(torch.fx.symbolic_trace(model), model, lambda *shape: (torch.randn(shape), torch.randn(1, 3, 7)), (9, 3, 5))


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_fx_of_the_language_model(options):
    model = CharRNN(11, 8, **options)
    check(torch.fx.symbolic_trace(model, concrete_args={"state": None}), model, ids_of, (5, 17))


def test_fx_quantization_leaves_it_in_floating_point():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    model, x = Head().eval(), torch.randn(9, 3, 5)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared)
    assert type(quantized.rnn) is FusedRNN and type(quantized.head) is not nn.Linear
    torch.testing.assert_close(quantized(x)[0], model(x)[0], rtol=0, atol=0.05)


# ---- ONNX ---------------------------------------------------------------------------------------------------------


def check_onnx(model, given, dynamic, dynamo, *sizes):
    """Exported for the first size, and run in onnxruntime; dynamic: for each input, its dimensions of any size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    first = given(*sizes[0])
    names = [f"input{i}" for i in range(len(first))]
    file = io.BytesIO()
    if dynamo:
        shapes = tuple({dim: torch.export.Dim.DYNAMIC for dim in dims} for dims in dynamic)
        torch.onnx.export(model, first, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False).save(file)
    else:
        axes = {name: {dim: f"dim{dim}" for dim in dims} for name, dims in zip(names, dynamic, strict=True)}
        torch.onnx.export(model, first, file, dynamo=False, dynamic_axes=axes, input_names=names)
    session = onnxruntime.InferenceSession(file.getvalue())

    def run(*arguments):
        results = session.run(None, {name: x.numpy() for name, x in zip(names, arguments, strict=True)})
        return tuple(torch.from_numpy(result) for result in results)

    check(run, model, given, *sizes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_onnx(options, state, dynamo):
    rnn = FusedRNN(5, 7, **options).eval()

    def given(steps, batch):
        x = torch.randn(*((batch, steps) if rnn.batch_first else (steps, batch)), 5)
        return (x, states(rnn, batch)) if state else (x,)

    check_onnx(rnn, given, [(0, 1), (1,)][: 1 + state], dynamo, (9, 3), (20, 6), (2, 4))


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_of_unbatched_input_and_tensor_operations(dynamo):
    rnn = FusedRNN(5, 7, num_layers=2, backend="torch").eval()
    check_onnx(rnn, lambda steps: (torch.randn(steps, 5),), [(0,)], dynamo, (9,), (20,))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_onnx_of_the_language_model(options, dynamo):
    check_onnx(CharRNN(11, 8, **options).eval(), ids_of, [(0, 1)], dynamo, (3, 6), (5, 17))


def test_onnx_of_packed_input():
    """By the exporter on torch.jit.trace, which knows packed rows; the other refuses them for torch.nn.RNN too."""
    model = Packed().eval()
    check_onnx(model, functools.partial(with_lengths, model), [(0, 1), (0,)], False, (9, 3))


def test_onnx_names_its_operator():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(FusedRNN(5, 7, 2).eval(), (torch.randn(9, 3, 5),), dynamo=True, verbose=False).save(file)
    operators = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert operators.count("RNN") == 2


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_whole_model_loads_with_weights_only_where_one_of_torchs_does():
    theirs = nn.Sequential(nn.RNN(5, 7, num_layers=2), nn.Identity())
    ours = replace_rnn(copy.deepcopy(theirs))
    x = torch.randn(9, 3, 5)
    for model in (theirs, ours):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with torch.serialization.safe_globals([nn.Sequential, nn.Identity, nn.RNN, set]):
            loaded = torch.load(file, weights_only=True)
        assert type(loaded[0]) is type(model[0])
        torch.testing.assert_close(loaded[0](x), theirs[0](x))
