"""A long run can be killed, stopped, and robbed of its disk: what it had is there, and it goes on to the same bits."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import malformed
import pytest
import torch

from charrnn_fast.cli import main
from charrnn_fast.lm import checkpoint, keeping
from charrnn_fast.lm.training import Trainer

HERE = Path(__file__).parent
TEXT = "It was the best of times, it was the worst of times; it was the age of wisdom, it was the age of folly. " * 30
FORMS = {
    "windows": ["--recipe", "scratch", "--batch-size", "256", "--epochs", "3"],
    "carried state": ["--recipe", "ch8", "--batch-size", "4", "--num-steps", "16", "--epochs", "3"],
    "pieces with Adam": ["--recipe", "santa", "--num-steps", "400", "--epochs", "3"],
    "dropout and cosine": ["--recipe", "shakespeare", "--batch-size", "4", "--num-steps", "32", "--epochs", "3"],
}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def _train(form, book, out, *more):
    return ["train", "--text", str(book), "--hidden-size", "8", *FORMS[form], "--out", str(out), *map(str, more)]


def _result(folder) -> str:
    written = checkpoint.load(folder / "last.ckpt")
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in written.trainer["history"]]
    return checkpoint.digest(
        {"parameters": dict(written.parameters), "optimizer": written.trainer["optimizer"], "history": history}
    )


def _lines(err) -> list[str]:
    """What was said, but that the text is short, which it is."""
    return [line for line in err.splitlines() if "the text is short" not in line]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["windows", "carried", "pieces"])
def test_killed_at_random_moments_and_resumed_to_the_same_bits(form, kills, tmp_path):
    command = [sys.executable, str(HERE / "killing.py"), form, str(kills), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    malformed.count(f"SIGKILLs of a run of {form}, resumed to the same bits", figures["kills"])
    assert figures["different"] == 0 and figures["kills"] >= kills
    assert kills < 50 or (figures["resumed"] > 15 and figures["in_an_epoch"] > 3), figures


class Raise:
    """Sends this process a signal in the middle of a chosen step."""

    def __init__(self, monkeypatch, step, number):
        def stepping(trainer, so_far, plain, original=Trainer._after_update):
            if trainer.step + 1 == step:
                signal.raise_signal(number)
            return original(trainer, so_far, plain)

        monkeypatch.setattr(Trainer, "_after_update", stepping)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("form", FORMS)
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_same_bits(
    form, number, book, tmp_path, capsys, monkeypatch
):
    handler = signal.getsignal(number)
    assert main(_train(form, book, tmp_path / "straight")) == 0
    with monkeypatch.context() as patch:
        Raise(patch, 5, number)
        assert main(_train(form, book, tmp_path / "run")) == 128 + number
    err = capsys.readouterr().err
    name = signal.Signals(number).name
    assert (
        f"{name}: stopped after step 5, saved in {tmp_path / 'run' / 'last.ckpt'}: --resume goes on from there" in err
    )
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").trainer["step"] == 5
    assert signal.getsignal(number) is handler
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0, "its own config.toml says what it was"
    assert "done, at step 5 in the next" in capsys.readouterr().out
    assert _result(tmp_path / "run") == _result(tmp_path / "straight")


def test_a_signal_without_a_folder_says_where_it_stopped(book, capsys, monkeypatch):
    Raise(monkeypatch, 2, signal.SIGINT)
    assert main(["train", "--text", str(book), "--hidden-size", "8", "--epochs", "2"]) == 130
    out, err = capsys.readouterr()
    assert "SIGINT: stopped after step 2" in err and "saved" not in err and "result" not in out


def test_a_second_signal_ends_at_once(book, tmp_path):
    """In a process of its own, whose steps take longer than the test waits."""
    code = (
        "import sys, time, torch; from charrnn_fast.lm.model import CharRNN; loss = CharRNN.loss\n"
        "def slow(*a):\n    print('step', flush=True); time.sleep(0.01)\n"
        "    while not done: pass\n"
        "    return loss(*a)\n"
        "done = []\n"
        "CharRNN.loss = slow\n"
        "from charrnn_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *_train("windows", book, tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()) as process:
        while process.stdout.readline() != b"step\n":
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM, "a shell reports 143"


def test_save_every_and_keep(book, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        main(_train("pieces with Adam", book, out, "--save-every", "5", "--keep", "3", "--log", tmp_path / "log")) == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    written = [line["step"] for line in lines if line["event"] == "checkpoint"]
    last = checkpoint.load(out / "last.ckpt").trainer["step"]
    assert last >= 15 and {5, 13, last} <= set(written), "epochs of 8 steps are saved too"
    kept = keeping.kept(out)
    assert [checkpoint.load(path).trainer["step"] for path in kept] == written[-3:]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["best.ckpt", "config.toml", "curve.png", "history.json", "last.ckpt", *(p.name for p in kept)]
    )
    assert main(_train("windows", book, tmp_path / "timed", "--save-every", "0.001s", "--log", tmp_path / "log2")) == 0
    lines = [json.loads(line) for line in (tmp_path / "log2").read_text().splitlines()]
    assert sum(line["event"] == "checkpoint" for line in lines) > 10, "after every step"


def test_best_is_the_best_epochs(book, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--lr", "20", "--clip", "none", "--optimizer", "sgd", "--epochs", "6", "--batch-size", "64"]
    assert main([*_train("windows", book, out), *arguments]) == 0
    history = json.loads((out / "history.json").read_text())
    losses = [record["val_ppl"] for record in history]
    assert losses.index(min(losses)) < 5, "not the last, or the test says nothing"
    assert checkpoint.load(out / "best.ckpt").epoch == losses.index(min(losses)) + 1
    assert checkpoint.load(out / "last.ckpt").epoch == 6


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KB, where one may be mounted; else None."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        yield None
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _fill(place, leave):
    """Take a disk's space but for some bytes."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / "filling").write_bytes(bytes(max(0, free - leave)))


