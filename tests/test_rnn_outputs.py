"""What FusedRNN hands out lies in memory as torch.nn.RNN's results do, whatever the input's strides: the same strides,
views where torch has views, dropout's masks, gradients; and it may be changed in place.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from rnn_modules import LAYOUTS, differentiated, drawn, pair, plain
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

STEPS, BATCH, FEATURES, HIDDEN = 5, 3, 4, 7

OPTIONS = [
    {"num_layers": layers, "bidirectional": both, "dropout": dropout}
    for layers, dropout in ((1, 0.0), (2, 0.0), (3, 0.5))
    for both in (False, True)
]


def pairs(backend, device, batch_first=False, dropout=True):
    """Both modules, input and state: of all OPTIONS, or on Triton's slow interpreter of the two furthest apart."""
    for options in [OPTIONS[0], OPTIONS[5]] if backend == "triton" and device.type == "cpu" else OPTIONS:
        if dropout or not options["dropout"]:
            modules = pair(FEATURES, HIDDEN, backend=backend, device=device, batch_first=batch_first, **options)
            yield modules, *drawn(modules[1], STEPS, BATCH)


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.is_contiguous(), tensor._is_view(), tensor.storage_offset()


def check_alike(modules, call, *leaves):
    """What call(module) gives of torch's module and then of ours: layouts, values, random numbers and gradients."""
    found = []
    for module in modules:
        torch.manual_seed(1)
        found.append([*differentiated(module, call(module), *leaves), torch.rand(3)])
    assert [described(x) for x in found[1][:2]] == [described(x) for x in found[0][:2]]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense(backend, device, layout, batch_first):
    change = LAYOUTS[layout]
    for modules, x, h0 in pairs(backend, device, batch_first, device.type == "cpu"):  # cuDNN draws masks of its own
        check_alike(modules, lambda module, x=x: module(change(x)), x)
        if modules[0].num_layers == 1:  # the state has strides too
            check_alike(modules, lambda module, x=x, h0=h0: module(x, change(h0)), x, h0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(STEPS,), (1, 1), (1, BATCH), (STEPS, 1), (STEPS, 0)], ids=str)
def test_unbatched_and_sizes_of_one_and_none(backend, device, shape, batch_first):
    shape = shape[::-1] if batch_first else shape
    for modules, *_ in pairs(backend, device, batch_first, dropout=False):
        x = torch.randn(*shape, FEATURES, device=device, requires_grad=True)
        check_alike(modules, lambda module, x=x: module(x), x)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("layout", ["plain", "first two turned"])
def test_packed(backend, device, layout, enforce_sorted, batch_first):
    def call(module, x):
        lengths = [STEPS, 4, 2] if enforce_sorted else [2, STEPS, 4]
        given = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=enforce_sorted)
        return module(given._replace(data=LAYOUTS[layout](given.data)))

    for modules, x, _ in pairs(backend, device, batch_first, device.type == "cpu"):  # cuDNN draws masks of its own
        check_alike(modules, functools.partial(call, x=x), x)


