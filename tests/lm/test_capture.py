"""Recorded steps: the curve of the plain loop bit for bit, whatever is recorded, refused or changed on the way.

Two recorders stand in for the CUDA graph's. `Calling` records the call itself: it runs the kernels that a CPU has.
`Tracing` records what the tensors go through, by make_fx: like a CUDA graph, its replays run no Python, read and write
the tensors that were there when it was recorded, and recording runs nothing.
"""

from dataclasses import replace
from unittest.mock import Mock

import lm_problems
import pytest
import torch
from lm_problems import Calling, by_form, fit, same_parameters, same_run, save, start
from torch.fx.experimental.proxy_tensor import make_fx

from charrnn_fast.errors import TrainingError
from charrnn_fast.lm import capture, checkpoint, data
from charrnn_fast.lm import model as model_module
from charrnn_fast.lm.capture import MAX_SHAPES, WARM_UP_STEPS, RecordedSteps, dependencies
from charrnn_fast.lm.evaluation import validate
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import RECIPES, build_model, build_sampler
from charrnn_fast.lm.step import Evaluation, TrainingStep, train_batches
from charrnn_fast.lm.torch_model import TorchCharRNN
from charrnn_fast.lm.training import Trainer

SMALL = {
    "scratch": {"batch_size": 256, "hidden_size": 16},
    "concise": {"batch_size": 256, "hidden_size": 16},
    "ch8": {"hidden_size": 24, "batch_size": 16},
    "ch8-random": {"hidden_size": 24, "batch_size": 16, "sampler": "random"},
    "santa": {"hidden_size": 24},
}
FORMS = {name: replace(RECIPES[name.removesuffix("-random")], **sizes, epochs=4) for name, sizes in SMALL.items()}
TEXT = lm_problems.TEXT[:3_000]


class Tracing(Calling):
    """Records the tensor operations: a replay runs these alone."""

    def record(self, work):
        self.recorded += 1
        model, optimizer = self.trained
        tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
        before = [t.clone() for t in tensors if t is not None]
        operations = make_fx(work, tracing_mode="fake", _allow_non_fake_inputs=True)()
        for tensor, kept in zip((t for t in tensors if t is not None), before, strict=True):
            tensor.data.copy_(kept)  # operations whose tensors all existed before have run

        @torch.no_grad()
        def replay():
            self.replays += 1
            return operations()

        return replay


class Refusing(Calling):
    """Fails as a capture does: in the middle of the step, when gradients are there and no update has been made."""

    def record(self, work):
        _, optimizer = self.trained
        step, optimizer.step = optimizer.step, self._refuse
        try:
            return work()
        finally:
            optimizer.step = step

    def _refuse(self):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def _recorded(model, optimizer, clip, recorder, carry_state) -> RecordedSteps:
    step = TrainingStep(model, optimizer, clip)
    zero_state = model.zero_state if carry_state else None
    return RecordedSteps(step, recorder, lambda: dependencies(model, optimizer), zero_state)


def _train(recipe, recorder=None, *, before_epoch=lambda *_: None, text=TEXT, device="cpu", **options):
    """The losses of every step, the trained model, and with a recorder's class the recorded steps and it."""
    trainer, sampler = start(recipe, text.to(device), device=device, capture=False, **options)
    model, optimizer, carry = trainer.model, trainer.optimizer, sampler.carry_state
    steps = None
    if recorder is not None:
        recorder = recorder(model, optimizer)
        steps = _recorded(model, optimizer, recipe.clip, recorder, carry)
    losses = []
    for epoch in range(trainer.epochs):
        before_epoch(epoch, model, optimizer)
        if steps is not None:
            steps.refresh()
        losses += train_batches(model, sampler.train(), optimizer, recipe.clip, carry_state=carry, recorded=steps)
        assert all(p.grad is None for p in model.parameters())
    return torch.stack(losses), model, steps, recorder


def _assert_same(plain, recorded):
    assert torch.equal(plain[0], recorded[0])
    same_parameters(plain[1], recorded[1])