def test_a_disk_that_is_full_keeps_the_last_checkpoint_and_training_goes_on(small_disk, book, tmp_path, capsys):
    if small_disk is None:
        pytest.skip("a small file system cannot be mounted here: the next test has the limit on a file's size")
    out = small_disk / "run"
    assert main(_train("windows", book, out)) == 0
    before = (out / "last.ckpt").read_bytes()
    _fill(small_disk, 0)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out), "--epochs", "6"]) == 2
    _, err = capsys.readouterr()
    assert err.count("No space left on device") == 1 and err.startswith("charrnn-fast: error: cannot write")
    (small_disk / "filling").unlink()
    _fill(small_disk, 8_000)  # enough for the configuration and too little for a checkpoint
    assert main(["train", "--resume", "--out", str(out), "--epochs", "6"]) == 2
    printed, err = capsys.readouterr()
    assert "epoch 6/6" in printed and "result" in printed, "training went on to its end"
    lines = _lines(err)
    assert [line for line in lines if "training goes on" in line] == lines[:1] and "No space left" in lines[0]
    assert lines[-1].startswith("charrnn-fast: error: ") and len(lines) == 2
    assert (out / "last.ckpt").read_bytes() == before and checkpoint.load(out / "last.ckpt").epoch == 3
    (small_disk / "filling").unlink()
    assert main(["train", "--resume", "--out", str(out), "--epochs", "6"]) == 0
    assert checkpoint.load(out / "last.ckpt").epoch == 6


