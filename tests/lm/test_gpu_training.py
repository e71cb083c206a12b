"""Training steps captured as CUDA graphs on a device: the uncaptured curve, no synchronisation, resume, fallback."""

import warnings
from dataclasses import replace

import pytest
import torch
from lm_problems import TEXT, by_form, save, start

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm import checkpoint, data
from charrnn_fast.lm.capture import WARM_UP_STEPS
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import RECIPES, build_model, build_sampler
from charrnn_fast.lm.training import Trainer, train_batches
from charrnn_fast.ops import backends

pytestmark = pytest.mark.gpu

# Every recipe at its own sizes; 20,000 characters give each an epoch of whole batches and a ragged one.
FORMS = {
    "scratch": RECIPES["scratch"],
    "concise": RECIPES["concise"],
    "ch8": RECIPES["ch8"],
    "ch8-random": replace(RECIPES["ch8"], sampler="random"),
    "santa": RECIPES["santa"],
    "stacked": replace(RECIPES["santa"], num_layers=2, hidden_size=128, clip=1.0),
    "embedding": replace(RECIPES["scratch"], embedding=16, nonlinearity="relu", lr=0.1),
}


def _trainer(recipe, **options) -> tuple[Trainer, data.Sampler]:
    return start(recipe, **{"epochs": 5, "device": "cuda", **options})


def _fit(recipe, **options) -> Trainer:
    trainer, sampler = _trainer(recipe, **options)
    trainer.fit(sampler)
    return trainer


def _curve(trainer) -> list[tuple]:
    return [(r.train_loss, r.val_ppl, r.val_ppl_batch_mean, r.tokens) for r in trainer.history]


def _losses(trainer) -> list[float]:
    return [r.train_loss for r in trainer.history]


def _tolerance(recipe) -> dict[str, float]:
    """None, but where cuDNN runs the recurrence: it does not promise the same bits twice."""
    name = backends.choose("auto", torch.device("cuda"), torch.float32, recipe.hidden_size)
    return {"rtol": 1e-3 if name == "torch" else 0.0, "atol": 0.0}


def _recorded(trainer) -> list[bool]:
    _, steps = trainer._recordings._training
    return [slot.replay is not None for slot in steps._slots.values()]


def _epoch(trainer, sampler) -> list[torch.Tensor]:
    """The losses of an epoch's steps, which nobody has waited for."""
    sampler.to("cuda")
    return list(trainer._losses(sampler.train(), sampler, trainer._plain_step(sampler, None)))


