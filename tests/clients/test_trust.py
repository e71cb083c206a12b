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
from command_line import files, result

from charrnn_fast.lm import checkpoint, keeping
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.training import Trainer

HERE = Path(__file__).parent
FORMS = {
    "windows": "--recipe scratch --batch-size 256 --epochs 3",
    "carried state": "--recipe ch8 --batch-size 4 --num-steps 16 --epochs 3",
    "pieces with Adam": "--recipe santa --num-steps 400 --epochs 3",
    "dropout and cosine": "--recipe shakespeare --batch-size 4 --num-steps 32 --epochs 3",
}
TRAIN = {form: f"train --text book.txt --hidden-size 8 {options}" for form, options in FORMS.items()}
WINDOWS = TRAIN["windows"]
RESUME = "train --resume --out out"  # its own config.toml says what it was


def _lines(err) -> list[str]:
    """What was said, but that the text is short, which it is."""
    return [line for line in err.splitlines() if "the text is short" not in line]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["windows", "carried", "pieces"])
def test_killed_at_random_moments_and_resumed_to_the_same_bits(form, kills, tmp_path):
    command = [sys.executable, str(HERE / "killing.py"), form, str(kills), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
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
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_same_bits(form, number, here, says, monkeypatch):
    handler = signal.getsignal(number)
    says(f"{TRAIN[form]} --out straight")
    with monkeypatch.context() as patch:
        Raise(patch, 5, number)
        _, err = says(f"{TRAIN[form]} --out out", code=128 + number)
    name = signal.Signals(number).name
    assert f"{name}: stopped after step 5, saved in out/last.ckpt: --resume goes on from there" in err
    assert checkpoint.load(here / "out" / "last.ckpt").trainer["step"] == 5
    assert signal.getsignal(number) is handler
    assert "done, at step 5 in the next" in says(RESUME).out
    assert result(here / "out") == result(here / "straight")


def test_a_signal_without_a_folder_says_where_it_stopped(says, monkeypatch):
    Raise(monkeypatch, 2, signal.SIGINT)
    out, err = says("train --text book.txt --hidden-size 8 --epochs 2", code=130)
    assert "SIGINT: stopped after step 2" in err and "saved" not in err and "result" not in out


def test_a_second_signal_ends_at_once(here):
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
    command = [sys.executable, "-c", code, *f"{WINDOWS} --out out".split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        while process.stdout.readline() != b"step\n":
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM, "a shell reports 143"


def test_save_every_and_keep(here, says):
    says(f"{TRAIN['pieces with Adam']} --out out --save-every 5 --keep 3 --log log")
    lines = [json.loads(line) for line in (here / "log").read_text().splitlines()]
    written = [line["step"] for line in lines if line["event"] == "checkpoint"]
    last = checkpoint.load(here / "out" / "last.ckpt").trainer["step"]
    assert last >= 15 and {5, 13, last} <= set(written), "epochs of 8 steps are saved too"
    kept = keeping.kept(here / "out")
    assert [checkpoint.load(path).trainer["step"] for path in kept] == written[-3:]
    assert sorted(p.name for p in (here / "out").iterdir()) == sorted(
        ["best.ckpt", "config.toml", "curve.png", "history.json", "last.ckpt", *(p.name for p in kept)]
    )
    says(f"{WINDOWS} --out timed --save-every 0.001s --log log2")
    lines = [json.loads(line) for line in (here / "log2").read_text().splitlines()]
    assert sum(line["event"] == "checkpoint" for line in lines) > 10, "after every step"


def test_best_is_the_best_epochs(here, says):
    says(f"{WINDOWS} --out out --lr 20 --clip none --optimizer sgd --epochs 6 --batch-size 64")
    history = json.loads((here / "out" / "history.json").read_text())
    losses = [record["val_ppl"] for record in history]
    assert losses.index(min(losses)) < 5, "not the last, or the test says nothing"
    assert checkpoint.load(here / "out" / "best.ckpt").epoch == losses.index(min(losses)) + 1
    assert checkpoint.load(here / "out" / "last.ckpt").epoch == 6


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


def test_a_disk_that_is_full_keeps_the_last_checkpoint_and_training_goes_on(small_disk, says):
    if small_disk is None:
        pytest.skip("a small file system cannot be mounted here: the next test has the limit on a file's size")
    out, resume = small_disk / "run", f"train --resume --out {small_disk / 'run'} --epochs 6"
    says(f"{WINDOWS} --out {out}")
    before = (out / "last.ckpt").read_bytes()
    _fill(small_disk, 0)
    _, err = says(resume, code=2)
    assert err.count("No space left on device") == 1 and err.startswith("charrnn-fast: error: cannot write")
    (small_disk / "filling").unlink()
    _fill(small_disk, 8_000)  # enough for the configuration and too little for a checkpoint
    printed, err = says(resume, code=2)
    assert "epoch 6/6" in printed and "result" in printed, "training went on to its end"
    lines = _lines(err)
    assert [line for line in lines if "training goes on" in line] == lines[:1] and "No space left" in lines[0]
    assert lines[-1].startswith("charrnn-fast: error: ") and len(lines) == 2
    assert (out / "last.ckpt").read_bytes() == before and checkpoint.load(out / "last.ckpt").epoch == 3
    (small_disk / "filling").unlink()
    says(resume)
    assert checkpoint.load(out / "last.ckpt").epoch == 6


def test_a_file_that_may_not_grow_keeps_the_last_checkpoint(here):
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
    command = [sys.executable, "-c", code, *f"{WINDOWS} --out out".split()]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2 and "epoch 6/6" in done.stdout and "Traceback" not in done.stderr
    lines = _lines(done.stderr)
    assert len(lines) == 2 and "File too large; training goes on" in lines[0] and "error: cannot write" in lines[1]
    assert checkpoint.load(here / "out" / "last.ckpt").epoch == 3


@pytest.mark.parametrize("how", ["gone", "a file"])
@pytest.mark.parametrize("back", [True, False])
def test_a_folder_that_vanishes_in_a_run(how, back, here, says, monkeypatch):
    out, away = here / "out", here / "away"
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
    printed, err = says(f"{WINDOWS} --out out --epochs 5", code=0 if back else 2)
    assert seen == [1, 2, 3, 4, 5] and "epoch 5/5" in printed and "Traceback" not in err
    assert err.count("training goes on") == 1 and err.count("error:") == (0 if back else 1)
    assert ("can be written again: step" in err) == back
    assert checkpoint.load((out if back else away) / "last.ckpt").epoch == (5 if back else 1)


def test_a_read_only_folder_is_told_before_training(here, says):
    out = here / "out"
    says(f"{WINDOWS} --out out")
    before = files(out)
    mounted = subprocess.run(["mount", "--bind", str(out), str(out)], capture_output=True, check=False).returncode == 0
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(out)], check=True)
    else:
        out.chmod(0o500)
        if os.access(out, os.W_OK):
            pytest.skip("nothing is read-only for this user, and nothing can be mounted")
    try:
        printed, err = says(f"{RESUME} --epochs 6", code=2)
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=True)
        else:
            out.chmod(0o700)
    assert len(err.splitlines()) == 1 and "error: cannot write the configuration" in err and "epoch " not in printed
    assert files(out) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_ends_and_training_goes_on(says):
    _, err = says(f"{WINDOWS} --out out --log /dev/full")
    assert err.count("the log /dev/full ends here: No space left on device") == 1


def test_on_nan(here, says, monkeypatch):
    """From the command line: one line with the step, the last good checkpoint and what to try; or what was asked."""

    def poison(calls, original=CharRNN.loss):
        made = []

        def loss(self, X, Y, state=None):
            value, state = original(self, X, Y, state)
            if torch.is_grad_enabled():
                made.append(1)
            return (value * float("nan") if len(made) in calls else value), state

        monkeypatch.setattr(CharRNN, "loss", loss)

    poison({6})
    (line,) = _lines(says(f"{WINDOWS} --out out --save-every 4", code=2).err)
    assert "error: the training loss is nan at step 6 (epoch 1, batch 6), the gradient norm was" in line
    assert "--lr" in line and "--on-nan skip or restore" in line
    assert "out/last.ckpt keeps the last state that was saved" in line
    assert checkpoint.load(here / "out" / "last.ckpt").trainer["step"] == 4
    for choice, told in (("skip", "1 skipped"), ("restore", "back to step 4, with the learning rate times 0.5")):
        poison({6})
        printed, err = says(f"{WINDOWS} --out {choice} --save-every 4 --on-nan {choice}")
        assert told in printed + err
