"""What a call costs before any kernel works, in counts, which a busy machine does not change."""

import json
import os
import subprocess
import sys

import needs
import pytest
import torch

from charrnn_fast.bench import host
from charrnn_fast.cli import main

# Python calls, ATen operations, launches: no more than these. torch.nn.RNN's backward is ATen's and has none of the
# first; what surrounds a backward pass in Python is torch's, some 20 of the calls.
MOST = {
    "native": {
        "forward, no_grad": (29, 6, 1),
        "forward": (25, 6, 1),
        "forward + backward": (60, 19, 2),
        "tokens, forward + backward": (58, 18, 2),
        "loss + backward": (88, 29, 1),
    },
    "triton": {
        "forward, no_grad": (26, 2, 1),
        "forward": (22, 2, 1),
        "forward + backward": (55, 18, 3),
        "tokens, forward + backward": (68, 24, 4),
        "loss + backward": (128, 26, 3),
    },
}


# In a process of its own without the interpreter, whose tiles are not a GPU's: the same counts on every machine.
COUNT = (
    "import dataclasses, json, sys; from charrnn_fast.bench import host; print(json.dumps("
    "[dataclasses.asdict(row) for row in host.rows_of(sys.argv[1], timed=False)]))"
)


@pytest.fixture(scope="module", params=MOST)
def rows(request):
    if request.param == "native":
        needs.native_kernels()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COUNT, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return request.param, [host.Row(**row) for row in json.loads(done.stdout)]


def test_no_call_gets_longer(rows):
    backend, found = rows
    counts = {row.name: (row.frames, row.operations, row.launches) for row in found}
    assert counts.keys() == MOST[backend].keys()
    longer = {
        name: (now, MOST[backend][name])
        for name, now in counts.items()
        if any(n > most for n, most in zip(now, MOST[backend][name], strict=True))
    }
    assert not longer, f"calls, operations and launches, now and at most: {longer}"


def test_a_forward_is_one_launch_four_files_from_the_door(rows):
    _, found = rows
    forward = next(row for row in found if row.name == "forward")
    assert (forward.launches, forward.files) == (1, 4)


@pytest.mark.parametrize("backend", MOST)
def test_the_stubs_are_taken_away_again(backend, device):
    if backend == "native":
        needs.native_kernels()
    host.rows_of(backend, timed=False)
    rnn = torch.nn.RNN(3, 4).to(device)
    ours = host.FusedRNN(3, 4, backend=backend).to(device)
    ours.load_state_dict(rnn.state_dict())
    x = torch.randn(5, 2, 3, device=device)
    torch.testing.assert_close(ours(x)[0], rnn(x)[0])


def test_times_are_ratios_of_one_run():
    add = host.adds_of(lambda: torch.add(torch.ones(4), 1))
    assert 1 < add < 20


def test_the_command_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(host, "adds_of", lambda call: 1.5)
    assert main(["bench", "--host"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["torch.nn.RNN", "forward,"] and "1.5" in lines[1]


def test_the_table_names_every_side():
    row = host.Row("forward", 12.3, 25, 2, 1, 4)
    lines = host.table({"torch.nn.RNN": [row], "native": [row]}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["torch.nn.RNN", "native"]
    assert "12.3" in lines[1] and "Python calls" in lines[0]
