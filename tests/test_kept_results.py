"""A loss that is kept after its backward pass holds nothing but its number: no gradients, no states. `growth` runs in a
process of its own.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from charrnn_fast import CharRNN, FusedRNN, linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="reads Linux's /proc and trims glibc's allocator",
)

MEGABYTE = 2**20
KEPT = 25


def resident() -> int:
    """Bytes of memory that this process has now, without what its allocator keeps in reserve."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _again(leaves: Iterable[Tensor], run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The loss that run gives, after its backward pass."""
    leaves = list(leaves)

    def loss() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        found = run()
        found.backward()
        return found

    return loss


def _loss(classes: int, reduction: str) -> Callable[[], Tensor]:
    rows = 4096 if classes < 100 else 1024  # gradients of 4 MB, or of 2
    h = torch.randn(rows, 256, requires_grad=True)
    w = torch.randn(classes, 256, requires_grad=True)
    target = torch.randint(classes, (rows,))
    return _again([h, w], lambda: linear_cross_entropy(h, w, target, reduction=reduction).sum().view(()))


def _model_loss() -> Callable[[], Tensor]:
    model, ids = CharRNN(512, 512), torch.randint(512, (12, 2))  # 3 MB of parameters, and as much for gradients
    return _again(model.parameters(), lambda: model.loss(ids, ids)[0])


def _layer(tokens: bool) -> Callable[[], Tensor]:
    rnn, x = FusedRNN(256, 256), torch.randn(16, 256, 256, requires_grad=True)  # 4 MB
    ids = torch.randint(256, (16, 256))
    return _again([x, *rnn.parameters()], lambda: (rnn.forward_tokens(ids) if tokens else rnn(x))[0].sum())


def _torchs() -> Callable[[], Tensor]:
    h, w = torch.randn(4096, 256, requires_grad=True), torch.randn(28, 256, requires_grad=True)
    return _again([h, w], lambda: F.cross_entropy(F.linear(h, w), torch.zeros(4096, dtype=torch.long)))


def _a_leak() -> Callable[[], Tensor]:
    """What the measure is to see: each loss holds 4 MB."""
    run = _loss(28, "mean")

    def leaking() -> Tensor:
        loss = run()
        loss.held = torch.ones(MEGABYTE)
        return loss

    return leaking


CASES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "loss": lambda: _loss(28, "mean"),
    "loss of rows": lambda: _loss(28, "none"),
    "loss, many classes": lambda: _loss(1100, "mean"),
    "model loss": _model_loss,
    "layer": lambda: _layer(False),
    "layer of tokens": lambda: _layer(True),
    "torch's loss": _torchs,
    "a leak": _a_leak,
}


def growth(case: str) -> int:
    """By how many bytes the process grows while so many losses are kept after their backward passes."""
    torch.manual_seed(0)
    run = CASES[case]()
    kept = [run() for _ in range(5)]
    before = resident()
    kept += [run() for _ in range(KEPT)]
    assert len(kept) == KEPT + 5
    return resident() - before


@pytest.mark.parametrize("case", [case for case in CASES if case != "a leak"])
def test_kept_losses_hold_no_gradients(server, case):
    assert server.call("test_kept_results", "growth", case) < 15 * MEGABYTE  # of at least 50 that their gradients have


def test_the_measure_sees_what_is_held(server):
    assert server.call("test_kept_results", "growth", "a leak") > 75 * MEGABYTE
