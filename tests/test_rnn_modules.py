"""FusedRNN as a module among modules: pickles, hooks, parametrizations, compilers, transforms, and replace_rnn."""

import copy
import inspect
import io
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from charrnn_fast import CharRNN, FusedRNN, replace_rnn

OPTIONS = {"num_layers": 2, "bidirectional": True}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's compiler imports it


@pytest.fixture
def rnn(backend, device):
    torch.manual_seed(0)
    return FusedRNN(3, 4, backend=backend, device=device, **OPTIONS)


@pytest.fixture
def theirs(rnn):
    """The torch.nn.RNN with the same parameters' values."""
    other = nn.RNN(3, 4, device=rnn.weight_hh_l0.device, **OPTIONS)
    other.load_state_dict(rnn.state_dict())
    return other


@pytest.fixture
def x(device):
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1)).to(device)


def loss_of(result):
    output, h_n = result
    output = output.data if isinstance(output, PackedSequence) else output
    return output.double().sin().sum() + h_n.double().square().sum()


def gradients(module, result):
    return torch.autograd.grad(loss_of(result), list(module.parameters()))


# ---- construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, OPTIONS, {"bias": False, "nonlinearity": "relu", "dtype": torch.bfloat16}])
def test_same_seed_same_parameters(kwargs):
    torch.manual_seed(3)
    theirs = nn.RNN(3, 4, **kwargs)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = FusedRNN(3, 4, **kwargs)
    assert torch.equal(torch.rand(1), after)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [[p.shape for p in row] for row in ours.all_weights] == [
        [p.shape for p in row] for row in theirs.all_weights
    ]
    state = {name: value for name, value in vars(theirs).items() if not isinstance(value, (dict, list))}
    assert {name: vars(ours)[name] for name in state} == state
    assert ours.backend == "auto"


def test_signature_and_positional_arguments():
    names = list(inspect.signature(FusedRNN).parameters)
    expected = (
        "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional device dtype backend"
    )
    assert names[:11] == expected.split()
    given = (3, 4, 2, "relu", False, True, 0.5, True)
    theirs = nn.RNN(*given, device="cpu", dtype=torch.float64)  # which takes these two by name alone
    ours = FusedRNN(*given, "cpu", torch.float64)
    assert ours.nonlinearity == "relu" and isinstance(ours, nn.RNNBase)
    assert repr(ours) == repr(theirs).replace("RNN", "FusedRNN")
    assert repr(FusedRNN(3, 4, backend="torch")) == "FusedRNN(3, 4, backend=torch)"
    ours.flatten_parameters()
    assert ours(torch.zeros(2, 3, 3, dtype=torch.float64))[0].shape == (2, 3, 8)


def test_parameters_set_anew_are_used(rnn, x):
    before, _ = rnn(x)
    rnn.weight_hh_l0 = nn.Parameter(rnn.weight_hh_l0 * 2)
    assert not torch.equal(rnn(x)[0], before)
    with torch.no_grad():
        rnn.weight_hh_l0.div_(2)
    torch.testing.assert_close(rnn(x)[0], before)


# ---- forms of input -----------------------------------------------------------------------------------------------


def one_hot(ids, size=3):
    if isinstance(ids, PackedSequence):
        return ids._replace(data=one_hot(ids.data, size))
    return F.one_hot(ids.long(), size).float()


@pytest.mark.parametrize("form", ["plain", "int32", "batch first", "unbatched", "packed", "no h0"])
def test_tokens_are_one_hot_rows(rnn, device, form):
    ids = torch.tensor([[0, 2], [1, 1], [2, 0], [2, 2], [0, 1]], device=device)
    h0 = torch.randn(4, 2, 4, device=device, requires_grad=True)
    if form == "int32":
        ids = ids.int()
    elif form == "batch first":
        rnn.batch_first, ids = True, ids.T.contiguous()
    elif form == "unbatched":
        ids, h0 = ids[:, 0], h0[:, 0]
    elif form == "packed":
        ids = pack_padded_sequence(ids, [3, 5], enforce_sorted=False)
    elif form == "no h0":
        h0 = None
    results = rnn.forward_tokens(ids, h0), rnn(one_hot(ids), h0)
    torch.testing.assert_close(*results)
    wanted = [*rnn.parameters(), *([] if h0 is None else [h0])]
    torch.testing.assert_close(*(torch.autograd.grad(loss_of(result), wanted) for result in results))


