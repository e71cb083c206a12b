"""What a call costs before any kernel works, and what a training step launches on a GPU: in counts, which no machine
changes.
"""

import json
import os
import subprocess
import sys
from typing import Any

import needs
import pytest
import torch

from charrnn_fast.bench import host, host_steps
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


# Launches of this library's kernels, ATen's operations that launch, Python calls: no more than these. Of ATen's there
# is a copy of the norm at once (a recorded step has it not), one for each second bias, whose gradient is the first
# one's, and for two layers the states put together and the products of the second one.
MOST_OF_A_STEP = {
    "one layer, SGD": (5, 0, 345),
    "one layer, evaluation": (2, 0, 140),
    "one layer, at once": (3, 1, 105),
    "one layer, replayed": (0, 2, 16),
    "one layer, one bias, SGD": (5, 0, 345),
    "learned embedding, SGD": (5, 3, 400),
    "two layers, SGD": (12, 6, 430),
    "two layers, evaluation": (5, 1, 150),
    "two layers, Adam": (12, 8, 470),
}


def _counted(found: str) -> list[dict[str, Any]]:
    """What an expression finds, in a process of its own without the interpreter, whose tiles are not a GPU's: the same
    counts on every machine.
    """
    code = (
        "import dataclasses, json; from charrnn_fast.bench import host, host_steps; "
        f"print(json.dumps([dataclasses.asdict(row) for row in {found}]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _no_longer(counts, most):
    assert counts.keys() == most.keys()
    longer = {
        name: (now, most[name])
        for name, now in counts.items()
        if any(n > limit for n, limit in zip(now, most[name], strict=True))
    }
    assert not longer, f"now and at most: {longer}"


@pytest.fixture(scope="module", params=MOST)
def rows(request):
    if request.param == "native":
        needs.native_kernels()
    return request.param, [host.Row(**row) for row in _counted(f"host.rows_of({request.param!r}, timed=False)")]


@pytest.fixture(scope="module")
def steps() -> dict[str, host_steps.Step]:
    return {row["name"]: host_steps.Step(**row) for row in _counted("host_steps.steps(timed=False)")}


def test_no_call_gets_longer(rows):
    backend, found = rows
    _no_longer({row.name: (row.frames, row.operations, row.launches) for row in found}, MOST[backend])


def test_no_step_gets_longer(steps):
    counts = {name: (len(step.launches), len(step.operations), step.frames) for name, step in steps.items()}
    _no_longer(counts, MOST_OF_A_STEP)


def test_a_step_has_no_casts_no_one_hot_rows_and_no_reductions_of_atens(steps):
    unwanted = {"scatter_", "eq", "sum", "mean", "linalg_vector_norm", "index", "index_select", "fill_", "zero_"}
    for step in steps.values():
        assert not set(step.operations) & unwanted, step
        assert step.operations.count("copy_") <= 3 and len(set(step.launches)) <= 10


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


def test_the_tables_name_every_side_and_every_launch():
    row = host.Row("forward", 12.3, 25, 2, 1, 4)
    lines = host.table({"torch.nn.RNN": [row], "native": [row]}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["torch.nn.RNN", "native"]
    assert "12.3" in lines[1] and "Python calls" in lines[0]
    lines = host_steps.table([host_steps.Step("a", ("windows_kernel",), ("copy_",), 3, 7.4)]).splitlines()
    assert lines[1].split() == ["a", "1", "1", "3", "7", "windows", "aten::copy_"]
