"""CharRNN against the reference model, and the decoder's string interface."""

from dataclasses import replace

import pytest
import torch
from lm_problems import H, V, same_parameters, tiny

from charrnn_fast.errors import InputError
from charrnn_fast.lm import data
from charrnn_fast.lm.data import Vocabulary
from charrnn_fast.lm.forms import FORMS, make, of
from charrnn_fast.lm.generation import generate
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import RECIPES, build_model
from charrnn_fast.lm.training import Trainer
from charrnn_fast.reference.generate import generate as reference_generate
from charrnn_fast.reference.language_model import RNNLM

OPTIONS = [
    {},
    {"num_layers": 2},
    {"nonlinearity": "relu"},
    {"embedding": 3},
    {"second_bias": False},
    {"second_bias": False, "num_layers": 2},
    {"backend": "torch"},
    {"form": "torch"},
    {"form": "torch", "embedding": 3, "num_layers": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_the_reference(options):
    """Logits, states, loss and the gradient of every trained parameter, by the loss in one call or separate operations;
    and back through load_reference.
    """
    model = tiny(**options)
    net = model.to_reference()
    same_parameters(model, tiny(seed=5, **options).load_reference(net))
    tokens = torch.randint(V, (20, 10), generator=torch.Generator().manual_seed(1))
    state = torch.randn(model.num_layers, 20, H, dtype=torch.float64)
    torch.testing.assert_close(model(tokens, state), net(tokens, state), rtol=1e-12, atol=1e-13)
    results = [m.loss(tokens[:, :-1], tokens[:, 1:], state) for m in (model, net)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)
    for loss, last in results:
        (loss + last.sum()).backward()
    gradients = tiny(**options)
    for p in net.parameters():
        p.data = p.grad
    gradients.load_reference(net)
    for (name, p), q in zip(model.named_parameters(), gradients.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("init", ["normal", "uniform", "orthogonal"])
@pytest.mark.parametrize("second_bias", [False, True])
def test_all_forms_of_a_recipe_begin_alike(init, second_bias):
    """Those drawn by the specification have no second bias: it begins as zeros."""
    recipe = replace(RECIPES["scratch"], hidden_size=5, init=init, second_bias=second_bias)
    ids = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(1))
    first, *others = (build_model(recipe, 7, 0, kind=form, dtype=torch.float64)(ids)[0] for form in FORMS)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"embedding": 3, "num_layers": 2}, {"second_bias": False}])
def test_every_form_is_a_language_model_and_takes_over_every_others_parameters(options):
    """One file's parameters make one model in each form: loss, state and text."""
    written = tiny(**options).state_dict()
    tokens = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for seed, form in enumerate(FORMS):
        model = tiny(form, seed + 1, **options)
        assert model.form == form and isinstance(model, LanguageModel)
        model.load_state_dict(written)
        again = model.state_dict()
        assert again.keys() == written.keys() and all(torch.equal(again[name], p) for name, p in written.items())
        assert model.config() == tiny(**options).config() and str(model.device) == "cpu"
        with model.evaluating():
            ids, _ = model.generate_ids(tokens, 6)
        found.append([*model.loss(tokens[:, :-1], tokens[:, 1:], model.zero_state(3)), ids.double()])
        with pytest.raises(RuntimeError, match=r"size mismatch|missing|other names"):
            model.load_state_dict(make("fused", 7, 4).state_dict())
        with pytest.raises(ValueError, match=r"a state \((1|2), B, 5\) was expected, got \(4, 2, 5\)"):
            model.require_state(torch.zeros(4, 2, 5))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-13)


def test_the_specifications_own_model_is_taken_with_its_own_parameters():
    net = RNNLM.from_scratch(7, 5, sigma=0.5, generator=torch.Generator().manual_seed(0))
    before = net.W_hq.clone()
    sampler = data.RandomWindows(torch.arange(60) % 7, torch.Generator(), batch_size=4, num_steps=5)
    trainer = Trainer(net, epochs=1)
    trainer.fit(sampler)
    assert trainer.model.W_hq is net.W_hq and not torch.equal(net.W_hq, before)
    assert generate(net, VOCAB, "cab", 12) == generate(of(net), VOCAB, "cab", 12)
    for taken in (Trainer, of):
        with pytest.raises(TypeError, match=r"a language model was expected .* got Linear"):
            taken(torch.nn.Linear(2, 2))