def test_packed_sequences_keep_their_order(rnn, theirs, device):
    rows = [torch.randn(length, 3, device=device) for length in (2, 5, 3)]
    ours_in, theirs_in = (pack_sequence(rows, enforce_sorted=False) for _ in range(2))
    h0 = torch.randn(4, 3, 4, device=device)
    (ours, ours_h), (expected, expected_h) = rnn(ours_in, h0), theirs(theirs_in, h0)
    torch.testing.assert_close(ours_h, expected_h)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_batches_of_none(rnn, theirs):
    for options in ({}, {"batch_first": True}):
        for module in (rnn, theirs):
            module.batch_first = bool(options)
        empty = torch.zeros(0, 5, 3) if options else torch.zeros(5, 0, 3)
        empty = empty.to(rnn.weight_hh_l0.device)
        assert [y.shape for y in rnn(empty)] == [y.shape for y in theirs(empty)]
        assert all(not grad.any() for grad in gradients(rnn, rnn(empty)))


def test_output_types_under_autocast(rnn, theirs, x, device):
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype=dtype):
            for arguments in [(x,), (x, torch.randn(4, 2, 4, device=device)), (x.to(dtype),)]:
                ours, expected = rnn(*arguments), theirs(*arguments)
                assert [y.dtype for y in ours] == [y.dtype for y in expected] == [dtype, dtype]
                torch.testing.assert_close(ours, expected, atol=0.02, rtol=0.02)
            tokens = rnn.forward_tokens(x.argmax(-1))
            assert [y.dtype for y in tokens] == [dtype, dtype]
        grads = gradients(rnn, ours)
        assert {grad.dtype for grad in grads} == {torch.float32}
        torch.testing.assert_close(grads, gradients(theirs, expected), atol=0.05, rtol=0.05)
        with torch.autocast(device.type, dtype=dtype):
            assert rnn.double()(x.double())[0].dtype == torch.float64
        rnn.float()


# ---- dropout ------------------------------------------------------------------------------------------------------


def test_dropout_falls_between_layers_in_training_only(rnn, theirs, x, device):
    for module in (rnn, theirs):
        module.dropout = 0.5
    torch.manual_seed(5)
    ours = rnn(x)
    torch.manual_seed(5)
    if device.type == "cpu":  # the same random numbers at the same places
        torch.testing.assert_close(ours, theirs(x))
    torch.manual_seed(5)
    torch.testing.assert_close(rnn.forward_tokens(x.argmax(-1)), (torch.manual_seed(5), rnn(one_hot(x.argmax(-1))))[1])
    rnn.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(rnn(x), theirs(x))
    rnn.train()
    rnn.dropout = 1.0
    for name in ("bias_ih_l1", "bias_hh_l1", "bias_ih_l1_reverse", "bias_hh_l1_reverse"):
        nn.init.zeros_(getattr(rnn, name))
    assert not rnn(x)[0].any()


def test_backward_in_eval_mode(rnn, x):
    assert all(grad.any() for grad in gradients(rnn.eval(), rnn(x)))


# ---- copies -------------------------------------------------------------------------------------------------------


def test_copies_and_pickles(rnn, x):
    expected = rnn(x)
    file = io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), torch.load(file, weights_only=False)):
        assert other.backend == rnn.backend and type(other) is FusedRNN
        assert all(a is not b for a, b in zip(other.parameters(), rnn.parameters(), strict=True))
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        torch.testing.assert_close(rnn(x), expected, rtol=0, atol=0)
        assert not torch.equal(other(x)[0], expected[0])


def test_state_dicts_load_both_ways_and_refuse_others(rnn, theirs):
    theirs.load_state_dict(rnn.state_dict(), strict=True)
    rnn.load_state_dict(theirs.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        FusedRNN(9, 4, **OPTIONS).load_state_dict(rnn.state_dict())


# ---- hooks, parametrizations, wrappers ----------------------------------------------------------------------------


def test_hooks(rnn, x):
    seen = []
    rnn.register_forward_pre_hook(lambda module, given: seen.append("before"))
    rnn.register_forward_hook(lambda module, given, result: (result[0] * 2, result[1]))
    rnn.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    plain = copy.deepcopy(rnn)
    plain._forward_hooks.clear()
    x.requires_grad_()
    output, _ = rnn(x)
    torch.testing.assert_close(output, plain(x)[0] * 2)
    output.sum().backward()
    assert seen == ["before", "before", "backward"]


def test_hooks_of_saved_tensors(rnn, x):
    expected = gradients(rnn, rnn(x))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: y.cpu().numpy(), lambda y: torch.from_numpy(y).to(x.device)
    ):
        result = rnn(x)
    torch.testing.assert_close(gradients(rnn, result), expected)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_parametrizations(rnn, theirs, x):
    for module in (rnn, theirs):
        nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Halved())
        nn.utils.parametrizations.weight_norm(module, "weight_ih_l1")
    torch.testing.assert_close(rnn(x), theirs(x))
    torch.testing.assert_close(gradients(rnn, rnn(x)), gradients(theirs, theirs(x)))
    with nn.utils.parametrize.cached():
        torch.testing.assert_close(rnn(x), theirs(x))
    for module in (rnn, theirs):
        nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert isinstance(rnn.weight_hh_l0, nn.Parameter)
    torch.testing.assert_close(rnn(x), theirs(x))


