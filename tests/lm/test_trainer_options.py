"""Optimizers, learning rates, accumulated gradients, dropout, autocast, early stopping, callbacks: each against
PyTorch's own or the loop that everybody writes.
"""

import json
import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lm_problems import H, Listener, V, by_hand, same_parameters, tiny

from charrnn_fast.errors import InputError
from charrnn_fast.lm import data
from charrnn_fast.lm.callbacks import Callback, JsonLog, Samples, TensorBoard
from charrnn_fast.lm.forms import FORMS
from charrnn_fast.lm.generation import generate
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.schedule import Schedule
from charrnn_fast.lm.training import Trainer, validate
from charrnn_fast.lm.training_options import MAX_GRAPH_BATCHES
from charrnn_fast.reference import training as reference

TOKENS = torch.randint(V, (800,), generator=torch.Generator().manual_seed(1))


def _sampler(batch_size=8, tokens=TOKENS) -> data.Sampler:
    return data.RandomWindows(tokens, torch.Generator().manual_seed(0), batch_size=batch_size, num_steps=6)


def _loss_of(model):
    return lambda X, Y: model.loss(X, Y)[0]


# ---- optimizers ----------------------------------------------------------------------------------------------------

OPTIMIZERS = [("sgd", False), ("adam", False)]  # made by Trainer, over all parameters
OPTIMIZERS += [(k, f) for k in ("SGD", "Adam", "RMSprop", "reference.SGD", "reference.Adam") for f in (False, True)]


@pytest.mark.parametrize("clip", [None, 0.05, math.inf])
@pytest.mark.parametrize(("kind", "fewer"), OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_curve_is_a_plain_loops_or_an_error(form, kind, fewer, clip):
    model, other = tiny(form), tiny(form)
    name = kind.split(".")[-1]
    torch_kind = getattr(torch.optim, {"sgd": "SGD", "adam": "Adam"}.get(name, name))
    held = [list(m.parameters())[2 if fewer else 0 :] for m in (model, other)]
    optimizer = kind if kind in ("sgd", "adam") else torch_kind(held[0], 0.1)
    if kind.startswith("reference."):
        optimizer = getattr(reference, name)(held[0], 0.1)
        if form != "reference":
            with pytest.raises(TypeError, match=r"optimizer must be .* a torch.optim.Optimizer for this model"):
                Trainer(model, optimizer=optimizer, clip=clip)
            return
    history = Trainer(model, optimizer=optimizer, lr=0.1, clip=clip, epochs=2).fit(_sampler(tokens=TOKENS[:400]))
    optimizer, sampler, expected = torch_kind(held[1], 0.1), _sampler(tokens=TOKENS[:400]), []
    for _ in range(2):
        batches = list(sampler.train())
        losses = torch.stack([loss for loss, _ in by_hand(_loss_of(other), optimizer, batches, clip)])
        counts = torch.tensor([Y.numel() for _, Y in batches])
        expected.append(float((losses * counts).sum() / counts.sum()))
    assert [r.train_loss for r in history] == pytest.approx(expected, rel=1e-10)
    if not fewer:  # the reference's own optimizers leave alone what they do not hold
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_of_something_else_is_refused(form):
    model = tiny(form)
    other = torch.optim.SGD(tiny().parameters(), 0.1)
    with pytest.raises(ValueError, match="holds 6 parameters, of which 6 are not the model's"):
        Trainer(model, optimizer=other)
    for wrong in (None, 3, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="optimizer must be"):
            Trainer(model, optimizer=wrong)


def test_modules_that_are_replaced_after_the_optimizer_was_made_are_noticed():
    model = tiny()
    trainer = Trainer(model, epochs=1)
    model.head = torch.nn.Linear(H, V, dtype=torch.float64)
    with pytest.raises(ValueError, match="of which 2 are not the model's"):
        trainer.fit(_sampler())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    ],
)
def test_optimizers_by_name_are_torchs(kind, options):
    one, other = tiny(), tiny()
    Trainer(one, epochs=2, optimizer=kind.__name__.lower(), lr=0.02, **options).fit(_sampler())
    Trainer(other, epochs=2, optimizer=kind(other.parameters(), 0.02, **options)).fit(_sampler())
    same_parameters(one, other)


# ---- the options, one after the other -------------------------------------------------------------------------------


