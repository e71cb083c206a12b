"""Every side of a comparison computes the same thing, or says in a clause why it cannot."""

import sys
import types

import numpy as np
import pytest
import torch

from charrnn_fast.bench.grid import BEYOND, Config, Gradients
from charrnn_fast.bench.libraries import XMA, FlagGems, FlashRNN, Jax, TensorFlow
from charrnn_fast.bench.peers import TASKS, CompiledReference, Ours, Reference, TorchRNN
from charrnn_fast.bench.problems import ClipProblem, Problem
from charrnn_fast.bench.suite import PEERS

CONFIGS = [Config("tokens", 3, 5, 7, 6, tokens=True), Config("dense", 3, 5, 4, 6)]
PACKED = Config("packed", 3, 5, 4, 6, packed=True)
GRADIENTS = Gradients("few", ((3, 4), (5,)))


def _array(outputs) -> np.ndarray:
    found = outputs[0] if isinstance(outputs, list) else outputs
    return np.asarray(found.detach() if isinstance(found, torch.Tensor) else found).reshape(5, 3, 6)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("peer", [Ours(), *(p for p in PEERS if not p.takes_minutes)], ids=lambda p: p.name)
def test_forward_gives_the_same_outputs(peer, config):
    problem = Problem(config)
    if (why := peer.why_not(problem, "forward")) is not None:
        pytest.skip(why)
    wanted = problem.rnn(problem.input)[0].detach().numpy()
    np.testing.assert_allclose(_array(peer.job(problem, "forward")()), wanted, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("library", [Jax(), TensorFlow()], ids=lambda p: p.name)
def test_backward_gives_the_same_gradients(library, config):
    problem = Problem(config)
    if (why := library.why_not(problem, "forward_backward")) is not None:
        pytest.skip(why)
    theirs = Reference().job(problem, "forward_backward")()
    found = library.job(problem, "forward_backward")()
    flat = [array for part in found for array in (part if isinstance(part, tuple) else (part,))]
    for array, wanted in zip(flat, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(array), wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("task", ["lm_step", "generation"])
@pytest.mark.parametrize("peer", [Ours(), TorchRNN(), Reference()], ids=lambda p: p.name)
def test_language_model_tasks_run_again_and_again(peer, task):
    job = peer.job(Problem(CONFIGS[0]), task)
    job()
    found = job()
    if task == "generation":
        wanted = Reference().job(Problem(CONFIGS[0]), task)()
        assert found.shape == (3, 5) and (isinstance(peer, TorchRNN) or torch.equal(found, wanted))


@pytest.mark.parametrize("task", BEYOND)
def test_both_sides_give_the_same_gradients_of_what_one_has_no_argument_for(task, monkeypatch):
    problem, found = Problem(Config("varied", 4, 150, 4, 6, packed=True)), []
    for peer in (Ours(), TorchRNN()):
        grads = []

        def beyond(module, problem, call, grad, grads=grads):
            x = problem.padded.detach()
            leaves = [x.requires_grad_(), *module.parameters()]
            return lambda: grads.extend(torch.autograd.grad(call(x), leaves, grad))

        monkeypatch.setattr(peer, "beyond", beyond)
        peer.job(problem, task)()
        found.append(grads)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peer", [Ours(), TorchRNN(), Reference()], ids=lambda p: p.name)
def test_clip_always_has_something_to_scale(peer):
    problem = ClipProblem(GRADIENTS)
    job = peer.job(problem, "clip")
    first, second = float(job()), float(job())
    assert first > 1.5 and second == pytest.approx(1.0, abs=1e-4)


def test_compiled_step_is_the_references_step():
    problem = Problem(Config("tokens", 2, 2, 5, 4, tokens=True))
    losses = [[float(peer.job(problem, "lm_step")()[0])] for peer in (Reference(), CompiledReference())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_what_a_peer_cannot_do_has_a_reason(peer):
    for task in (*TASKS, *BEYOND):
        problem = ClipProblem(GRADIENTS) if task == "clip" else Problem(PACKED)
        reason = peer.why_not(problem, task)
        assert reason is None or (reason and not reason.endswith("."))
        if task not in peer.tasks and peer.package is None:
            assert reason == f"it has no {task}"


def _documented_flashrnn(Wx, R, b, states=None, function="lstm", backend="cuda_fused", dtype="bfloat16"):
    """The Elman function in the shapes that FlashRNN documents, by plain operations."""
    assert function == "elman" and dtype == "float32"
    h, steps = torch.zeros_like(Wx[:, 0, 0]), []  # (B, N, D)
    for x_t in Wx[:, :, 0].unbind(1):
        h = torch.tanh(x_t + torch.einsum("ndp,bnp->bnd", R[0], h) + b[0])
        steps.append(h)
    return torch.stack(steps, 1)[None], h[None, :, None]


def _documented_xma(input, weight, input_state=None, *, kernel_backend=None):
    """tanh(h W + x) over (B, S, N, H) with W (N, H, H), by plain operations: the states and the last of them."""
    assert input.dim() == 4 and weight.shape == (input.shape[2], input.shape[3], input.shape[3])
    h, steps = torch.zeros_like(input[:, 0]), []
    for x_t in input.unbind(1):
        h = torch.tanh(torch.einsum("bnh,nhk->bnk", h, weight) + x_t)
        steps.append(h)
    return torch.stack(steps, 1), h


STAND_INS = {
    FlashRNN: {"flashrnn": types.SimpleNamespace(flashrnn=_documented_flashrnn)},
    XMA: {"xma": types.ModuleType("xma"), "xma.functional": types.SimpleNamespace(rnn=_documented_xma)},
    FlagGems: {"flag_gems": types.SimpleNamespace(rnn_tanh=torch.rnn_tanh)},
}


@pytest.mark.parametrize("library", STAND_INS, ids=lambda library: library.name)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_libraries_are_called_as_they_document(library, config, monkeypatch):
    """Outputs and gradients are torch.nn.RNN's."""
    for name, module in STAND_INS[library].items():
        monkeypatch.setitem(sys.modules, name, module)
    problem, peer = Problem(config), library()
    wanted = problem.rnn(problem.input)[0]
    torch.testing.assert_close(peer.job(problem, "forward")(), wanted, atol=1e-5, rtol=1e-5)
    grads = peer.job(problem, "forward_backward")()
    theirs = torch.autograd.grad(wanted, list(problem.rnn.parameters()), problem.grad_output)
    for found, right in zip(grads[-4:], theirs, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


def test_a_flashrnn_that_computes_something_else_is_not_timed(monkeypatch):
    wrong = types.SimpleNamespace(flashrnn=lambda *args, **kwargs: [2 + _documented_flashrnn(*args, **kwargs)[0]] * 2)
    monkeypatch.setitem(sys.modules, "flashrnn", wrong)
    with pytest.raises(AssertionError):
        FlashRNN().job(Problem(CONFIGS[0]), "forward")