def test_weight_norm_by_hooks(rnn, theirs, x):
    for module in (rnn, theirs):
        nn.utils.spectral_norm(module, "weight_hh_l0")
    rnn.weight_hh_l0_u.copy_(theirs.weight_hh_l0_u)
    torch.testing.assert_close(rnn(x), theirs(x))
    torch.testing.assert_close(gradients(rnn, rnn(x)), gradients(theirs, theirs(x)), atol=1e-4, rtol=1e-4)


def test_one_parameter_in_two_places(rnn, theirs, x):
    for module in (rnn, theirs):
        module.weight_hh_l1_reverse = module.weight_hh_l1
    torch.testing.assert_close(gradients(rnn, rnn(x)), gradients(theirs, theirs(x)))


def test_frozen_parameters(rnn, x):
    expected = dict(zip(dict(rnn.named_parameters()), gradients(rnn, rnn(x)), strict=True))
    for name, parameter in rnn.named_parameters():
        parameter.requires_grad_("bias" in name)
    loss_of(rnn(x)).backward()
    for name, parameter in rnn.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name] if "bias" in name else None)


def test_checkpointing(rnn, x):
    result = torch.utils.checkpoint.checkpoint(rnn, x, use_reentrant=False)
    torch.testing.assert_close(gradients(rnn, result), gradients(rnn, rnn(x)))


DISTRIBUTED = """
import os, sys
import torch
from charrnn_fast import FusedRNN

backend, device, rendezvous = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=0, world_size=1)
rnn = FusedRNN(3, 4, num_layers=2, bidirectional=True, backend=backend, device=device)
x = torch.randn(5, 2, 3, device=device)
expected = torch.autograd.grad(rnn(x)[0].sin().sum(), list(rnn.parameters()))
torch.nn.parallel.DistributedDataParallel(rnn)(x)[0].sin().sum().backward()
torch.testing.assert_close([p.grad for p in rnn.parameters()], list(expected))
print("equal", flush=True)
os._exit(0)
"""


def test_distributed_data_parallel(backend, device, tmp_path):
    """In a process of its own that just ends: gloo's threads and Python's lock can deadlock when a group is deleted."""
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, backend, device.type, str(tmp_path / "rendezvous")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout == "equal\n", result.stderr


def test_threads_of_data_parallel(rnn, x):
    """Replicas hold plain tensors in place of parameters."""
    replica = rnn._replicate_for_data_parallel()
    for name, parameter in rnn.named_parameters():
        setattr(replica, name, parameter * 1)
    torch.testing.assert_close(replica(x), rnn(x))


# ---- transforms and compilers -------------------------------------------------------------------------------------


def test_functional_call(rnn, x):
    doubled = {name: (parameter * 2).detach().requires_grad_() for name, parameter in rnn.named_parameters()}
    other = copy.deepcopy(rnn)
    other.load_state_dict(doubled)
    result = functional_call(rnn, doubled, (x,))
    torch.testing.assert_close(result, other(x))
    torch.testing.assert_close(torch.autograd.grad(loss_of(result), list(doubled.values())), gradients(other, other(x)))


def test_transforms(rnn, x):
    parameters = {name: parameter.detach() for name, parameter in rnn.named_parameters()}

    def loss(parameters, x):
        return loss_of(functional_call(rnn, parameters, (x,)))

    expected = gradients(rnn, rnn(x))
    torch.testing.assert_close(list(grad(loss)(parameters, x).values()), list(expected), check_dtype=False)
    per_sample = vmap(grad(lambda parameters, row: loss(parameters, row[:, None])), in_dims=(None, 1))(parameters, x)
    torch.testing.assert_close([g.sum(0) for g in per_sample.values()], list(expected))
    _, tangent = jvp(lambda x: rnn(x)[0], (x,), (torch.ones_like(x),))
    jacobian = jacrev(lambda x: rnn(x)[0])(x)
    torch.testing.assert_close(tangent, jacobian.sum((-3, -2, -1)))


