"""What FusedRNN hands out lies in memory as torch.nn.RNN's results do, whatever the input's strides: the same strides,
views where torch has views, dropout's masks, gradients; and it may be changed in place.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from charrnn_fast import FusedRNN

STEPS, BATCH, FEATURES, HIDDEN = 5, 3, 4, 7

# From contiguous values to the same values behind other strides.
LAYOUTS = {
    "plain": lambda x: x,
    "first two turned": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last two turned": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "all turned": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every other column": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "every other step": lambda x: torch.stack([x, -x], dim=1)[:, 0],
    "columns of a wider tensor": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "one step for all": lambda x: x[:1].expand(x.shape),
    "one sequence for all": lambda x: x[:, :1].expand(x.shape),
    "one column for all": lambda x: x[..., :1].expand(x.shape),
    "an offset": lambda x: torch.cat([x[:1], x])[1:],
}
OPTIONS = [
    {"num_layers": layers, "bidirectional": both, "dropout": dropout}
    for layers, dropout in ((1, 0.0), (2, 0.0), (3, 0.5))
    for both in (False, True)
]


def options_for(backend, dropout=True):
    """All of OPTIONS, or on Triton's slow interpreter the two that are furthest apart."""
    chosen = [OPTIONS[0], OPTIONS[5]] if backend == "triton" and not torch.cuda.is_available() else OPTIONS
    return chosen if dropout else [options for options in chosen if not options["dropout"]]


def pair(backend, device, **options):
    torch.manual_seed(0)
    theirs = nn.RNN(FEATURES, HIDDEN, **options).to(device)
    ours = FusedRNN(FEATURES, HIDDEN, backend=backend, **options).to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def data_of(output):
    return output.data if isinstance(output, PackedSequence) else output


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.is_contiguous(), tensor._is_view(), tensor.storage_offset()


def check_alike(theirs, ours, call):
    """call(module) -> (output, h_n), the input's leaf or None; same layouts, values, random numbers and gradients."""
    found = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        (output, h_n), leaf = call(module)
        output = data_of(output)
        leaves = [*module.parameters(), *([] if leaf is None else [leaf])]
        grads = torch.autograd.grad(output.sin().sum() + h_n.square().sum(), leaves)
        found.append((output, h_n, torch.rand(3), *grads))
    assert [described(x) for x in found[1][:2]] == [described(x) for x in found[0][:2]]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense(backend, device, layout, batch_first):
    for options in options_for(backend, dropout=device.type == "cpu"):  # cuDNN draws masks of its own
        theirs, ours = pair(backend, device, batch_first=batch_first, **options)
        leaf = torch.randn(
            (BATCH, STEPS, FEATURES) if batch_first else (STEPS, BATCH, FEATURES), device=device, requires_grad=True
        )
        check_alike(theirs, ours, lambda module, leaf=leaf: (module(LAYOUTS[layout](leaf)), leaf))
        if options["num_layers"] == 1:  # the state has strides too
            h0 = torch.randn(2 if options["bidirectional"] else 1, BATCH, HIDDEN, device=device)
            check_alike(theirs, ours, lambda module, leaf=leaf, h0=h0: (module(leaf, LAYOUTS[layout](h0)), leaf))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(STEPS,), (1, 1), (1, BATCH), (STEPS, 1), (STEPS, 0)], ids=str)
def test_unbatched_and_sizes_of_one_and_none(backend, device, shape, batch_first):
    shape = shape[::-1] if batch_first else shape
    for options in options_for(backend, dropout=False):
        theirs, ours = pair(backend, device, batch_first=batch_first, **options)
        leaf = torch.randn(*shape, FEATURES, device=device, requires_grad=True)
        check_alike(theirs, ours, lambda module, leaf=leaf: (module(leaf), leaf))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed(backend, device, enforce_sorted, batch_first):
    for options in options_for(backend, dropout=device.type == "cpu"):  # cuDNN draws masks of its own
        theirs, ours = pair(backend, device, batch_first=batch_first, **options)
        leaf = torch.randn(
            (BATCH, STEPS, FEATURES) if batch_first else (STEPS, BATCH, FEATURES), device=device, requires_grad=True
        )
        lengths = [STEPS, 4, 2] if enforce_sorted else [2, STEPS, 4]

        def call(module, layout, leaf=leaf, lengths=lengths):
            given = pack_padded_sequence(leaf, lengths, batch_first=batch_first, enforce_sorted=enforce_sorted)
            return module(given._replace(data=LAYOUTS[layout](given.data))), leaf

        for layout in ("plain", "first two turned"):
            check_alike(theirs, ours, functools.partial(call, layout=layout))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", ["plain", "first two turned", "every other step", "one step for all"])
