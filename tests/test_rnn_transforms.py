"""FusedRNN under torch.func, forward-mode and batched derivatives, torch.compile and torch.export."""

import copy
import os
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from rnn_modules import OPTIONS, assert_same, differentiated, drawn
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence

from charrnn_fast import CharRNN, FusedRNN, linear_cross_entropy
from charrnn_fast.ops.compiling import allow_in_graphs

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's compiler imports it


def test_transforms(rnn, x):
    """Of the module's function, with other parameters than its own; of the module."""
    parameters = {name: parameter.detach() * 2 for name, parameter in rnn.named_parameters()}
    other = copy.deepcopy(rnn)
    other.load_state_dict(parameters)
    torch.testing.assert_close(functional_call(rnn, parameters, (x,)), other(x))

    def total(result):  # to which each sequence adds its part
        return sum(y.double().sin().sum() for y in result)

    def loss(parameters, x):
        return total(functional_call(rnn, parameters, (x,)))

    expected = torch.autograd.grad(total(other(x)), list(other.parameters()))
    torch.testing.assert_close(list(grad(loss)(parameters, x).values()), list(expected), check_dtype=False)
    per_sample = vmap(grad(lambda parameters, row: loss(parameters, row[:, None])), in_dims=(None, 1))(parameters, x)
    torch.testing.assert_close([g.sum(0) for g in per_sample.values()], list(expected))
    _, tangent = jvp(lambda x: rnn(x)[0], (x,), (torch.ones_like(x),))
    jacobian = jacrev(lambda x: rnn(x)[0])(x)
    torch.testing.assert_close(tangent, jacobian.sum((-3, -2, -1)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(rnn(dual)[0]).tangent, tangent)


def test_an_ensemble_by_vmap(backend, device, x):
    models = [FusedRNN(3, 4, backend=backend, device=device) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    outputs, _ = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([model(x)[0] for model in models]))
    ids = x.argmax(-1)
    outputs, _ = vmap(models[0].forward_tokens, in_dims=1)(ids)
    torch.testing.assert_close(outputs.transpose(0, 1), models[0].forward_tokens(ids)[0])


@pytest.mark.parametrize("options", [{}, {**OPTIONS, "batch_first": True}], ids=str)
def test_batched_gradients(backend, device, options):
    """gradcheck's comparison of a batch of gradients, which vmap walks backward, with one after another."""
    rnn = FusedRNN(3, 4, backend=backend, dtype=torch.float64, device=device, **options)
    x, h0 = drawn(rnn, 3, 2)
    checks = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda x, h0, *parameters: rnn(x, h0), (x, h0, *rnn.parameters()), **checks)
    ids = x.argmax(-1)
    assert torch.autograd.gradcheck(lambda h0, *_: rnn.forward_tokens(ids, h0), (h0, *rnn.parameters()), **checks)


@pytest.mark.parametrize("options", [{}, {**OPTIONS, "batch_first": True}], ids=str)
def test_vectorized_jacobians(backend, device, options):
    rnn = FusedRNN(3, 4, backend=backend, device=device, **options)
    x = torch.randn(3, 2, 3, device=device)
    for function in (lambda x: rnn(x)[0], lambda x: rnn(x)[1]):
        one_by_one = torch.autograd.functional.jacobian(function, x)
        torch.testing.assert_close(torch.autograd.functional.jacobian(function, x, vectorize=True), one_by_one)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", [9, 1100])
def test_batched_gradients_of_the_loss(device, reduction, vocab):
    target = torch.randint(9, (6,), device=device)
    operands = [torch.randn(s, dtype=torch.float64, device=device) for s in ((6, 4), (vocab, 4), (vocab,))]

    def loss(h, weight, bias):
        return linear_cross_entropy(h, weight, target, linear_bias=bias, reduction=reduction)

    leaves = tuple(x.requires_grad_() for x in operands)
    assert torch.autograd.gradcheck(loss, leaves, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"embedding": 3}], ids=str)
def test_batched_gradients_of_the_language_models_loss(backend, device, options):
    model = CharRNN(5, 4, backend=backend, dtype=torch.float64, device=device, **options)
    ids = torch.randint(5, (3, 6), device=device)
    parameters = list(model.parameters())
    factors = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64, device=device)
    batched = torch.autograd.grad(model.loss(ids, ids)[0], parameters, factors, is_grads_batched=True)
    single = torch.autograd.grad(model.loss(ids, ids)[0], parameters)
    expected = [torch.stack([factor * g for factor in factors]) for g in single]
    torch.testing.assert_close(list(batched), expected)


