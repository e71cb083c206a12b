"""Learning rates, optimizers, accumulated gradients, dropout, autocast, early stopping, callbacks: each against
PyTorch's own or a loop written out.
"""

import json
import math
import sys
from types import ModuleType

import pytest
import torch

from charrnn_fast.errors import InputError
from charrnn_fast.lm import data
from charrnn_fast.lm.callbacks import Callback, JsonLog, Samples, TensorBoard
from charrnn_fast.lm.forms import make
from charrnn_fast.lm.generation import generate
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.schedule import Schedule
from charrnn_fast.lm.training import Trainer, validate

V, H = 7, 5
TOKENS = torch.randint(V, (800,), generator=torch.Generator().manual_seed(1))


def _model(form="fused", **options):
    torch.manual_seed(0)
    return make(form, V, H, **{"dtype": torch.float64, **options})


def _sampler(batch_size=8) -> data.Sampler:
    return data.RandomWindows(TOKENS, torch.Generator().manual_seed(0), batch_size=batch_size, num_steps=6)


class Rates(Callback):
    def __init__(self):
        self.lrs, self.losses, self.norms = [], [], []

    def on_step(self, trainer, step):
        self.lrs.append(step.lr)
        self.losses.append(step.loss)
        self.norms.append(step.grad_norm)


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
    trainer, rates, sampler = Trainer(_model(), lr=0.2, epochs=3, schedule=schedule), Rates(), _sampler()
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
    trainer = Trainer(_model(), schedule=Schedule("cosine"), epochs=1)
    with pytest.raises(ValueError, match="the sampler has no num_batches"):
        trainer.fit(Endless(TOKENS, torch.Generator()))


@pytest.mark.parametrize(
    ("name", "options", "kind", "theirs"),
    [
        ("adamw", {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        ("adam", {"weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
        ("rmsprop", {"momentum": 0.5}, torch.optim.RMSprop, {"momentum": 0.5}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.01}, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    ],
)
def test_optimizers_by_name_are_torchs(name, options, kind, theirs):
    one, other = _model(), _model()
    for model, given in ((one, {"optimizer": name, "lr": 0.02, **options}), (other, {})):
        given = given or {"optimizer": kind(model.parameters(), 0.02, **theirs)}
        Trainer(model, epochs=2, **given).fit(_sampler())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "adam has its own"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"accumulate": 0}, "accumulate must be 1 to"),
        ({"accumulate": 2, "graph_batches": 2}, "one of them at a time"),
        ({"precision": "fp8"}, "precision must be"),
        ({"on_nan": "ignore"}, "on_nan must be one of stop, skip, restore"),
        ({"patience": 0}, "patience must be at least 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(_model(), **options)


def test_options_that_the_reference_does_not_have():
    for options in ({"accumulate": 2}, {"schedule": Schedule("cosine")}, {"precision": "bf16"}, {"on_nan": "skip"}):
        with pytest.raises(ValueError, match="the reference model"):
            Trainer(_model().to_reference(), **options)
    with pytest.raises(ValueError, match="no dropout"):
        _model(dropout=0.1).to_reference()


@pytest.mark.parametrize("form", ["fused", "torch"])
def test_accumulated_gradients_are_those_of_the_large_batch(form):
    """Also where batches differ in size, and where the epoch ends inside a group."""
    large, small = _model(form), _model(form)
    plain, accumulated = Rates(), Rates()
    Trainer(large, optimizer="sgd", lr=0.1, momentum=0.5, epochs=2).fit(_sampler(24), callbacks=[plain])
    trainer = Trainer(small, optimizer="sgd", lr=0.1, momentum=0.5, epochs=2, accumulate=3)
    trainer.fit(_sampler(8), callbacks=[accumulated])
    assert len(plain.norms) == len(accumulated.norms) == trainer.step
    assert accumulated.norms == pytest.approx(plain.norms, rel=1e-9)
    for p, q in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_norms_and_the_share_of_clipped_steps(clip):
    model, rates = _model(), Rates()
    (record,) = Trainer(model, lr=0.5, clip=clip, epochs=1).fit(_sampler(), callbacks=[rates])
    other, norms = _model(), []
    optimizer = torch.optim.SGD(other.parameters(), 0.5)
    for X, Y in _sampler().train():
        optimizer.zero_grad()
        other.loss(X, Y)[0].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(other.parameters(), math.inf if clip is None else clip)))
        optimizer.step()
    assert rates.norms == pytest.approx(norms, rel=1e-9)
    assert record.grad_norm == pytest.approx(sum(norms) / len(norms))
    share = sum(norm > clip for norm in norms) / len(norms) if clip else 0.0
    assert record.clipped == pytest.approx(share) and (clip is None or share > 0)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", ["fused", "torch"])
def test_dropout_is_between_layers_and_before_the_head(form, layers):
    """The same random numbers in the same places as nn.RNN(dropout=) and nn.Dropout draw them."""
    model = _model(form, dropout=0.4, num_layers=layers, embedding=4)
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
    with model.evaluating():
        assert not model.training and not model.rnn.training
        assert model.loss(X, Y)[0] == model.loss(X, Y)[0] == _eval(model).loss(X, Y)[0]
    assert model.training and model.rnn.training


def _eval(model) -> CharRNN:
    other = _model(num_layers=model.num_layers, embedding=4)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("form", ["fused", "torch"])
def test_dropout_is_for_training_alone(form):
    vocab = data.Vocabulary(list("abcdefg"), letters=False)
    model = _model(form, dropout=0.5, num_layers=2)
    assert model.training and len({generate(model, vocab, "abc", 30) for _ in range(5)}) == 1
    assert len({validate(model, [(TOKENS[None, :50], TOKENS[None, 1:51])]) for _ in range(5)}) == 1
    model.eval()
    Trainer(model, epochs=1).fit(_sampler())
    assert model.training, "fit trains"
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="dropout must be a probability"):
            CharRNN(V, H, dropout=wrong)


