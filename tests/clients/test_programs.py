"""Users' programs with torch.nn.RNN, with its name patched, and with replace_rnn: the same curves."""

import copy
import importlib.util
import multiprocessing

import programs
import pytest
import torch
from torch import nn

from charrnn_fast import FusedRNN, replace_rnn

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that programs use

NEEDS = {"lightning": "lightning", "accelerate": "accelerate"}


@pytest.fixture
def patched(monkeypatch):
    def patch(kind):
        for module in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
            monkeypatch.setattr(module, "RNN", kind)

    return patch


def run(name, finish):
    torch.manual_seed(0)
    return programs.PROGRAMS[name](finish)


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_three_ways_to_the_same_curve(name, patched):
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (the extra clients)")
    made = []

    def seen(model):
        made.append({type(module) for module in model.modules() if isinstance(module, nn.RNNBase)})
        return model

    expected = run(name, seen)
    replaced = run(name, lambda model: seen(replace_rnn(model)))
    patched(FusedRNN)
    by_name = run(name, seen)
    assert [FusedRNN in kinds for kinds in made] == [False, True, True]
    assert len(expected) > 3
    # In 16 bit one rounding more or less; dropout draws the same numbers on a CPU.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if name == "half precision" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(replaced, expected, **tolerance)
    torch.testing.assert_close(by_name, expected, **tolerance)
    assert replaced == by_name


def test_a_policy_with_resets_follows_the_curve_of_one_that_cuts_its_rollouts(monkeypatch):
    expected = run("recurrent policy", replace_rnn)

    def forward(self, observations, state, begins):
        features, state = self.rnn.forward_with_resets(observations, begins, state)
        return self.actor(features), self.critic(features).squeeze(-1), state

    monkeypatch.setattr(programs.Policy, "forward", forward)
    torch.testing.assert_close(run("recurrent policy", replace_rnn), expected, rtol=1e-4, atol=1e-5)


# ---- other processes and other files --------------------------------------------------------------------------------


def test_a_module_in_a_spawned_process():
    """As torch.multiprocessing and data loaders send it: pickled, with its parameters in shared memory."""
    context = multiprocessing.get_context("spawn")
    rnn, x, results = FusedRNN(4, 8, 2), torch.randn(9, 3, 4), context.SimpleQueue()
    rnn.share_memory()
    process = context.Process(target=programs.in_another_process, args=(rnn, x, results))
    process.start()
    found = results.get()
    process.join()
    assert process.exitcode == 0
    assert found == pytest.approx(rnn(x)[0].sum().item(), abs=1e-4)


def test_safetensors_both_ways(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, ours = nn.Sequential(nn.RNN(4, 8, 2)), nn.Sequential(FusedRNN(4, 8, 2))
    safetensors.save_model(theirs, str(tmp_path / "model.safetensors"))
    safetensors.load_model(ours, str(tmp_path / "model.safetensors"))
    x = torch.randn(9, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    safetensors.save_model(ours, str(tmp_path / "ours.safetensors"))
    other = copy.deepcopy(theirs)
    nn.init.zeros_(other[0].weight_hh_l0)
    safetensors.load_model(other, str(tmp_path / "ours.safetensors"))
    torch.testing.assert_close(other(x), theirs(x))


def test_second_derivatives_of_a_model():
    """torch.func's hessian over a model's parameters, and a jacobian-vector product."""
    from torch.func import functional_call, hessian, jvp

    found = []
    for kind in (nn.RNN, FusedRNN):
        torch.manual_seed(0)
        rnn, x = kind(2, 3).double(), torch.randn(6, 2, 2, dtype=torch.float64)
        parameters = {name: p.detach() for name, p in rnn.named_parameters()}

        def loss(weight, rnn=rnn, x=x, parameters=parameters):
            return functional_call(rnn, parameters | {"weight_hh_l0": weight}, (x,))[0].sin().sum()

        weight = parameters["weight_hh_l0"]
        if kind is FusedRNN:
            found.append((hessian(loss)(weight), jvp(loss, (weight,), (torch.ones_like(weight),))[1]))
        else:  # which has no rule for torch.func: by autograd
            second = torch.autograd.functional.hessian(loss, weight)
            (first,) = torch.autograd.functional.jacobian(lambda w: loss(w)[None], weight)
            found.append((second, first.sum()))
    torch.testing.assert_close(found[1], found[0])
