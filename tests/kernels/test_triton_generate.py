"""What the Triton decoder has alone: tiles, the choice of an id, limits; test_generate.py has what all have."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from comparisons import same
from generate_problems import Decoder, across
from needs import DEVICE
from on_gpu import nobody_waits

from charrnn_fast.kernels.triton.generate import generate, generate_limits
from charrnn_fast.kernels.triton.generate_kernels import _rank, argmax, draw, probabilities
from charrnn_fast.kernels.triton.generate_tiles import MAX_VOCAB, generate_tile
from charrnn_fast.reference.generate import next_token


@pytest.mark.parametrize("H", [130, 200, 256])
def test_tiles_of_a_larger_matrix(H):
    """Whole tiles of 64 and of 128 outputs, in two layers, and a vocabulary of several tiles of the head."""
    decoder = Decoder(H, 90, L=2, P=2)
    tile = generate_tile(H, 90, 2, 8)
    assert not tile.resident and tile.width > tile.layer.n and tile.depth > tile.head.k
    ids, state = decoder.run(generate, 3, True, top_k=20)
    wanted, last = decoder.reference(3, True, top_k=20)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@triton.jit
def _choose_kernel(
    logits_ptr,
    uniform_ptr,
    scratch_ptr,
    ids_ptr,
    V,
    top_k,
    SAMPLE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs, row = tl.arange(0, BLOCK), tl.program_id(0)
    logits = tl.load(logits_ptr + row * V + offs, mask=offs < V, other=-float("inf"))
    if SAMPLE:
        uniform = tl.load(uniform_ptr + row)
        q = probabilities(logits, tl.max(logits, 0), tl.full((), 1.0, tl.float64))
        if TOP_K:
            q = tl.where(_rank(logits, scratch_ptr + row * BLOCK, BLOCK, BLOCK // 2) < top_k, q, 0.0)
        chosen = draw(q, offs, uniform)
    else:
        chosen = argmax(logits, offs, V)
    tl.store(ids_ptr + row, chosen)


def choose(logits, uniforms=None, top_k=None):
    (B, V), block = logits.shape, 16
    ids = torch.empty(B, dtype=torch.int64, device=DEVICE)
    scratch = torch.empty(B, block, dtype=logits.dtype, device=DEVICE)
    uniforms = None if uniforms is None else uniforms.to(DEVICE)
    constants = {"SAMPLE": uniforms is not None, "TOP_K": top_k is not None, "BLOCK": block}
    _choose_kernel[(B,)](logits.to(DEVICE), uniforms, scratch, ids, V, top_k or 0, **constants)
    return ids.cpu()


def test_argmax_is_the_first_of_the_largest_and_an_id_whatever_comes():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [2.0] * 5, [-torch.inf] * 5, [0, 0, 0, 1.0, torch.inf]])
    assert choose(logits).tolist() == [1, 0, 0, 4]
    assert choose(torch.full((1, 5), torch.nan)).item() in range(5)


def test_top_k_keeps_those_equal_to_the_kth():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0]]).expand(24, 5).contiguous()
    uniforms = torch.linspace(0, 0.999, 24, dtype=torch.float64)
    for k, kept in ((1, {1}), (2, {1, 2, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3})):
        found = choose(logits, uniforms, k)
        assert set(found.tolist()) == kept
        assert torch.equal(found, next_token(logits, uniforms, top_k=k))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_extreme_uniforms_choose_ids_of_nonzero_probability():
    logits = torch.tensor(
        [[-torch.inf, 0.0, 0.1, -torch.inf], [-torch.inf, 0, -800.0, -torch.inf]], dtype=torch.float64
    )
    for u, wanted in ((0.0, [1, 1]), (1 - 2**-53, [2, 1])):
        assert choose(logits, torch.full((2,), u, dtype=torch.float64)).tolist() == wanted
    wild = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, torch.inf, 0.0], [-torch.inf] * 3])
    assert set(choose(wild, torch.full((3,), 0.5, dtype=torch.float64)).tolist()) <= {0, 1, 2}


def test_what_the_launcher_refuses():
    decoder = Decoder(8, 5, P=2)
    with pytest.raises(ValueError, match="at least one id"):
        decoder.run(generate, 0, False)
    with pytest.raises(RuntimeError, match="complex64"):
        decoder.run(generate, 3, False, torch.complex64)
    decoder.uniforms = decoder.uniforms[:, :2]
    with pytest.raises(ValueError, match=r"uniforms: expected shape \(1, 3\), got \(1, 2\)"):
        decoder.run(generate, 3, True)
    decoder.nonlinearity = "sigmoid"
    with pytest.raises(ValueError, match="nonlinearity"):
        decoder.run(generate, 3, False)
    assert generate_limits(MAX_VOCAB, torch.float32) is None
    assert "above" in generate_limits(MAX_VOCAB + 1, torch.float32)


def test_every_tile_divides_what_it_has_to():
    """Whole tiles everywhere, for every H and V that a kernel may see, and none larger than a thread's registers."""
    sizes = [*range(1, 300, 3), 256, 257, 384, 500, 512, 513, 768, 1000, 1024]
    for H, V, L, number in itertools.product(sizes, (1, 2, 28, 90, 128, 300, 1024), (1, 2), (4, 8)):
        tile = generate_tile(H, V, L, number)
        assert tile.width >= H and tile.depth >= tile.width and tile.head.n >= V
        assert tile.width % tile.layer.n == tile.width % tile.layer.k == tile.depth % tile.head.k == 0
        assert tile.head.n % tile.block_j == 0
        for rows, columns in ((tile.layer.k, tile.layer.n), (tile.head.k, tile.head.n)):
            assert rows & (rows - 1) == columns & (columns - 1) == 0
            assert rows * columns * number // 4 <= 32 * tile.warps * (64 if tile.resident else 32)
        assert not tile.resident or tile.width == tile.depth == tile.layer.k == tile.layer.n == tile.head.k