def _torch_rates(schedule, lr, steps, per_epoch, total) -> list[float]:
    """The same by torch's own schedulers, chained."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    S = torch.optim.lr_scheduler
    if schedule.kind == "cosine":
        after = S.CosineAnnealingLR(optimizer, max(1, total - schedule.warmup), eta_min=lr * schedule.final)
    elif schedule.kind == "step":
        after = S.LambdaLR(
            optimizer, lambda t: schedule.gamma ** ((t + schedule.warmup) // per_epoch // schedule.every)
        )
    else:
        after = S.LambdaLR(optimizer, lambda t: 1.0)
    if schedule.warmup:
        rise = S.LinearLR(optimizer, 1 / schedule.warmup, 1.0, total_iters=schedule.warmup - 1)
        after = S.SequentialLR(optimizer, [rise, after], [schedule.warmup])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("kind", ["constant", "cosine", "step"])
def test_rates_are_those_of_torchs_schedulers(kind, warmup):
    schedule = Schedule(kind, warmup, final=0.1 if kind == "cosine" else 0.0, every=1, gamma=0.5)
    trainer, rates, sampler = Trainer(tiny(), lr=0.2, epochs=3, schedule=schedule), Listener(), _sampler()
    history = trainer.fit(sampler, callbacks=[rates])
    per_epoch = sampler.num_batches
    expected = _torch_rates(schedule, 0.2, len(rates.lrs), per_epoch, 3 * per_epoch)
    assert rates.lrs == pytest.approx(expected, rel=1e-9)
    assert history[-1].lr == rates.lrs[-1] and history[-1].step == trainer.step == len(rates.lrs)
    assert (len(set(rates.lrs)) > 1) == schedule.changes


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "linear"},
        {"warmup": -1},
        {"final": 1.5},
        {"final": math.nan},
        {"every": 0},
        {"gamma": 0.0},
        {"gamma": 2.0},
    ],
)
def test_schedules_that_cannot_be(options):
    with pytest.raises(ValueError, match="got"):
        Schedule(**options)


class Endless(data.Sampler):
    def train(self):
        yield TOKENS[None, :5], TOKENS[None, 1:6]


def test_a_cosine_needs_a_length():
    trainer = Trainer(tiny(), schedule=Schedule("cosine"), epochs=1)
    with pytest.raises(ValueError, match="the sampler has no num_batches"):
        trainer.fit(Endless(TOKENS, torch.Generator()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be 'sgd', 'adam', 'adamw', 'rmsprop' .* got 'lion'"),
        ({"lr": 0.0}, r"lr must be above 0, got 0\.0"),
        ({"clip": -1.0}, r"clip must be above 0, or None for no clipping, got -1\.0"),
        ({"graph_batches": 0}, "graph_batches must be 1 to 16, got 0"),
        ({"graph_batches": MAX_GRAPH_BATCHES + 1}, "graph_batches must be 1 to 16, got 17"),
        ({"optimizer": "adam", "momentum": 0.9}, "adam has its own"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"accumulate": 0}, "accumulate must be 1 to"),
        ({"precision": "fp8"}, "precision must be"),
        ({"on_nan": "ignore"}, "on_nan must be one of stop, skip, restore"),
        ({"patience": 0}, "patience must be at least 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(), **options)


def test_options_that_the_reference_does_not_have():
    for options in ({"accumulate": 2}, {"schedule": Schedule("cosine")}, {"precision": "bf16"}, {"on_nan": "skip"}):
        with pytest.raises(ValueError, match="the reference model"):
            Trainer(tiny().to_reference(), **options)


@pytest.mark.parametrize("form", ["fused", "torch"])
def test_accumulated_gradients_are_those_of_the_large_batch(form):
    """Also where batches differ in size, and where the epoch ends inside a group."""
    large, small = tiny(form), tiny(form)
    plain, accumulated = Listener(), Listener()
    Trainer(large, optimizer="sgd", lr=0.1, momentum=0.5, epochs=2).fit(_sampler(24), callbacks=[plain])
    trainer = Trainer(small, optimizer="sgd", lr=0.1, momentum=0.5, epochs=2, accumulate=3)
    trainer.fit(_sampler(8), callbacks=[accumulated])
    assert len(plain.norms) == len(accumulated.norms) == trainer.step
    assert accumulated.norms == pytest.approx(plain.norms, rel=1e-9)
    torch.testing.assert_close(list(large.parameters()), list(small.parameters()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_norms_and_the_share_of_clipped_steps(clip):
    rates, other = Listener(), tiny()
    (record,) = Trainer(tiny(), lr=0.5, clip=clip, epochs=1).fit(_sampler(), callbacks=[rates])
    run = by_hand(_loss_of(other), torch.optim.SGD(other.parameters(), 0.5), _sampler().train(), clip)
    norms = [float(norm) for _, norm in run]
    assert rates.norms == pytest.approx(norms, rel=1e-9)
    assert record.grad_norm == pytest.approx(sum(norms) / len(norms))
    share = sum(norm > clip for norm in norms) / len(norms) if clip else 0.0
    assert record.clipped == pytest.approx(share) and (clip is None or share > 0)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", ["fused", "torch"])
def test_dropout_is_between_layers_and_before_the_head(form, layers):
    """The same random numbers in the same places as nn.RNN(dropout=) and nn.Dropout draw them."""
    model = tiny(form, dropout=0.4, num_layers=layers, embedding=4)
    X, Y = TOKENS[:60].view(4, 15), TOKENS[1:61].view(4, 15)
    torch.manual_seed(3)
    loss, _ = model.loss(X, Y)
    rnn = torch.nn.RNN(4, H, layers, batch_first=True, dropout=0.4 if layers > 1 else 0.0, dtype=torch.float64)
    rnn.load_state_dict(model.rnn.state_dict())
    torch.manual_seed(3)
    outputs, _ = rnn(model.embed(X))
    logits = model.head(torch.nn.functional.dropout(outputs, 0.4))
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits.flatten(0, 1), Y.flatten()).item())
    assert model.loss(X, Y)[0] != loss, "other numbers each time"
    without = tiny(num_layers=layers, embedding=4)
    without.load_state_dict(model.state_dict())
    with model.evaluating():
        assert not model.training and not model.rnn.training
        assert model.loss(X, Y)[0] == model.loss(X, Y)[0] == without.loss(X, Y)[0]
    assert model.training and model.rnn.training


@pytest.mark.parametrize("form", ["fused", "torch"])
def test_dropout_is_for_training_alone(form):
    vocab = data.Vocabulary(list("abcdefg"), letters=False)
    model = tiny(form, dropout=0.5, num_layers=2)
    assert model.training and len({generate(model, vocab, "abc", 30) for _ in range(5)}) == 1
    assert len({validate(model, [(TOKENS[None, :50], TOKENS[None, 1:51])]) for _ in range(5)}) == 1
    model.eval()
    Trainer(model, epochs=1).fit(_sampler())
    assert model.training, "fit trains"
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="dropout must be a probability"):
            CharRNN(V, H, dropout=wrong)


def test_bf16_is_autocast():
    one, exact, other = (tiny(dtype=torch.float32) for _ in range(3))
    rates, plain = Listener(), Listener()
    Trainer(one, lr=0.5, epochs=1, precision="bf16").fit(_sampler(), callbacks=[rates])
    Trainer(exact, lr=0.5, epochs=1).fit(_sampler(), callbacks=[plain])
    loss_of = torch.autocast("cpu", torch.bfloat16)(_loss_of(other))
    run = by_hand(loss_of, torch.optim.SGD(other.parameters(), 0.5), _sampler().train(), 1.0)
    assert rates.losses == pytest.approx([float(loss) for loss, _ in run], rel=1e-3)
    assert all(p.dtype == torch.float32 for p in one.parameters())
    assert rates.losses != plain.losses and rates.losses == pytest.approx(plain.losses, rel=0.02)


def test_early_stopping_waits_for_patience_and_says_why():
    torch.manual_seed(0)
    noise = torch.randint(V, (300,))
    sampler = data.RandomWindows(noise[:200], torch.Generator().manual_seed(0), batch_size=4, num_steps=6)
    sampler.hold_out(noise[200:])
    trainer = Trainer(tiny(), optimizer="adam", lr=0.1, epochs=100, patience=3)
    history = trainer.fit(sampler)
    losses = [record.loss for record in history]
    assert len(history) == losses.index(min(losses)) + 1 + 3 < 100
    assert trainer.stopped == "no better loss for 3 epochs"


def test_callbacks_in_their_order():
    events = []

    class Watch(Callback):
        def on_step(self, trainer, step):
            events.append(("step", step.step, step.epoch, step.batch, trainer.step))

        def on_epoch(self, trainer, record):
            events.append(("epoch", record.epoch, len(trainer.history)))

    trainer = Trainer(tiny(), lr=0.1, epochs=2)
    trainer.fit(_sampler(64), callbacks=[Watch()], on_epoch=lambda record: events.append(("on_epoch", record.epoch)))
    n = _sampler(64).num_batches
    one = [("step", i, 1, i, i) for i in range(1, n + 1)]
    two = [("step", n + i, 2, i, n + i) for i in range(1, n + 1)]
    assert events == [*one, ("on_epoch", 1), ("epoch", 1, 1), *two, ("on_epoch", 2), ("epoch", 2, 2)]


def test_log_and_samples(tmp_path):
    shown = []
    trainer = Trainer(tiny(), lr=0.1, epochs=4)
    samples = Samples(lambda epoch: f"text {epoch}", shown.append, every=2)
    trainer.fit(_sampler(), callbacks=[JsonLog(tmp_path / "log", every=5), samples])
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    steps, epochs = ([line for line in lines if line["event"] == kind] for kind in ("step", "epoch"))
    assert [line["step"] for line in steps] == list(range(5, trainer.step + 1, 5))
    assert {"loss", "lr", "grad_norm", "tokens", "epoch"} <= set(steps[0])
    assert [line["train_loss"] for line in epochs] == [record.train_loss for record in trainer.history]
    assert shown == ["text 2", "text 4"]
    with pytest.raises(InputError, match="cannot write the log"):
        JsonLog(tmp_path / "nowhere" / "log")


def test_tensorboard(tmp_path, monkeypatch):
    """With a writer that keeps what it is given; the package is an extra, and without it there is one line."""
    writer = Mock()
    module = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer = Trainer(tiny(), lr=0.1, epochs=2)
    trainer.fit(_sampler(), callbacks=[TensorBoard(tmp_path, every=4)])
    names, values, at = zip(*(call.args for call in writer.add_scalar.call_args_list), strict=True)
    assert all(isinstance(value, float | int) for value in values)
    wanted = {("step/loss", 4), ("step/grad_norm", 8), ("step/lr", 4), ("epoch/train_loss", 2)}
    assert wanted <= set(zip(names, at, strict=True))
    assert "epoch/val_ppl" not in names, "what was not measured is left out"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
