"""Stopped after any step, saved, loaded into a fresh trainer: the bits of the run that was never stopped."""

import math
from dataclasses import replace

import lm_problems
import pytest
import torch
from lm_problems import VOCAB, Listener, figures, same_parameters, same_run, save

from charrnn_fast.errors import InputError, TrainingError
from charrnn_fast.lm import checkpoint, data
from charrnn_fast.lm.callbacks import Callback
from charrnn_fast.lm.recipes import RECIPES
from charrnn_fast.lm.training import Trainer

TEXT = lm_problems.TEXT[:3_000].to(VOCAB.dtype)
BASE = replace(RECIPES["scratch"], hidden_size=8, batch_size=16, num_steps=12, epochs=3)
FORMS = {
    "windows": replace(BASE, batch_size=512),
    "windows, validated by place": replace(BASE, batch_size=512, split=(0.8, 0.2)),
    "random windows, momentum": replace(BASE, sampler="random", momentum=0.9, lr=0.1),
    "carried state": replace(BASE, sampler="sequential"),
    "carried state, graph of 2 batches": replace(BASE, sampler="sequential", graph_batches=2),
    "carried state, dropout, AdamW, cosine": replace(
        RECIPES["shakespeare"], hidden_size=8, batch_size=16, num_steps=12, epochs=3, warmup=5
    ),
    "pieces with Adam": replace(RECIPES["santa"], hidden_size=8, epochs=3, num_steps=300),
    "RMSprop, accumulated": replace(BASE, sampler="random", optimizer="rmsprop", lr=1e-3, accumulate=3),
    "steps down, early stopping": replace(BASE, sampler="random", schedule="step", lr_every=1, patience=2),
}


class Stop(Callback):
    """Stops the run after a step, and after an epoch."""

    def __init__(self, step=None, epoch=None):
        self.step, self.epoch = step, epoch

    def on_step(self, trainer, step):
        if step.step == self.step:
            trainer.stop("the test said so")

    def on_epoch(self, trainer, record):
        if record.epoch == self.epoch and trainer.stopped is None:
            trainer.stop("the test said so")


def _start(recipe, **changes) -> tuple[Trainer, data.Sampler]:
    torch.manual_seed(0)
    return lm_problems.start(recipe, TEXT, **changes)


def _straight(recipe, *callbacks, **changes) -> Trainer:
    """A run to its end, or to where a callback stops it."""
    trainer, sampler = _start(recipe, **changes)
    trainer.fit(sampler, callbacks=callbacks)
    return trainer


@pytest.mark.parametrize("name", FORMS)
def test_a_run_stopped_at_every_few_steps_is_the_run_that_was_never_stopped(name, tmp_path):
    """Also between two epochs."""
    recipe, path = FORMS[name], tmp_path / "a.ckpt"
    straight = _straight(recipe)
    assert straight.step > 9 and len({r.train_loss for r in straight.history}) == len(straight.history)
    (trainer, sampler), between = _start(recipe), []
    while True:
        at = trainer.step + (1, 2, 5)[len(between) % 3]
        trainer.fit(sampler, callbacks=[Stop(at, epoch=len(trainer.history) + 1)])
        if trainer.stopped != "the test said so":
            break
        assert trainer.step <= straight.step and (trainer.step == at or trainer.between_epochs)
        between.append(trainer.between_epochs)
        save(path, trainer, sampler, recipe)
        trainer, sampler = _start(recipe)
        torch.manual_seed(99)  # what dropout draws from comes with the checkpoint
        checkpoint.resume(checkpoint.load(path), trainer, sampler, recipe)
    assert sum(between) >= 1 and between.count(False) >= 3
    same_run(trainer, straight)


def test_a_run_stopped_in_its_validation_goes_on_there():
    recipe = FORMS["windows, validated by place"]
    straight = _straight(recipe)
    trainer, sampler = _start(recipe)
    walk = sampler.walk

    def interrupted(tokens):
        for batch in walk(tokens):
            trainer.stop("in validation")
            yield batch

    sampler.walk = interrupted
    trainer.fit(sampler)
    assert trainer.history == [] and trainer.step == straight.history[0].step
    sampler.walk = walk
    trainer.fit(sampler)
    same_run(trainer, straight)


def test_a_fit_that_was_stopped_goes_on_in_the_same_process():
    straight = _straight(FORMS["carried state"])
    trainer, sampler = _start(FORMS["carried state"])
    for step in range(1, straight.step, 4):
        trainer.fit(sampler, callbacks=[Stop(step)])
    trainer.fit(sampler)
    same_run(trainer, straight)


def _write(path, content):
    torch.save(content | {"checksum": checkpoint.digest(content)}, path)


def test_files_of_version_2_are_resumed(tmp_path):
    """Whole epochs, and none of the settings and figures that came later."""
    recipe, path = replace(BASE, epochs=1), tmp_path / "a.ckpt"
    trainer, sampler = _start(recipe)
    trainer.fit(sampler)
    save(path, trainer, sampler, recipe)
    content = torch.load(path)
    later = ("dropout", "momentum", "weight_decay", "schedule", "warmup", "lr_final", "lr_every", "lr_gamma")
    for name in (*later, "accumulate", "precision", "patience", "on_nan", "split"):
        del content["recipe"][name]
    content["trainer"] = {name: content["trainer"][name] for name in ("optimizer", "history")}
    for record in content["trainer"]["history"]:
        for name in ("step", "lr", "grad_norm", "clipped", "skipped"):
            del record[name]
    _write(path, content | {"version": 2})
    resumed, sampler = _start(recipe, epochs=2)
    checkpoint.resume(checkpoint.load(path), resumed, sampler, replace(recipe, epochs=2))
    resumed.fit(sampler)
    straight = _straight(recipe, epochs=2)
    assert [r.train_loss for r in resumed.history] == [r.train_loss for r in straight.history]