@pytest.mark.parametrize("name", FORMS)
def test_captured_curve_is_the_uncaptured_one(name):
    captured, plain = _fit(FORMS[name], capture=True), _fit(FORMS[name], capture=False)
    assert captured.capture_reason is None and any(_recorded(captured))
    if name in ("scratch", "concise", "santa"):
        assert _recorded(captured) == [True, True], "the ragged batch has a graph of its own"
    torch.testing.assert_close(_losses(captured), _losses(plain), **_tolerance(FORMS[name]))
    for p, q in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q) or _tolerance(FORMS[name])["rtol"] > 0


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop"])
def test_an_optimizer_of_torch_with_state_is_captured(optimizer):
    results = []
    for capture in (True, False):
        model = build_model(FORMS["concise"], 28, seed=0, device="cuda")
        options = {"momentum": 0.9} if optimizer == "SGD" else {"capturable": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a capturable optimizer that is not captured
            made = getattr(torch.optim, optimizer)(model.parameters(), 1e-2, **options)
            trainer = Trainer(model, optimizer=made, epochs=4, capture=capture)
            trainer.fit(build_sampler(FORMS["concise"], TEXT, seed=0))
        results.append(trainer)
    assert any(_recorded(results[0]))
    assert _curve(results[0]) == _curve(results[1])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("capture", [True, False])
def test_no_synchronisation_in_an_epoch(name, capture):
    """Neither the steps of an epoch nor its validation wait for the device; only reading the losses does."""
    trainer, sampler = _trainer(FORMS[name], epochs=WARM_UP_STEPS + 1, capture=capture)
    trainer.fit(sampler)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = _epoch(trainer, sampler)
        measure = trainer._evaluation(False)
        with trainer.model.evaluating():
            validation = [measure(batch)[0] for batch in sampler.validation()]
        with pytest.raises(RuntimeError, match="synchroniz"):
            losses[0].item()  # the mode is on
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    assert all(loss.isfinite() for loss in validation)


@pytest.mark.parametrize("name", ["scratch", "concise", "ch8", "santa"])
def test_captured_curve_follows_the_reference_for_200_steps(name):
    recipe = FORMS[name]
    trainer, sampler = _trainer(recipe, dtype=torch.float64)
    losses = []
    while len(losses) < 200:
        losses += _epoch(trainer, sampler)
    expected, *_ = by_form(recipe, TEXT.cuda(), 200, kind="reference", device="cuda", dtype=torch.float64)
    torch.testing.assert_close(torch.stack(losses[:200]).tolist(), expected[:200], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["scratch", "ch8", "santa"])
def test_resume_is_exact_and_goes_on_on_a_cpu(name, tmp_path):
    recipe = FORMS[name]
    straight = _fit(recipe, epochs=6)
    stopped, sampler = _trainer(recipe, epochs=4)
    stopped.fit(sampler)
    save(tmp_path / "a.ckpt", stopped, sampler, recipe)
    written = checkpoint.load(tmp_path / "a.ckpt")
    resumed, sampler = _trainer(recipe, epochs=6)
    checkpoint.resume(written, resumed, sampler, recipe)
    resumed.fit(sampler)
    torch.testing.assert_close(_losses(resumed), _losses(straight), **_tolerance(recipe))
    on_cpu, sampler = start(recipe, epochs=5, seed=1)
    checkpoint.resume(written, on_cpu, sampler, recipe)
    on_cpu.fit(sampler)
    assert on_cpu.history[4].train_loss == pytest.approx(straight.history[4].train_loss, rel=1e-3)


def test_a_learning_rate_changed_between_epochs_is_heeded():
    curves = []
    for capture in (True, False):
        trainer, sampler = _trainer(FORMS["ch8"], epochs=6, capture=capture)

        def halve(record, optimizer=trainer.optimizer):
            optimizer.param_groups[0]["lr"] /= 2

        trainer.fit(sampler, on_epoch=halve)
        curves.append(_losses(trainer))
    torch.testing.assert_close(*curves, **_tolerance(FORMS["ch8"]))


def test_a_step_that_cannot_be_captured_falls_back_with_its_reason(monkeypatch):
    """A synchronisation in the step: training goes on on the stream that was current, along the same curve."""
    plain = _fit(FORMS["scratch"], capture=False)
    loss = CharRNN.loss

    def synchronising(self, *arguments):
        value, state = loss(self, *arguments)
        value.item()
        return value, state

    monkeypatch.setattr(CharRNN, "loss", synchronising)
    stream = torch.cuda.current_stream()
    trainer = _fit(FORMS["scratch"])
    assert trainer.capture_reason.startswith("recording a step raised ")
    assert torch.cuda.current_stream() == stream
    assert _curve(trainer) == _curve(plain)
    with pytest.raises(TrainingError, match="a training step cannot be captured"):
        _fit(FORMS["scratch"], capture=True)
    monkeypatch.setattr(CharRNN, "loss", loss)
    again = _fit(FORMS["scratch"], capture=True)  # a capture that failed does not spoil the next
    assert _curve(again) == _curve(plain)


def test_capturing_makes_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fit(FORMS["santa"], capture=True)
        _fit(FORMS["santa"], capture=False)


def test_train_batches_alone_takes_batches_of_the_device():
    """Without Trainer nothing is captured: a list of batches and any optimizer."""
    model = CharRNN(28, 16, device="cuda")
    X = TEXT[:640].view(20, 32).cuda()
    batches = [(X[:, :-1], X[:, 1:])] * 5
    losses = torch.stack(list(train_batches(model, batches, torch.optim.SGD(model.parameters(), 0.5), 1.0))).tolist()
    assert losses == sorted(losses, reverse=True)