@pytest.mark.gpu
class TestOnDevice:
    @pytest.mark.parametrize("B", [1, 64])
    @pytest.mark.parametrize(("H", "L"), [(32, 1), (128, 1), (256, 1), (512, 1), (200, 3)])
    @pytest.mark.parametrize("sampled", [False, True])
    def test_large_sizes(self, H, L, B, sampled):
        decoder = Decoder(H, 90, L, B, P=20)
        options = {"temperature": 0.7, "top_k": 30} if sampled else {}
        ids, state = decoder.run(generate, 500, sampled, **options)
        wanted, last = decoder.reference(500, sampled, **options)
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)
        assert same(decoder.run(generate, 500, sampled, **options), (ids, state))

    @pytest.mark.parametrize(
        ("decode", "H", "B", "count"),
        [(generate, H, B, 300) for H in (32, 256, 512) for B in (1, 64)]
        + [(across, H, 1, 2000) for H in (256, 512, 1024)],
    )
    def test_fp32_follows_its_own_choices(self, decode, H, B, count, monkeypatch):
        """A rounding may move a choice, so each id is held against the exact logits of the text before it."""
        monkeypatch.setenv("CHARRNN_GRID_DEBUG", "1")  # which says who waits in vain
        decoder = Decoder(H, 90, 1, B, P=20)
        options = {"tile": None} if decode is across else {}
        ids, _ = decoder.run(decode, count, False, torch.float32, **options)
        assert decoder.behind_greedy(ids).max() < 1e-3

    def test_frequencies_of_many_draws(self):
        decoder = Decoder(32, 28, B=20_000)
        decoder.prompt.fill_(3)
        decoder.state[:] = decoder.state[:, :1].clone()
        ids, _ = decoder.run(generate, 1, True, torch.float32)
        logits = torch.tanh(decoder.table[3] + decoder.state[0, 0] @ decoder.weight_hh[0].T) @ decoder.head_weight.T
        expected = torch.softmax(logits + decoder.head_bias, -1) * 20_000
        counts = torch.bincount(ids.flatten(), minlength=28)
        common = expected >= 5
        statistic = float(((counts - expected) ** 2 / expected)[common].sum())
        assert statistic < 55.5  # the 0.1 % point of chi square with 27 degrees of freedom, or of fewer

    def test_the_host_does_not_wait(self):
        decoder = Decoder(64, 28, B=2, P=3)
        on_device = [decoder.prompt, decoder.table, *decoder.weight_hh, decoder.head_weight, decoder.uniforms[:, :50]]
        prompt, table, weight_hh, head, uniforms = (t.to(DEVICE) for t in on_device)
        with nobody_waits():
            generate(prompt, 50, table, [None], [weight_hh], [None], head, uniforms=uniforms, top_k=4)