def test_bf16_is_autocast():
    one, other = _model(dtype=torch.float32), _model(dtype=torch.float32)
    trainer = Trainer(one, lr=0.5, epochs=1, precision="bf16")
    rates = Rates()
    trainer.fit(_sampler(), callbacks=[rates])
    losses = []
    optimizer = torch.optim.SGD(other.parameters(), 0.5)
    for X, Y in _sampler().train():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = other.loss(X, Y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert rates.losses == pytest.approx(losses, rel=1e-3)
    assert all(p.dtype == torch.float32 for p in one.parameters())
    exact = _model(dtype=torch.float32)
    plain = Rates()
    Trainer(exact, lr=0.5, epochs=1).fit(_sampler(), callbacks=[plain])
    assert rates.losses != plain.losses and rates.losses == pytest.approx(plain.losses, rel=0.02)


def test_early_stopping_waits_for_patience_and_says_why():
    torch.manual_seed(0)
    noise = torch.randint(V, (300,))
    sampler = data.RandomWindows(noise[:200], torch.Generator().manual_seed(0), batch_size=4, num_steps=6)
    sampler.hold_out(noise[200:])
    trainer = Trainer(_model(), optimizer="adam", lr=0.1, epochs=100, patience=3)
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

    trainer = Trainer(_model(), lr=0.1, epochs=2)
    trainer.fit(_sampler(64), callbacks=[Watch()], on_epoch=lambda record: events.append(("on_epoch", record.epoch)))
    n = _sampler(64).num_batches
    one = [("step", i, 1, i, i) for i in range(1, n + 1)]
    two = [("step", n + i, 2, i, n + i) for i in range(1, n + 1)]
    assert events == [*one, ("on_epoch", 1), ("epoch", 1, 1), *two, ("on_epoch", 2), ("epoch", 2, 2)]


def test_log_and_samples(tmp_path):
    shown = []
    trainer = Trainer(_model(), lr=0.1, epochs=4)
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
    written, module = [], ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, at):
            written.append((name, at))
            assert isinstance(value, float | int)

        def flush(self):
            pass

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer = Trainer(_model(), lr=0.1, epochs=2)
    trainer.fit(_sampler(), callbacks=[TensorBoard(tmp_path, every=4)])
    assert {("step/loss", 4), ("step/grad_norm", 8), ("step/lr", 4), ("epoch/train_loss", 2)} <= set(written[1:])
    assert not any(name == "epoch/val_ppl" for name, _ in written[1:]), "what was not measured is left out"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