def test_charrnn_is_the_fused_form_and_names_the_other():
    with pytest.raises(ValueError, match=r"cell must be 'fused', got .torch.: .*TorchCharRNN, with these arguments"):
        CharRNN(7, 5, cell="torch")
    with pytest.raises(ValueError, match="the form must be one of fused, reference, torch, got 'lstm'"):
        make("lstm", 7, 5)


def test_one_bias_means_one_trained_bias():
    model = CharRNN(28, 32, second_bias=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2876
    assert model.rnn.bias_hh_l0.eq(0).all()


@pytest.mark.parametrize(
    "options", [{"embedding": 0}, {"embedding": "two"}, {"cell": "lstm"}, {"nonlinearity": "gelu"}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        CharRNN(7, 5, **options)


def test_token_ids_out_of_range():
    with pytest.raises(IndexError):
        tiny()(torch.tensor([[1, 7]]))


VOCAB = Vocabulary.of("abcdefg", letters=False)


def test_generate_is_the_reference_decoder():
    model = tiny()
    ids, _ = reference_generate(model.to_reference(), VOCAB.encode("cab").unsqueeze(0), 12)
    assert generate(model, VOCAB, "cab", 12) == "cab" + VOCAB.decode(ids[0])
    assert generate(model.to_reference(), VOCAB, "cab", 12) == generate(model, VOCAB, "cab", 12)
    assert generate(model, VOCAB, "cab", 0) == "cab"


def test_sampling_is_repeated_by_its_seed():
    model = tiny()
    texts = [generate(model, VOCAB, "a", 60, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert generate(model, VOCAB, "a", 60, temperature=1.0) != generate(model, VOCAB, "a", 60, temperature=1.0)
    assert generate(model, VOCAB, "a", 60, temperature=1.0, top_k=1, seed=3) == generate(model, VOCAB, "a", 60)
    assert generate(model, VOCAB, "a", 60, temperature=1e-4, seed=3) == generate(model, VOCAB, "a", 60)


def test_prompt_is_prepared_as_the_text_was():
    model = CharRNN(28, 4)
    vocab = Vocabulary.of("abcdefghijklmnopqrstuvwxyz ", letters=True)
    assert generate(model, vocab, "Time, 1895 Traveller", 0) == "time traveller"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("", 5), {}, "the prompt is empty"),
        (("axb", 5), {}, "outside the model's vocabulary of 7: 'x'"),
        (("a", -1), {}, "must be at least 0, got -1"),
        (("a", 5), {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (("a", 5), {"temperature": float("nan")}, "temperature must be above 0, got nan"),
        (("a", 5), {"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        (("a", 5), {"temperature": 1.0, "alpha": -1.0}, r"alpha must be above 0, got -1\.0"),
        (("a", 5), {"top_k": 3}, "pass a temperature"),
    ],
)
def test_bad_requests(arguments, options, message):
    with pytest.raises(InputError, match=message):
        generate(tiny(), VOCAB, *arguments, **options)


def test_state_of_another_number_of_layers_is_refused():
    tokens = torch.randint(7, (20, 10), generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        tiny().loss(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 20, 5, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"form": "torch"}])
def test_targets_of_another_shape_are_refused(options):
    """As many, but (T, B): some ways of the loss would pair them with other tokens than others do."""
    tokens = torch.randint(11, (2, 3))
    with pytest.raises(ValueError, match=r"targets must be \(2, 3\) as tokens are, got \(3, 2\)"):
        make(options.pop("form", "fused"), 11, 8, **options).loss(tokens, torch.randint(11, (3, 2)))
