"""FusedRNN and CharRNN written down by others: torch.jit.trace and script, torch.fx, ONNX by both exporters, and files
that are loaded with weights_only. Each runs on other sizes than it was made with, and gives what the module gives.
"""

import copy
import io

import pytest
import torch
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


class Head(nn.Module):
    """A model with a FusedRNN in it."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = FusedRNN(5, 7, **options)
        self.head = nn.Linear(14 if options.get("bidirectional") else 7, 3)

    def forward(self, x):
        output, h_n = self.rnn(x)
        return self.head(output), h_n


class Packed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.batch_first = options.get("batch_first", False)
        self.rnn = FusedRNN(5, 7, **options)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)
        output, h_n = self.rnn(packed)
        return pad_packed_sequence(output, batch_first=self.batch_first)[0], h_n


class Ids(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn = FusedRNN(5, 7, **options)

    def forward(self, ids):
        return self.rnn.forward_tokens(ids)


def states(options, batch):
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    return torch.randn(rows, batch, 7)


def lengths_of(x, batch_first):
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    return torch.tensor([max(1, steps - 2 * row) for row in range(batch)]).flip(0)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


# ---- torch.jit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trace(backend, device, options):
    rnn = FusedRNN(5, 7, backend=backend, device=device, **options).eval()
    for given in (lambda t, b: (torch.randn(t, b, 5),), lambda t, b: (torch.randn(b, b, 5), states(options, b))):
        traced = torch.jit.trace(rnn, tuple(x.to(device) for x in given(9, 3)))  # with its checker
        for sizes in ((9, 3), (20, 6), (2, 1)):
            arguments = [x.to(device) for x in given(*sizes)]
            torch.testing.assert_close(traced(*arguments), rnn(*arguments))
    traced = torch.jit.trace(rnn, (torch.randn(9, 5, device=device),))
    unbatched = torch.randn(20, 5, device=device)
    torch.testing.assert_close(traced(unbatched), rnn(unbatched))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trace_of_packed_input(options):
    model = Packed(**options).eval()
    x = torch.randn(9, 9, 5)
    traced = torch.jit.trace(model, (x[:, :3], lengths_of(x[:, :3], model.batch_first)))
    for sizes in ((9, 3), (4, 6), (12, 2)):
        x = torch.randn(*sizes, 5)
        given = x, lengths_of(x, model.batch_first)
        torch.testing.assert_close(traced(*given), model(*given))


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_trace_of_the_language_model(backend, device, options):
    model = CharRNN(11, 8, backend=backend, device=device, **options).eval()
    traced = torch.jit.trace(model, (torch.randint(11, (3, 6), device=device),))
    for sizes in ((3, 6), (5, 17), (1, 1)):
        ids = torch.randint(11, sizes, device=device)
        torch.testing.assert_close(traced(ids), model(ids))
    torch.testing.assert_close(saved_and_loaded(traced)(ids), model(ids))


def test_trace_of_the_language_models_loss():
    model, ids = CharRNN(11, 8), torch.randint(11, (3, 6))
    traced = torch.jit.trace_module(model, {"loss": (ids, ids)})
    other = torch.randint(11, (5, 17))
    torch.testing.assert_close(traced.loss(other, other), model.loss(other, other))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trace_of_tokens(options):
    model = Ids(**options).eval()
    traced = torch.jit.trace(model, (torch.randint(5, (9, 3)),))
    ids = torch.randint(5, (20, 6))
    torch.testing.assert_close(traced(ids), model(ids))
    with pytest.raises(ValueError, match=r"expects int64 or int32 token ids, got torch\.float32"):
        torch.jit.trace(model, (torch.zeros(9, 3),))


class PackedIds(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = FusedRNN(5, 7)

    def forward(self, ids, batch_sizes):
        output, h_n = self.rnn.forward_tokens(PackedSequence(ids, batch_sizes))
        return output.data, h_n


def test_trace_of_packed_tokens():
    model = PackedIds().eval()
    traced = torch.jit.trace(model, (torch.randint(5, (6,)), torch.tensor([3, 2, 1])))
    given = torch.randint(5, (9,)), torch.tensor([4, 4, 1])
    torch.testing.assert_close(traced(*given), model(*given))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_script(options):
    model = Head(**options).eval()
    scripted = torch.jit.script(model)
    assert type(model.rnn) is FusedRNN  # PyTorch's hook for this would replace it in the user's model
    for module in (scripted, saved_and_loaded(scripted)):
        for shape in ((9, 3, 5), (2, 4, 5), (9, 5)):
            x = torch.randn(shape)
            torch.testing.assert_close(module(x), model(x))
    with pytest.raises(torch.jit.Error, match="Expected input to be 2D or 3D, got 1D tensor instead"):
        scripted(torch.zeros(5))
    with pytest.raises(torch.jit.Error, match=r"input\.size\(-1\) must be equal to input_size"):
        scripted(torch.zeros(9, 3, 4))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_script_of_packed_input(options):
    model = Packed(**options).eval()
    scripted = torch.jit.script(model)
    for sizes in ((9, 3), (4, 6)):
        x = torch.randn(*sizes, 5)
        given = x, lengths_of(x, model.batch_first)
        torch.testing.assert_close(scripted(*given), model(*given))


def test_script_with_a_state():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = FusedRNN(5, 7, num_layers=2)

        def forward(self, x: torch.Tensor, hx: torch.Tensor):
            return self.rnn(x, hx)

    model = Stateful()
    scripted, given = torch.jit.script(model), (torch.randn(9, 3, 5), torch.randn(2, 3, 7))
    found, expected = scripted(*given), model(*given)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found[0].sum(), parameters), torch.autograd.grad(expected[0].sum(), parameters)
    )
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
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = FusedRNN(5, 7)

        def forward(self, x, hx):
            output, h_n = self.rnn(x, hx=hx)
            return output, h_n, self.rnn(x[:4])

    model, given = Model(), (torch.randn(9, 3, 5), torch.randn(1, 3, 7))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*given), model(*given))


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_fx_of_the_language_model(options):
    model = CharRNN(11, 8, **options)
    graph = torch.fx.symbolic_trace(model, concrete_args={"state": None})
    ids = torch.randint(11, (5, 17))
    torch.testing.assert_close(graph(ids), model(ids))


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


def exported(model, given, dynamo, dynamic):
    """A function that runs the exported model in onnxruntime. dynamic: for each input, its dimensions of any size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    names = [f"input{i}" for i in range(len(given))]
    file = io.BytesIO()
    if dynamo:
        shapes = tuple({dim: torch.export.Dim.DYNAMIC for dim in dims} for dims in dynamic)
        torch.onnx.export(model, given, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False).save(file)
    else:
        axes = {name: {dim: f"dim{dim}" for dim in dims} for name, dims in zip(names, dynamic, strict=True)}
        torch.onnx.export(model, given, file, dynamo=False, dynamic_axes=axes, input_names=names)
    session = onnxruntime.InferenceSession(file.getvalue())

    def run(*arguments):
        results = session.run(None, {name: x.numpy() for name, x in zip(names, arguments, strict=True)})
        return tuple(torch.from_numpy(result) for result in results)

    return run


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_onnx(options, state, dynamo):
    rnn = FusedRNN(5, 7, **options).eval()

    def given(steps, batch):
        shape = (batch, steps, 5) if rnn.batch_first else (steps, batch, 5)
        return (torch.randn(shape), states(options, batch)) if state else (torch.randn(shape),)

    run = exported(rnn, given(9, 3), dynamo, [(0, 1), (1,)][: 1 + state])
    for sizes in ((9, 3), (20, 6), (2, 4)):
        arguments = given(*sizes)
        torch.testing.assert_close(run(*arguments), rnn(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_of_unbatched_input_and_tensor_operations(dynamo):
    rnn = FusedRNN(5, 7, num_layers=2, backend="torch").eval()
    run = exported(rnn, (torch.randn(9, 5),), dynamo, [(0,)])
    x = torch.randn(20, 5)
    torch.testing.assert_close(run(x), rnn(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_onnx_of_the_language_model(options, dynamo):
    model = CharRNN(11, 8, **options).eval()
    run = exported(model, (torch.randint(11, (3, 6)),), dynamo, [(0, 1)])
    for sizes in ((3, 6), (5, 17)):
        ids = torch.randint(11, sizes)
        torch.testing.assert_close(run(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_onnx_of_packed_input():
    """By the exporter on torch.jit.trace, which knows packed rows; the other refuses them for torch.nn.RNN too."""
    model = Packed().eval()
    x = torch.randn(9, 3, 5)
    run = exported(model, (x, torch.tensor([9, 5, 2])), False, [(0, 1), (0,)])
    torch.testing.assert_close(run(x, torch.tensor([9, 5, 2])), model(x, torch.tensor([9, 5, 2])), rtol=1e-5, atol=1e-5)


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
