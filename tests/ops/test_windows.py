"""Windows of a corpus, gathered by every backend."""

import pytest
import torch

from charrnn_fast.ops.windows import windows


@pytest.mark.parametrize(("T", "B"), [(1, 1), (5, 3), (32, 70), (33, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_windows_are_what_indexing_gives(T, B, dtype, backend, device, monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)
    corpus = torch.randint(200, (T + 90,), generator=generator).to(dtype)
    starts = torch.randint(90, (B,), generator=generator)
    starts[0], starts[-1] = 0, 89  # the first window and the last
    expected = corpus[starts + torch.arange(T + 1)[:, None]].long()  # (T + 1, B)
    tokens, targets = windows(corpus.to(device), starts.to(device), T)
    assert torch.equal(tokens.cpu(), expected[:-1]) and torch.equal(targets.cpu(), expected[1:])
    if backend == "triton":
        assert tokens.is_contiguous() and targets.is_contiguous(), "in the order that the recurrence walks"


def test_places_outside_the_corpus(backend, device, monkeypatch):
    """Nothing is read that is not the corpus's: an IndexError where one can be told, else the nearest window."""
    monkeypatch.setenv("CHARRNN_BACKEND", backend)
    corpus = torch.arange(20, device=device)
    for wrong, nearest in ((-1, 0), (17, 16), (2**40, 16), (-(2**40), 0)):
        starts = torch.tensor([wrong, 3], device=device)
        if backend == "triton":
            assert windows(corpus, starts, 3)[0].t().tolist() == [list(range(s, s + 3)) for s in (nearest, 3)]
        else:
            with pytest.raises(IndexError):
                windows(corpus, starts, 3)
    with pytest.raises(ValueError, match="a corpus of at least 22 ids was expected for windows of 21, got 20"):
        windows(corpus, torch.tensor([0], device=device), 21)
