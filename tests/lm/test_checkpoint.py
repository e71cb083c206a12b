"""Checkpoints: what comes back is what was written; everything else is an error of one line."""

from dataclasses import replace

import pytest
import torch
from lm_problems import TEXT, VOCAB, start

from charrnn_fast.errors import InputError
from charrnn_fast.lm import checkpoint
from charrnn_fast.lm.generation import generate
from charrnn_fast.lm.recipes import RECIPES


def _write(path, kind="fused", **changes):
    recipe = replace(RECIPES["scratch"], hidden_size=6, batch_size=64, epochs=1, **changes)
    trainer, sampler = start(recipe, TEXT[:1_800], kind=kind)
    trainer.fit(sampler)
    checkpoint.save(path, trainer, sampler, VOCAB, recipe, kind=kind, seed=0, source="a fox")
    return trainer


@pytest.mark.parametrize("kind", ["fused", "reference", "torch"])
@pytest.mark.parametrize("embedding", ["onehot", 5])
def test_model_and_vocabulary_come_back(tmp_path, kind, embedding):
    trainer = _write(tmp_path / "a.ckpt", kind, embedding=embedding, num_layers=2)
    written = checkpoint.load(tmp_path / "a.ckpt")
    assert (written.kind, written.source, written.epoch) == (kind, "a fox", 1)
    assert written.vocab.symbols == VOCAB.symbols and written.vocab.letters
    assert written.versions["torch"] == torch.__version__
    assert set(written.versions) == {"charrnn_fast", "torch", "python"}
    model = written.build()
    assert generate(model, written.vocab, "the ", 30) == generate(trainer.model, VOCAB, "the ", 30)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_folder_stands_for_its_best(tmp_path):
    with pytest.raises(InputError, match=r"holds no checkpoint: expected best\.ckpt or last\.ckpt"):
        checkpoint.find(tmp_path)
    _write(tmp_path / checkpoint.LAST)
    assert checkpoint.find(tmp_path) == tmp_path / checkpoint.LAST
    _write(tmp_path / checkpoint.BEST)
    assert checkpoint.find(tmp_path) == tmp_path / checkpoint.BEST
    with pytest.raises(InputError, match=r"there is no checkpoint .*missing"):
        checkpoint.find(tmp_path / "missing")


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "a.ckpt"
    _write(path)
    whole = path.read_bytes()
    for share in (0.0, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        _refused(path, "cut short or is another kind of file")
    path.write_text("not a checkpoint at all")
    _refused(path, "cut short or is another kind of file")
    torch.save({"weights": torch.zeros(3)}, path)
    _refused(path, "is not a charrnn_fast checkpoint")
    path.write_bytes(whole)
    torch.save({**torch.load(path), "version": 99}, path)
    _refused(path, "has checkpoint version 99: this charrnn_fast reads versions 1 to 3")


def _refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    _write(path)
    before = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("charrnn_fast.lm.files.os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*No space left on device"):
        _write(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
