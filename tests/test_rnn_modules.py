"""FusedRNN as a module among modules: construction, forms of input, pickles, hooks, parametrizations, wrappers."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from rnn_modules import OPTIONS, Halved, assert_same, gradients, loss_of, one_hot, pair
from torch import nn
from torch.func import vmap
from torch.nn.utils.rnn import pack_sequence

import charrnn_fast.rnn
from charrnn_fast import FusedRNN

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's compiler imports it


@pytest.fixture
def theirs(rnn):
    """The torch.nn.RNN with the same parameters' values."""
    other = nn.RNN(3, 4, device=rnn.weight_hh_l0.device, **OPTIONS)
    other.load_state_dict(rnn.state_dict())
    return other


# ---- construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, OPTIONS, {"bias": False, "nonlinearity": "relu", "dtype": torch.bfloat16}])
def test_same_seed_same_parameters(kwargs):
    theirs, ours = pair(3, 4, **kwargs)
    after = torch.rand(1)
    torch.manual_seed(0)
    nn.RNN(3, 4, **kwargs)
    assert torch.equal(torch.rand(1), after)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(ours.all_weights, theirs.all_weights)
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


def test_packed_sequences_keep_their_order(rnn, theirs, device):
    rows = [torch.randn(length, 3, device=device) for length in (2, 5, 3)]
    packed, h0 = pack_sequence(rows, enforce_sorted=False), torch.randn(4, 3, 4, device=device)
    torch.testing.assert_close(rnn(packed, h0), theirs(packed, h0))


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
    ids = x.argmax(-1)
    torch.testing.assert_close(rnn.forward_tokens(ids), (torch.manual_seed(5), rnn(one_hot(ids, 3, x.dtype)))[1])
    rnn.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(rnn(x), theirs(x))
    rnn.train()
    rnn.dropout = 1.0
    for name in ("bias_ih_l1", "bias_hh_l1", "bias_ih_l1_reverse", "bias_hh_l1_reverse"):
        nn.init.zeros_(getattr(rnn, name))
    assert not rnn(x)[0].any()


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


def test_the_state_dict_of_another_module_is_refused(rnn):
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


def test_parametrizations(rnn, theirs, x):
    for module in (rnn, theirs):
        nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Halved())
        nn.utils.parametrizations.weight_norm(module, "weight_ih_l1")
    assert_same(rnn, theirs, x)
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
    assert_same(rnn, theirs, x, atol=1e-4, rtol=1e-4)


def test_one_parameter_in_two_places(rnn, theirs, x):
    for module in (rnn, theirs):
        module.weight_hh_l1_reverse = module.weight_hh_l1
    assert_same(rnn, theirs, x)


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


def test_threads_of_data_parallel(rnn, x):
    """Replicas hold plain tensors in place of parameters."""
    replica = rnn._replicate_for_data_parallel()
    for name, parameter in rnn.named_parameters():
        setattr(replica, name, parameter * 1)
    torch.testing.assert_close(replica(x), rnn(x))


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
    by_torch = charrnn_fast.rnn.by_torchs_operator
    monkeypatch.setattr(
        charrnn_fast.rnn, "by_torchs_operator", lambda *arguments: calls.append(1) or by_torch(*arguments)
    )
    torch.manual_seed(0)
    rnn = FusedRNN(3, 4, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn((2, steps, 3) if batch_first else (steps, 2, 3), dtype=torch.float64, requires_grad=True)
    by_auto = rnn(x)
    assert len(calls) == (1 if steps < 4 else 0)
    rnn.backend = "torch"
    torch.testing.assert_close(by_auto, rnn(x))
    assert len(calls) == (1 if steps < 4 else 0)
    rnn.backend = "auto"
    unbatched = x[0] if batch_first else x[:, 0]
    torch.testing.assert_close(rnn(unbatched), (by_auto[0][0] if batch_first else by_auto[0][:, 0], by_auto[1][:, 0]))
    assert len(calls) == (2 if steps < 4 else 0)
    assert torch.autograd.gradgradcheck(lambda x: rnn(x)[0], (x,))
    stacked = torch.stack([x.detach(), x.detach()])
    torch.testing.assert_close(vmap(lambda x: rnn(x)[0])(stacked)[0], by_auto[0])
