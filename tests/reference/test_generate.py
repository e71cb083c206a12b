"""The decoder: greedy step by step, sampling by uniforms, top-k, temperature and sharpening."""

import pytest
import torch

from charrnn_fast.reference.elman import elman
from charrnn_fast.reference.generate import generate, next_token
from charrnn_fast.reference.language_model import RNNLM


def _net(layers: int = 1) -> RNNLM:
    return RNNLM.from_scratch(7, 5, layers, sigma=1.5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_greedy_equals_the_recurrence_written_out():
    net = _net()
    cell = net.cells[0]
    prompt = [2, 5, 1]
    state, expected = torch.zeros(1, 5, dtype=torch.float64), []
    token = prompt[0]
    for i in range(len(prompt) + 11):
        x = torch.zeros(1, 1, 7, dtype=torch.float64)
        x[0, 0, token] = 1
        outputs, state = elman(x, state, cell.W_xh, cell.W_hh, cell.b_h)
        token = int((outputs[-1] @ net.W_hq + net.b_q).argmax()) if i + 1 >= len(prompt) else prompt[i + 1]
        if i + 1 >= len(prompt):
            expected.append(token)
    new, last = generate(net, torch.tensor([prompt]), 12)
    assert new.tolist() == [expected]
    # Eleven of the twelve new characters have been read; the state is the one after them.
    _, walked = net(torch.tensor([prompt + expected[:11]]))
    torch.testing.assert_close(last, walked)


def test_batch_of_prompts_equals_one_by_one_and_state_carries_on():
    net = _net(layers=2)
    prompts = torch.tensor([[1, 2, 3], [6, 0, 4]])
    uniforms = torch.rand(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together, _ = generate(net, prompts, 9, uniforms=uniforms)
    for i in range(2):
        alone, _ = generate(net, prompts[i : i + 1], 9, uniforms=uniforms[i : i + 1])
        assert torch.equal(alone[0], together[i])
    first, state = generate(net, prompts, 4, uniforms=uniforms[:, :4])
    rest, _ = generate(net, first[:, -1:], 5, uniforms=uniforms[:, 4:], state=state)
    assert torch.equal(torch.cat([first, rest], 1), together)


def test_no_characters():
    new, _ = generate(_net(), torch.tensor([[1, 2]]), 0)
    assert new.shape == (1, 0)


def test_sampling_follows_the_distribution():
    p = torch.tensor([0.5, 0.1, 0.0, 0.4], dtype=torch.float64)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ids = next_token(p.log().expand(1000, 4), uniforms)
    assert torch.bincount(ids, minlength=4).tolist() == [500, 100, 0, 400]


def test_temperature_and_alpha_sharpen():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = p.log().expand(10_000, 3)
    for options, power in [
        ({"alpha": 2.0}, 2.0),
        ({"temperature": 0.5}, 2.0),
        ({"alpha": 3.0, "temperature": 2.0}, 1.5),
    ]:
        expected = p**power / (p**power).sum() * 10_000
        counts = torch.bincount(next_token(logits, uniforms, **options), minlength=3)
        torch.testing.assert_close(counts.double(), expected, atol=1.0, rtol=0)


def test_top_k_leaves_the_others_out_and_keeps_ties():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0]])
    uniforms = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    assert set(next_token(logits.expand(50, 5), uniforms, top_k=1).tolist()) == {1}
    assert set(next_token(logits.expand(50, 5), uniforms, top_k=2).tolist()) == {1, 2, 3}
    assert set(next_token(logits.expand(50, 5), uniforms, top_k=99).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_extreme_uniforms_choose_ids_of_nonzero_probability(u):
    logits = torch.tensor([[-torch.inf, 0.0, 0.1, -torch.inf]], dtype=torch.float64)
    assert int(next_token(logits, torch.tensor([u], dtype=torch.float64))) == (1 if u == 0 else 2)
