"""Vocabulary, samplers and splits, against the counts that the recipes state."""

import itertools

import pytest
import torch

from charrnn_fast.errors import InputError
from charrnn_fast.lm import data
from charrnn_fast.lm.data import Vocabulary


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _follows(X: torch.Tensor, Y: torch.Tensor) -> None:
    """On the corpus 0, 1, 2, ... the character after i is i + 1."""
    assert torch.equal(X + 1, Y)
    assert (X[:, 1:] == X[:, :-1] + 1).all()


def test_time_machine_counts(time_machine):
    prepared = data.letters_only(time_machine)
    assert len(prepared) == 173_428
    vocab = Vocabulary.of(time_machine, letters=True)
    assert len(vocab) == 28
    assert vocab.symbols[:4] == [" ", "<unk>", "a", "b"] and vocab.symbols[27] == "z"
    tokens = vocab.encode(time_machine)
    assert vocab.decode(tokens) == prepared
    windows = data.Windows(tokens, _generator(), batch_size=1024, num_steps=32)
    assert [len(X) for X, _ in windows.train()] == [1024] * 9 + [784]
    assert [len(X) for X, _ in windows.validation()] == [1024] * 4 + [904]
    sequential = data.Sequential(tokens[:10_000], _generator(), batch_size=32, num_steps=35)
    assert [X.shape for X, _ in sequential.train()] == [(32, 35)] * 8


def test_unknown_characters():
    letters = Vocabulary.of("abc abd", letters=True)
    assert letters.symbols == [" ", "<unk>", "a", "b", "c", "d"]
    assert letters.encode("ab7z").tolist() == [2, 3, 0, 1]  # the digit is prepared away, z is unknown
    raw = Vocabulary.of("ab\r\nAB", letters=False)
    assert raw.symbols == ["\n", "\r", "A", "B", "a", "b"]
    with pytest.raises(InputError, match=r"outside the model's vocabulary of 6: 'x' 'é'"):
        raw.encode("axé")
    with pytest.raises(InputError, match=r"token id 6 is outside 0\.\.5"):
        raw.decode(torch.tensor([0, 6]))


@pytest.mark.parametrize(("text", "letters"), [("", True), ("", False), ("123 !?", True), (" \n", False)])
def test_empty_text(text, letters):
    with pytest.raises(InputError, match="the text is empty"):
        Vocabulary.of(text, letters)


def test_windows_shuffle_the_training_part_and_keep_the_validation_part_in_order():
    tokens = torch.arange(200)
    windows = data.Windows(tokens, _generator(), batch_size=16, num_steps=5, num_train=100, num_val=50)
    assert not windows.shortened
    first, second = (torch.cat([X for X, _ in windows.train()]) for _ in range(2))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(100))
    assert torch.cat([X for X, _ in windows.validation()])[:, 0].tolist() == list(range(100, 150))
    for X, Y in windows.train():
        _follows(X, Y)


def test_windows_of_a_short_text_are_split_in_proportion():
    windows = data.Windows(torch.arange(35), _generator(), batch_size=16, num_steps=5)
    assert windows.shortened and (windows.num_train, windows.num_val) == (20, 10)
    last = torch.cat([Y for _, Y in windows.validation()])[-1]
    assert last[-1] == 34  # the last character of the text is used, and none beyond
    with pytest.raises(InputError, match="expected at least 7 characters, got 6"):
        data.Windows(torch.arange(6), _generator(), batch_size=16, num_steps=5)


def test_sequential_streams_continue_from_batch_to_batch():
    sampler = data.Sequential(torch.arange(1000), _generator(), batch_size=4, num_steps=7)
    offsets = set()
    for _ in range(30):
        batches = list(sampler.train())
        offsets.add(int(batches[0][0][0, 0]))
        for X, Y in batches:
            assert X.shape == (4, 7)
            _follows(X, Y)
        for (_, before), (X, _) in itertools.pairwise(batches):
            assert torch.equal(before[:, -1], X[:, 0])
    assert sampler.carry_state and offsets <= set(range(7)) and len(offsets) > 3
    with pytest.raises(InputError, match="expected at least 35 characters, got 34"):
        data.Sequential(torch.arange(34), _generator(), batch_size=4, num_steps=7)
    for seed in range(20):  # the shortest text allowed has a batch, whatever the offset
        assert list(data.Sequential(torch.arange(35), _generator(seed), batch_size=4, num_steps=7).train())


def test_random_windows_visit_everything_once():
    sampler = data.RandomWindows(torch.arange(100), _generator(), batch_size=4, num_steps=7)
    batches = list(sampler.train())
    for X, Y in batches:
        _follows(X, Y)
    seen = torch.cat([X for X, _ in batches]).flatten().sort().values
    assert torch.equal(seen, torch.arange(int(seen[0]), int(seen[0]) + len(seen))) and seen[0] < 7
    assert len(seen) == (100 - int(seen[0]) - 1) // 7 * 7
    order = torch.cat([X for X, _ in batches])[:, 0]
    assert order.tolist() != order.sort().values.tolist() and not sampler.carry_state


def test_pieces_are_walked_in_chunks():
    sampler = data.Pieces(torch.arange(10_000), _generator())
    batches = list(sampler.train())
    assert [X.shape for X, _ in batches] == [(1, 64)] * 78 + [(1, 7)]
    assert torch.cat([X for X, _ in batches], 1)[0].diff().eq(1).all()
    for X, Y in batches:
        _follows(X, Y)
    starts = {int(next(iter(sampler.train()))[0][0, 0]) for _ in range(20)}
    assert len(starts) > 10 and max(starts) <= 5000
    short = data.Pieces(torch.arange(50), _generator())
    assert [X.shape[1] for X, _ in short.train()] == [49]


def test_consecutive_covers_the_text():
    batches = list(data.consecutive(torch.arange(100), 33))
    assert torch.cat([X for X, _ in batches], 1).tolist() == [list(range(99))]
    with pytest.raises(InputError, match="expected at least 2 characters, got 1"):
        list(data.consecutive(torch.arange(1), 33))


def test_batches_depend_on_the_seed_alone():
    def starts(seed: int) -> list[int]:
        sampler = data.Windows(
            torch.arange(300), _generator(seed), batch_size=16, num_steps=5, num_train=100, num_val=10
        )
        return torch.cat([X for X, _ in sampler.train()])[:, 0].tolist()

    assert starts(1) == starts(1) != starts(2)
