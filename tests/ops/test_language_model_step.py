"""ops/language_model_step.py: a whole training step in three launches, against the reference's and torch's."""

import copy

import pytest
import torch

from charrnn_fast.kernels.triton.launch import Launch
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.ops import language_model_step as operation
from charrnn_fast.ops.language_model_step import LanguageModelStep, Weights, evaluate, positions, why_not, windows
from charrnn_fast.reference.language_model import RNNLM
from charrnn_fast.reference.training import SGD, Adam, train_batches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE.type == "cpu":  # where only a test asks for the kernels
        monkeypatch.setenv("CHARRNN_BACKEND", "triton")


def make(V, H, *, nonlinearity="tanh", second_bias=False, seed=0) -> tuple[CharRNN, RNNLM]:
    """A model on the device, and in fp64 the reference's form of it."""
    torch.manual_seed(seed)
    model = CharRNN(V, H, nonlinearity=nonlinearity, second_bias=second_bias)
    net = copy.deepcopy(model).double().to_reference()
    return model.to(DEVICE), net


def weights_of(model: CharRNN) -> Weights:
    rnn, head = model.rnn, model.head
    return Weights(rnn.weight_ih_l0, rnn.weight_hh_l0, head.weight, rnn.bias_ih_l0, rnn.bias_hh_l0, head.bias)


def parameters_of(net: RNNLM) -> list[torch.Tensor]:
    """In the order of Weights, as CharRNN has them."""
    (cell,) = net.cells
    b_hh = torch.zeros_like(cell.b_h) if cell.b_hh is None else cell.b_hh
    return [p.detach() for p in (cell.W_xh.T, cell.W_hh.T, net.W_hq.T, cell.b_h, b_hh, net.b_q)]


def optimizers(model, net, adam: bool, lr: float):
    trained = [p for p in model.parameters() if p.requires_grad]
    if adam:
        return torch.optim.Adam(trained, lr, fused=DEVICE.type == "cuda"), Adam(net.parameters(), lr)
    return torch.optim.SGD(trained, lr), SGD(net.parameters(), lr)


def corpus_of(V, length=120) -> torch.Tensor:
    torch.manual_seed(V)
    return torch.randint(V, (length,)).to(torch.uint8).to(DEVICE)


def gathered(corpus, starts, T):
    window = corpus[starts[:, None] + torch.arange(T + 1, device=DEVICE)].long().cpu()
    return window[:, :-1], window[:, 1:]


@pytest.mark.parametrize(
    ("V", "H", "B", "T", "nonlinearity", "adam", "clip", "carried", "second_bias"),
    [
        (28, 32, 4, 3, "tanh", False, 1.0, False, False),
        (28, 20, 4, 5, "relu", True, None, True, True),
        (97, 9, 2, 9, "tanh", True, 0.05, True, False),
        (5, 33, 3, 1, "relu", False, 0.05, False, True),
        (2, 1, 1, 11, "tanh", False, None, True, True),
        (7, 70, 1, 10, "tanh", False, 1.0, True, False),
    ],
)
def test_steps_are_the_references(V, H, B, T, nonlinearity, adam, clip, carried, second_bias):
    """Loss, state and every parameter after each of two steps, from a corpus and where its windows begin."""
    model, net = make(V, H, nonlinearity=nonlinearity, second_bias=second_bias)
    ours, theirs = optimizers(model, net, adam, 0.01 if adam else 0.5)
    weights, corpus = weights_of(model), corpus_of(V)
    assert why_not(weights, ours) is None
    starts = torch.randint(120 - 2 * T - 1, (B,)).to(DEVICE)
    step = LanguageModelStep(weights, ours, clip, nonlinearity=nonlinearity)
    places = [starts, starts + T]
    batches = [gathered(corpus, s, T) for s in places]
    state = torch.zeros(B, H, device=DEVICE) if carried else None
    expected = train_batches(net, batches, theirs, clip, carry_state=carried)
    for s in places:
        known = evaluate(weights, positions(corpus, s, T), state, nonlinearity=nonlinearity)
        loss, h_n = step(positions(corpus, s, T), state, h_n=state)
        torch.testing.assert_close((loss, h_n), known, rtol=1e-6, atol=1e-6)
        assert abs(float(loss) - float(next(expected))) < 2e-6 * float(loss)
        state = h_n if carried else None
        for p, exact in zip(weights, parameters_of(net), strict=True):
            # Adam divides a gradient by its own size, however small that is.
            torch.testing.assert_close(p.detach().double().cpu(), exact, rtol=1e-5, atol=2e-5 if adam else 2e-6)
    assert all(p.grad is None for p in model.parameters())