def test_an_ensemble_by_vmap(backend, device, x):
    models = [FusedRNN(3, 4, backend=backend, device=device) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    outputs, _ = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([model(x)[0] for model in models]))
    ids = x.argmax(-1)
    outputs, _ = vmap(models[0].forward_tokens, in_dims=1)(ids)
    torch.testing.assert_close(outputs.transpose(0, 1), models[0].forward_tokens(ids)[0])


def test_forward_mode_derivatives(rnn, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(rnn(dual)[0]).tangent
    torch.testing.assert_close(tangent, jvp(lambda x: rnn(x)[0], (x,), (torch.ones_like(x),))[1])


class Tokens(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, tokens, hx=None):
        return self.rnn.forward_tokens(tokens, hx)


@pytest.mark.parametrize("tokens", [False, True])
def test_compile_in_one_graph(rnn, x, tokens):
    x = x[:2]  # torch's own path is unrolled, step by step
    given, model = (x.argmax(-1), Tokens(rnn)) if tokens else (x, rnn)
    h0 = torch.randn(4, 2, 4, device=x.device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for arguments in [(given,), (given, h0)]:
        result = compiled(*arguments)
        torch.testing.assert_close(result, model(*arguments))
        assert result[0].stride() == model(*arguments)[0].stride()
        torch.testing.assert_close(gradients(rnn, result), gradients(rnn, model(*arguments)))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(given), model(given))


def test_compile_with_any_number_of_steps(device):
    """One graph serves every T: the kernels are an operator to the compiler, not unrolled."""
    torch._dynamo.reset()
    rnn = FusedRNN(3, 4, backend="triton", batch_first=True, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rnn, fullgraph=True, backend=counter, dynamic=True)
    for steps in (5, 7, 9):
        given = torch.randn(2, steps, 3, device=device)
        torch.testing.assert_close(compiled(given), rnn(given))
    assert counter.frame_count == 1


def test_compile_of_packed_input(rnn, backend, device):
    """In one graph by the kernels; torch's own path looks at the data and breaks it."""
    torch._dynamo.reset()
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=backend == "triton")
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
    torch.testing.assert_close(gradients(rnn, compiled(x)), gradients(rnn, rnn(x)))


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")  # torch.nn.RNNBase sets them anew
def test_export(rnn, x):
    for strict in (True, False):
        program = torch.export.export(rnn, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), rnn(x))


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_export_with_any_number_of_steps(device, x):
    rnn = FusedRNN(3, 4, backend="triton", device=device)
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(rnn, (x,), dynamic_shapes={"input": {0: steps}})
    longer = torch.randn(9, 2, 3, device=device)
    torch.testing.assert_close(program.module()(longer), rnn(longer))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and says so in several ways
def test_trace(rnn, x):
    traced = torch.jit.trace(rnn, (x,))
    longer = torch.cat([x, x])
    torch.testing.assert_close(traced(longer), rnn(longer))


# ---- replace_rnn --------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.RNN(3, 4, nonlinearity="relu", batch_first=True)
        self.layers = nn.ModuleList([nn.RNN(4, 4, num_layers=2, dropout=0.5), nn.LSTM(4, 4), nn.GRU(4, 4)])
        self.named = nn.ModuleDict({"again": self.first, "linear": nn.Linear(4, 4)})
        self.nothing = None
        self.register_module("none", None)


def test_replace_rnn_swaps_all_and_shares():
    model = Model()
    model.layers[0].eval()
    parameters = dict(model.named_parameters())
    first = model.first
    assert replace_rnn(model) is model
    assert type(model.first) is FusedRNN and model.named["again"] is model.first and model.first is not first
    assert [type(layer) for layer in model.layers] == [FusedRNN, nn.LSTM, nn.GRU]
    after = dict(model.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is parameters[name] for name in after)
    assert model.first.training and not model.layers[0].training
    assert (model.first.nonlinearity, model.first.batch_first, model.layers[0].dropout) == ("relu", True, 0.5)
    assert model.first.backend == "auto"
    assert type(first) is nn.RNN
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(model.first(x), first(x))
    copy.deepcopy(model), pickle.loads(pickle.dumps(model.first))
    assert replace_rnn(model).first is model.first


