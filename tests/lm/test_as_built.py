"""CharRNN calls its modules wherever calling them would do something else than reading their parameters."""

from functools import partial

import pytest
import torch
import torch.nn.utils.prune
from lm_problems import H, V, by_hand, tiny
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from charrnn_fast.lm import as_built, capture, data
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.training import Trainer
from charrnn_fast.reference import generate as reference_generate

B, T = 40, 12  # so many rows that the loss is computed in one call where nobody listens
TOKENS = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]
FORMS = [{}, {"num_layers": 2}, {"embedding": 5}, {"form": "torch"}]


def _loss(model, x, y) -> torch.Tensor:
    return model.loss(x, y)[0]


def _plain_loss(model, x, y) -> torch.Tensor:
    """What calling the modules one after the other gives."""
    rows = F.one_hot(x, V).double() if model.embed is None else model.embed(x)
    outputs, _ = model.rnn(rows)
    return F.cross_entropy(model.head(outputs).flatten(0, 1), y.flatten())


class LowRank(nn.Module):
    """A frozen linear layer and a trained product of two thin matrices beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


CHANGES = {
    "head hook": lambda m: m.head.register_forward_hook(lambda mod, i, o: o * 0.5),
    "head pre-hook": lambda m: m.head.register_forward_pre_hook(lambda mod, i: (i[0] * 2,)),
    "rnn hook": lambda m: m.rnn.register_forward_hook(lambda mod, i, o: (o[0] * 0.5, o[1])),
    "rnn pre-hook": lambda m: m.rnn.register_forward_pre_hook(lambda mod, i: (i[0] * 2, *i[1:])),
    "rnn backward hook": lambda m: m.rnn.register_full_backward_hook(lambda mod, i, o: (None, *i[1:])),
    "head backward hook": lambda m: m.head.register_full_backward_hook(lambda mod, i, o: (i[0] * 2,)),
    "head's own forward": lambda m: setattr(m.head, "forward", lambda x, own=m.head.forward: own(x) * 0.5),
    "head pruned": lambda m: nn.utils.prune.random_unstructured(m.head, "weight", 0.5),
    "rnn pruned": lambda m: nn.utils.prune.random_unstructured(m.rnn, "weight_hh_l0", 0.5),
    "head weight_norm": lambda m: parametrizations.weight_norm(m.head),
    "rnn weight_norm": lambda m: parametrizations.weight_norm(m.rnn, "weight_hh_l0"),
    "rnn old weight_norm": lambda m: nn.utils.weight_norm(m.rnn, "weight_ih_l0"),
    "head spectral_norm": lambda m: parametrizations.spectral_norm(m.head),
    "head low rank": lambda m: setattr(m, "head", LowRank(m.head)),
    "head without bias": lambda m: setattr(m, "head", nn.Linear(H, V, bias=False, dtype=torch.float64)),
    "other sizes": lambda m: (
        setattr(m, "rnn", nn.RNN(m.rnn.input_size, 6, batch_first=True, dtype=torch.float64)),
        setattr(m, "head", nn.Linear(6, V, dtype=torch.float64)),
    ),
}
REPLACED = {
    "relu": lambda i: nn.RNN(i, H, nonlinearity="relu", batch_first=True, dtype=torch.float64),
    "no bias": lambda i: nn.RNN(i, H, bias=False, batch_first=True, dtype=torch.float64),
    "GRU": lambda i: nn.GRU(i, H, batch_first=True, dtype=torch.float64),
    "LSTM": lambda i: nn.LSTM(i, H, batch_first=True, dtype=torch.float64),
    "RNN": lambda i: nn.RNN(i, H, 2, dropout=0.0, batch_first=True, dtype=torch.float64),
    "fused relu": lambda i: as_built.FusedRNN(i, H, nonlinearity="relu", batch_first=True, dtype=torch.float64),
    "fused no bias": lambda i: as_built.FusedRNN(i, H, bias=False, batch_first=True, dtype=torch.float64),
    "fused two layers": lambda i: as_built.FusedRNN(i, H, 2, batch_first=True, dtype=torch.float64),
}
for _name, _make in REPLACED.items():
    CHANGES[f"rnn {_name}"] = lambda m, make=_make: setattr(m, "rnn", make(m.rnn.input_size))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_training_is_what_calling_the_modules_gives(change, form):
    """Four steps, from and with copies of the same random numbers: losses and every gradient."""
    curves = []
    for loss_of in (_loss, _plain_loss):
        model = tiny(**form)
        torch.manual_seed(3)
        CHANGES[change](model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
        curve = []
        for loss, _ in by_hand(partial(loss_of, model), optimizer, [(X, Y)] * 4):
            curve += [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
        curves.append(curve)
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-9, atol=1e-11)
    assert float(curves[0][0]) != pytest.approx(float(_loss(tiny(**form), X, Y)), rel=1e-9) or any(
        word in change for word in ("norm", "backward", "low rank")
    ), "a change that keeps the loss tells nothing"


@pytest.mark.parametrize("change", CHANGES)
def test_generating_is_what_calling_the_modules_gives(change):
    model = tiny()
    torch.manual_seed(3)
    CHANGES[change](model)
    model.eval()

    def net(tokens, state):
        outputs, state = model.rnn(F.one_hot(tokens, V).double(), state)
        return model.head(outputs), state

    uniforms = torch.rand(B, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for options in ({}, {"uniforms": uniforms, "temperature": 0.7}):
        expected, _ = reference_generate.generate(net, X, 20, **options)
        assert torch.equal(model.generate_ids(X, 20, **options)[0], expected)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_named_and_neither_captured_nor_copied(change):
    model = tiny()
    assert as_built.why_called(model) is None
    model.to_reference()
    CHANGES[change](model)
    assert as_built.why_called(model).startswith(("rnn ", "head "))
    assert "would not call its modules, and " in capture.why_not(model)
    with pytest.raises(ValueError, match=r"as it was built, but (rnn|head) "):
        model.to_reference()


def test_hooks_see_what_the_modules_are_called_with_and_can_be_taken_away():
    model, seen = tiny(), []
    handles = [
        module.register_forward_hook(lambda mod, i, o: seen.append(tuple(i[0].shape)))
        for module in (model.rnn, model.head)
    ]
    model.loss(X, Y)
    model(X)
    assert seen == [(B, T, V), (B, T, H)] * 2
    for handle in handles:
        handle.remove()
    model.loss(X, Y)
    assert len(seen) == 4 and as_built.why_called(model) is None


def test_hooks_of_all_modules_are_run():
    model, seen = tiny(), []
    with nn.modules.module.register_module_forward_hook(lambda mod, i, o: seen.append(type(mod).__name__)):
        model.loss(X, Y)
        model.generate_ids(X, 1)
    assert seen == ["FusedRNN", "Linear", "FusedRNN", "Linear", "CharRNN"]
    model.loss(X, Y)
    assert len(seen) == 5


def test_time_first_modules_get_time_first_rows():
    """An nn.RNN as its constructor makes it by default, which would otherwise walk along the batch without a word."""
    model, other = tiny(), tiny()
    torch.manual_seed(3)
    model.rnn = nn.RNN(V, H, dtype=torch.float64)
    other.rnn = nn.RNN(V, H, batch_first=True, dtype=torch.float64)
    other.rnn.load_state_dict(model.rnn.state_dict())
    state = torch.randn(1, B, H, dtype=torch.float64)
    for a, b in zip(model.loss(X, Y, state), other.loss(X, Y, state), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.generate_ids(X, 9)[0], other.generate_ids(X, 9)[0])


@pytest.mark.parametrize("method", ["forward", "hidden"])
def test_a_subclasss_own_methods_are_its_loss_and_its_text(method):
    class Doubled(CharRNN):
        pass

    def doubled(self, tokens, state=None):
        outputs, state = getattr(CharRNN, method)(self, tokens, state)
        return 2 * outputs, state

    setattr(Doubled, method, doubled)
    torch.manual_seed(0)
    model = Doubled(V, H, dtype=torch.float64)
    expected = F.cross_entropy(model(X)[0].flatten(0, 1), Y.flatten())
    torch.testing.assert_close(model.loss(X, Y)[0], expected)
    assert float(expected) != pytest.approx(float(tiny().loss(X, Y)[0]), rel=1e-6)
    assert torch.equal(model.generate_ids(X, 9)[0], reference_generate.generate(model, X, 9)[0])


@pytest.mark.parametrize("change", ["rnn relu", "rnn GRU", "rnn LSTM", "head low rank", "rnn old weight_norm"])
def test_trainer_carries_the_state_of_whatever_is_trained(change):
    model = tiny()
    CHANGES[change](model)
    tokens = torch.randint(V, (1,), generator=torch.Generator().manual_seed(1)).repeat(600)
    tokens[::2] = (tokens[0] + 1) % V
    sampler = data.Sequential(tokens, torch.Generator().manual_seed(0), batch_size=4, num_steps=10)
    history = Trainer(model, epochs=4, lr=0.5).fit(sampler)
    assert history[-1].train_loss < history[0].train_loss


@pytest.mark.parametrize(("options", "hooked"), [({}, False), ({"embedding": 3}, False), ({}, True)])
def test_compiled_for_other_sizes_it_is_not_compiled_again(options, hooked):
    """A compiler can answer whether the parts are as they were built, and is asked nothing about sizes: fewer
    characters than symbols, or more, are one graph.
    """
    model, graphs = tiny(**options), []
    if hooked:
        model.head.register_forward_hook(lambda mod, i, o: o * 0)

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    loss = torch.compile(lambda x, y: model.loss(x, y)[0], fullgraph=True, dynamic=True, backend=counted)
    for rows, steps in ((B, T), (2, 3), (7, T)):
        x, y = X[:rows, :steps].clone(), Y[:rows, :steps].clone()
        torch.testing.assert_close(loss(x, y), model.loss(x, y)[0])
    assert len(graphs) == 1