def test_norm_and_gradients_are_autograds():
    from charrnn_fast.kernels.triton.language_model import language_model_backward, language_model_forward

    model, _ = make(28, 20, second_bias=True)
    X, Y = torch.randint(28, (3, 7), device=DEVICE), torch.randint(28, (3, 7), device=DEVICE)
    Y[1, 2] = -100
    h0, weights = torch.randn(3, 20, device=DEVICE), weights_of(model)
    loss, h_n, sums = language_model_forward(weights, windows(X, Y), h0)
    grads = language_model_backward(torch.full((), 0.5, device=DEVICE), weights, sums)
    exact = CharRNN(28, 20).double()
    exact.load_state_dict(model.state_dict())
    logits, state = exact(X.cpu(), h0[None].double().cpu())
    right = torch.nn.functional.cross_entropy(logits.flatten(0, 1), Y.cpu().flatten())
    right.backward()
    assert abs(float(loss) - float(right.detach())) < 1e-6
    torch.testing.assert_close(h_n.double().cpu(), state[0].detach(), rtol=0, atol=1e-6)
    for ours, p in zip(grads, weights_of(exact), strict=True):
        torch.testing.assert_close(2 * ours.double().cpu(), p.grad, rtol=1e-5, atol=1e-7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = LanguageModelStep(weights, optimizer, 0.01)
    step(windows(X.to(torch.int32), Y.to(torch.int16)), h0)
    right = torch.stack([p.grad.norm() for p in exact.parameters()]).norm()
    assert abs(float(step.norm) - float(right)) < 1e-6


def test_ids_that_are_none():
    model, _ = make(5, 4)
    X = torch.tensor([[1, 7, -1, 2]], device=DEVICE)
    Y, weights = X.clamp(0, 4), weights_of(model)
    loss, _ = evaluate(weights, windows(X, Y))
    one_hot = torch.nn.functional.one_hot(X.clamp(0, 4), 5) * ((X >= 0) & (X < 5))[..., None]
    right = torch.nn.functional.cross_entropy(model.head(model.rnn(one_hot.float())[0]).flatten(0, 1), Y.flatten())
    assert abs(float(loss) - float(right.detach())) < 1e-6
    assert evaluate(weights, windows(Y, X))[0].isnan()
    assert evaluate(weights, windows(Y, torch.full_like(Y, -100)))[0].isnan()


class Recorder:
    """Stands for launches: writes down which they are."""

    def __init__(self, monkeypatch):
        self.kernels = []
        call = Launch.__call__

        def recorded(launch, grid, device, *arguments):
            self.kernels.append(launch.kernel.fn.__name__)
            call(launch, grid, device, *arguments)

        monkeypatch.setattr(Launch, "__call__", recorded)


def operations_of(call) -> set[str]:
    """ATen's, but those that make a tensor or a view of one and launch nothing."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = set()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Mode():
        call()
    return found - {"empty", "empty_like", "slice", "detach"}


@pytest.mark.parametrize("adam", [False, True])
def test_a_step_is_three_launches_and_no_operation(monkeypatch, adam):
    model, net = make(28, 8)
    ours, _ = optimizers(model, net, adam, 0.1)
    step, corpus = LanguageModelStep(weights_of(model), ours, 1.0), corpus_of(28)
    batch, state = positions(corpus, torch.tensor([3, 50], device=DEVICE), 2), torch.zeros(2, 8, device=DEVICE)
    step(batch, state, h_n=state)  # makes Adam's state
    launches = Recorder(monkeypatch)
    step(batch, state, h_n=state)
    names = ["language_model_kernel", "language_model_sums_kernel", "language_model_update_kernel"]
    assert launches.kernels == names
    launches.kernels.clear()
    evaluate(step.weights, batch, state)
    assert launches.kernels == names[:2]
    monkeypatch.setattr(Launch, "__call__", lambda *arguments: None)
    assert operations_of(lambda: step(batch, state, h_n=state)) == set()


def test_a_learning_rate_on_the_device_is_read_there():
    model, _ = make(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.0, device=DEVICE))
    step, batch = (
        LanguageModelStep(weights_of(model), optimizer, None),
        positions(corpus_of(5), torch.tensor([1]).to(DEVICE), 3),
    )
    before = model.head.weight.clone()
    step(batch)
    assert torch.equal(model.head.weight, before)
    optimizer.param_groups[0]["lr"].fill_(1.0)
    step(batch)
    assert not torch.equal(model.head.weight, before)


def test_why_not_says_why():
    model, _ = make(5, 4)
    weights, trained = weights_of(model), [p for p in model.parameters() if p.requires_grad]
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    assert why_not(weights) is None and why_not(weights, sgd(trained, 1.0)) is None
    for optimizer, reason in (
        (sgd(trained, 1.0, momentum=0.9), "SGD has momentum"),
        (adam(trained, 1.0, weight_decay=0.1), "Adam has weight_decay"),
        (adam(trained, 1.0, amsgrad=True), "Adam has amsgrad"),
        (torch.optim.AdamW(trained, 1.0), "no step of AdamW's"),
        (sgd([*trained, torch.zeros(2, device=DEVICE, requires_grad=True)], 1.0), "other parameters"),
        (sgd([{"params": trained[:1]}, {"params": trained[1:]}], 1.0), "2 groups"),
        (sgd([weights.bias_hh], 1.0), "nothing is trained"),
    ):
        assert reason in why_not(weights, optimizer)
    hooked = sgd(trained, 1.0)
    hooked.register_step_post_hook(lambda *_: None)
    assert "hooks" in why_not(weights, hooked)
    assert "more than one program" in why_not(weights_of(CharRNN(5, 300).to(DEVICE)))
    assert "float64" in why_not(weights_of(CharRNN(5, 4).double().to(DEVICE)))
    assert "autocast" in why_not_in_autocast(weights)
    assert "'torch' was asked for" in why_not(weights, backend="torch")
    X = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    assert operation.why_not_batch(weights, windows(X, X)) is None
    assert "float32" in operation.why_not_batch(weights, windows(X.float(), X))
    assert "empty" in operation.why_not_batch(weights, windows(X[:0], X[:0]))
    assert "constant (B, H)" in operation.why_not_batch(weights, windows(X, X), torch.zeros(1, 4, device=DEVICE))
    starts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert "int64" in operation.why_not_batch(weights, positions(corpus_of(5), starts, 3))
    with pytest.raises(ValueError, match="as tokens are"):
        windows(X, X[:1])
    with pytest.raises(ValueError, match="more than 120 ids"):
        positions(corpus_of(5), starts, 120)


def why_not_in_autocast(weights: Weights) -> str | None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return why_not(weights)


@pytest.mark.parametrize(("V", "nonlinearity", "second_bias"), [(28, "tanh", False), (5, "relu", True)])
def test_the_models_loss_under_autograd(monkeypatch, V, nonlinearity, second_bias):
    """Two launches forward and one backward, also for a loss that is scaled and a graph that is walked twice; where the
    last state is differentiated, the separate operations.
    """
    model, _ = make(V, 20, nonlinearity=nonlinearity, second_bias=second_bias)
    X, Y = (torch.randint(V, (3, 5), device=DEVICE) for _ in range(2))
    state = torch.randn(1, 3, 20, device=DEVICE)
    exact = CharRNN(V, 20, nonlinearity=nonlinearity, backend="torch").double().to(DEVICE)
    exact.load_state_dict(model.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    rights = [q for p, q in zip(model.parameters(), exact.parameters(), strict=True) if p.requires_grad]
    launches = Recorder(monkeypatch)
    loss, h_n = model.loss(X, Y, state)
    found = [*torch.autograd.grad(0.25 * loss, parameters, retain_graph=True), *torch.autograd.grad(loss, parameters)]
    rows, sums = "language_model_kernel", "language_model_sums_kernel"
    assert launches.kernels == [rows, sums, sums, sums]
    right, right_n = exact.loss(X, Y, state.double())
    of_loss = torch.autograd.grad(right, rights, retain_graph=True)
    expected = [right.detach(), right_n.detach(), *(0.25 * g for g in of_loss), *of_loss]
    for ours, theirs in zip([loss.detach(), h_n.detach(), *found], expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
    loss, h_n = model.loss(X, Y, state)
    found = torch.autograd.grad(loss + h_n.sin().sum(), parameters)
    of_both = torch.autograd.grad(right + right_n.sin().sum(), rights, allow_unused=True)
    for ours, theirs in zip(found, of_both, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