def test_a_file_that_may_not_grow_keeps_the_last_checkpoint(book, tmp_path):
    """The limit on a file's size stands for a full disk where none can be mounted."""
    code = (
        "import resource, signal, sys; from charrnn_fast.cli import main\n"
        "run = sys.argv[1:]\n"
        "assert main(run) == 0\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "sys.exit(main([*run, '--resume', '--epochs', '6']))"
    )
    assert hasattr(resource, "RLIMIT_FSIZE")
    command = [sys.executable, "-c", code, *_train("windows", book, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 2 and "epoch 6/6" in done.stdout and "Traceback" not in done.stderr
    lines = _lines(done.stderr)
    assert len(lines) == 2 and "File too large; training goes on" in lines[0] and "error: cannot write" in lines[1]
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").epoch == 3


@pytest.mark.parametrize("how", ["gone", "a file"])
@pytest.mark.parametrize("back", [True, False])
def test_a_folder_that_vanishes_in_a_run(how, back, book, tmp_path, capsys, monkeypatch):
    out, away = tmp_path / "run", tmp_path / "away"
    seen = []

    def on_epoch(self, trainer, record, original=keeping.Keeper.on_epoch):
        if record.epoch == 2:
            out.rename(away)
            if how == "a file":
                out.write_text("in the way")
        if record.epoch == 4 and back:
            if how == "a file":
                out.unlink()
            away.rename(out)
        seen.append(record.epoch)
        original(self, trainer, record)

    monkeypatch.setattr(keeping.Keeper, "on_epoch", on_epoch)
    assert main([*_train("windows", book, out), "--epochs", "5"]) == (0 if back else 2)
    printed, err = capsys.readouterr()
    assert seen == [1, 2, 3, 4, 5] and "epoch 5/5" in printed and "Traceback" not in err
    assert err.count("training goes on") == 1 and err.count("error:") == (0 if back else 1)
    assert ("can be written again: step" in err) == back
    assert checkpoint.load((out if back else away) / "last.ckpt").epoch == (5 if back else 1)


def test_a_read_only_folder_is_told_before_training(book, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(_train("windows", book, out)) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    mounted = subprocess.run(["mount", "--bind", str(out), str(out)], capture_output=True, check=False).returncode == 0
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(out)], check=True)
    else:
        out.chmod(0o500)
        if os.access(out, os.W_OK):
            pytest.skip("nothing is read-only for this user, and nothing can be mounted")
    try:
        assert main(["train", "--resume", "--out", str(out), "--epochs", "6"]) == 2
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=True)
        else:
            out.chmod(0o700)
    printed, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "error: cannot write the configuration" in err and "epoch " not in printed
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_log_that_cannot_be_written_ends_and_training_goes_on(book, tmp_path, capsys):
    assert main(["train", "--text", str(book), "--hidden-size", "8", "--log", str(tmp_path / "no" / "log")]) == 2
    assert "error: cannot write the log" in capsys.readouterr().err
    if Path("/dev/full").exists():
        assert main([*_train("windows", book, tmp_path / "run"), "--log", "/dev/full"]) == 0
        assert capsys.readouterr().err.count("the log /dev/full ends here: No space left on device") == 1


def test_on_nan(book, tmp_path, capsys, monkeypatch):
    """From the command line: one line with the step, the last good checkpoint and what to try; or what was asked."""
    from charrnn_fast.lm.model import CharRNN

    def poison(calls, original=CharRNN.loss):
        made = []

        def loss(self, X, Y, state=None):
            value, state = original(self, X, Y, state)
            if torch.is_grad_enabled():
                made.append(1)
            return (value * float("nan") if len(made) in calls else value), state

        monkeypatch.setattr(CharRNN, "loss", loss)

    out = tmp_path / "run"
    poison({6})
    assert main(_train("windows", book, out, "--save-every", "4")) == 2
    (line,) = _lines(capsys.readouterr().err)
    assert "error: the training loss is nan at step 6 (epoch 1, batch 6), the gradient norm was" in line
    assert "--lr" in line and "--on-nan skip or restore" in line
    assert f"{out / 'last.ckpt'} keeps the last state that was saved" in line
    assert checkpoint.load(out / "last.ckpt").trainer["step"] == 4
    for choice, told in (("skip", "1 skipped"), ("restore", "back to step 4, with the learning rate times 0.5")):
        poison({6})
        assert main(_train("windows", book, tmp_path / choice, "--save-every", "4", "--on-nan", choice)) == 0
        printed, err = capsys.readouterr()
        assert told in printed + err
