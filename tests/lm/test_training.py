"""Trainer: the same curve as the reference, the same curve from the same seed, exact resume, losses that are not
finite.
"""

import functools
from dataclasses import replace

import pytest
import torch

from charrnn_fast.errors import TrainingError
from charrnn_fast.kernels import native
from charrnn_fast.lm import checkpoint, corpora, data, step
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import RECIPES, build_model, build_sampler
from charrnn_fast.lm.training import Trainer, train_batches, validate
from charrnn_fast.lm.training_options import MAX_GRAPH_BATCHES
from charrnn_fast.reference import training as reference

# English that is on every machine, which the recipes' own books are not; all 27 symbols of it and <unk> make V = 28.
ENGLISH = corpora.fallback(corpora.BOOKS["timemachine"], "offline").text[:20_000]
TEXT = data.Vocabulary.of(f"{ENGLISH} abcdefghijklmnopqrstuvwxyz", letters=True).encode(ENGLISH)[:9_000]

# The constants of each recipe but for sizes that would take minutes in fp64.
SMALL = {
    "scratch": {"batch_size": 256},
    "concise": {"batch_size": 256},
    "ch8": {"hidden_size": 48, "batch_size": 16},
    "santa": {"hidden_size": 48},
    # dropout draws other numbers in each form; the reference has Adam, at one learning rate
    "shakespeare": {"hidden_size": 24, "batch_size": 8, "dropout": 0.0, "optimizer": "adam", "schedule": "constant"},
}


@functools.cache
def _curve(recipe, kind: str, steps: int, dtype: torch.dtype = torch.float64) -> list[float]:
    """The losses of the first steps, epoch after epoch."""
    model = build_model(recipe, 28, seed=0, kind=kind, dtype=dtype)
    sampler = build_sampler(recipe, TEXT, seed=0)
    trainer = Trainer(model, optimizer=recipe.optimizer, lr=recipe.lr, clip=recipe.clip)
    run = reference.train_batches if kind == "reference" else train_batches
    losses: list[float] = []
    while len(losses) < steps:
        for loss in run(model, sampler.train(), trainer.optimizer, trainer.clip, carry_state=sampler.carry_state):
            losses.append(float(loss))
    return losses[:steps]


@pytest.mark.parametrize("name", RECIPES)
def test_fused_and_reference_follow_the_same_curve_for_200_steps(name):
    recipe = replace(RECIPES[name], **SMALL[name])
    fused, scratch = (_curve(recipe, kind, 200, torch.float64) for kind in ("fused", "reference"))
    torch.testing.assert_close(fused, scratch, rtol=0, atol=1e-9)
    assert min(fused[-20:]) < fused[0] - 0.2


@pytest.mark.parametrize("name", ["ch8", "santa"])
def test_trainers_step_on_the_reference_is_the_references_own_loop(name):
    """Bit for bit: the one step that every form is trained by is the specification's where the form is."""
    recipe = replace(RECIPES[name], hidden_size=6, batch_size=1 if name == "santa" else 8)
    model, net = (build_model(recipe, 28, seed=0, kind="reference") for _ in range(2))
    trainer = Trainer(model, optimizer=recipe.optimizer, lr=recipe.lr, clip=recipe.clip, epochs=2)
    history = trainer.fit(build_sampler(recipe, TEXT[:900], seed=0))
    updater = model.own_optimizers[recipe.optimizer](net.parameters(), recipe.lr)
    sampler = build_sampler(recipe, TEXT[:900], seed=0)
    for record in history:
        batches = list(sampler.train())
        run = reference.train_batches(net, batches, updater, recipe.clip, carry_state=sampler.carry_state)
        weighed = [float(loss) * Y.numel() for loss, (_, Y) in zip(run, batches, strict=True)]
        assert record.train_loss == sum(weighed) / record.tokens
    for p, q in zip(model.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)


def _departure(recipe, kind: str, reordered: int = 0) -> float:
    """How far 200 losses in fp32 come from those of the reference in fp64; `reordered` turns the rows of each batch
    around by so many, which is another order of the same sums.
    """
    model = build_model(recipe, 28, seed=0, kind=kind)
    sampler = build_sampler(recipe, TEXT, seed=0)
    trainer = Trainer(model, optimizer=recipe.optimizer, lr=recipe.lr, clip=recipe.clip)
    run = reference.train_batches if kind == "reference" else train_batches
    curve: list[float] = []
    while len(curve) < 200:
        batches = [(X.roll(reordered, 0), Y.roll(reordered, 0)) for X, Y in sampler.train()]
        carried = {"carry_state": sampler.carry_state}
        curve += [float(loss) for loss in run(model, batches, trainer.optimizer, trainer.clip, **carried)]
    exact = torch.tensor(_curve(recipe, "reference", 200, torch.float64), dtype=torch.float64)
    return float((torch.tensor(curve[:200], dtype=torch.float64) - exact).abs().max())


