"""Checkpoints: what comes back is what was written; everything else is an error of one line."""

from dataclasses import replace

import pytest
import torch

from charrnn_fast.errors import InputError
from charrnn_fast.lm import checkpoint
from charrnn_fast.lm.data import Vocabulary
from charrnn_fast.lm.generation import generate
from charrnn_fast.lm.recipes import RECIPES, build_model, build_sampler
from charrnn_fast.lm.training import Trainer

VOCAB = Vocabulary.of("the quick brown fox jumps over the lazy dog " * 40, letters=True)
RECIPE = replace(RECIPES["scratch"], hidden_size=6, batch_size=64, epochs=1)


def _write(path, recipe=RECIPE, kind="fused"):
    sampler = build_sampler(recipe, VOCAB.encode("the quick brown fox jumps over the lazy dog " * 40), seed=0)
    trainer = Trainer(build_model(recipe, len(VOCAB), 0, kind=kind), epochs=1)
    trainer.fit(sampler)
    checkpoint.save(path, trainer, sampler, VOCAB, recipe, kind=kind, seed=0, source="a fox")
    return trainer, sampler


@pytest.mark.parametrize("kind", ["fused", "reference", "torch"])
@pytest.mark.parametrize("embedding", ["onehot", 5])
def test_model_and_vocabulary_come_back(tmp_path, kind, embedding):
    trainer, _ = _write(tmp_path / "a.ckpt", replace(RECIPE, embedding=embedding, num_layers=2), kind)
    written = checkpoint.load(tmp_path / "a.ckpt")
    assert (written.kind, written.source, written.epoch) == (kind, "a fox", 1)
    assert written.vocab.symbols == VOCAB.symbols and written.vocab.letters
    assert written.versions["torch"] == torch.__version__ and set(written.versions) == {
        "charrnn_fast",
        "torch",
        "python",
    }
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


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_cut_short(tmp_path, keep):
    path = tmp_path / "a.ckpt"
    _write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match="cut short or is another kind of file") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_other_files(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("not a checkpoint at all")
    with pytest.raises(InputError, match="another kind of file"):
        checkpoint.load(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="is not a charrnn_fast checkpoint"):
        checkpoint.load(path)
    _write(path)
    content = torch.load(path)
    torch.save({**content, "version": 99}, path)
    with pytest.raises(InputError, match="has checkpoint version 99: this charrnn_fast reads versions 1 to 3"):
        checkpoint.load(path)


def test_another_models_checkpoint(tmp_path):
    _write(tmp_path / "a.ckpt")
    written = checkpoint.load(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"is a checkpoint of another model: .*size mismatch"):
        written.restore(build_model(replace(RECIPE, hidden_size=7), len(VOCAB), 0))


def test_resume_with_other_settings(tmp_path):
    trainer, sampler = _write(tmp_path / "a.ckpt")
    written = checkpoint.load(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"by a run with other settings: lr 1\.0 there, 0\.5 now"):
        checkpoint.resume(written, trainer, sampler, replace(RECIPE, lr=0.5, epochs=9))


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
