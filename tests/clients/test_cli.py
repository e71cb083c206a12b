"""The command line as a user meets it: lines, JSON, files, and every error of the table with its message and exit
code.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from charrnn_fast.cli import main
from charrnn_fast.kernels import native
from charrnn_fast.lm import capture, checkpoint, recordings

TEXT = (
    "It was the best of times, it was the worst of times; it was the age of wisdom, it was the age of foolishness. "
    * 30
)
SMALL = ["--hidden-size", "8", "--epochs", "2"]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(tmp_path, book, capsys):
    """A trained run's folder."""
    assert main(["train", "--text", str(book), "--out", str(tmp_path / "run"), *SMALL]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def _fails(capsys, arguments, *parts):
    """The command exits with code 2 and one line on standard error that holds the parts; no traceback."""
    assert main([str(a) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("charrnn-fast: error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("model", ["fused", "reference", "torch"])
@pytest.mark.parametrize("recipe", ["scratch", "concise", "ch8", "santa"])
def test_train_prints_lines_and_json(book, capsys, recipe, model):
    arguments = ["train", "--recipe", recipe, "--model", model, "--text", str(book), "--seed", "3", "--json", *SMALL]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
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
    assert abs(len(result["text"].splitlines()[0]) - expected) <= 2  # santa's prompt loses letters that this text lacks
    assert "\r" not in err, "a progress bar where standard error is not a terminal"


def test_models_of_a_recipe_print_the_same_perplexity(book, capsys):
    results = []
    for model in ("fused", "reference", "torch"):
        assert main(["train", "--recipe", "concise", "--model", model, "--text", str(book), "--json", *SMALL]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1])["val_ppl"])
    assert results == pytest.approx([results[0]] * 3, rel=1e-5)


def test_capture(book, capsys, monkeypatch):
    train = ["train", "--text", str(book), *SMALL]
    assert main([*train, "--capture", "off"]) == 0
    assert "steps   not captured: it was turned off" in capsys.readouterr().out
    _fails(capsys, [*train, "--model", "reference", "--capture", "on"], "cannot be captured: the reference model")
    if not torch.cuda.is_available():
        _fails(capsys, [*train, "--capture", "on"], "cannot be captured: a CUDA graph needs a CUDA or ROCm device")
    monkeypatch.setattr(capture, "why_not_on", lambda device: None)
    monkeypatch.setattr(recordings, "CudaGraphRecorder", _NothingIsRecorded)
    assert main(train) == 0
    out, err = capsys.readouterr()
    assert "steps   captured as CUDA graphs" in out
    assert err.count("charrnn-fast: steps are not captured: recording a step raised RuntimeError: no memory") == 1
    _fails(capsys, [*train, "--capture", "on"], "a training step cannot be captured: ", "no memory")


class _NothingIsRecorded:
    """A recorder on which training steps run, and cannot be recorded."""

    def __init__(self, device):
        pass

    def run(self, work):
        return work()

    def record(self, work):
        raise RuntimeError("no memory")


def test_files_of_a_run(run):
    assert sorted(p.name for p in run.iterdir()) == [
        "best.ckpt",
        "config.toml",
        "curve.png",
        "history.json",
        "last.ckpt",
    ]
    history = json.loads((run / "history.json").read_text())
    assert [record["epoch"] for record in history] == [1, 2]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_resume(run, book, capsys):
    train = ["train", "--text", str(book), "--out", str(run), "--hidden-size", "8"]
    before = (run / "last.ckpt").read_bytes()
    _fails(capsys, [*train, "--epochs", "3"], "holds the last.ckpt of an earlier run", "--resume")
    _fails(capsys, [*train, "--epochs", "2", "--resume"], "is at epoch 2 already: raise --epochs")
    _fails(
        capsys,
        [*train, "--epochs", "3", "--resume", "--seed", "7"],
        "was written by --model fused --seed 0",
        "--seed 7",
    )
    _fails(capsys, [*train, "--epochs", "3", "--resume", "--lr", "0.5"], "lr 1.0 there, 0.5 now")
    assert (run / "last.ckpt").read_bytes() == before
    assert main([*train, "--epochs", "3", "--resume"]) == 0
    assert "2 epochs done" in capsys.readouterr().out
    assert checkpoint.load(run / "last.ckpt").epoch == 3
    _fails(capsys, ["train", "--text", book, "--resume"], "name it with --out")


def test_variations(book, capsys):
    arguments = ["train", "--recipe", "ch8", "--text", str(book), *SMALL, "--no-detach-state", "2", "--layers", "2"]
    assert main([*arguments, "--nonlinearity", "relu", "--embedding", "5", "--clip", "none", "--lr", "0.1"]) == 0
    assert "2 layers of 8 relu units" in capsys.readouterr().out
    assert main(["train", "--recipe", "ch8", "--sampler", "random", "--text", str(book), *SMALL]) == 0


def test_generate(run, capsys):
    assert main(["generate", str(run), "--prompt", "it was", "--num-chars", "12"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("it was") and len(greedy) == 6 + 12 + 1
    sampled = []
    options = ["--temperature", "0.8", "--top-k", "5", "--alpha", "1.5", "--seed", "4"]
    for _ in range(2):
        assert main(["generate", str(run / "last.ckpt"), "--prompt", "it was", *options]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] and len(sampled[0]) == 6 + 50 + 1


def test_evaluate(run, book, capsys):
    assert main(["evaluate", str(run), "--text", str(book), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert 1 < result["ppl"] < 30 and f"perplexity {result['ppl']:.3f}" in lines[0]
    assert result["characters"] == len(checkpoint.load(run).vocab.prepare(TEXT))


def test_offline_without_books_trains_on_the_fallback(tmp_path, capsys, monkeypatch):
    import urllib.error

    from charrnn_fast.lm import corpora

    def no_network(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(corpora.urllib.request, "urlopen", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CHARRNN_DATA", raising=False)
    for recipe in ("scratch", "santa"):
        assert main(["train", "--recipe", recipe, "--epochs", "1", "--hidden-size", "8"]) == 0
        out, err = capsys.readouterr()
        assert "training on Python's language reference instead" in err and "CHARRNN_DATA" in err
        assert "pydoc_data" in out


def test_empty_text(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    _fails(capsys, ["train", "--text", tmp_path / "empty.txt"], "the text is empty")


def test_text_shorter_than_a_window(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("only this")
    _fails(capsys, ["train", "--text", tmp_path / "short.txt"], "too short for", "at least 34 characters, got 9")
    _fails(
        capsys,
        ["train", "--recipe", "ch8", "--text", tmp_path / "short.txt"],
        "at least 1155 characters, got 9; a smaller batch size",
    )


@pytest.mark.parametrize("recipe", ["scratch", "concise", "ch8", "santa", "shakespeare"])
def test_a_hundred_bytes_are_a_text(tmp_path, capsys, recipe):
    (tmp_path / "short.txt").write_text(TEXT[:100])
    train = ["train", "--recipe", recipe, "--text", str(tmp_path / "short.txt"), "--num-steps", "8", *SMALL]
    assert main([*train, "--batch-size", "2", "--max-chars", "none"]) == 0
    assert "100 characters" in capsys.readouterr().out or recipe in ("scratch", "concise", "ch8")


def test_missing_and_undecodable_text(tmp_path, capsys):
    _fails(capsys, ["train", "--text", tmp_path / "nowhere"], "cannot read the text", "No such file")
    (tmp_path / "latin.txt").write_bytes(TEXT.encode() + b"\xe9")
    _fails(capsys, ["train", "--text", tmp_path / "latin.txt"], f"byte 0xe9 at offset {len(TEXT)}", "--encoding")
    assert main(["train", "--text", str(tmp_path / "latin.txt"), "--encoding", "latin-1", *SMALL]) == 0
    assert main(["train", "--text", str(tmp_path / "latin.txt"), "--errors", "replace", *SMALL]) == 0
    assert "1 undecodable places were read as U+FFFD" in capsys.readouterr().err


def test_prompt_outside_the_vocabulary(tmp_path, book, capsys):
    out = tmp_path / "raw"
    assert main(["train", "--recipe", "santa", "--text", str(book), "--out", str(out), *SMALL]) == 0
    capsys.readouterr()
    _fails(capsys, ["generate", out, "--prompt", "Zürich"], "outside the model's vocabulary", "'Z'", "'ü'")
    _fails(capsys, ["generate", out, "--prompt", ""], "the prompt is empty")
    (tmp_path / "other.txt").write_text("¿Qué?")
    _fails(capsys, ["evaluate", out, "--text", tmp_path / "other.txt"], "outside the model's vocabulary")


def test_checkpoint_cut_short_or_of_something_else(run, capsys):
    content = (run / "last.ckpt").read_bytes()
    (run / "cut.ckpt").write_bytes(content[: len(content) // 2])
    _fails(
        capsys, ["generate", run / "cut.ckpt", "--prompt", "it"], "cut.ckpt cannot be read as a checkpoint", "cut short"
    )
    torch.save([1, 2], run / "list.ckpt")
    _fails(capsys, ["generate", run / "list.ckpt", "--prompt", "it"], "list.ckpt is not a charrnn_fast checkpoint")
    _fails(capsys, ["generate", run / "none.ckpt", "--prompt", "it"], "there is no checkpoint")


def test_checkpoint_of_another_model(run, book, capsys):
    """A file whose parameters are not those that its own description says."""
    content = torch.load(run / "last.ckpt")
    content["config"]["hidden_size"] = 9
    content["checksum"] = checkpoint.digest(content)
    torch.save(content, run / "other.ckpt")
    _fails(
        capsys, ["generate", run / "other.ckpt", "--prompt", "it"], "is a checkpoint of another model", "size mismatch"
    )
    arguments = ["train", "--text", book, "--out", run, "--resume", "--epochs", "3", "--hidden-size", "9"]
    _fails(capsys, arguments, "hidden_size 8 there, 9 now")


def test_loss_that_is_not_finite_keeps_what_was_written(run, book, capsys):
    content = torch.load(run / "last.ckpt")
    content["parameters"]["head.weight"][0, 0] = torch.inf
    content["checksum"] = checkpoint.digest(content)
    torch.save(content, run / "last.ckpt")
    before = (run / "last.ckpt").read_bytes()
    arguments = ["train", "--text", book, "--out", run, "--resume", "--epochs", "9", "--hidden-size", "8"]
    _fails(
        capsys,
        arguments,
        "the training loss is nan at step 7 (epoch 3, batch 1)",
        "learning rate",
        "last.ckpt keeps the last",
    )
    assert (run / "last.ckpt").read_bytes() == before


def test_unusable_device_and_backend(book, capsys, monkeypatch):
    _fails(capsys, ["train", "--text", book, "--device", "abacus"], "--device abacus cannot be used here")
    if not torch.cuda.is_available():
        _fails(capsys, ["train", "--text", book, "--device", "cuda"], "--device cuda cannot be used here")
    _fails(capsys, ["train", "--text", book, "--backend", "magic"], "'magic'", "'triton'", "'torch'")
    monkeypatch.setenv("CHARRNN_BACKEND", "magic")
    _fails(capsys, ["train", "--text", book], "CHARRNN_BACKEND is 'magic'")


def test_doctor_says_what_runs_and_why_the_others_do_not(capsys, monkeypatch):
    assert main(["doctor", "--device", "cpu", "--hidden-size", "32", "100000"]) == 0
    out = capsys.readouterr().out
    chosen = "native" if native.available() is None else "torch"
    assert f"torch {torch.__version__}" in out
    assert out.count("  training steps: not captured: a CUDA graph needs a CUDA or ROCm device\n") == 1
    assert f"  hidden size 32: {chosen}" in out and f"  hidden size 100000: {chosen}" in out
    assert out.count("    not triton: ") == 5  # of two hidden sizes, the decoder's, and two kinds of other operations
    assert f"  generate, hidden size 32, 100000: {chosen}\n" in out
    assert f"  linear_cross_entropy, language_model_loss, clip_grad_norm_: {chosen}\n" in out
    monkeypatch.setenv("CHARRNN_BACKEND", "magic")
    _fails(capsys, ["doctor"], "CHARRNN_BACKEND is 'magic'")
    _fails(capsys, ["doctor", "--device", "abacus"], "--device abacus cannot be used here")


def test_a_reader_that_stops_is_no_error():
    command = [sys.executable, "-u", "-m", "charrnn_fast", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_no_detach_state_limits(book, capsys):
    train = ["train", "--text", book, "--epochs", "1"]
    _fails(capsys, [*train, "--no-detach-state", "2"], "needs a sampler that carries the state", "windows")
    _fails(capsys, [*train, "--recipe", "ch8", "--no-detach-state", "17"], "at most 16 batches, got 17")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["train", "--recipe", "lstm"], "invalid choice: 'lstm'"),
        (["train", "--epochs", "0"], "must be at least 1, got 0"),
        (["train", "--epochs", "many"], "invalid whole number value: 'many'"),
        (["train", "--lr", "-1"], "must be a number above 0, got -1"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "must be at least 0 and at most inf, got -1"),
        (["evaluate", "x"], "--text"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("train", "generate", "evaluate", "doctor"):
        assert f"\n    {command} " in out


def test_interrupt(book, capsys, monkeypatch):
    from charrnn_fast.lm.training import Trainer

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert main(["train", "--text", str(book)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_module_and_script_run_the_same(book):
    environment = {**os.environ, "COLUMNS": "100"}
    module = subprocess.run(
        [sys.executable, "-m", "charrnn_fast", "train", "--text", str(book), *SMALL],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert module.returncode == 0 and "result  training perplexity" in module.stdout, module.stderr
    wrong = subprocess.run(
        [sys.executable, "-m", "charrnn_fast", "train", "--text", str(book) + "x"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_resume_compares_the_text_not_its_path(run, book, tmp_path, capsys):
    """Another text of as many symbols is refused before anything is written; the same one elsewhere goes on."""
    train = ["train", "--out", str(run), "--hidden-size", "8", "--epochs", "3", "--resume", "--text"]
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    _fails(capsys, [*train, tmp_path / "other.txt"], "was trained on another text", "SHA-256")
    (tmp_path / "letters.txt").write_text("raw text: " * 400)
    assert main(["train", "--recipe", "santa", "--text", str(book), "--out", str(tmp_path / "raw"), *SMALL]) == 0
    raw = ["train", "--recipe", "santa", "--out", tmp_path / "raw", "--hidden-size", "8", "--epochs", "3", "--resume"]
    capsys.readouterr()
    _fails(capsys, [*raw, "--text", tmp_path / "letters.txt"], "has another vocabulary")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    (tmp_path / "same.txt").write_bytes(book.read_bytes())
    assert main([*train, str(tmp_path / "same.txt")]) == 0
    _fails(capsys, ["train", "--text", book, "--out", tmp_path / "nowhere", "--resume"], "there is no checkpoint")
    assert not (tmp_path / "nowhere").exists()


def test_resume_of_a_checkpoint_without_a_hash_says_so(run, book, capsys):
    content = torch.load(run / "last.ckpt")
    del content["checksum"], content["text_sha256"]
    torch.save({**content, "version": 1}, run / "last.ckpt")
    train = ["train", "--text", str(book), "--out", str(run), "--hidden-size", "8", "--epochs", "3", "--resume"]
    assert main(train) == 0
    assert "keeps no hash of its text: only the vocabulary was compared" in capsys.readouterr().err


def test_a_terminal_that_lacks_the_letters_does_not_lose_the_run(tmp_path):
    (tmp_path / "zh.txt").write_text("\u9053\u53ef\u9053\u975e\u5e38\u9053\u3002" * 40, encoding="utf-8")
    command = [sys.executable, "-m", "charrnn_fast", "train", "--recipe", "santa", "--text", str(tmp_path / "zh.txt")]
    command += ["--out", str(tmp_path / "run"), "--hidden-size", "8", "--epochs", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"\\u" in done.stdout and checkpoint.load(tmp_path / "run").epoch == 2


def test_debug_shows_the_traceback(book):
    from charrnn_fast.errors import InputError

    with pytest.raises(InputError):
        main(["train", "--text", str(book) + "x", "--debug"])
