"""checkpoint_steps: the same outputs and gradients from the states of every k-th step alone."""

import copy
import pickle

import pytest
import torch
from rnn_modules import drawn, gradients, loss_of, pair, plain
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from charrnn_fast import FusedRNN, replace_rnn

T, B, F_IN, H = 11, 3, 4, 6
LENGTHS = torch.tensor([7, 11, 2])
FORMS = {
    "plain": {},
    "deep": {"num_layers": 3, "nonlinearity": "relu", "dropout": 0.4},
    "both ways": {"bidirectional": True},
    "both ways, deep": {"bidirectional": True, "num_layers": 2, "dropout": 0.3, "bias": False},
    "batch first": {"batch_first": True, "num_layers": 2, "dropout": 1.0},
}


def both(backend="native", device="cpu", steps=3, dtype=torch.float64, **options) -> list[FusedRNN]:
    """With all states kept, and with every ``steps``-th."""
    options |= {"backend": backend, "device": device, "dtype": dtype}
    return [pair(F_IN, H, checkpoint_steps=kept, **options)[1] for kept in (None, steps)]


def evaluated(rnn: FusedRNN, kind: str, with_state: bool, of=loss_of) -> tuple[list[Tensor], list[Tensor]]:
    """Results; gradients of a loss of them."""
    x, hx = drawn(rnn, T, B, with_state)
    torch.manual_seed(3)  # of dropout
    if kind == "tokens":
        x = x.argmax(-1)
        results = rnn.forward_tokens(x, hx)
    elif kind == "packed":
        results = plain(rnn(pack_padded_sequence(x, LENGTHS, rnn.batch_first, enforce_sorted=False), hx))
    else:
        results = rnn(x, hx)
    leaves = [leaf for leaf in (x, hx) if leaf is not None and leaf.requires_grad]
    return list(results), list(torch.autograd.grad(of(results), [*leaves, *rnn.parameters()]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["dense", "tokens", "packed"])
def test_same_outputs_and_gradients(backend, device, form, kind):
    steps, with_state = {"dense": 3, "tokens": 4, "packed": 5}[kind], kind != "dense"
    (outputs, gradients), (cut_outputs, cut_gradients) = (
        evaluated(rnn, kind, with_state) for rnn in both(backend, device, steps, **FORMS[form])
    )
    torch.testing.assert_close(cut_outputs, outputs, rtol=0, atol=0)
    torch.testing.assert_close(cut_gradients, gradients)


@pytest.mark.parametrize("steps", [1, T - 1, T, 1000])
@pytest.mark.parametrize("form", ["deep", "both ways, deep"])
def test_any_number_of_steps(steps, form):
    (_, expected), (_, found) = (evaluated(rnn, "packed", True) for rnn in both(steps=steps, **FORMS[form]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("of", [lambda results: results[0][2].sum(), lambda results: results[1][0].sin().sum()])
@pytest.mark.parametrize("form", ["plain", "both ways"])
def test_a_loss_of_one_result(of, form):
    (_, expected), (_, found) = (evaluated(rnn, "packed", True, of) for rnn in both(**FORMS[form]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "bias_ih_l1", "input and state", "all but the input"])
def test_what_needs_no_gradient_gets_none(frozen):
    found = []
    for rnn in both(num_layers=2):
        x, hx = drawn(rnn, T, B)
        for name, parameter in rnn.named_parameters():
            parameter.requires_grad_(frozen not in (name, "all but the input"))
        if frozen == "input and state":
            x, hx = x.detach(), hx.detach()
        loss_of(rnn(x, hx)).backward()
        found.append([p.grad for p in (x, hx, *rnn.parameters())])
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    torch.testing.assert_close(*([g for g in grads if g is not None] for grads in found))


def check_derivatives(rnn: FusedRNN) -> None:
    given = drawn(rnn, 3, 2)
    assert torch.autograd.gradcheck(lambda x, hx: rnn(x, hx), given, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, hx: rnn(x, hx), given, fast_mode=True)


def test_gradcheck_and_second_derivatives(backend, device):
    check_derivatives(FusedRNN(2, 3, backend=backend, device=device, dtype=torch.float64, checkpoint_steps=2))


def test_gradcheck_and_second_derivatives_of_layers_with_two_directions():
    check_derivatives(FusedRNN(2, 3, 2, bidirectional=True, bias=False, dtype=torch.float64, checkpoint_steps=1))


def kept_bytes(rnn: FusedRNN, x: Tensor, of) -> int:
    """What autograd holds when forward is done, parameters and input aside: each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *rnn.parameters())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = of(*rnn(x))
    assert graph.grad_fn is not None
    return sum(found.values())


@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"num_layers": 3, "bidirectional": True}], ids=str)
def test_what_is_kept_is_the_states_of_every_kth_step(backend, device, options):
    steps, total = (50, 400) if backend != "triton" else (5, 20)
    whole, cut = both(backend, device, steps, torch.float32, **options)
    x = torch.randn(total, 2, F_IN, device=device)
    cells = options.get("num_layers", 1) * (2 if "bidirectional" in options else 1)
    a_state, of = 2 * H * 4, lambda output, h_n: h_n.sum()
    assert kept_bytes(cut, x, of) == cells * (total // steps) * a_state
    if backend != "torch":  # whose own operators keep more
        assert kept_bytes(whole, x, of) == cells * total * a_state


def test_dropout_keeps_a_bit_for_each_number():
    total, rnn = 400, both(steps=50, dtype=torch.float32, num_layers=2, dropout=0.5)[1]
    x = torch.randn(total, 2, F_IN)
    states = 2 * (total // 50) * 2 * H * 4
    assert kept_bytes(rnn, x, lambda output, h_n: h_n.sum()) == states + total * 2 * 1  # 6 bits in a byte


def test_the_output_may_be_changed_in_place():
    rnn = both()[1]
    output, _ = rnn(drawn(rnn, T, B)[0])
    output.mul_(2).sum().backward()


def test_under_autocast():
    found = []
    for rnn in both(dtype=torch.float32, num_layers=2):
        with torch.autocast("cpu", torch.bfloat16):
            result = rnn(drawn(rnn, T, B)[0])
        assert result[0].dtype == torch.bfloat16
        found.append((result[0], gradients(rnn, result)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.05, atol=0.2)


@pytest.mark.filterwarnings("ignore")
def test_transforms_and_exported_programs_are_as_without():
    whole, cut = both()
    x = drawn(whole, T, B)[0].detach()
    parameters = dict(whole.named_parameters())

    def of(rnn):
        return torch.func.grad(lambda p: torch.func.functional_call(rnn, p, (x,))[0].sum())(parameters)

    torch.testing.assert_close(of(cut), of(whole))
    program = torch.export.export(cut, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "checkpointed" not in str(program.graph)
    for made in (torch.jit.trace(cut, (x,)), torch.jit.script(nn.Sequential(cut))):
        torch.testing.assert_close(made(x), whole(x))


def test_it_is_an_option_of_the_module():
    rnn = FusedRNN(3, 4, checkpoint_steps=64)
    assert repr(rnn) == "FusedRNN(3, 4, checkpoint_steps=64)"
    assert rnn.state_dict().keys() == FusedRNN(3, 4).state_dict().keys()
    for copied in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert copied.checkpoint_steps == 64
    swapped = replace_rnn(nn.RNN(3, 4))
    assert swapped.checkpoint_steps is None
    old = FusedRNN(3, 4)
    del old.__dict__["checkpoint_steps"]  # as it was saved before there was one
    assert old(torch.randn(9, 2, 3))[0].shape == (9, 2, 4)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "8"])
def test_what_is_no_number_of_steps(steps):
    with pytest.raises(ValueError, match="checkpoint_steps: expected a positive number of steps or None, got"):
        FusedRNN(3, 4, checkpoint_steps=steps)
    rnn = FusedRNN(3, 4)
    rnn.checkpoint_steps = steps
    with pytest.raises(ValueError, match="checkpoint_steps"):
        rnn(torch.randn(9, 2, 3))