def test_tokens(backend, device, layout, batch_first):
    for options in options_for(backend, dropout=device.type == "cpu"):  # cuDNN draws masks of its own
        theirs, ours = pair(backend, device, batch_first=batch_first, **options)
        ids = LAYOUTS[layout](torch.randint(FEATURES, (BATCH, STEPS) if batch_first else (STEPS, BATCH), device=device))

        def call(module, ids=ids):
            fused = isinstance(module, FusedRNN)
            return (module.forward_tokens(ids) if fused else module(F.one_hot(ids, FEATURES).float())), None

        check_alike(theirs, ours, call)


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_gradients(backend, device, batch_first):
    for context in (torch.no_grad, torch.inference_mode):
        for options in options_for(backend, dropout=False):
            theirs, ours = pair(backend, device, batch_first=batch_first, **options)
            x = torch.randn((BATCH, STEPS, FEATURES) if batch_first else (STEPS, BATCH, FEATURES), device=device)
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edit", EDITS)
def test_outputs_may_be_changed_in_place(backend, device, edit, form):
    """At once and without an error; only a backward pass that reads what was there refuses."""
    theirs, ours = pair(backend, device, **FORMS[form])
    x = torch.randn(STEPS, STEPS, FEATURES, device=device)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(2)
        output, h_n = module(x)
        EDITS[edit](output)
        h_n.mul_(2)
        results.append((output, h_n))
    torch.testing.assert_close(results[1], results[0])
    output, _ = results[1]
    if edit == "transpose_":
        return
    if backend == "torch" and device.type == "cpu":
        torch.autograd.grad(output.sum(), list(ours.parameters()))
    else:
        with pytest.raises(RuntimeError, match=r"output of an Elman RNN was changed in place .*output\.clone\(\)"):
            torch.autograd.grad(output.sum(), list(ours.parameters()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edit", EDITS)
def test_outputs_without_gradients_may_be_changed_in_place(backend, device, edit, form):
    theirs, ours = pair(backend, device, **FORMS[form])
    x = torch.randn(STEPS, STEPS, FEATURES, device=device)
    results = []
    for module in (theirs, ours):
        with torch.no_grad():
            output, _ = module(x)
        torch.manual_seed(2)
        EDITS[edit](output)
        results.append(output)
    torch.testing.assert_close(results[1], results[0])
    assert results[1].requires_grad == results[0].requires_grad
    if results[1].requires_grad:
        results[1].sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_states_may_be_changed_and_outputs_detached_in_place(backend, device, form):
    theirs, ours = pair(backend, device, **FORMS[form])
    x = torch.randn(STEPS, STEPS, FEATURES, device=device)
    grads = []
    for module in (theirs, ours):
        _, h_n = module(x)
        h_n.mul_(2)
        grads.append(torch.autograd.grad(h_n.sin().sum(), list(module.parameters())))
        output, _ = module(x)
        assert not output.detach_().requires_grad
    torch.testing.assert_close(grads[1], grads[0])


def test_a_frozen_modules_output_may_be_changed_before_backward(backend, device):
    """Nothing of the module needs a gradient, so backward does not read its output."""
    _, ours = pair(backend, device)
    output, _ = ours.requires_grad_(False)(torch.randn(STEPS, BATCH, FEATURES, device=device))
    scale = nn.Parameter(torch.ones((), device=device))
    output *= scale
    output.sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("form", ["packed", "tokens", "packed tokens"])
def test_packed_outputs_and_those_of_tokens_may_be_changed_in_place(backend, device, form):
    _, ours = pair(backend, device)
    x = torch.randn(STEPS, BATCH, FEATURES, device=device)
    if "tokens" in form:
        x = x.argmax(-1)
    if "packed" in form:
        x = pack_padded_sequence(x, [STEPS, 4, 2])
    call = ours.forward_tokens if "tokens" in form else ours
    with torch.no_grad():
        data_of(call(x)[0]).add_(nn.Parameter(torch.ones((), device=device)))
    output, _ = call(x)
    data = data_of(output)
    assert not data._is_view()
    data.relu_()
    if backend == "torch":
        torch.autograd.grad(data.sum(), list(ours.parameters()))
    else:
        with pytest.raises(RuntimeError, match="output of an Elman RNN was changed in place"):
            torch.autograd.grad(data.sum(), list(ours.parameters()))
    data_of(call(x)[0]).detach_()
