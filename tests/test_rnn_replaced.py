"""replace_rnn, and FusedRNN under torch.nn.RNN's own name."""

import copy
import pickle

import pytest
import torch
from rnn_modules import Halved, assert_same
from torch import nn

from charrnn_fast import FusedRNN, replace_rnn
from charrnn_fast.lm.torch_model import TorchCharRNN


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
    assert_same(ours, theirs, x)
    handle.remove()
    assert not ours._forward_hooks
    expected = theirs(x)
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is FusedRNN
    torch.testing.assert_close(ours(x), expected)


def test_a_replaced_model_trains_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.RNN(3, 4, batch_first=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_rnn(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 5, 3))[0].sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.fixture
def patched(monkeypatch):
    """torch.nn.RNN is FusedRNN, the commonest way to try a drop-in; torch's own class is what the fixture gives."""
    torch_rnn = torch.nn.RNN
    for module in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
        monkeypatch.setattr(module, "RNN", FusedRNN)
    return torch_rnn


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_name_in_torch_may_be_patched(patched, steps):
    fused, theirs = torch.nn.RNN(5, 8, 2), patched(5, 8, 2)
    theirs.load_state_dict(fused.state_dict())
    x = torch.randn(steps, 3, 5)
    for module in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(module(x), theirs(x))


def test_replace_rnn_swaps_torchs_own_class_while_its_name_is_patched(patched):
    model = torch.nn.ModuleList([patched(5, 8), torch.nn.RNN(8, 8)])
    first, second = model
    replace_rnn(model)
    assert type(model[0]) is FusedRNN and model[0].weight_hh_l0 is first.weight_hh_l0
    assert model[1] is second


def test_pytorch_alone_stays_pytorch_alone_while_the_name_is_patched(patched):
    assert type(TorchCharRNN(7, 4).rnn) is patched


def test_it_is_an_instance_of_torchs_class():
    """So that what a user does to all torch.nn.RNN of a model is done to what replace_rnn put in their place."""

    def initialise(module):
        if isinstance(module, (nn.RNN, nn.LSTM)):
            for parameter in module.parameters():
                nn.init.constant_(parameter, 0.125)

    model = replace_rnn(Model()).apply(initialise)
    assert isinstance(model.first, nn.RNN) and issubclass(FusedRNN, nn.RNN)
    for module in (model.first, *model.layers[:2]):
        assert all((parameter == 0.125).all() for parameter in module.parameters())
    assert not (model.layers[2].weight_hh_l0 == 0.125).any()
