"""Runs of the command line that are killed at random moments, in children of one process that has everything loaded:
python killing.py FORM KILLS FOLDER, with tests/ on its path, prints one JSON object of figures. Not a test itself.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  (loaded here once, not in every child)
import torch

torch.set_num_threads(1)  # a process with threads of its own must not fork
from command_line import TEXT, result  # noqa: E402

from charrnn_fast.cli import main  # noqa: E402
from charrnn_fast.lm import checkpoint  # noqa: E402

FORMS = {
    "windows": ["--recipe", "scratch", "--hidden-size", "16", "--batch-size", "64", "--epochs", "2"],
    "carried": ["--recipe", "ch8", "--hidden-size", "16", "--batch-size", "4", "--num-steps", "8", "--epochs", "2"],
    "pieces": ["--recipe", "santa", "--hidden-size", "16", "--num-steps", "32", "--epochs", "2"],
}


def child(arguments: list[str]) -> int:
    """Start the command line in a child with nothing to say; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            code = main(arguments)
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(form: str, kills: int, folder: Path) -> dict:
    book, rng = folder / "book.txt", random.Random(f"{form} {kills}")
    book.write_text(TEXT)
    train = ["train", "--text", str(book), *FORMS[form], "--save-every", "3", "--keep", "2"]
    start = time.monotonic()
    assert end_of(child([*train, "--out", str(folder / "straight")])) == 0
    duration = time.monotonic() - start
    expected, steps = result(folder / "straight")
    figures = {"form": form, "kills": 0, "resumed": 0, "in_an_epoch": 0, "runs": 0, "steps": steps, "different": 0}
    while figures["kills"] < kills or figures["runs"] == 0:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        while True:
            resume = ["--resume"] if (out / "last.ckpt").exists() else []
            if not resume:
                shutil.rmtree(out, ignore_errors=True)
            pid = child([*train, "--out", str(out), *resume])
            if figures["kills"] < kills:
                time.sleep(rng.uniform(0, duration / 2))
                os.kill(pid, signal.SIGKILL)
            code = end_of(pid)
            if code == 0:
                break
            if code == 2 and result(out) == (expected, steps):
                break  # it was killed after its last write
            assert code == -signal.SIGKILL, (form, code, resume)
            figures["kills"] += 1
            if (out / "last.ckpt").exists():
                written = checkpoint.load(out / "last.ckpt")  # whole at every moment, or this raises
                figures["resumed"] += 1
                figures["in_an_epoch"] += written.trainer["epoch"] is not None
        figures["runs"] += 1
        figures["different"] += result(out)[0] != expected
        assert not list(out.glob(".*.part")), "parts of killed writers are left"
    return figures


if __name__ == "__main__":
    print(json.dumps(killed(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