@pytest.mark.parametrize("name", RECIPES)
def test_fp32_departs_from_the_exact_curve_as_the_reference_in_fp32_does(name):
    """Rounding grows along a curve, in 200 steps to 2e-6 (scratch) or 2e-7 (ch8), by chance more or less (concise:
    1.2e-6, 2.8e-6, 5.7e-6 by the order of a batch's rows): at most 3 times as far as there, in the worse of two orders.
    """
    recipe = replace(RECIPES[name], **SMALL[name])
    theirs = max(_departure(recipe, "reference", order) for order in ((0, 100) if recipe.batch_size > 1 else (0,)))
    assert 0 < _departure(recipe, "fused") <= 3 * theirs


def test_torch_model_follows_the_same_curve():
    recipe = replace(RECIPES["concise"], batch_size=64)
    torch.testing.assert_close(_curve(recipe, "fused", 30), _curve(recipe, "torch", 30), rtol=0, atol=1e-10)


@pytest.mark.parametrize("embedding", ["onehot", 5])
def test_torch_model_trains_by_pytorch_alone(embedding, monkeypatch):
    """Bit for bit the loop that one writes in PyTorch, and no kernel of this library is entered."""

    def entered(*arguments, **options):
        raise AssertionError("a kernel of this library ran")

    for name in ("elman_forward", "elman_backward", "linear_cross_entropy", "language_model_loss", "clip_grad_norm_"):
        monkeypatch.setattr(native, name, entered)
    recipe = replace(RECIPES["concise"], batch_size=64, embedding=embedding)
    model, plain = (build_model(recipe, 28, seed=0, kind="torch") for _ in range(2))
    batches = list(build_sampler(recipe, TEXT[:700], seed=0).train())
    losses = list(train_batches(model, batches, torch.optim.SGD(model.parameters(), 1.0), 0.1))
    optimizer = torch.optim.SGD(plain.parameters(), 1.0)
    for (X, Y), loss in zip(batches, losses, strict=True):
        x = torch.nn.functional.one_hot(X, 28).float() if plain.embed is None else plain.embed(X)
        states, _ = plain.rnn(x)
        expected = torch.nn.functional.cross_entropy(plain.head(states.transpose(0, 1).flatten(0, 1)), Y.T.flatten())
        optimizer.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        assert torch.equal(loss, expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_graph_across_batches_follows_the_reference():
    def curve(kind: str) -> list[float]:
        recipe = replace(RECIPES["ch8"], hidden_size=16, batch_size=8)
        model = build_model(recipe, 28, seed=0, kind=kind, dtype=torch.float64)
        trainer = Trainer(model, epochs=2, graph_batches=3)
        return [record.train_loss for record in trainer.fit(build_sampler(recipe, TEXT[:2000], seed=0))]

    torch.testing.assert_close(curve("fused"), curve("reference"), rtol=0, atol=1e-11)


@pytest.mark.parametrize("sampler", ["sequential", "random"])
def test_ch8_learns_in_a_short_form(time_machine, sampler):
    """25 epochs of the recipe at a quarter of its width; the full runs are recorded in bench/results."""
    from charrnn_fast.lm.recipes import prepare_text

    recipe = replace(RECIPES["ch8"], hidden_size=128, sampler=sampler)
    vocab, tokens = prepare_text(recipe, time_machine)
    trainer = Trainer(build_model(recipe, len(vocab), seed=0), epochs=25)
    history = trainer.fit(build_sampler(recipe, tokens, seed=0))
    assert 8 < history[-1].train_ppl < 16 < history[0].train_ppl < 29


def test_same_seed_same_curve():
    def losses(seed: int) -> list[float]:
        recipe = replace(RECIPES["scratch"], batch_size=256)
        trainer = Trainer(build_model(recipe, 28, seed), epochs=2)
        return [record.train_loss for record in trainer.fit(build_sampler(recipe, TEXT, seed))]

    assert losses(3) == losses(3) != losses(4)


@pytest.mark.parametrize("name", ["scratch", "santa"])
def test_resumed_run_is_the_run_that_was_never_stopped(name, tmp_path):
    recipe = replace(RECIPES[name], hidden_size=8, batch_size=RECIPES[name].batch_size // 4 or 1, epochs=4)
    vocab = data.Vocabulary([chr(97 + i) for i in range(28)], letters=False)

    def start(epochs: int) -> tuple[Trainer, data.Sampler]:
        model = build_model(recipe, 28, seed=0)
        return Trainer(model, optimizer=recipe.optimizer, lr=recipe.lr, epochs=epochs), build_sampler(
            recipe, TEXT[:3000], 0
        )

    straight, sampler = start(4)
    straight.fit(sampler)
    stopped, sampler = start(2)
    stopped.fit(sampler)
    checkpoint.save(tmp_path / "a.ckpt", stopped, sampler, vocab, recipe, kind="fused", seed=0, source="random")
    resumed, sampler = start(4)
    checkpoint.resume(checkpoint.load(tmp_path / "a.ckpt"), resumed, sampler, recipe)
    resumed.fit(sampler)
    assert [r.train_loss for r in resumed.history] == [r.train_loss for r in straight.history]
    assert [r.val_ppl for r in resumed.history] == [r.val_ppl for r in straight.history]
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_loss_that_is_not_finite_stops_the_run(kind):
    recipe = replace(RECIPES["scratch"], nonlinearity="relu", batch_size=64)
    trainer = Trainer(build_model(recipe, 28, seed=0, kind=kind), lr=1e12, clip=None, epochs=3)
    seen = []
    with pytest.raises(
        TrainingError,
        match=r"the (training loss|gradient norm|validation perplexity) is (nan|inf) (in epoch|at step) \d.*: expected",
    ):
        trainer.fit(build_sampler(recipe, TEXT, seed=0), on_epoch=seen.append)
    assert len(trainer.history) == len(seen) < 3


def test_perplexities_of_unequal_batches():
    model = CharRNN(28, 4, dtype=torch.float64)
    batches = [(TEXT[None, :100], TEXT[None, 1:101]), (TEXT[None, 500:510], TEXT[None, 501:511])]
    losses = [model.loss(X, Y)[0].item() for X, Y in batches]
    ppl, batch_mean = validate(model, batches)
    assert ppl == pytest.approx(
        float(torch.tensor((100 * losses[0] + 10 * losses[1]) / 110, dtype=torch.float64).exp())
    )
    assert batch_mean == pytest.approx(float(torch.tensor(losses, dtype=torch.float64).exp().mean()))
    assert validate(model, []) is None


def test_trainer_takes_an_optimizer_of_torch():
    model = CharRNN(28, 4)
    trainer = Trainer(model, optimizer=torch.optim.RMSprop(model.parameters(), 1e-2), epochs=2)
    recipe = replace(RECIPES["scratch"], batch_size=64)
    history = trainer.fit(build_sampler(recipe, TEXT[:1000], seed=0))
    assert history[1].train_loss < history[0].train_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be 'sgd', 'adam', 'adamw', 'rmsprop' .* got 'lion'"),
        ({"lr": 0.0}, r"lr must be above 0, got 0\.0"),
        ({"clip": -1.0}, r"clip must be above 0, or None for no clipping, got -1\.0"),
        ({"graph_batches": 0}, "graph_batches must be 1 to 16, got 0"),
        ({"graph_batches": MAX_GRAPH_BATCHES + 1}, "graph_batches must be 1 to 16, got 17"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(CharRNN(28, 4), **options)


def test_plain_sgd_is_told_from_other_optimizers():
    """Its step may be taken by the clip's launch; every other one, and one with hooks, by the optimizer itself."""
    p = torch.zeros(3, requires_grad=True)
    assert step._plain_sgd_lr(torch.optim.SGD([p], 0.5)) == 0.5
    others = [torch.optim.SGD([p], 0.5, momentum=0.9), torch.optim.SGD([p], 0.5, weight_decay=0.1)]
    others += [torch.optim.SGD([p], 0.5, maximize=True), torch.optim.Adam([p], 0.5)]
    others += [torch.optim.SGD([{"params": [p]}, {"params": [torch.zeros(2, requires_grad=True)]}], 0.5)]
    watched = torch.optim.SGD([p], 0.5)
    watched.register_step_pre_hook(lambda *arguments: None)
    assert [step._plain_sgd_lr(optimizer) for optimizer in [*others, watched]] == [None] * 6
