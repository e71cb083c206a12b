"""charrnn-fast train under torchrun: one line of output, one checkpoint, one end, whatever happens to a process."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from command_line import TEXT, result

from charrnn_fast.lm import checkpoint

if not (dist.is_available() and Path("/proc/self").exists()):  # where the workers of a torchrun are found
    pytest.skip("torch.distributed, or /proc, is not here", allow_module_level=True)

TRAIN = "--text book.txt --recipe ch8 --batch-size 4 --num-steps 16 --hidden-size 16 --save-every 20"
A_MINUTE = 60


@pytest.fixture(autouse=True)
def two_books(here):
    (here / "book.txt").write_text(2 * TEXT)


@contextmanager
def torchrun(line, restarts=0):
    """A run of two processes: torchrun's process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["--standalone", "-m", "charrnn_fast", "train", *line.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield agent
    finally:
        agent.terminate()
        agent.communicate()


def ended(agent, seconds=240):
    out, err = agent.communicate(timeout=seconds)
    return agent.returncode, out, err


def workers(agent):
    """The process ids of the ranks, in their order."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = {}
    for pid in children:
        with suppress(OSError):  # it has ended
            variables = dict(v.split(b"=", 1) for v in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if v)
            if b"RANK" in variables:
                ranks[int(variables[b"RANK"])] = int(pid)
    return [ranks[rank] for rank in sorted(ranks)]


def until(condition, agent, seconds=120):
    begun = time.monotonic()
    while not condition():
        assert agent.poll() is None, "".join(ended(agent)[1:])
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)


def steps(folder):
    return checkpoint.load(folder / "last.ckpt").trainer["step"] if (folder / "last.ckpt").exists() else 0


def test_two_processes_are_one_run(here, says):
    with torchrun(f"{TRAIN} --epochs 2 --out two --log-file log --json") as agent:
        code, said, err = ended(agent)
    assert code == 0, err
    assert len([line for line in said.splitlines() if line.startswith("epoch")]) == 2
    assert "run     2 processes, which share batches of 8 sequences" in said
    together = json.loads(said.splitlines()[-1])
    alone = json.loads(says(f"train {TRAIN} --batch-size 8 --epochs 2 --json").out.splitlines()[-1])
    assert together["train_ppl"] == pytest.approx(alone["train_ppl"], rel=1e-4)
    written = ["best.ckpt", "config.toml", "history.json", "last.ckpt"]
    assert sorted(p.name for p in (here / "two").iterdir() if p.suffix != ".png") == written
    assert "batch_size = 4" in (here / "two" / "config.toml").read_text()  # as it was written, for each process
    events = [json.loads(line)["event"] for line in (here / "log").read_text().splitlines()]
    assert events.count("epoch") == 2
    # One process goes on from there, with the whole batch.
    assert "2 epochs done" in says("train --out two --resume --text book.txt --batch-size 8 --epochs 3").out


def test_a_killed_process_ends_the_job_and_torchruns_restart_resumes(here):
    train, straight, out = f"{TRAIN} --epochs 24", here / "straight", here / "killed"
    with torchrun(f"{train} --out straight -q") as agent:
        assert ended(agent)[0] == 0
    with torchrun(f"{train} --out killed", restarts=1) as agent:
        until(lambda: steps(out) > 0, agent)
        first = workers(agent)
        os.kill(first[1], signal.SIGKILL)
        until(lambda: len(workers(agent)) == 2 and not set(workers(agent)) & set(first), agent)
        at = steps(out)
        until(lambda: steps(out) > at, agent)
        os.kill(workers(agent)[0], signal.SIGKILL)
        begun = time.monotonic()
        code, said, err = ended(agent)
        assert time.monotonic() - begun < A_MINUTE
    assert code != 0 and "rank 1: error: another process of this run has ended or cannot be reached" in err
    assert "resume  killed/last.ckpt: " in said
    assert 0 < steps(out) < steps(straight)  # it is whole, or this raises
    with torchrun(f"{train} --out killed --resume -q") as agent:
        assert ended(agent)[0] == 0
    assert result(out) == result(straight)


def test_a_signal_to_torchrun_saves_and_ends_all(here):
    with torchrun(f"{TRAIN} --epochs 4000 --out out") as agent:
        until(lambda: steps(here / "out") > 0, agent)
        agent.send_signal(signal.SIGTERM)
        code, _, err = ended(agent, A_MINUTE)
    assert code != 0
    (line,) = (line for line in err.splitlines() if "stopped after step" in line)
    assert f"SIGTERM: stopped after step {steps(here / 'out')}, saved in out/last.ckpt" in line


def test_what_several_processes_cannot_do_is_one_line():
    """More of it, without a torchrun, is in test_refused.py."""
    with torchrun(f"{TRAIN} --model reference") as agent:
        code, _, err = ended(agent)
    assert code != 0 and "rank 0: error: the reference model is trained by one process, got 2" in err
    assert "charrnn_fast/" not in err.split("torch.distributed.elastic")[0]  # no traceback of ours
