"""The fused training step in C against an oracle in float64 by torch's own operators."""

import itertools

import needs
import pytest
import torch
from comparisons import by_one_thread_and_by_two, same
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from charrnn_fast.kernels import native

pytestmark = needs.NATIVE

# Every hidden size with every batch size once, the others in turn.
SIZES = [
    (H, B, (2, 28, 100)[(i + j) % 3], (1, 2, 17)[(i + 2 * j) % 3])
    for (i, H), (j, B) in itertools.product(enumerate((1, 7, 16, 31, 32, 33, 64)), enumerate((1, 15, 16, 17, 64, 100)))
]
# Few rows, several steps of them in a group: the steps fill groups, leave a rest, or do not fill one; then many units.
SIZES += [(20, 1, 28, 24), (20, 1, 28, 106), (33, 2, 28, 4), (7, 3, 5, 1), (33, 5, 100, 40), (20, 4, 28, 47)]
SIZES += [(130, 1, 28, 30), (257, 13, 100, 3)]


def operands(H: int, B: int, V: int, T: int, optional: bool = True) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Tokens and targets (T, B), and table, weight_hh, head weight, head bias, h0 in float32."""
    generator = torch.Generator().manual_seed(H + 100 * B)
    tokens, targets = (torch.randint(V, (T, B), generator=generator) for _ in range(2))
    shapes = ((V, H), (H, H), (V, H), (V,) if optional else None, (B, H) if optional else None)
    floats = [None if s is None else torch.randn(s, generator=generator) for s in shapes]
    for weight in floats[1:3]:
        weight *= H**-0.5
    return tokens, targets, floats


def by_torch(tokens: Tensor, targets: Tensor, floats: list[Tensor | None], nonlinearity: str) -> list[Tensor | None]:
    """What the kernel returns, by torch's operators in the type of `floats`."""
    leaves = [None if f is None else f.clone().requires_grad_() for f in floats]
    table, weight_hh, head_weight, head_bias, h0 = leaves
    h = weight_hh.new_zeros(tokens.shape[1], weight_hh.shape[0]).requires_grad_() if h0 is None else h0
    leaves[4] = h
    states = []
    for step in table[tokens]:
        h = getattr(torch, nonlinearity)(torch.addmm(step, h, weight_hh.t()))
        states.append(h)
    loss = cross_entropy(linear(torch.cat(states), head_weight, head_bias), targets.flatten())
    gradients = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))
    return [loss.detach(), h.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]


def check(tokens: Tensor, targets: Tensor, floats: list[Tensor | None], nonlinearity: str = "tanh") -> None:
    """In float32 at most twice torch's own error; in float64, which is the oracle, 100 roundings."""
    torch.set_num_threads(1)
    doubles = [None if f is None else f.double() for f in floats]
    exact = by_torch(tokens, targets, doubles, nonlinearity)
    torchs = by_torch(tokens, targets, floats, nonlinearity)
    for values in (floats, doubles):
        given, dtype = (tokens, targets, *values), values[0].dtype
        results = by_one_thread_and_by_two(
            lambda given=given: native.language_model_loss(*given, nonlinearity=nonlinearity)
        )
        for i, (one, two, theirs, truth) in enumerate(zip(*results, torchs, exact, strict=True)):
            if truth is None:
                assert one is None and two is None
                continue
            assert one.shape == truth.shape and one.dtype == dtype and torch.equal(one, two)
            # The loss is a difference of numbers of order 1 or more.
            scale = torch.finfo(dtype).eps * max(1e-3 if i else 1, truth.abs().max())
            bound = 100 * scale if values is doubles else 2 * (theirs.double() - truth).abs().max() + 4 * scale
            assert (one.double() - truth).abs().max() <= bound


@pytest.mark.parametrize(("H", "B", "V", "T"), SIZES)
def test_every_output_and_gradient(isa, H, B, V, T):
    for nonlinearity, optional in (("tanh", True), ("relu", False)):
        check(*operands(H, B, V, T, optional), nonlinearity)


def test_strided(isa):
    tokens, targets, floats = operands(20, 40, 30, 9)
    plain = native.language_model_loss(tokens, targets, *floats)
    wide = [torch.stack([f, f], 0).transpose(0, -1).contiguous().transpose(0, -1)[0] for f in floats]
    by_rows, spread = tokens.t().contiguous().t(), torch.stack([targets, targets], 2)[:, :, 0]
    assert all(w.stride() != f.stride() for w, f in zip(wide, floats, strict=True))
    strided = native.language_model_loss(by_rows, spread, *wide)
    rows = [torch.cat([f, f], 1)[:, : f.shape[1]] if f.dim() == 2 else f for f in floats]
    for other in (strided, native.language_model_loss(tokens, targets, *rows)):
        assert same(plain, other)


def test_repeatable():
    tokens, targets, floats = operands(32, 500, 28, 32)
    first = native.language_model_loss(tokens, targets, *floats)
    for threads in (1, 2, 2, 3, 5):
        torch.set_num_threads(threads)
        assert same(first, native.language_model_loss(tokens, targets, *floats))


def test_logits_far_apart(isa):
    """A block's rows share one shift of their logits; rows far below it need their own."""
    tokens, targets, floats = operands(8, 30, 12, 5)
    floats[0][::2] *= 100
    floats[2] *= torch.logspace(0, 2.5, 12)[:, None]
    floats[2][:, 0] = floats[2][:, 0].abs() * 30
    check(tokens, targets, floats)


def test_ignored_targets(isa):
    tokens, targets, floats = operands(16, 40, 28, 6)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = -100
    check(tokens, targets, floats)
    assert native.language_model_loss(tokens, torch.full_like(targets, -100), *floats)[0].isnan()


@pytest.mark.parametrize("bad", [-1, 28, -(2**62), 2**62])
def test_ids_out_of_range(bad):
    tokens, targets, floats = operands(16, 40, 28, 6)
    for ids, message in (
        (tokens, rf"index out of range in self: token id {bad} is not in 0\.\.27"),
        (targets, f"Target {bad} is out of bounds"),
    ):
        before, ids[5, 39] = ids[5, 39].item(), bad
        with pytest.raises(IndexError, match=message):
            native.language_model_loss(tokens, targets, *floats)
        ids[5, 39] = before


def test_nan_stays_nan():
    tokens, targets, floats = operands(16, 40, 28, 6)
    floats[4][3, 2] = float("nan")
    loss, h_n, *gradients = native.language_model_loss(tokens, targets, *floats)
    assert loss.isnan() and all(g.isnan().any() for g in gradients)
    assert h_n[3].isnan().all() and not h_n[4:].isnan().any()


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="'tanh' or 'relu'"):
        tokens, targets, floats = operands(4, 4, 4, 4)
        native.language_model_loss(tokens, targets, *floats, nonlinearity="gelu")


def test_limits():
    assert native.language_model_limits(1024, 32, 28, torch.float32) is None
    assert "bfloat16" in native.language_model_limits(1024, 32, 28, torch.bfloat16)
    assert native.language_model_limits(1, 256, 28, torch.float32) is None
    assert "hidden size 513" in native.language_model_limits(1024, 513, 28, torch.float32)
    assert "vocabulary 513" in native.language_model_limits(1024, 32, 513, torch.float32)
    assert "batch 11" in native.language_model_limits(11, 257, 28, torch.float32)
