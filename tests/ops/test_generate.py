"""The decoder operation against the reference decoder: same ids, same state, every option, every backend."""

import pytest
import torch

from charrnn_fast.lm.model import CharRNN
from charrnn_fast.ops.generate import generate
from charrnn_fast.reference import generate as reference


@pytest.fixture(params=["torch", "native"])
def backend(request):
    from charrnn_fast.kernels import native

    if request.param == "native" and (why := native.available()):
        pytest.skip(why)
    return request.param


def _model(layers=1, nonlinearity="tanh", hidden=24, vocab=11):
    torch.manual_seed(0)
    model = CharRNN(vocab, hidden, layers, nonlinearity=nonlinearity, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p *= 2.5  # far from uniform, so that a wrong state would show in the ids
    return model


def _operands(model):
    layers = [
        (
            getattr(model.rnn, f"weight_ih_l{i}"),
            getattr(model.rnn, f"weight_hh_l{i}"),
            getattr(model.rnn, f"bias_ih_l{i}") + getattr(model.rnn, f"bias_hh_l{i}"),
        )
        for i in range(model.num_layers)
    ]
    return layers, model.head.weight, model.head.bias


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "alpha": 1.7},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 0.01, "top_k": 50},
    ],
)
@pytest.mark.parametrize(
    ("layers", "B", "P", "nonlinearity"), [(1, 1, 1, "tanh"), (2, 3, 5, "relu"), (3, 64, 2, "tanh")]
)
def test_matches_the_reference(backend, layers, B, P, nonlinearity, options):
    model = _model(layers, nonlinearity)
    generator = torch.Generator().manual_seed(B)
    prompt = torch.randint(11, (B, P), generator=generator)
    state = torch.randn(layers, B, 24, generator=generator, dtype=torch.float64).tanh()
    uniforms = torch.rand(B, 40, generator=generator, dtype=torch.float64) if options else None
    ids, last = generate(
        prompt, 40, *_operands(model), state, uniforms=uniforms, nonlinearity=nonlinearity, backend=backend, **options
    )
    expected, expected_last = reference.generate(
        model.to_reference(), prompt, 40, uniforms=uniforms, state=state, **options
    )
    assert torch.equal(ids, expected)
    torch.testing.assert_close(last, expected_last, rtol=1e-9, atol=1e-9)


def test_a_thousand_greedy_characters(backend):
    model = _model(hidden=32)
    prompt = torch.tensor([[1, 2, 3]])
    ids, _ = generate(prompt, 1000, *_operands(model), backend=backend)
    assert torch.equal(ids, reference.generate(model.to_reference(), prompt, 1000)[0])


def test_sampling_frequencies_pass_a_chi_square_test(backend):
    """One step from one state, many draws: the counts have to be those of the softmax."""
    model = _model()
    draws = 20_000
    prompt = torch.full((draws, 1), 4)
    uniforms = torch.rand(draws, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ids, _ = generate(prompt, 1, *_operands(model), uniforms=uniforms, temperature=2.0, backend=backend)
    logits, _ = model(prompt[:1])
    expected = torch.softmax(logits[0, 0].detach() / 2.0, -1) * draws
    counts = torch.bincount(ids.flatten(), minlength=11)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 29.6  # the 0.1 % point of chi square with 10 degrees of freedom


def test_nothing_to_append(backend):
    model = _model()
    state = torch.randn(1, 2, 24, dtype=torch.float64)
    ids, last = generate(torch.tensor([[1], [2]]), 0, *_operands(model), state, backend=backend)
    assert ids.shape == (2, 0) and torch.equal(last, state)


def test_ids_out_of_range(backend):
    with pytest.raises(IndexError):
        generate(torch.tensor([[11]]), 3, *_operands(_model()), backend=backend)
