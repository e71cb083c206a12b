"""A training step at once: the curve of the step by autograd, and the reasons for that one."""

import pytest
import torch
from lm_problems import TEXT, start
from torch import nn

from charrnn_fast.kernels import native
from charrnn_fast.lm import at_once
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.forms import make
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import RECIPES
from charrnn_fast.lm.step import TrainingStep, train_batches
from charrnn_fast.lm.training import Trainer

SIZES = {
    "scratch": {"batch_size": 64, "hidden_size": 12},
    "concise": {"batch_size": 64, "hidden_size": 12},
    "ch8": {"batch_size": 16, "hidden_size": 20},
    "santa": {"hidden_size": 20},
}
needs_native = pytest.mark.skipif(native.available() is not None, reason=f"backend 'native': {native.available()}")


class Counted:
    """A step at once that counts what it takes."""

    def __init__(self, step):
        self.step, self.taken, self.reuses_norm = step, 0, step.reuses_norm

    @property
    def norm(self):
        return self.step.norm

    def __call__(self, *arguments):
        found = self.step(*arguments)
        self.taken += found is not None
        return found


@needs_native
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_a_step_at_once_is_the_step_by_autograd_bit_for_bit(name, guard, monkeypatch):
    """SGD and Adam, one bias and two, whole and ragged batches, zero and carried state: losses, norms, parameters."""
    results = []
    for at_once_too in (True, False):
        trainer, sampler = start(RECIPES[name], TEXT[:3_000], **SIZES[name])
        model, optimizer, clip = trainer.model, trainer.optimizer, trainer.clip
        step, curve = TrainingStep(model, optimizer, clip, guard=guard), []
        monkeypatch.setattr(step, "prepare", lambda: None)
        if at_once_too:
            assert step.why_not_at_once is None
            step._at_once = Counted(model.step_at_once(optimizer, clip, step._may_update))
        for _ in range(2):
            run = train_batches(model, sampler.train(), optimizer, clip, carry_state=sampler.carry_state, step=step)
            for loss in run:
                curve += [loss, step.norm]
                assert all(p.grad is None for p in model.parameters())
        results.append((torch.stack(curve), *model.parameters()))
        if at_once_too:
            assert step._at_once.taken == len(curve) // 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
def test_batches_that_it_does_not_take_go_the_other_way():
    """Few rows of many units, where the separate kernels are faster; a state of another number of rows is refused."""
    model = CharRNN(28, 300)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainingStep(model, optimizer, None)
    step.prepare()
    step._at_once = taken = Counted(step._at_once)
    X, Y = TEXT[:320].view(16, 20), TEXT[1:321].view(16, 20)
    for rows, count in ((16, 1), (2, 1), (16, 2)):
        loss, state = step((X[:rows], Y[:rows]))
        assert loss.isfinite() and state.shape == (1, rows, 300) and taken.taken == count and step.norm > 0
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        step((X, Y), torch.zeros(1, 3, 300))
    with pytest.raises(IndexError, match=r"token id \d+ is not in 0\.\.27"):
        step((X + 28, Y))
    assert all(p.grad is None for p in model.parameters()) and not step.pending


class Own(CharRNN):
    def loss(self, tokens, targets, state=None):
        return super().loss(tokens, targets, state)


def _changed(change) -> CharRNN:
    model = CharRNN(7, 5)
    change(model)
    return model


REASONS = {
    "the model has 2 layers": lambda: (CharRNN(7, 5, 2), {}),
    "the model has a learned embedding": lambda: (CharRNN(7, 5, embedding=3), {}),
    "dropout draws numbers": lambda: (CharRNN(7, 5, dropout=0.1), {}),
    "a method of the model is not CharRNN's": lambda: (Own(7, 5), {}),
    "a method of the model is not CharRNN's ": lambda: (_changed(lambda m: setattr(m, "loss", m.loss)), {}),
    "it would not call its modules, and head has a forward hook": lambda: (
        _changed(lambda m: m.head.register_forward_hook(lambda *_: None)),
        {},
    ),
    "it would not call the hook of head.bias": lambda: (_changed(lambda m: m.head.bias.register_hook(lambda g: g)), {}),
    "rnn is a RNN": lambda: (_changed(lambda m: setattr(m, "rnn", nn.RNN(7, 5, batch_first=True))), {}),
    "PyTorch alone is trained as PyTorch does": lambda: (make("torch", 7, 5), {}),
    "the reference model is trained operation by operation": lambda: (make("reference", 7, 5), {}),
    "an update is made for 3 batches": lambda: (CharRNN(7, 5), {"accumulate": 3}),
    "an update is made for 2 batches": lambda: (CharRNN(7, 5), {"graph_batches": 2}),
    "forward and loss are under autocast": lambda: (CharRNN(7, 5), {"bf16": True}),
    "gradients are shared with other processes": lambda: (CharRNN(7, 5), {"processes": Processes.__new__(Processes)}),
    "it is there for the native kernels on a CPU and the Triton kernels on a GPU": lambda: (
        CharRNN(7, 5, backend="torch"),
        {},
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    model, options = REASONS[reason]()
    optimizer = Trainer(model).optimizer
    step = TrainingStep(model, optimizer, 1.0, **options)
    assert step.why_not_at_once == reason.strip()
    step.prepare()
    assert step._at_once is None


@needs_native
def test_what_has_changed_since_is_found_before_an_epoch(monkeypatch):
    model = CharRNN(28, 5)
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    step.prepare()
    assert isinstance(step._at_once, at_once.OneCall)
    handle = model.head.register_forward_hook(lambda *_: None)
    step.prepare()
    assert step._at_once is None
    handle.remove()
    made = step._made[0]
    step.prepare()
    assert step._at_once is made, "what was recorded of it may be replayed again"
    model.head.bias = nn.Parameter(model.head.bias.detach().clone())
    step.prepare()
    assert step._at_once is not made and step._made[0] is made
    monkeypatch.setattr(CharRNN, "loss", lambda *_: None)
    step.prepare()
    assert step._at_once is None, "the class's own method was replaced"
