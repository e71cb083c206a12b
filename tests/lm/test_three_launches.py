"""Trainer's step in three launches: the reference's curve, recorded and not, and what makes it go the other way."""

import pytest
import torch
from lm_problems import TEXT, VOCAB, Listener, by_form, same_run, start

from charrnn_fast.kernels.triton.launch import Launch
from charrnn_fast.lm import at_once
from charrnn_fast.lm.capture import WARM_UP_STEPS
from charrnn_fast.lm.evaluation import validate
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import RECIPES
from charrnn_fast.lm.step import TrainingStep

SIZES = {  # and characters: an epoch of few steps, with a ragged batch where the sampler has one
    "scratch": ({"batch_size": 3, "num_steps": 3, "hidden_size": 7}, 9),
    "concise": ({"batch_size": 3, "num_steps": 3, "hidden_size": 16}, 7),
    "ch8": ({"batch_size": 2, "num_steps": 4, "hidden_size": 9}, 14),
    "santa": ({"num_steps": 4, "hidden_size": 12}, 8),
}


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", "triton")


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels that are launched, by name."""
    names: list[str] = []
    launch = Launch.__call__

    def noted(self, *arguments):
        names.append(self.kernel.fn.__name__)
        return launch(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", noted)
    return names


def _start(name, device, **options):
    sizes, count = SIZES[name]
    return start(RECIPES[name], TEXT[:count].to(device, VOCAB.dtype), device=device, **sizes, **options)


def _fit(name, device, epochs, listener, **options):
    trainer, sampler = _start(name, device, epochs=epochs, **options)
    assert trainer.at_once_reason is None
    trainer.fit(sampler, callbacks=[listener])
    assert isinstance(trainer._plain._at_once, at_once.ThreeLaunches)
    return trainer


@pytest.mark.parametrize("steps", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SIZES)
def test_trainer_follows_the_reference(name, steps, device):
    """So many updates of Trainer's beside the reference's loop in float64, with the validation of the last epoch."""
    sizes, count = SIZES[name]
    options = {"kind": "reference", "dtype": torch.float64, **sizes}
    expected, epochs, reference, sampler = by_form(RECIPES[name], TEXT[:count], steps, **options)
    listener = Listener()
    trainer = _fit(name, device, epochs, listener)
    assert listener.losses == pytest.approx(expected, abs=3e-5) and all(norm > 0 for norm in listener.norms)
    assert trainer.capture_reason is None or device.type == "cpu"
    measured = validate(reference.model, sampler.validation())
    if measured is not None:
        assert trainer.history[-1].val_ppl == pytest.approx(measured[0], rel=1e-4)


def test_a_step_is_three_launches_and_a_batch_of_the_validation_two(device, launches):
    """Eager; nothing of ATen's is launched in between but what keeps the norm."""

    def counted(trainer):
        said = len(launches)
        launches.clear()
        return said

    listener = Listener(counted)
    trainer = _fit("concise", device, 1, listener, capture=False)
    assert listener.said == [3] * trainer.step and len(launches) == 2, launches


@pytest.mark.parametrize("name", ["concise", "ch8"])
def test_recorded_steps_are_the_same_bits(name, device, recorders):
    """With a recorder that calls what it recorded again: buffers for places and state, in place."""
    heard, trainers = [], []
    for wanted in (True, False):
        listener = Listener()
        trainers.append(_fit(name, device, WARM_UP_STEPS + 1, listener, capture=wanted))
        heard.append((listener.losses, listener.norms))
    assert heard[0] == heard[1] and recorders[0].replays > 0
    same_run(*trainers)


def test_a_learning_rate_that_changes(device):
    curves = []
    for kind in ("three launches", "separate operations"):
        options = {"lr": 0.5, "epochs": 2, "schedule": "cosine", "warmup": 2}
        trainer, sampler = _start("ch8", device, capture=False, **options)
        if kind == "separate operations":
            trainer.model.loss = trainer.model.loss
        trainer.fit(sampler, callbacks=[listener := Listener()])
        assert (trainer.at_once_reason is None) == (kind == "three launches")
        curves.append(listener.losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_reasons(device):
    def why(*sizes, looks=False, optimizer=torch.optim.SGD, **options):
        model = CharRNN(*sizes, device=device, **options)
        made = optimizer([p for p in model.parameters() if p.requires_grad], 0.1)
        return TrainingStep(model, made, 1.0, guard=looks).why_not_at_once

    assert why(28, 8) is None and why(28, 8, second_bias=False) is None
    assert why(28, 8, looks=True) == "loss and norm are looked at before an update"
    for reason in (why(28, 8, dtype=torch.float64), why(28, 300), why(400, 8), why(28, 8, optimizer=torch.optim.AdamW)):
        assert isinstance(reason, str) and " " in reason
    assert "RMSprop" in why(28, 8, optimizer=torch.optim.RMSprop)


def test_ids_that_nobody_has_looked_at_go_the_other_way(device, launches):
    """Where an id that is none of the model's is an error, on a CPU one that names it."""
    model = CharRNN(7, 5, device=device)
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    step.prepare()
    X = torch.arange(12, device=device).view(2, 6) % 7
    loss, state = step((X, X))
    assert loss.isfinite() and state.shape == (1, 2, 5)
    assert launches and "language_model_update_kernel" not in launches
    if device.type == "cpu":
        with pytest.raises(IndexError, match="token id 9 is not in"):
            step((X + 3, X))
