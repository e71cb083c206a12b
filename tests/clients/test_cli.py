"""charrnn-fast train as a user meets it: lines, JSON, files, runs that go on; and the command line as a program."""

import json
import os
import subprocess
import sys
import urllib.error

import pytest
import torch
from command_line import TEXT

from charrnn_fast.cli import main
from charrnn_fast.errors import InputError
from charrnn_fast.lm import capture, checkpoint, corpora, recordings
from charrnn_fast.lm.training import Trainer

SMALL = "--hidden-size 8 --epochs 2"
TRAIN = f"train --text book.txt {SMALL}"


@pytest.mark.parametrize("recipe", ["scratch", "concise", "ch8", "santa"])
def test_train_prints_lines_and_json(says, recipe):
    """The same perplexity by each model of a recipe."""
    results = []
    for model in ("fused", "reference", "torch"):
        out, err = says(f"{TRAIN} --recipe {recipe} --model {model} --seed 3 --json")
        lines = out.splitlines()
        assert lines[0].startswith("text    ") and lines[1].startswith(f"model   {model} (")
        assert lines[2].startswith("steps   not captured: ")
        unit = "iteration" if recipe == "santa" else "epoch"
        assert sum(line.startswith(unit) for line in lines) == 2
        result = json.loads(lines[-1])
        assert list(result) == [
            *("recipe", "model", "backend", "seed", "train_ppl", "val_ppl", "val_ppl_batch_mean"),
            *("tokens_per_s", "seconds", "text"),
        ]
        assert (result["recipe"], result["model"], result["seed"]) == (recipe, model, 3)
        assert 1 < result["train_ppl"] < 60 and result["tokens_per_s"] > 0 and result["seconds"] > 0
        has_validation = recipe in ("scratch", "concise")
        assert (result["val_ppl"] is not None) == (result["val_ppl_batch_mean"] is not None) == has_validation
        expected = {"scratch": 34, "concise": 34, "ch8": 64, "santa": 56}[recipe]
        assert abs(len(result["text"].splitlines()[0]) - expected) <= 2  # the text lacks letters of santa's prompt
        assert "\r" not in err, "a progress bar where standard error is not a terminal"
        results.append([result["train_ppl"], result["val_ppl"] or 0])
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


def test_capture(says, refused, monkeypatch):
    train = f"{TRAIN} --batch-size 256"  # of more steps than are run before one is recorded
    assert "steps   not captured: it was turned off" in says(f"{train} --capture off").out
    monkeypatch.setattr(capture, "why_not_on", lambda device: None)
    monkeypatch.setattr(recordings, "CudaGraphRecorder", _NothingIsRecorded)
    out, err = says(train)
    assert "steps   captured as CUDA graphs" in out
    assert err.count("charrnn-fast: steps are not captured: recording a step raised RuntimeError: no memory") == 1
    refused(f"{train} --capture on", "a training step cannot be captured: ", "no memory")


class _NothingIsRecorded:
    """A recorder on which training steps run, and cannot be recorded."""

    def __init__(self, device):
        pass

    def run(self, work):
        return work()

    def record(self, work):
        raise RuntimeError("no memory")


def test_files_of_a_run(here):
    names = ["best.ckpt", "config.toml", "curve.png", "history.json", "last.ckpt"]
    assert sorted(p.name for p in (here / "run").iterdir()) == names
    history = json.loads((here / "run" / "history.json").read_text())
    assert [record["epoch"] for record in history] == [1, 2]
    assert (here / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_resume_compares_the_text_not_its_path(here, says):
    (here / "book.txt").rename("same.txt")
    assert "2 epochs done" in says("train --text same.txt --out run --hidden-size 8 --epochs 3 --resume").out
    assert checkpoint.load(here / "run" / "last.ckpt").epoch == 3


def test_resume_of_a_checkpoint_without_a_hash_says_so(here, says):
    path = here / "run" / "last.ckpt"
    content = torch.load(path)
    del content["checksum"], content["text_sha256"]
    torch.save({**content, "version": 1}, path)
    _, err = says("train --text book.txt --out run --hidden-size 8 --epochs 3 --resume")
    assert "keeps no hash of its text: only the vocabulary was compared" in err


def test_variations(says):
    options = "--no-detach-state 2 --layers 2 --nonlinearity relu --embedding 5 --clip none --lr 0.1"
    assert "2 layers of 8 relu units" in says(f"{TRAIN} --recipe ch8 {options}").out
    says(f"{TRAIN} --recipe ch8 --sampler random")


def test_offline_without_books_trains_on_the_fallback(here, says, monkeypatch):
    def no_network(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(corpora.urllib.request, "urlopen", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    monkeypatch.delenv("CHARRNN_DATA", raising=False)
    for recipe in ("scratch", "santa"):
        out, err = says(f"train --recipe {recipe} --epochs 1 --hidden-size 8")
        assert "training on Python's language reference instead" in err and "CHARRNN_DATA" in err
        assert "pydoc_data" in out


@pytest.mark.parametrize("recipe", ["scratch", "concise", "ch8", "santa", "shakespeare"])
def test_a_hundred_bytes_are_a_text(here, says, recipe):
    (here / "short.txt").write_text(TEXT[:100])
    out, _ = says(f"{TRAIN} --recipe {recipe} --text short.txt --num-steps 8 --batch-size 2 --max-chars none")
    assert "100 characters" in out or recipe in ("scratch", "concise", "ch8")


def test_undecodable_text_in_another_encoding_or_replaced(here, says):
    (here / "latin.txt").write_bytes(TEXT.encode() + b"\xe9")
    says(f"{TRAIN} --text latin.txt --encoding latin-1")
    _, err = says(f"{TRAIN} --text latin.txt --errors replace")
    assert "1 undecodable places were read as U+FFFD" in err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("train", "generate", "evaluate", "doctor"):
        assert f"\n    {command} " in out


def test_interrupt(says, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert "interrupted" in says(TRAIN, code=130).err


def test_debug_shows_the_traceback():
    with pytest.raises(InputError):
        main(["train", "--text", "nowhere", "--debug"])


# ---- as a program ---------------------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-m", "charrnn_fast"]


def test_a_reader_that_stops_is_no_error():
    command = [sys.executable, "-u", "-m", "charrnn_fast", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_an_error_is_one_line_and_its_exit_code(here):
    environment = {**os.environ, "CHARRNN_ISA": "avx3", "CHARRNN_BACKEND": "avx3"}
    command = [*PROGRAM, "generate", "run", "--prompt", "it was"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done


def test_a_terminal_that_lacks_the_letters_does_not_lose_the_run(here):
    (here / "zh.txt").write_text("\u9053\u53ef\u9053\u975e\u5e38\u9053\u3002" * 40, encoding="utf-8")
    command = [*PROGRAM, *f"train --recipe santa --text zh.txt --out zh {SMALL}".split()]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, check=False)
    assert done.returncode == 0 and b"result  training perplexity" in done.stdout, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"\\u" in done.stdout and checkpoint.load(here / "zh").epoch == 2