@pytest.mark.parametrize(("name", "momentum"), [("concise", 0.9), ("ch8", 0.0), ("ch8-random", 0.0)])
def test_replay_needs_no_python(name, momentum, monkeypatch):
    """The optimiser's state, the carried state and the parameters all live in tensors that a recording can hold."""
    monkeypatch.setenv("CHARRNN_BACKEND", "torch")  # operations that can be traced
    recipe = replace(FORMS[name], embedding=5, num_steps=4, hidden_size=7, batch_size=9, lr=0.3)
    options = {"momentum": momentum, "dtype": torch.float64, "text": TEXT[:150], "epochs": WARM_UP_STEPS + 1}
    recorded = _train(recipe, Tracing, **options)
    _, _, steps, recorder = recorded
    assert steps.reason is None and recorder.recorded == (2 if name == "concise" else 1) and recorder.replays > 0
    _assert_same(_train(recipe, **options), recorded)


def test_changes_between_epochs_are_recorded_anew(monkeypatch):
    """Learning rate, frozen parameters and parameters that moved; a traced replay would go on with the old ones."""
    monkeypatch.setenv("CHARRNN_BACKEND", "torch")
    recipe = replace(FORMS["ch8"], embedding=5, num_steps=4, hidden_size=7, batch_size=9)

    def before_epoch(epoch, model, optimizer):
        if epoch == 1:
            optimizer.param_groups[0]["lr"] = 0.1
        if epoch == 2:
            model.head.bias.requires_grad_(False)
        if epoch == 3:
            model.head.weight.data = model.head.weight.data.clone()

    options = {"dtype": torch.float64, "text": TEXT[:250], "epochs": 5, "before_epoch": before_epoch}
    recorded = _train(recipe, Tracing, **options)
    assert recorded[3].recorded == 4 and recorded[2].reason is None
    _assert_same(_train(recipe, **options), recorded)


@pytest.mark.parametrize("name", ["scratch", "ch8", "santa"])
def test_a_recording_that_fails_leaves_the_plain_loop(name):
    recorded = _train(FORMS[name], Refusing)
    reason = "recording a step raised RuntimeError: operation not permitted when stream is capturing"
    assert recorded[2].reason == reason
    _assert_same(_train(FORMS[name]), recorded)


