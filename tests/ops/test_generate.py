"""The decoder operation against the reference decoder: same ids, same state, every option, every backend."""

import pytest
import torch

from charrnn_fast.kernels.triton.launch import INTERPRETED
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.ops.generate import generate
from charrnn_fast.reference import generate as reference


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
def test_matches_the_reference(backend, device, layers, B, P, nonlinearity, options):
    N = 40
    if INTERPRETED and backend == "triton":  # some 30 ms for a layer's step
        B, N = min(B, 2), 10
    model = _model(layers, nonlinearity)
    generator = torch.Generator().manual_seed(B)
    prompt = torch.randint(11, (B, P), generator=generator)
    state = torch.randn(layers, B, 24, generator=generator, dtype=torch.float64).tanh()
    uniforms = torch.rand(B, N, generator=generator, dtype=torch.float64) if options else None
    expected, expected_last = reference.generate(
        model.to_reference(), prompt, N, uniforms=uniforms, state=state, **options
    )
    prompt, state, uniforms = (None if t is None else t.to(device) for t in (prompt, state, uniforms))
    options = {"uniforms": uniforms, "nonlinearity": nonlinearity, "backend": backend, **options}
    ids, last = generate(prompt, N, *_operands(model.to(device)), state, **options)
    assert torch.equal(ids.cpu(), expected)
    torch.testing.assert_close(last.cpu(), expected_last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_thousand_greedy_characters(backend, device, count):
    model = _model(hidden=32)
    prompt = torch.tensor([[1, 2, 3]])
    wanted, _ = reference.generate(model.to_reference(), prompt, count)
    ids, _ = generate(prompt.to(device), count, *_operands(model.to(device)), backend=backend)
    assert torch.equal(ids.cpu(), wanted)


def test_sampling_frequencies_pass_a_chi_square_test(backend, device):
    """Draws from a model whose head sees no state: the counts have to be those of the softmax of its bias."""
    model = _model().to(device)
    model.head.weight.data.zero_()
    B, N = (1, 500) if INTERPRETED and backend == "triton" else (40, 500)
    uniforms = torch.rand(B, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(device)
    prompt = torch.full((B, 1), 4, device=device)
    ids, _ = generate(prompt, N, *_operands(model), uniforms=uniforms, temperature=2.0, backend=backend)
    expected = torch.softmax(model.head.bias.detach() / 2.0, -1) * B * N
    counts = torch.bincount(ids.flatten(), minlength=11)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 29.6  # the 0.1 % point of chi square with 10 degrees of freedom


def test_ten_and_ten_more_are_twenty(backend, device):
    model = _model(2).to(device)
    prompt = torch.tensor([[3, 1], [0, 10]], device=device)
    uniforms = torch.rand(2, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    options = {"backend": backend, "top_k": 5}
    ids, last = generate(prompt, 20, *_operands(model), uniforms=uniforms, **options)
    first, state = generate(prompt, 10, *_operands(model), uniforms=uniforms[:, :10], **options)
    rest, end = generate(first[:, -1:], 10, *_operands(model), state, uniforms=uniforms[:, 10:], **options)
    assert torch.equal(torch.cat((first, rest), 1), ids)
    assert torch.equal(end, last)


def test_nothing_to_append(backend, device):
    model = _model().to(device)
    state = torch.randn(1, 2, 24, dtype=torch.float64, device=device)
    prompt = torch.tensor([[1], [2]], device=device)
    ids, last = generate(prompt, 0, *_operands(model), state, backend=backend)
    assert ids.shape == (2, 0) and torch.equal(last, state)


@pytest.mark.parametrize("bad", [11, -1])
def test_ids_out_of_range(backend, device, bad):
    if device.type == "cuda":
        pytest.skip("an assertion on the device would end this process's use of it")
    with pytest.raises(IndexError):
        generate(torch.tensor([[3, bad]]), 3, *_operands(_model()), backend=backend)


def test_the_kernel_is_chosen_where_it_can_and_is_not_slower(monkeypatch, choices_anew):
    from charrnn_fast.kernels.triton import generate_grid
    from charrnn_fast.ops import generate as op

    def chosen(backend, H=32, V=28, L=1, B=1, num_tokens=5, dtype=torch.float32, device="cpu"):
        layers = [tuple(torch.empty(H, n, dtype=dtype, device=device) for n in (V, H, 1))] * L
        return op._backend(backend, B, layers, torch.empty(V, H, dtype=dtype, device=device), num_tokens)

    monkeypatch.delenv("CHARRNN_BACKEND", raising=False)
    assert chosen("auto", device="meta") == "torch"
    monkeypatch.setattr(op.backends, "triton_cannot_run_on", lambda device: None)
    op.backends.forget()
    assert chosen("triton", 512) == "triton" and chosen("triton", num_tokens=0) == "torch"
    with pytest.raises(RuntimeError, match=r"'triton' cannot run generate .*vocabulary 5000 is above 1024"):
        chosen("triton", V=5000)
    # As if it were a GPU: a device type that is not the CPU's.
    assert chosen("auto", 512, device="meta") == chosen("auto", 256, L=3, B=64, device="meta") == "triton"
    assert chosen("auto", 2048, device="meta") == chosen("auto", 512, B=1024, device="meta") == "torch"
    assert chosen("torch", device="meta") == "torch"
    explanation = op.backends.explain(2048, device="meta", operation="generate", num_classes=28, backend="triton")
    assert explanation.how == "one program a sequence; no grid of programs on device type meta"
    monkeypatch.setattr(generate_grid, "generate_grid_limits", lambda *sizes: None)
    op.backends.forget()
    assert chosen("auto", 2048, device="meta") == "triton"  # across the chip the weights are read once
    assert "interpreted" in op.backends.explain(2, operation="generate", num_classes=2).why_not["triton"]


def _small_model(layers: int = 1, device: str | torch.device = "cpu"):
    """(layers, head_weight, head_bias) of 8 units and 11 symbols."""
    V, H = 11, 8
    rows = [
        (torch.randn(H, V if layer == 0 else H), torch.randn(H, H) * 0.3, torch.randn(H)) for layer in range(layers)
    ]
    return [tuple(t.to(device) for t in row) for row in rows], torch.randn(V, H).to(device), torch.randn(V).to(device)


MISFITS = {
    "too few uniforms": dict(uniforms=torch.rand(1, 3)),
    "uniforms of another batch": dict(uniforms=torch.rand(2, 40)),
    "whole uniforms": dict(uniforms=torch.zeros(1, 40, dtype=torch.int64)),
    "uniforms of one dimension": dict(uniforms=torch.rand(40)),
    "a state of another batch": dict(state=torch.zeros(1, 2, 8)),
    "a state of another size": dict(state=torch.zeros(1, 1, 9)),
    "a state of more layers": dict(state=torch.zeros(2, 1, 8)),
    "a state of integers": dict(state=torch.zeros(1, 1, 8, dtype=torch.int64)),
    "a float prompt": dict(prompt=torch.zeros(1, 4)),
    "a flat prompt": dict(prompt=torch.zeros(4, dtype=torch.int64)),
    "an empty prompt": dict(prompt=torch.zeros(1, 0, dtype=torch.int64)),
    "fewer than no tokens": dict(num_tokens=-1),
    "a temperature of 0": dict(temperature=0.0),
    "a temperature that is no number": dict(temperature=float("nan")),
    "a top_k of 0": dict(top_k=0),
    "a head of another size": dict(head_weight=torch.zeros(11, 7)),
    "a head with another bias": dict(head_bias=torch.zeros(12)),
    "a head bias of another type": dict(head_bias=torch.zeros(11, dtype=torch.float64)),
    "a head of another type": dict(head_weight=torch.zeros(11, 8, dtype=torch.bfloat16)),
    "a state of another type": dict(state=torch.zeros(1, 1, 8, dtype=torch.float64)),
    "a prompt on another device": dict(prompt=torch.zeros(1, 4, dtype=torch.int64, device="meta")),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_together_is_refused_on_every_backend(backend, misfit):
    arguments = dict(prompt=torch.zeros(1, 4, dtype=torch.int64), num_tokens=40, uniforms=torch.rand(1, 40))
    arguments |= zip(("layers", "head_weight", "head_bias"), _small_model(), strict=True)
    with pytest.raises(ValueError, match="expected"):
        generate(**(arguments | MISFITS[misfit]), backend=backend)


@pytest.mark.parametrize(
    "sharp",
    [
        dict(temperature=1e-310),
        dict(alpha=1e308),
        dict(temperature=1e-300, alpha=1e300),
        dict(temperature=1e-30),
        dict(alpha=0.0, top_k=1),  # makes those that take part equally probable, and gives the others nothing
    ],
    ids=str,
)
def test_the_sharpest_sampling_is_greedy(backend, device, sharp):
    torch.manual_seed(2)
    call = (torch.tensor([[3, 1], [2, 10]], device=device), 9, *_small_model(2, device))
    greedy, _ = generate(*call, backend=backend)
    for top_k in (None, 10**9):
        options = {"top_k": top_k, **sharp}
        sampled, _ = generate(*call, uniforms=torch.rand(2, 9, device=device), **options, backend=backend)
        assert torch.equal(sampled, greedy)


def test_the_flattest_sampling_is_uniform(backend, device):
    torch.manual_seed(3)
    call = (torch.tensor([[3, 1]], device=device), 9, *_small_model(1, device))
    uniforms = torch.rand(1, 9, device=device)
    ids, _ = generate(*call, uniforms=uniforms, temperature=1e308, backend=backend)
    assert ids.tolist() == (uniforms.double() * 11).long().tolist()
