"""Every operation under another default device and another default dtype: they make their tensors where, and of what
type, their operands are.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from rnn_modules import differentiated, pair
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal.common_utils import set_default_dtype

from charrnn_fast import CharRNN, Trainer, clip_grad_norm_, linear_cross_entropy
from charrnn_fast.lm.data import Vocabulary, Windows
from charrnn_fast.lm.generation import generate


@pytest.fixture(params=["meta", "float64"])
def elsewhere(request) -> Callable:
    return (lambda: torch.device("meta")) if request.param == "meta" else (lambda: set_default_dtype(torch.float64))


@pytest.fixture
def on(device) -> Callable:
    torch.manual_seed(0)
    return lambda tensor: tensor.to(device)


def _gradients(result: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(result.sum(), leaves))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("form", ["dense", "packed", "tokens", "packed tokens"])
def test_fused_rnn(backend, device, elsewhere, options, form):
    theirs, ours = pair(5, 7, **options, backend=backend, device=device)
    x = torch.randn(9, 3, 5, device=device)
    if "tokens" in form:
        x = x.argmax(-1)
    if "packed" in form:
        x = pack_sequence([x[:n, b] for b, n in enumerate((9, 4, 1))])

    def everything(module):
        return differentiated(module, (module.forward_tokens if "tokens" in form else module)(x))

    with elsewhere():
        found = everything(ours)
    torch.testing.assert_close(found, everything(theirs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab", [11, 1100])
def test_linear_cross_entropy(on, elsewhere, reduction, vocab):
    operands = [on(torch.randn(shape)).requires_grad_() for shape in ((6, 4), (vocab, 4), (vocab,))]
    target = on(torch.randint(vocab, (6,)))
    expected = F.cross_entropy(F.linear(*operands), target, reduction=reduction)
    right = _gradients(expected, *operands)
    with elsewhere():
        found = linear_cross_entropy(*operands[:2], target, linear_bias=operands[2], reduction=reduction)
        gradients = _gradients(found, *operands)
    torch.testing.assert_close([found, *gradients], [expected, *right])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"embedding": 6}], ids=str)
def test_the_language_model(backend, on, elsewhere, options):
    model = on(CharRNN(11, 8, **options, backend=backend))
    tokens, uniforms = on(torch.randint(11, (3, 6))), on(torch.rand(3, 9))

    def everything() -> list[torch.Tensor]:
        loss, state = model.loss(tokens, tokens)
        logits, _ = model(tokens)
        greedy, last = model.generate_ids(tokens, 9)
        sampled, _ = model.generate_ids(tokens, 9, uniforms=uniforms)
        return [loss, state, logits, greedy, last, sampled, *_gradients(loss, *model.parameters())]

    expected = everything()
    with elsewhere():
        found = everything()
    torch.testing.assert_close(found, expected)


def test_decoding_text(elsewhere):
    vocab = Vocabulary.of("the cat sat on the mat", letters=True)
    model = CharRNN(len(vocab), 8)
    expected = generate(model, vocab, "the", 9, temperature=0.7, seed=3)
    with elsewhere():
        assert generate(model, vocab, "the", 9, temperature=0.7, seed=3) == expected


def test_clip_grad_norm(on, elsewhere):
    parameters = [nn.Parameter(on(torch.zeros(n))) for n in (3, 40_000)]
    grads = [on(torch.randn(p.shape)) for p in parameters]
    results = []
    for clip in (clip_grad_norm_, nn.utils.clip_grad_norm_):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        with elsewhere():
            norm = clip(parameters, 1.0)
        results.append([norm, *(p.grad for p in parameters)])
    torch.testing.assert_close(*results)


def test_training():
    text = "the cat sat on the mat and the dog lay on the rug " * 20
    vocab = Vocabulary.of(text, letters=True)
    losses = []
    for context in (nullcontext, lambda: torch.device("meta")):
        torch.manual_seed(0)
        data = Windows(vocab.encode(text), torch.Generator().manual_seed(0), batch_size=16, num_steps=8)
        model = CharRNN(len(vocab), 8)
        with context():
            history = Trainer(model, lr=1.0, epochs=2).fit(data)
        losses.append([(record.train_loss, record.val_ppl) for record in history])
    assert losses[0] == losses[1]