def test_many_shapes_are_not_all_recorded():
    """Beyond MAX_SHAPES the plain step runs, on the state that the recorded ones carry, and they on its."""
    lengths = [4 + i for i in range(MAX_SHAPES + 3)] * (WARM_UP_STEPS + 2)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    batches = [(TEXT[None, e - n : e], TEXT[None, e - n + 1 : e + 1]) for e, n in zip(ends, lengths, strict=True)]
    results = []
    for recorder in (None, Calling()):
        model = build_model(FORMS["santa"], 28, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        steps = None if recorder is None else _recorded(model, optimizer, 1.0, recorder, True)
        run = train_batches(model, batches, optimizer, 1.0, carry_state=True, recorded=steps)
        results.append((torch.stack(list(run)), model))
    assert recorder.recorded == MAX_SHAPES
    _assert_same(*results)


def test_a_state_of_another_batch_size_is_refused_as_by_the_plain_step():
    model = CharRNN(28, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    X, Y = TEXT[:80].view(4, 20), TEXT[1:81].view(4, 20)
    batches = [(X[:1], Y[:1]), (X, Y)]
    steps = _recorded(model, optimizer, None, Calling(), True)
    for recorded in (None, steps):
        with pytest.raises(RuntimeError, match="Expected hidden size"):
            list(train_batches(model, batches, optimizer, None, carry_state=True, recorded=recorded))


@pytest.mark.parametrize("name", ["scratch", "ch8", "santa"])
def test_triton_kernels_follow_the_reference(name, device, monkeypatch):
    """What a GPU runs (token recurrence, loss, clip, update; recorded), in fp64: interpreted where there is none."""
    monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    steps = Mock(wraps=model_module.clip_and_sgd_step_)
    monkeypatch.setattr(model_module, "clip_and_sgd_step_", steps)
    sizes = {"batch_size": 1 if name == "santa" else 5, "num_steps": 4, "hidden_size": 6}
    recipe = replace(RECIPES[name], **sizes)
    text = TEXT[: {"scratch": 60, "ch8": 130, "santa": 30}[name]]
    losses, _, _, recorder = _train(recipe, Calling, dtype=torch.float64, text=text, epochs=1, device=device)
    assert recorder.replays > 0
    assert steps.called == (recipe.optimizer == "sgd"), "clip and SGD's step are one launch"
    expected, *_ = by_form(recipe, text, 1, kind="reference", dtype=torch.float64)
    torch.testing.assert_close(losses.tolist(), expected, rtol=0, atol=1e-9)


# ---- Trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_trainer_records_and_keeps_its_curve(name, recorders):
    """Whole and ragged batches, zero and carried state, SGD and Adam; every shape is recorded in the end."""
    captured, plain = (fit(FORMS[name], TEXT, capture=wanted, epochs=WARM_UP_STEPS + 2) for wanted in (True, False))
    assert captured.capture_reason is None and plain.capture_reason == "it was turned off"
    same_run(captured, plain)
    (recorder,) = recorders
    _, training = captured._recordings._training
    slots = [slot for steps in (training, *captured._recordings._evaluation.values()) for slot in steps._slots.values()]
    assert len(training._slots) >= (1 if name == "ch8" else 2)
    assert recorder.recorded == len([slot for slot in slots if slot.replay is not None]) >= 1
    assert recorder.runs == sum(min(slot.steps, WARM_UP_STEPS) for slot in slots) < recorder.replays
    assert recorder.runs + recorder.replays == sum(slot.steps for slot in slots)


def test_validation_is_recorded_and_an_epoch_reads_from_the_device_twice(recorders, monkeypatch):
    """Each shape of the validation after its warm-up; losses and norms of an epoch come over in one transfer, those of
    its validation in another.
    """
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (transfers.append(tuple(self.shape)), cpu(self))[1])
    recipe = replace(FORMS["scratch"], batch_size=64)
    trainer, sampler = start(recipe, TEXT, epochs=WARM_UP_STEPS + 2, capture=True)
    trainer.fit(sampler)
    steps, batches = trainer.step // trainer.epochs, len(list(sampler.validation()))
    assert transfers == [(2 * steps,), (batches,)] * trainer.epochs
    slots = trainer._recordings.evaluation(False)._slots.values()
    assert len(slots) == 2 and all(slot.replay is not None for slot in slots)
    assert trainer._recordings.evaluation(False).reason is None


@pytest.mark.parametrize("name", ["concise", "ch8"])
def test_an_evaluation_alone_is_recorded_where_a_step_can_be(name, recorders):
    """validate() as `charrnn-fast evaluate` calls it: whole and ragged batches, zero and carried state."""
    model = build_model(FORMS[name], 28, seed=0)
    text = data.consecutive(TEXT[:500], 33, ids_below=28)
    batches = list(text) if name == "ch8" else list(build_sampler(FORMS[name], TEXT, seed=0).validation())
    recorded = validate(model, batches, carry_state=name == "ch8")
    plain = validate(model, batches, carry_state=name == "ch8", step=Evaluation(model))
    assert recorded == plain
    assert [r.recorded for r in recorders] == ([1] if name == "ch8" else [0]) and recorders[0].runs >= WARM_UP_STEPS - 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_learning_rate_that_changes_is_a_tensor_that_a_recording_follows(optimizer, recorders):
    recipe = replace(FORMS["ch8"], optimizer=optimizer, lr=0.01, schedule="cosine", warmup=5, epochs=6)
    captured, plain = (fit(recipe, TEXT, capture=wanted) for wanted in (True, False))
    assert [r.lr for r in captured.history] == pytest.approx([r.lr for r in plain.history])
    assert [r.train_loss for r in captured.history] == pytest.approx([r.train_loss for r in plain.history], rel=1e-5)
    assert len({r.lr for r in captured.history}) == 6 and isinstance(
        captured.optimizer.param_groups[0]["lr"], torch.Tensor
    )
    assert recorders[0].recorded == 1 and recorders[0].replays > 20, "not recorded anew when the rate changes"


def test_clip_and_optimizer_changed_between_epochs_are_heeded(recorders):
    results = []
    for wanted in (True, False):
        trainer, sampler = start(FORMS["ch8"], TEXT, epochs=8, capture=wanted)

        def change(record, trainer=trainer):
            if record.epoch == 3:
                trainer.clip = 0.05
            if record.epoch == 6:
                trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)

        trainer.fit(sampler, on_epoch=change)
        results.append(trainer)
    same_run(*results)
    assert [recorder.recorded for recorder in recorders] == [3] and recorders[0].replays > 8


@pytest.mark.parametrize("name", ["scratch", "ch8", "santa"])
def test_resume_of_recorded_steps_is_exact(name, recorders, tmp_path):
    """Also into a trainer that has recorded steps on the optimiser state that the checkpoint replaces."""
    recipe = FORMS[name]
    straight = fit(recipe, TEXT, epochs=6)
    stopped, sampler = start(recipe, TEXT, epochs=2)
    stopped.fit(sampler)
    save(tmp_path / "a.ckpt", stopped, sampler, recipe)
    stopped.epochs = 5
    stopped.fit(sampler)  # past the checkpoint, and back
    checkpoint.resume(checkpoint.load(tmp_path / "a.ckpt"), stopped, sampler, recipe)
    stopped.epochs = 6
    stopped.fit(sampler)
    same_run(stopped, straight)
    assert len(recorders) == 2 and recorders[1].recorded >= (4 if recipe.optimizer == "adam" else 1)


