"""torch.compile over forward, loss, clip and a whole training step: one graph for every number of steps and sequences;
compiled autograd; packed input.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from rnn_modules import assert_same
from torch import nn
from torch._dynamo import compiled_autograd, config
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pack_padded_sequence

from charrnn_fast import CharRNN, FusedRNN, clip_grad_norm_, linear_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's compiler announces its own changes

F_IN, H, V = 5, 7, 11
SIZES = [(3, 6), (4, 9), (2, 20), (7, 4), (5, 3)]  # B, T


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Head(nn.Linear):
    def forward(self, h, target):
        return linear_cross_entropy(h.flatten(0, 1), self.weight, target.flatten(), linear_bias=self.bias)


# What is called, how it is made, and the inputs that it is called with.
CASES = {
    "dense": (FusedRNN, "forward", {"num_layers": 2, "batch_first": True}, ["x"]),
    "checkpointed": (FusedRNN, "forward", {"num_layers": 2, "bidirectional": True, "checkpoint_steps": 3}, ["x"]),
    "tokens": (FusedRNN, "forward_tokens", {"batch_first": True}, ["ids"]),
    "model": (CharRNN, "forward", {}, ["ids"]),
    "loss": (CharRNN, "loss", {}, ["ids", "ids"]),
    "head": (Head, "forward", {}, ["h", "ids"]),
}
SIZES_OF = {FusedRNN: (F_IN, H), CharRNN: (V, H), Head: (H, V)}


def check_alike(found, expected, parameters):
    """Results and their gradients."""
    torch.testing.assert_close(found, expected)
    losses = [sum(y.sin().sum() for y in (of if isinstance(of, tuple) else (of,))) for of in (found, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters) for loss in losses))


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_every_number_of_steps_and_sequences(device, case):
    """Forward and backward by the kernels, which are operators to the compiler."""
    kind, method, options, inputs = CASES[case]
    if kind is not Head:
        options = {**options, "backend": "triton" if device.type == "cuda" else "native"}
    module = kind(*SIZES_OF[kind], device=device, **options)
    f, made = module if method == "forward" else getattr(module, method), None
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in SIZES:
        drawn = {"x": torch.randn(B, T, F_IN), "h": torch.randn(B, T, H), "ids": torch.randint(F_IN, (B, T))}
        arguments = [drawn[name].to(device) for name in inputs]
        check_alike(compiled(*arguments), f(*arguments), list(module.parameters()))
        made = made or graphs()
        assert graphs() == made, f"compiled anew for {B} sequences of {T} steps"


def _step(model, parameters):
    """Forward, loss, backward, clip and plain SGD."""

    def step(X, Y):
        loss, _ = model.loss(X, Y)
        loss.backward()
        norm = clip_grad_norm_(parameters, 0.1)
        with torch.no_grad():
            for p in parameters:
                p.sub_(p.grad, alpha=0.5)
                p.grad = None
        return loss.detach(), norm

    return step


def test_a_whole_training_step_in_one_graph(backend, device):
    eager = CharRNN(V, H, backend=backend, device=device)
    model = copy.deepcopy(eager)
    parameters = [list(m.parameters()) for m in (model, eager)]
    batches = [torch.randint(V, (3, 6), device=device) for _ in range(4)]
    with config.patch(trace_autograd_ops=True):
        compiled = torch.compile(_step(model, parameters[0]), fullgraph=True, backend="aot_eager")
        for X in batches:
            torch.testing.assert_close(compiled(X, X.roll(1, 1)), _step(eager, parameters[1])(X, X.roll(1, 1)))
    torch.testing.assert_close(parameters[0], parameters[1])
    assert graphs() <= 2  # the second after the first step, whose gradients are the first that there are


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_training_step_by_inductor(device, mode):
    """Loss and gradients compiled, for any number of steps and sequences; on a GPU as CUDA graphs by the mode."""
    model = CharRNN(V, H, device=device)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=True, mode=mode)
    parameters = list(model.parameters())
    for B, T in SIZES:
        X = torch.randint(V, (B, T), device=device)
        check_alike(compiled(X, X.roll(1, 1)), model.loss(X, X.roll(1, 1)), parameters)


class Tagger(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(F_IN, H, **options)

    def forward(self, x, lengths, enforce_sorted, hx=None):
        output, h_n = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted), hx)
        return output.data, h_n


@pytest.mark.parametrize(
    ("state", "enforce_sorted", "options"),
    [(False, False, {}), (False, True, {}), (True, True, {}), (False, True, {"checkpoint_steps": 2})],
    ids=str,
)
def test_packed_input_breaks_no_graph(state, enforce_sorted, options):
    """But at pack_padded_sequence, which the compiler leaves out; at torch.nn.RNN it breaks once more, or gives up."""
    ours, theirs = Tagger(FusedRNN, backend="native", **options), Tagger(nn.RNN)
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="aot_eager", dynamic=True)
    for lengths in ([6, 3, 2], [7, 7, 4, 2]):
        lengths = torch.tensor(lengths if enforce_sorted else lengths[::-1])
        x, hx = torch.randn(int(lengths.max()), len(lengths), F_IN), torch.randn(1, len(lengths), H)
        assert_same(compiled, theirs, x, lengths, enforce_sorted, hx if state else None)
    assert graphs() == 1
    assert all("pack_padded_sequence" in reason for reason in counters["graph_break"]), counters["graph_break"]


@pytest.mark.parametrize(("packed", "options"), [(False, {}), (True, {}), (True, {"checkpoint_steps": 4})], ids=str)
def test_compiled_autograd(packed, options):
    """The backward pass read by the compiler: torch.nn.RNN's gradients, and no more graphs than of its pass."""
    torch.manual_seed(0)
    x, lengths = torch.randn(6, 3, F_IN), torch.tensor([6, 3, 2])
    found = []
    for kind, own in ((FusedRNN, options), (nn.RNN, {})):
        torch.manual_seed(1)
        rnn = kind(F_IN, H, **own)
        torch._dynamo.reset()
        counters.clear()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=False)):
            output, h_n = rnn(pack_padded_sequence(x, lengths) if packed else x)
            (F.softplus(output.data if packed else output).sum() + h_n.sin().sum()).backward()
        breaks = sum(counters["graph_break"].values())
        found.append(([p.grad for p in rnn.parameters()], graphs(), breaks))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:] == (1, 0)


def check_compiled_autograd(loss, leaves):
    """The gradients of loss() in one graph."""
    expected = torch.autograd.grad(loss(), leaves)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss().backward()
    torch.testing.assert_close([x.grad for x in leaves], list(expected))
    assert (graphs(), sum(counters["graph_break"].values())) == (1, 0)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "embedding": 4}], ids=str)
def test_compiled_autograd_of_the_language_models_loss(backend, device, options):
    model, ids = CharRNN(V, H, backend=backend, device=device, **options), torch.randint(V, (3, 6), device=device)
    check_compiled_autograd(lambda: model.loss(ids, ids)[0], list(model.parameters()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kernels", ["native", "triton"])
def test_compiled_autograd_of_the_loss(kernels, device, monkeypatch, reduction):
    monkeypatch.setenv("CHARRNN_BACKEND", kernels)
    if kernels == "native":
        device = torch.device("cpu")
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((9, H), (V, H), (V,))]
    target = torch.randint(V, (9,), device=device)
    target[2] = -100

    def loss():
        h, weight, bias = leaves
        return linear_cross_entropy(h, weight, target, linear_bias=bias, reduction=reduction).sin().sum()

    check_compiled_autograd(loss, leaves)