@pytest.mark.parametrize("tokens", [False, True])
def test_compile_in_one_graph(rnn, x, tokens):
    given, model = (x.argmax(-1), rnn.forward_tokens) if tokens else (x, rnn)
    h0 = torch.randn(4, 2, 4, device=x.device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for arguments in [(given,), (given, h0)]:
        results = compiled(*arguments), model(*arguments)
        assert results[0][0].stride() == results[1][0].stride()
        torch.testing.assert_close(*(differentiated(rnn, result) for result in results))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        # The operator's operands are cast before it, in eager mode some by the operators within: a rounding apart.
        torch.testing.assert_close(compiled(given), model(given), rtol=1.6e-2, atol=1.6e-2)


def test_compile_with_any_number_of_steps(backend, device):
    """One graph serves every T: a layer is one operator to the compiler, torch's own RNN too, and not unrolled."""
    torch._dynamo.reset()
    rnn = FusedRNN(3, 4, backend=backend, batch_first=True, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rnn, fullgraph=True, backend=counter, dynamic=True)
    for steps in (5, 7, 9):
        given = torch.randn(2, steps, 3, device=device)
        torch.testing.assert_close(compiled(given), rnn(given))
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_compiling_torchs_own_rnn_takes_no_longer_for_more_steps(options):
    """A thousand steps unrolled take minutes; one operator a layer is a handful of nodes for any number of steps."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    rnn = FusedRNN(3, 4, backend="torch", **options)
    compiled = torch.compile(rnn, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    given = torch.randn(1000, 2, 3, requires_grad=True)
    assert_same(compiled, rnn, given, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2 and max(graphs) < 60


def test_compile_of_packed_input(rnn, backend, device):
    """In one graph: how many sequences there are is the operator's matter."""
    torch._dynamo.reset()
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    packed = pack_padded_sequence(torch.randn(5, 2, 3, device=device), [3, 5], enforce_sorted=False)
    h0 = torch.randn(4, 2, 4, device=device)
    for arguments in [(packed,), (packed, h0)]:
        torch.testing.assert_close(compiled(*arguments), rnn(*arguments))
    packed = pack_padded_sequence(torch.randn(5, 2, 3, device=device), [5, 3])
    for bad in (h0[:2], h0.repeat(1, 2, 1), h0[..., :3]):
        with pytest.raises(RuntimeError):
            compiled(packed, bad)


@pytest.mark.skipif(
    not torch.cuda.is_available()
    and all(shutil.which(name) is None for name in (os.environ.get("CXX", "g++"), "clang++")),
    reason="inductor compiles C++, and there is no C++ compiler",
)
def test_compile_by_inductor(device, x):
    torch._dynamo.reset()
    rnn = FusedRNN(3, 4, backend="triton", device=device)
    compiled = torch.compile(rnn, fullgraph=True)
    assert_same(compiled, rnn, x)


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")  # torch.nn.RNNBase sets them anew
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_any_number_of_steps(rnn, x, strict):
    steps = {"input": {0: torch.export.Dim("steps", min=2)}}
    program = torch.export.export(rnn, (x,), dynamic_shapes=steps, strict=strict)
    for given in (x, torch.cat([x, x])):
        torch.testing.assert_close(program.module()(given), rnn(given))


# ---- torch.nn.RNN's class and the compiler ------------------------------------------------------------------------


def test_the_compiler_still_leaves_torchs_own_rnn_out(x):
    """FusedRNN is a torch.nn.RNN, at which torch.compile breaks its graph; only FusedRNN is let in."""
    torch._dynamo.reset()
    ours, theirs = FusedRNN(3, 4), nn.RNN(3, 4)
    x = x.cpu()
    torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN"):
        torch.compile(theirs, fullgraph=True, backend="aot_eager")(x)
    assert not torch._dynamo.config.allow_rnn


def test_hooked_and_compiled_in_place(rnn, x):
    torch._dynamo.reset()
    rnn.register_forward_hook(lambda module, given, result: (result[0] * 2, result[1]))
    x = x[:2]
    expected = rnn(x)
    torch.testing.assert_close(torch.compile(rnn, fullgraph=True, backend="aot_eager")(x), expected)
    rnn.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(rnn(x), expected)


def test_a_compiler_with_no_such_method_breaks_its_graph(monkeypatch, x):
    builder = torch._dynamo.variables.builder.VariableBuilder
    wrapped = builder.wrap_module
    monkeypatch.setattr(builder, "wrap_module", wrapped.__wrapped__)
    torch._dynamo.reset()
    rnn, x = FusedRNN(3, 4), x.cpu()
    compiled = torch.compile(nn.Sequential(rnn), backend="aot_eager")
    torch.testing.assert_close(compiled(x), rnn(x))
    torch._dynamo.reset()
    monkeypatch.delattr(builder, "wrap_module")
    allow_in_graphs(FusedRNN)
    assert not hasattr(builder, "wrap_module")
