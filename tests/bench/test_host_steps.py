"""What a general training step launches on a GPU, in counts, which no machine changes."""

import json
import os
import subprocess
import sys

import pytest

from charrnn_fast.bench import host_steps

# Launches of this library's kernels, ATen's operations that launch, Python calls: no more than these. Of ATen's there
# is a copy of the norm at once (a recorded step has it not), one for each second bias, whose gradient is the first
# one's, and for two layers the states put together and the products of the second one.
MOST = {
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
COUNT = (
    "import dataclasses, json; from charrnn_fast.bench import host_steps; "
    "print(json.dumps([dataclasses.asdict(step) for step in host_steps.steps(timed=False)]))"
)


@pytest.fixture(scope="module")
def steps() -> dict[str, host_steps.Step]:
    """In a process of its own without the interpreter, whose tiles are not a GPU's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COUNT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {found["name"]: host_steps.Step(**found) for found in json.loads(done.stdout)}


def test_no_step_gets_longer(steps):
    counts = {name: (len(step.launches), len(step.operations), step.frames) for name, step in steps.items()}
    assert counts.keys() == MOST.keys()
    longer = {
        name: (now, MOST[name])
        for name, now in counts.items()
        if any(n > most for n, most in zip(now, MOST[name], strict=True))
    }
    assert not longer, f"launches, operations and Python calls, now and at most: {longer}"


def test_a_step_has_no_casts_no_one_hot_rows_and_no_reductions_of_atens(steps):
    unwanted = {"scatter_", "eq", "sum", "mean", "linalg_vector_norm", "index", "index_select", "fill_", "zero_"}
    for step in steps.values():
        assert not set(step.operations) & unwanted, step
        assert step.operations.count("copy_") <= 3 and len(set(step.launches)) <= 10


def test_the_table_names_every_launch():
    lines = host_steps.table([host_steps.Step("a", ("windows_kernel",), ("copy_",), 3, 7.4)]).splitlines()
    assert lines[1].split() == ["a", "1", "1", "3", "7", "windows", "aten::copy_"]