def test_failure_in_a_run_is_told_and_trained_through(recorders, monkeypatch):
    monkeypatch.setattr(Calling, "record", lambda self, work: 1 / 0)
    trainer = fit(FORMS["scratch"], TEXT)
    assert trainer.capture_reason == "recording a step raised ZeroDivisionError: division by zero"
    same_run(trainer, fit(FORMS["scratch"], TEXT, capture=False))
    with pytest.raises(TrainingError, match=r"a training step cannot be captured: .*division by zero"):
        fit(FORMS["scratch"], TEXT, capture=True)


REASONS = {
    "a CUDA graph needs a CUDA or ROCm device": (lambda: CharRNN(28, 4), {}),
    "PyTorch alone is trained as PyTorch does": (lambda: TorchCharRNN(28, 4), {}),
    "the reference model is trained operation by operation": (lambda: CharRNN(28, 4).to_reference(), {}),
    "the graph is kept across 3 batches": (lambda: CharRNN(28, 4), {"graph_batches": 3}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    make, options = REASONS[reason]
    assert reason in Trainer(make(), **options).capture_reason
    assert Trainer(make(), capture=False, **options).capture_reason == "it was turned off"
    if "PyTorch alone" not in reason:
        with pytest.raises(
            RuntimeError, match=f"capture was asked for, but training steps cannot be captured: {reason}"
        ):
            Trainer(make(), capture=True, **options)
    with pytest.raises(ValueError, match="capture must be 'auto', True or False, got 'yes'"):
        Trainer(make(), capture="yes", **options)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("SGD", {}, None),
        ("SGD", {"momentum": 0.9}, None),
        ("Adam", {"capturable": True}, None),
        ("RMSprop", {"capturable": True}, None),
        ("Adam", {}, "Adam keeps its step count on the host: make it with capturable=True"),
        ("Adagrad", {}, "Adagrad has no option capturable"),
        ("LBFGS", {}, "LBFGS has no option capturable"),
    ],
)
def test_optimizers_that_can_be_captured(kind, options, reason, monkeypatch):
    model = CharRNN(28, 4)
    optimizer = getattr(torch.optim, kind)(model.parameters(), 0.1, **options)
    assert capture.why_not_optimizer(optimizer) == reason
    monkeypatch.setattr(capture, "why_not_on", lambda device: None)
    if kind != "LBFGS":  # which Trainer refuses
        assert Trainer(model, optimizer=optimizer).capture_reason == reason


@pytest.mark.parametrize("name", ["scratch", "santa"])
def test_state_written_by_a_gpu_resumes_on_a_cpu(name):
    """On a GPU Adam is fused and capturable, with step counts on the device: the options stay behind, the counts do
    not.
    """
    recipe = FORMS[name]
    straight = fit(recipe, TEXT)
    stopped, sampler = start(recipe, TEXT, epochs=2)
    stopped.fit(sampler)
    state = stopped.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group |= {name: True for name in ("capturable", "fused") if name in group}
    resumed, _ = start(recipe, TEXT, seed=1)
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.load_state_dict(state)
    assert not any(group.get("capturable") or group["fused"] for group in resumed.optimizer.param_groups)
    resumed.fit(sampler)
    same_run(resumed, straight)


def test_state_of_another_number_of_groups_is_refused():
    model = CharRNN(28, 4)
    groups = [{"params": [model.head.weight]}, {"params": [model.head.bias]}]
    state = Trainer(model, optimizer=torch.optim.SGD(groups, 0.1)).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Trainer(CharRNN(28, 4)).load_state_dict(state)


def test_corpus_moves_to_the_models_device():
    model = CharRNN(28, 4)
    sampler = build_sampler(FORMS["scratch"], TEXT[:300], seed=0)
    moved = []
    sampler.to = lambda device: moved.append(device)
    Trainer(model, epochs=1).fit(sampler)
    assert moved == [torch.device("cpu")]
    assert data.Sampler.to(sampler, "meta") is sampler and sampler.tokens.device.type == "meta"