@pytest.mark.parametrize("field", ["losses", "counts", "generator", "norms", "state"])
@pytest.mark.parametrize("value", [None, "x", torch.zeros(3), -1])
def test_a_checkpoint_whose_epoch_in_progress_is_malformed_is_refused(tmp_path, field, value):
    recipe, path = FORMS["carried state"], tmp_path / "a.ckpt"
    trainer, sampler = _start(recipe)
    trainer.fit(sampler, callbacks=[Stop(4)])
    save(path, trainer, sampler, recipe)
    content = torch.load(path)
    content["trainer"]["epoch"][field] = value
    _write(path, content)
    trainer, sampler = _start(recipe)
    if field == "state" and value is None:  # the zero state: a state like another
        checkpoint.resume(checkpoint.load(path), trainer, sampler, recipe)
        return
    with pytest.raises(InputError, match="cannot be resumed") as caught:
        checkpoint.resume(checkpoint.load(path), trainer, sampler, recipe)
    assert "\n" not in str(caught.value)


class Poisoned:
    """A model whose loss is not finite at chosen calls, counted from 1."""

    def __init__(self, trainer, calls, value=math.nan):
        self.calls, self.made, self.value, self.loss = calls, 0, value, trainer.model.loss
        trainer.model.loss = self

    def __call__(self, X, Y, state=None):
        loss, state = self.loss(X, Y, state)
        if not torch.is_grad_enabled():
            return loss, state
        self.made += 1
        return (loss * self.value, state * self.value) if self.made in self.calls else (loss, state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["windows", "carried state", "pieces with Adam", "RMSprop, accumulated"])
def test_stop_names_the_step_and_keeps_the_parameters_before_it(form, value):
    trainer, sampler = _start(FORMS[form])
    group = FORMS[form].accumulate
    good = _straight(FORMS[form], Stop(4))
    Poisoned(trainer, {4 * group + 1}, value)
    epoch = 1 + 4 * group // sampler.num_batches
    with pytest.raises(TrainingError, match=rf"the training loss is (nan|inf) at step 5 \(epoch {epoch}, batch \d+\)"):
        trainer.fit(sampler)
    same_parameters(trainer.model, good.model)


def test_stop_at_a_gradient_norm_that_is_not_finite():
    trainer, sampler = _start(FORMS["windows"])
    steps = []

    def poison(grad):
        steps.append(1)
        return grad * math.inf if len(steps) == 3 else grad

    trainer.model.head.bias.register_hook(poison)
    with pytest.raises(TrainingError, match=r"the gradient norm is (nan|inf) at step 3 .*a step before: expected"):
        trainer.fit(sampler)


def test_skip_makes_no_update_and_goes_on_from_a_zero_state():
    trainer, sampler = _start(FORMS["carried state"], on_nan="skip")
    watch = Listener(lambda trainer: [p.clone() for p in trainer.model.parameters()])
    poisoned = Poisoned(trainer, {3, 5})
    history = trainer.fit(sampler, callbacks=[watch])
    assert poisoned.made > 5 and [r.skipped for r in history] == [2, 0, 0]
    assert all(math.isfinite(r.train_loss) and math.isfinite(r.grad_norm) for r in history)
    for before, after, same in ((1, 2, True), (2, 3, False), (3, 4, True), (4, 5, False)):
        assert all(torch.equal(p, q) for p, q in zip(watch.said[before], watch.said[after], strict=True)) == same


def test_skip_gives_up_where_nothing_is_finite():
    trainer, sampler = _start(FORMS["pieces with Adam"], num_steps=10, on_nan="skip")
    Poisoned(trainer, set(range(1, 10_000)))
    with pytest.raises(TrainingError, match="the first 100 updates of the epoch are not finite"):
        trainer.fit(sampler)


@pytest.mark.parametrize("form", ["carried state", "pieces with Adam", "carried state, dropout, AdamW, cosine"])
def test_restore_goes_back_to_the_last_epoch_with_half_the_learning_rate(form):
    recipe = FORMS[form]
    steps = _straight(recipe, Stop(epoch=1)).step
    trainer, sampler = _start(recipe, on_nan="restore")
    restored = []

    class Watch(Callback):
        def on_restore(self, trainer, lr_scale):
            restored.append((trainer.step, lr_scale))

    Poisoned(trainer, {steps + 3})
    history = trainer.fit(sampler, callbacks=[Watch()])
    assert len(history) == 3 and restored == [(history[0].step, 0.5)]
    reference, sampler = _start(recipe)
    reference.fit(sampler, callbacks=[Stop(epoch=1)])
    reference._lr_scale = 0.5
    reference.fit(sampler)
    assert figures(reference) == figures(trainer)


def test_restore_gives_up_after_eight():
    trainer, sampler = _start(FORMS["windows"], on_nan="restore")
    Poisoned(trainer, set(range(2, 10_000)))
    with pytest.raises(TrainingError, match="the training loss is nan at step 1 "):
        trainer.fit(sampler)
    assert trainer._restores == 8
