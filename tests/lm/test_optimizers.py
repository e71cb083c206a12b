"""Trainer with every form of model and every kind of optimizer: the curve of a plain loop, or a clear error."""

import pytest
import torch

from charrnn_fast.lm import data
from charrnn_fast.lm.forms import FORMS, make
from charrnn_fast.lm.training import Trainer
from charrnn_fast.reference import training as reference

V, H = 7, 5
TOKENS = torch.randint(V, (400,), generator=torch.Generator().manual_seed(1))


def _model(form):
    torch.manual_seed(0)
    return make(form, V, H, dtype=torch.float64)


def _sampler():
    return data.RandomWindows(TOKENS, torch.Generator().manual_seed(0), batch_size=8, num_steps=6)


def _plain_curve(model, optimizer, clip):
    """Two epochs of the loop that everybody writes, with the norm of all that the optimizer holds."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    sampler, curve = _sampler(), []
    for _ in range(2):
        total = count = 0
        for X, Y in sampler.train():
            loss, _ = model.loss(X, Y)
            for p in model.parameters():
                p.grad = None
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(held, clip)
            optimizer.step()
            total, count = total + loss.item() * Y.numel(), count + Y.numel()
        curve.append(total / count)
    return curve


@pytest.mark.parametrize("clip", [None, 0.05, float("inf")])
@pytest.mark.parametrize(
    ("kind", "fewer"),
    [("sgd", False), ("adam", False)]  # made by Trainer, over all parameters
    + [(kind, f) for kind in ("SGD", "Adam", "RMSprop", "reference.SGD", "reference.Adam") for f in (False, True)],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_curve_is_a_plain_loops_or_an_error(form, kind, fewer, clip):
    model, other = _model(form), _model(form)
    name = kind.split(".")[-1]
    torch_kind = getattr(torch.optim, {"sgd": "SGD", "adam": "Adam"}.get(name, name))
    held = [list(m.parameters())[2 if fewer else 0 :] for m in (model, other)]
    if kind.startswith("reference."):
        optimizer = getattr(reference, name)(held[0], 0.1)
        if form != "reference":
            with pytest.raises(TypeError, match=r"optimizer must be .* a torch.optim.Optimizer for this model"):
                Trainer(model, optimizer=optimizer, clip=clip)
            return
    elif kind in ("sgd", "adam"):
        optimizer = kind
    else:
        optimizer = torch_kind(held[0], 0.1)
    history = Trainer(model, optimizer=optimizer, lr=0.1, clip=clip, epochs=2).fit(_sampler())
    expected = _plain_curve(other, torch_kind(held[1], 0.1), clip)
    assert [r.train_loss for r in history] == pytest.approx(expected, rel=1e-10)
    if not fewer:  # the reference's own optimizers leave alone what they do not hold
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_of_something_else_is_refused(form):
    model = _model(form)
    other = torch.optim.SGD(_model("fused").parameters(), 0.1)
    with pytest.raises(ValueError, match="holds 6 parameters, of which 6 are not the model's"):
        Trainer(model, optimizer=other)
    for wrong in (None, 3, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="optimizer must be"):
            Trainer(model, optimizer=wrong)
    with pytest.raises(ValueError, match="LBFGS"):
        Trainer(model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_modules_that_are_replaced_after_the_optimizer_was_made_are_noticed():
    model = _model("fused")
    trainer = Trainer(model, epochs=1)
    model.head = torch.nn.Linear(H, V, dtype=torch.float64)
    with pytest.raises(ValueError, match="of which 2 are not the model's"):
        trainer.fit(_sampler())