def test_replace_rnn_of_a_module_itself():
    theirs = nn.RNN(3, 4)
    ours = replace_rnn(theirs)
    assert type(ours) is FusedRNN and ours.weight_hh_l0 is theirs.weight_hh_l0
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(4, 4))
    assert theirs._flat_weights[1] is theirs.weight_hh_l0
    assert theirs.weight_hh_l0.any() and not ours.weight_hh_l0.any()
    linear = nn.Linear(3, 4)
    assert replace_rnn(linear) is linear


def test_replace_rnn_leaves_subclasses_alone():
    class Own(nn.RNN):
        def forward(self, input, hx=None):
            return "own"

    model = nn.Sequential(Own(3, 4), nn.RNN(3, 4))
    replace_rnn(model)
    assert [type(layer) for layer in model] == [Own, FusedRNN]


def test_replace_rnn_keeps_hooks_and_parametrizations(x):
    x = x.cpu()
    theirs = nn.RNN(3, 4)
    nn.utils.parametrize.register_parametrization(theirs, "weight_hh_l0", Halved())
    handle = theirs.register_forward_hook(lambda module, given, result: (result[0] + 1, result[1]))
    model = nn.Sequential(theirs)
    ours = replace_rnn(model)[0]
    assert isinstance(ours, FusedRNN) and type(ours).__name__ == "ParametrizedFusedRNN"
    assert ours.parametrizations.weight_hh_l0.original is theirs.parametrizations.weight_hh_l0.original
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(gradients(ours, ours(x)), gradients(theirs, theirs(x)))
    handle.remove()
    assert not ours._forward_hooks
    expected = theirs(x)
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is FusedRNN
    torch.testing.assert_close(ours(x), expected)


def test_a_replaced_model_trains_on(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.RNN(3, 4, batch_first=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_rnn(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 5, 3))[0].sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_moving_between_types(rnn, x):
    rnn.double()
    assert rnn(x.double())[0].dtype == torch.float64
    rnn.to(torch.bfloat16)
    assert rnn(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_few_steps_on_a_cpu_are_torchs_own(monkeypatch, steps, batch_first):
    """By auto alone; the results, the gradients and the double gradients are the same either way."""
    calls = []
    forward = nn.RNN.forward
    monkeypatch.setattr(nn.RNN, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    torch.manual_seed(0)
    rnn = FusedRNN(3, 4, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn((2, steps, 3) if batch_first else (steps, 2, 3), dtype=torch.float64, requires_grad=True)
    by_auto = rnn(x)
    assert len(calls) == (1 if steps < 4 else 0)
    rnn.backend = "torch"
    torch.testing.assert_close(by_auto, rnn(x))
    assert len(calls) == (1 if steps < 4 else 0)
    rnn.backend = "auto"
    assert torch.autograd.gradgradcheck(lambda x: rnn(x)[0], (x,))
    stacked = torch.stack([x.detach(), x.detach()])
    torch.testing.assert_close(vmap(lambda x: rnn(x)[0])(stacked)[0], by_auto[0])


@pytest.fixture
def patched(monkeypatch):
    """torch.nn.RNN is FusedRNN, the commonest way to try a drop-in; torch's own class is what the fixture gives."""
    torch_rnn = torch.nn.RNN
    for module in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
        monkeypatch.setattr(module, "RNN", FusedRNN)
    return torch_rnn


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_name_in_torch_may_be_patched(patched, steps):
    torch.manual_seed(0)
    fused = torch.nn.RNN(5, 8, 2)
    theirs = patched(5, 8, 2)
    theirs.load_state_dict(fused.state_dict())
    x = torch.randn(steps, 3, 5)
    for found, expected in zip(fused(x), theirs(x), strict=True):
        torch.testing.assert_close(found, expected)
    clone = copy.deepcopy(fused)
    torch.testing.assert_close(clone(x)[0], fused(x)[0])
    torch.testing.assert_close(pickle.loads(pickle.dumps(fused))(x)[0], fused(x)[0])


def test_replace_rnn_swaps_torchs_own_class_while_its_name_is_patched(patched):
    model = torch.nn.ModuleList([patched(5, 8), torch.nn.RNN(8, 8)])
    first, second = model
    replace_rnn(model)
    assert type(model[0]) is FusedRNN and model[0].weight_hh_l0 is first.weight_hh_l0
    assert model[1] is second


def test_pytorch_alone_stays_pytorch_alone_while_the_name_is_patched(patched):
    assert type(CharRNN(7, 4, cell="torch").rnn) is patched