TOKENS = {
    "plain": lambda ids, _: ids,
    "first two turned": lambda ids, _: LAYOUTS["first two turned"](ids),
    "every other step": lambda ids, _: LAYOUTS["every other step"](ids),
    "one step for all": lambda ids, _: LAYOUTS["one step for all"](ids),
    "int32": lambda ids, _: ids.int(),
    "unbatched": lambda ids, batch_first: ids[0] if batch_first else ids[:, 0],
    "packed": lambda ids, batch_first: pack_padded_sequence(ids, [2, STEPS, 4], batch_first, enforce_sorted=False),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", TOKENS)
def test_tokens(backend, device, form, batch_first):
    for modules, x, h0 in pairs(backend, device, batch_first, device.type == "cpu"):  # cuDNN draws masks of its own
        ids = TOKENS[form](x.argmax(-1), batch_first)
        h0 = h0[:, 0] if form == "unbatched" else h0
        check_alike(modules, lambda module, ids=ids, h0=h0: module.forward_tokens(ids, h0), h0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, device, context, batch_first):
    for (theirs, ours), x, _ in pairs(backend, device, batch_first, dropout=False):
        with context():
            found, expected = ours(x), theirs(x)
        assert [described(y) for y in found] == [described(y) for y in expected]
        torch.testing.assert_close(found, expected)


# ---- changes in place ---------------------------------------------------------------------------------------------

EDITS = {
    "zero some steps": lambda y: y[3:].zero_(),
    "set some sequences": lambda y: y.__setitem__((slice(None), 1), 0.5),
    "relu_": torch.relu_,
    "relu(inplace)": lambda y: F.relu(y, inplace=True),
    "dropout(inplace)": lambda y: F.dropout(y, 0.5, inplace=True),
    "add a parameter": lambda y: y.add_(nn.Parameter(torch.ones((), device=y.device))),
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 0.0),
    "transpose_": lambda y: y.transpose_(0, 1),
}
FORMS = {
    "one layer": {},
    "batch first": {"batch_first": True},
    "two layers both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def pair_of(form, backend, device):
    return pair(FEATURES, HIDDEN, backend=backend, device=device, **FORMS[form])


def check_backward(output, module):
    """Through an output that was changed; only a backward pass that reads what was there refuses."""
    if module.backend == "torch":
        torch.autograd.grad(output.sum(), list(module.parameters()))
    else:
        with pytest.raises(RuntimeError, match=r"output of an Elman RNN was changed in place .*output\.clone\(\)"):
            torch.autograd.grad(output.sum(), list(module.parameters()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("graph", [True, False])
def test_outputs_may_be_changed_in_place(backend, device, graph, edit, form):
    """At once and without an error."""
    modules, results = pair_of(form, backend, device), []
    x = torch.randn(STEPS, STEPS, FEATURES, device=device)
    for module in modules:
        with torch.set_grad_enabled(graph):
            output, h_n = module(x)
        torch.manual_seed(2)
        EDITS[edit](output)
        h_n.mul_(2)
        results.append((output, h_n))
    torch.testing.assert_close(results[1], results[0])
    assert output.requires_grad == results[0][0].requires_grad
    if not graph and output.requires_grad:
        output.sum().backward()
    elif graph and edit != "transpose_":
        check_backward(output, module)


@pytest.mark.parametrize("form", FORMS)
def test_states_may_be_changed_and_outputs_detached_in_place(backend, device, form):
    x = torch.randn(STEPS, STEPS, FEATURES, device=device)
    grads = []
    for module in pair_of(form, backend, device):
        _, h_n = module(x)
        h_n.mul_(2)
        grads.append(torch.autograd.grad(h_n.sin().sum(), list(module.parameters())))
        output, _ = module(x)
        assert not output.detach_().requires_grad
    torch.testing.assert_close(grads[1], grads[0])


def test_a_frozen_modules_output_may_be_changed_before_backward(backend, device):
    """Nothing of the module needs a gradient, so backward does not read its output."""
    _, ours = pair_of("one layer", backend, device)
    output, _ = ours.requires_grad_(False)(torch.randn(STEPS, BATCH, FEATURES, device=device))
    scale = nn.Parameter(torch.ones((), device=device))
    output *= scale
    output.sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("form", ["packed", "tokens", "packed tokens"])
def test_packed_outputs_and_those_of_tokens_may_be_changed_in_place(backend, device, form):
    _, ours = pair_of("one layer", backend, device)
    x = torch.randn(STEPS, BATCH, FEATURES, device=device)
    if "tokens" in form:
        x = x.argmax(-1)
    if "packed" in form:
        x = pack_padded_sequence(x, [STEPS, 4, 2])

    def output_of():
        return plain(ours.forward_tokens(x) if "tokens" in form else ours(x))[0]

    with torch.no_grad():
        output_of().add_(nn.Parameter(torch.ones((), device=device)))
    output = output_of()
    assert not output._is_view()
    check_backward(output.relu_(), ours)
    output_of().detach_()
